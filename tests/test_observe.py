"""Observe: whoever looks on at a run hears every moment once and in order, and none of them can fail it."""

import pytest

from brainseg import storage
from brainseg.errors import FailureLimitError, RunError
from brainseg.observe import FAILURES_TOLD, Ear, Onlookers
from brainseg.progress import FILE, Progress

BODY = {"run_id": "r", "attempt": 1}


def receipt(ok, failed=0):
    why = {"code": "CORRUPT", "stage": "decode", "message": "found rubbish"}
    seconds = {"seconds_decode": 1.0, "seconds_predict": 2.0, "seconds_finish": 0.5}
    return {"part": "p.parquet", "ok": ok, "failed": [{"scan_id": f"s{n}", **why} for n in range(failed)], **seconds}


def observed(run, receipts, error=None, check=lambda: None):
    """The events and ticks of an attempt with these receipts, which ends with this error."""
    events, ticks = [], []
    ear = Ear(tick=lambda p: ticks.append(p.done), note=events.append)
    with Onlookers(str(run), BODY, 10, ear, check) as onlookers:
        onlookers.see(Progress(10))
        for one in receipts:
            onlookers.part(one)
        if error is not None:
            raise error
    return events, ticks


def test_a_run_is_told_from_beginning_to_end(tmp_path):
    events, ticks = observed(tmp_path, [receipt(3), receipt(5, failed=2)])
    assert [e.event for e in events] == ["begun", "part_written", "part_written", "scan_failed", "scan_failed", "finished"]
    assert {e.run_id for e in events} == {"r"}
    assert [(e.scan_id, e.stage, e.code, e.level) for e in events if e.event == "scan_failed"] == [
        ("s0", "decode", "CORRUPT", "warning"),
        ("s1", "decode", "CORRUPT", "warning"),
    ]
    assert dict(events[-1].counts) | {"scans_per_s": 0, "left_s": 0} == {
        "done": 10,
        "ok": 8,
        "failed": 2,
        "total": 10,
        "scans_per_s": 0,
        "left_s": 0,
    }
    assert ticks == [3, 10]


def test_a_part_of_failures_does_not_flood_the_log(tmp_path):
    events, _ = observed(tmp_path, [receipt(0, failed=10**4)])
    failed = [e for e in events if e.event == "scan_failed"]
    assert len(failed) == FAILURES_TOLD + 1
    assert failed[-1].scan_id is None
    assert failed[-1].message.startswith(f"{10**4 - FAILURES_TOLD} more ")


@pytest.mark.parametrize(("error", "state"), [(RunError("damaged"), "failed"), (FailureLimitError("many"), "stopped")])
def test_how_it_ended_is_told_and_the_error_goes_its_way(tmp_path, error, state):
    events = []
    with pytest.raises(type(error)), Onlookers(str(tmp_path), BODY, 10, Ear(note=events.append)):
        raise error
    assert events[-1].event == state
    body = storage.read_json(f"{tmp_path}/{FILE}")
    assert (body["state"], body["total"], body["done"]) == (state, 10, 0)


def test_the_file_of_whoever_took_the_run_over_is_left_alone(tmp_path):
    def overtaken():
        raise RunError("another driver has taken over this run")

    def lose():
        with Onlookers(str(tmp_path), BODY, 10, Ear(), overtaken):
            raise RunError("lost it")

    with pytest.raises(RunError, match="lost it"):
        lose()
    assert storage.read_json(f"{tmp_path}/{FILE}")["state"] == "running"


def test_a_folder_that_takes_no_file_costs_a_warning_and_not_the_run(tmp_path):
    (tmp_path / "run").write_text("no folder")
    said = []
    with Onlookers(str(tmp_path / "run"), BODY, 10, Ear(said.append)) as onlookers:
        onlookers.see(Progress(10))
        onlookers.part(receipt(10))
    assert [line.split(":")[0] for line in said] == ["warning"]
