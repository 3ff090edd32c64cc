"""In flight: a scan over which processes die is found, however its block is cut; whoever only stood beside it is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import inflight
from brainseg.errors import ClusterError
from brainseg.inflight import MOST_STARTS, MOST_TRIES, Flight, left_behind, note_ready, note_start


class Died(BaseException):
    """A process died here: nothing that came after was done."""


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def notes(run):
    folder = Path(run, inflight.FOLDER)
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def process(run, scan_ids, poison=(), suspects=frozenset(), dies_after=None):
    """One process does one block: what becomes of each scan. It dies over a scan of `poison`, or after so many scans."""
    done = {}

    def touch(scan_id):
        if scan_id in poison or len(done) == dies_after:
            raise Died
        return "done"

    flight = Flight(run, "whole", scan_ids, suspects)
    if flight.begin():
        for s in scan_ids:
            done[s] = flight.alone(s, "decode", lambda s=s: touch(s), lambda: "given up")
    else:
        for s in scan_ids:
            done[s] = touch(s)
    flight.end()
    return done


def until_done(run, scan_ids, poison=(), suspects=frozenset()):
    """What Ray does: start a process again while it dies. Returns the outcome and the number of deaths."""
    for deaths in range(100):
        try:
            return process(run, scan_ids, poison, suspects), deaths
        except Died:
            continue
    raise AssertionError("for ever")


def test_a_block_that_nothing_happens_to_leaves_no_note(run):
    assert process(run, ["a", "b"]) == {"a": "done", "b": "done"}
    assert notes(run) == []


def test_it_costs_one_note_a_block(run):
    flight = Flight(run, "whole", [f"s{n}" for n in range(32)])
    assert not flight.begin()
    assert len(notes(run)) == 1
    flight.end()


def test_a_scan_that_kills_its_process_is_given_up_after_three_deaths_and_the_others_are_done(run):
    outcome, deaths = until_done(run, ["a", "b", "c"], poison={"b"})
    assert outcome == {"a": "done", "b": "given up", "c": "done"}
    assert deaths == 1 + MOST_TRIES
    assert notes(run) == []


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_exactly_the_guilty_are_given_up_at_a_bounded_price(tmp_path_factory, data):
    run = str(tmp_path_factory.mktemp("run"))
    scans = [f"s{n}" for n in range(data.draw(st.integers(1, 6)))]
    poison = set(data.draw(st.lists(st.sampled_from(scans), unique=True)))
    outcome, deaths = until_done(run, scans, poison)
    assert {s for s, how in outcome.items() if how == "given up"} == poison
    assert deaths <= 1 + MOST_TRIES * len(poison)
    assert notes(run) == []


def test_a_process_that_is_killed_by_chance_costs_nobody_a_place(run):
    scans = ["a", "b", "c", "d"]
    for place in (0, 2, 1, 3):
        with pytest.raises(Died):
            process(run, scans, dies_after=place)
    assert process(run, scans) == dict.fromkeys(scans, "done")
    assert notes(run) == []


def test_what_was_in_flight_when_the_driver_died_is_looked_at_by_the_next_one(run):
    with pytest.raises(Died):
        process(run, ["a", "b", "c"], poison={"b"})
    suspects = left_behind(run)
    assert suspects == {"a", "b", "c"}
    assert notes(run) == []
    outcome, deaths = until_done(run, ["b", "c", "x"], {"b"}, suspects)
    assert (outcome, deaths) == ({"b": "given up", "c": "done", "x": "done"}, MOST_TRIES)


def test_deaths_are_remembered_over_drivers(run):
    """A scan that takes the whole machine down each time: every command sees it once."""
    suspects: frozenset[str] = frozenset()
    for _ in range(1 + MOST_TRIES):
        with pytest.raises(Died):
            process(run, ["a", "b"], {"b"}, suspects)
        suspects = left_behind(run)
    assert process(run, ["b", "y"], {"b"}, suspects) == {"b": "given up", "y": "done"}


def test_stages_of_one_block_do_not_mistake_each_other_for_a_death(run):
    first = Flight(run, "decode", ["a"])
    assert not first.begin()
    assert not Flight(run, "predict", ["a"]).begin()


def test_a_torn_note_of_a_block_accuses_nobody(run):
    assert not Flight(run, "whole", ["a"]).begin()
    (note,) = Path(run, inflight.FOLDER).iterdir()
    note.write_bytes(b'{"scan')
    assert left_behind(run) == frozenset()


def test_hostile_ids_stay_inside_the_folder(run):
    hostile = ["../../x", "/etc/passwd", "a" * 300, "CON", "line\nfeed", "nul\0"]
    flight = Flight(run, "whole", hostile)
    flight.begin()
    for scan_id in hostile:
        with pytest.raises(Died):
            flight.alone(scan_id, "decode", lambda: (_ for _ in ()).throw(Died), lambda: None)
    assert len(notes(run)) == 1 + len(hostile)
    assert [p.name for p in Path(run).parent.iterdir()] == ["run"]
    assert json.loads(next(Path(run, inflight.FOLDER).glob("block-*")).read_text())["scan_ids"] == hostile


def test_an_actor_that_never_comes_up_is_an_error_and_one_that_does_may_die_for_ever(run):
    for _ in range(3 * MOST_STARTS):
        note_start(run, "actor-1")
        note_ready(run, "actor-1")
    for _ in range(MOST_STARTS):
        note_start(run, "actor-2")
    with pytest.raises(ClusterError, match=f"died {MOST_STARTS} times while it loaded the model"):
        note_start(run, "actor-2")
    note_start(run, "actor-1")
    assert left_behind(run) == frozenset()
    note_start(run, "actor-2")


def test_at_the_end_nothing_is_left(run):
    assert not Flight(run, "whole", ["a"]).begin()
    inflight.clear(run)
    assert notes(run) == []
    inflight.clear(run)
