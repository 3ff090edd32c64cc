"""The heartbeat: it knows where a training stands and what is left, and says so seldom enough."""

import time

import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg import heartbeat, storage
from brainseg.heartbeat import FILE, Heartbeat, Progress, leaving_word, read_progress


class Clock:
    """A clock that goes on only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def run_epochs(beat, clock, *, epochs, steps, step_s, validate_s, save_s):
    for epoch in range(epochs):
        beat.begin("train", epoch)
        for _ in range(steps):
            clock.wait(step_s)
            beat.step()
        beat.begin("validate", epoch)
        clock.wait(validate_s)
        beat.begin("checkpoint", epoch)
        clock.wait(save_s)


@FEW
@given(
    done=st.integers(1, 5),
    planned=st.integers(1, 12),
    steps=st.integers(1, 9),
    seconds=st.tuples(*[st.floats(0.5, 100)] * 3),
)
def test_at_an_even_pace_what_is_left_is_what_the_epochs_to_come_take(done, planned, steps, seconds):
    clock, epochs = Clock(), done + planned
    beat = Heartbeat("/nowhere", epochs, steps, writes=False, clock=clock)
    run_epochs(beat, clock, epochs=done, steps=steps, step_s=seconds[0], validate_s=seconds[1], save_s=seconds[2])
    beat.begin("train", done)
    expected = planned * (steps * seconds[0] + seconds[1] + seconds[2])
    assert abs(beat.now().left_s - expected) < 1e-6 * expected


def test_at_an_even_pace_nothing_that_happens_makes_it_longer():
    clock = Clock()
    beat = Heartbeat("/nowhere", 4, 3, writes=False, clock=clock)
    run_epochs(beat, clock, epochs=1, steps=3, step_s=2.0, validate_s=5.0, save_s=1.0)
    beat.begin("train", 1)
    left = [beat.now().left_s]
    for what in ("train", "train", "train", "validate", "checkpoint"):
        clock.wait({"train": 2.0, "validate": 5.0, "checkpoint": 1.0}[what])
        if what == "train":
            beat.step()
        else:
            beat.begin(what, 1)
        left.append(beat.now().left_s)
    assert left == sorted(left, reverse=True)


def test_each_part_of_an_epoch_is_timed_on_its_own():
    clock = Clock()
    beat = Heartbeat("/nowhere", 3, 4, writes=False, clock=clock)
    run_epochs(beat, clock, epochs=2, steps=4, step_s=2.0, validate_s=5.0, save_s=0.5)
    assert [beat.seconds(part) for part in ("train", "validate", "checkpoint")] == [8.0, 5.0, 0.5]


def test_steps_are_counted_within_their_epoch():
    beat = Heartbeat("/nowhere", 2, 3, writes=False)
    for epoch in range(2):
        beat.begin("train", epoch)
        beat.step()
        assert (beat.now().epoch, beat.now().step, beat.now().steps) == (epoch, 1, 3)


def test_nothing_is_guessed_before_the_first_step():
    assert Heartbeat("/nowhere", 2, 3, writes=False).now().left_s is None


def test_what_the_first_worker_writes_is_what_the_driver_reads(tmp_path):
    work = str(tmp_path)
    with Heartbeat(work, 5, 7, every_s=0.01) as beat:
        beat.begin("train", 2)
        beat.step()
        until = time.monotonic() + 20
        while ((found := read_progress(work)) is None or found.step != 1) and time.monotonic() < until:
            time.sleep(0.01)
    assert found is not None
    assert (found.phase, found.epoch, found.epochs, found.step, found.steps) == ("train", 2, 5, 1, 7)


@pytest.mark.parametrize(("error", "state"), [(RuntimeError, "failed"), (KeyboardInterrupt, "stopped")])
def test_a_training_that_broke_off_says_how_and_keeps_how_far_it_came(tmp_path, error, state):
    work = str(tmp_path)
    with Heartbeat(work, 5, 7, every_s=0.01) as beat:
        beat.begin("train", 2)
        until = time.monotonic() + 20
        while ((found := read_progress(work)) is None or found.epoch != 2) and time.monotonic() < until:
            time.sleep(0.01)
    body = storage.read_json(storage.join(work, FILE))
    assert body["state"] == "running"
    with pytest.raises(error), leaving_word(work):
        raise error
    after = storage.read_json(storage.join(work, FILE))
    assert after["state"] == state
    assert read_progress(work) == found
    assert after["written_at"] >= body["written_at"]


def test_a_training_that_ends_well_leaves_no_word(tmp_path):
    with leaving_word(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_other_workers_write_nothing(tmp_path):
    with Heartbeat(str(tmp_path), 5, 7, writes=False, every_s=0.01) as beat:
        beat.step()
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_what_is_no_heartbeat_is_silence(tmp_path):
    work = str(tmp_path)
    assert read_progress(work) is None
    for body in ({}, [], {"phase": "asleep", "epoch": 1, "epochs": 2, "step": 0, "steps": 1, "left_s": None}):
        storage.write_json(storage.join(work, FILE), body)
        assert read_progress(work) is None
    (tmp_path / FILE).write_text("{torn")
    assert read_progress(work) is None


def test_where_requests_are_paid_for_it_beats_seldom():
    assert heartbeat.interval_s("s3://bucket/work") >= 30
    assert heartbeat.interval_s("/disk/work") == 1


def test_a_line_says_what_goes_on_and_how_long_it_will():
    assert Progress("train", 1, 9, 4, 8, 600.0).line() == "training  10 min left"
    assert Progress("validate", 1, 9, 8, 8, None).line() == "validating"
    assert [heartbeat.in_words(s) for s in (0, 42, 600, 7260)] == ["1 s", "42 s", "10 min", "2 h 01 min"]
