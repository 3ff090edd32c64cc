"""Workers: what a process does with a block, and that it does not keep hold of what it is done with."""

import weakref

from factory import make_scan

from brainseg.stages import Work
from brainseg.workers import _predicted


def name_of(work):
    return work.row["scan_id"]


def test_no_scan_is_held_any_more_when_the_next_group_is_read(monkeypatch):
    """Memory would otherwise hold two groups at a time."""
    monkeypatch.setattr("brainseg.stages.VOXELS_TOGETHER", 1)  # each scan is a group by itself
    read, alive_then = [], []

    def works():
        for number in range(5):
            alive_then.append([ref() is not None for ref in read[:-1]])  # the last is what a group is begun with
            work = Work({"scan_id": str(number)}, make_scan((3, 16, 16), seed=number))
            read.append(weakref.ref(work.scan))
            yield work
            del work

    finished = list(map(name_of, _predicted(works(), list)))
    assert finished == ["0", "1", "2", "3", "4"]
    assert [any(each) for each in alive_then] == [False] * 5
    assert all(ref() is None for ref in read)
