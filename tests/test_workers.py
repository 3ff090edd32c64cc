"""Workers: what a process does with a block, and that it does not keep hold of what it is done with."""

import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from factory import make_scan
from slow_network import actor, block, late

from brainseg import inflight, stages
from brainseg.plan import BLOCKS_AT_ONCE
from brainseg.stages import Work
from brainseg.workers import _predicted, _unpacked


def name_of(work):
    return work.row["scan_id"]


def test_no_scan_is_held_any_more_when_the_next_one_is_read(monkeypatch):
    """Memory would otherwise hold two groups at a time, or a scan more than is segmented."""
    monkeypatch.setattr("brainseg.stages.VOXELS_TOGETHER", 1)  # each scan is a group by itself
    read, alive_then = [], []

    def works():
        for number in range(5):
            alive_then.append([ref() is not None for ref in read])
            work = Work({"scan_id": str(number)}, make_scan((3, 16, 16), seed=number))
            read.append(weakref.ref(work.scan))
            yield work
            del work

    finished = list(map(name_of, _predicted(works(), list)))
    assert finished == ["0", "1", "2", "3", "4"]
    assert [any(each) for each in alive_then] == [False] * 5
    assert all(ref() is None for ref in read)


@pytest.fixture
def forward(tmp_path, monkeypatch):
    """An actor with a slow network."""
    monkeypatch.setattr(stages, "VOXELS_TOGETHER", 1)
    return actor(str(tmp_path), 0.005)


class TestForward:
    def test_a_store_that_is_slow_does_not_keep_the_network_waiting(self, forward, monkeypatch):
        monkeypatch.setattr(inflight, "_create", late(inflight._create, 0.03))
        monkeypatch.setattr(inflight.storage, "delete", late(inflight.storage.delete, 0.03))
        blocks = [block(number) for number in range(12)]
        taken = {}
        for threads in (1, BLOCKS_AT_ONCE):
            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                answers = list(pool.map(forward, blocks))
            taken[threads] = time.perf_counter() - started
            assert [a["scan_id"].to_pylist() for a in answers] == [b["scan_id"].to_pylist() for b in blocks]
        assert taken[BLOCKS_AT_ONCE] < 0.7 * taken[1]
        assert forward.model.most == 1

    def test_what_comes_before_the_network_does_not_keep_it_waiting(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stages, "VOXELS_TOGETHER", 1)
        forward = actor(str(tmp_path), scan_s=0.02, before_s=0.02)
        started = time.perf_counter()
        with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
            list(pool.map(forward, [block(number) for number in range(9)]))
        assert time.perf_counter() - started < 0.75 * 36 * (0.02 + 0.02)
        assert forward.model.most == 1

    def test_what_was_decoded_goes_on_as_it_is(self, forward):
        given = block(0)
        answered = forward(given)
        assert answered["work"].chunks[0].buffers()[2].address == given["work"].chunks[0].buffers()[2].address
        assert [a.row["scan_id"] for a in _unpacked(answered)[1]] == given["scan_id"].to_pylist()
        for work in _unpacked(answered)[1]:
            assert work.prediction.label.shape == work.scan.grid.shape

    def test_what_is_touched_alone_has_the_process_to_itself(self, forward, tmp_path, monkeypatch):
        """Were two scans noted at once, the one would be blamed for what the other does."""
        noted, alone = [], inflight.Flight.alone

        def watched(self, scan_id, stage, call, give_up):
            def looked():
                noted.append(sorted(path.name for path in (tmp_path / "inflight").glob("predict-*")))
                return call()

            return alone(self, scan_id, stage, looked, give_up)

        monkeypatch.setattr(inflight.Flight, "alone", watched)
        forward.job.suspects = frozenset({"0-0", "1-0", "2-0"})
        with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
            list(pool.map(forward, [block(number) for number in range(3)]))
        assert [len(names) for names in noted] == [1] * 12
        assert forward.model.most == 1
        assert list((tmp_path / "inflight").iterdir()) == []
