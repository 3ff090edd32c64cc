"""Progress: what receipts add up to, and a file of it that is there, is true, costs little, and never fails the run."""

import json
import time

import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st
from object_stores import moto_store, s3

from brainseg import storage
from brainseg.errors import FailureLimitError, RunError
from brainseg.progress import FILE, Progress, ProgressFile, ended_as

ABOUT = {"run_id": "r", "attempt": 2}
SAME = ("done", "ok", "failed", "total", "failed_by_code")


def receipt(ok, codes=(), seconds=1.0):
    failed = [{"scan_id": f"s{n}", "code": code, "stage": "decode", "message": "m"} for n, code in enumerate(codes)]
    return {
        "part": "p.parquet",
        "ok": ok,
        "failed": failed,
        **{f"seconds_{s}": seconds for s in ("decode", "predict", "finish")},
    }


PARTS = st.lists(st.tuples(st.integers(0, 32), st.lists(st.sampled_from(["CORRUPT", "TIMEOUT"]), max_size=5)), max_size=8)


@FEW
@given(parts=PARTS, before=st.integers(0, 9), failed_before=st.integers(0, 9))
def test_every_scan_is_counted_once_and_every_failure_under_its_code(parts, before, failed_before):
    progress = Progress(1000, before + failed_before, failed_before)
    progress.codes["INTERNAL"] = failed_before
    for ok, codes in parts:
        progress.take(receipt(ok, codes))
    body = progress.to_json()
    assert body["done"] == body["ok"] + body["failed"] == before + failed_before + sum(ok + len(codes) for ok, codes in parts)
    assert sum(body["failed_by_code"].values()) == body["failed"]
    assert body["seconds"] == dict.fromkeys(("decode", "predict", "finish"), float(len(parts)))
    assert (body["left_s"] is None) == (not progress.ok + progress.failed)
    assert json.loads(json.dumps(body, allow_nan=False)) == body


def test_nothing_is_left_where_all_is_done():
    progress = Progress(3)
    progress.take(receipt(3))
    assert progress.left_s is None
    assert progress.line().startswith("3/3 scans, 0 failed, ")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "finished"),
        (FailureLimitError("too many"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(15), "stopped"),
        (RunError("x"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_how_a_run_ended_is_known_by_what_ended_it(error, state):
    assert ended_as(error) == state


def shown(run, *, every_s, ending, say=print):
    """A progress file that was opened, shown something, and closed; returns what stands there at the end."""
    file = ProgressFile(run, ABOUT, say, every_s=every_s)
    progress = Progress(10, before=1)
    file.show(progress)
    file.start()
    progress.take(receipt(4, ["CORRUPT"]))
    file.show(progress)
    file.close(ending)
    return storage.read_json(storage.join(run, FILE))


@pytest.mark.parametrize("ending", ["finished", "failed", "stopped"])
def test_the_last_word_is_how_it_ended_and_how_far_it_came(tmp_path, ending):
    body = shown(str(tmp_path), every_s=60, ending=ending)
    assert {**ABOUT, "state": ending}.items() <= body.items()
    assert [body[name] for name in SAME] == [6, 5, 1, 10, {"CORRUPT": 1}]
    assert body["written_at"].endswith("Z")
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_run_that_is_somebody_elses_by_now_gets_no_last_word(tmp_path):
    assert shown(str(tmp_path), every_s=60, ending=None)["state"] == "running"


def test_it_shows_that_the_driver_lives_although_nothing_happens(tmp_path):
    file = ProgressFile(str(tmp_path), ABOUT, print, every_s=0.02)
    file.show(Progress(3))
    file.start()
    seen, until = set(), time.monotonic() + 20
    while len(seen) < 3 and time.monotonic() < until:
        if (tmp_path / FILE).exists():
            seen.add(storage.read_json(str(tmp_path / FILE))["written_at"])
    file.close("finished")
    assert len(seen) == 3


def test_on_a_store_a_thousand_parts_cost_two_requests():
    sent = []
    with moto_store() as place:
        s3().meta.events.register("before-send.s3", lambda **_: sent.append(1))
        file, progress = ProgressFile(place, ABOUT, print), Progress(1000)
        file.show(progress)
        file.start()
        for _ in range(1000):
            progress.take(receipt(1))
            file.show(progress)
        file.close("finished")
        assert len(sent) == 2
        assert storage.read_json(f"{place}/{FILE}")["done"] == 1000


def test_a_place_that_takes_nothing_is_one_warning_and_no_error(tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    said = []
    file = ProgressFile(str(tmp_path / "run"), ABOUT, said.append, every_s=0.01)
    file.show(Progress(3))
    file.start()
    time.sleep(0.1)
    file.close("finished")
    assert len(said) == 1
    assert said[0].startswith(f"warning: {FILE} could not be written; the run goes on without it (")
