"""Ahead: the files of the next scans come in beforehand, no further than told, and no scan depends on it."""

import time
import weakref
from collections import defaultdict
from threading import Event

import numpy as np
import pytest
from factory import make_row, make_scan, write_scan

from brainseg import ahead, storage
from brainseg.ahead import AT_ONCE, LARGEST_BYTES, MOST_BYTES, bytes_of, fetched
from brainseg.errors import Code, ScanError
from brainseg.scans import load_scan
from brainseg.workers import _decoded

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def own_fetchers(monkeypatch):
    """Threads of this test's own: what hangs in them is nobody else's affair."""
    fetchers = ahead._Fetchers(AT_ONCE)
    monkeypatch.setattr(ahead, "_fetchers", lambda: fetchers)


@pytest.fixture
def reads(monkeypatch):
    """How often each place was read; nothing is really there."""
    seen = defaultdict(int)

    def read(uri):
        seen[uri] += 1
        return uri.encode()

    monkeypatch.setattr(storage, "read_bytes", read)
    return seen


def bare_rows(count, size_bytes=1000, files=2):
    def file(scan, number):
        return {"uri": f"/{scan}/{number}", "role": "image", "modality": f"m{number}", "index": None, "size_bytes": size_bytes}

    return [make_row(f"s{n}", sources=[file(f"s{n}", number) for number in range(files)]) for n in range(count)]


def eventually(reads, rows, count):
    """Whether the files of the first `count` rows come to be read, and of no others after a while."""
    expected, deadline = places(rows[:count]), time.monotonic() + PATIENCE_S
    while not expected <= set(reads) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    return set(reads) & places(rows) == expected  # an earlier test's threads may still be at a file of its own


def places(rows):
    return {source["uri"] for row in rows for source in row["sources"]}


def test_scans_are_what_they_are_without_it(tmp_path):
    rows = [write_scan(tmp_path, make_scan((4, 16, 16), seed=n, name=f"s{n}")) for n in range(5)]
    for row, coming in zip(rows, fetched(rows, with_label=True), strict=True):
        alone, scan = load_scan(row), load_scan(coming)
        assert scan.scan_id == alone.scan_id == row["scan_id"]
        assert np.array_equal(scan.image, alone.image)
        assert np.array_equal(scan.label, alone.label)


def test_large_scans_are_fetched_one_ahead_and_each_file_once(reads):
    rows = bare_rows(4, MOST_BYTES // 4 + 1)
    coming = fetched(rows, with_label=True)
    for n in range(4):
        row = next(coming)
        assert eventually(reads, rows, min(n + 2, 4))
        assert [bytes_of(source) for source in row["sources"]] == [f"/s{n}/0".encode(), f"/s{n}/1".encode()]
    assert next(coming, None) is None
    assert {reads[place] for place in places(rows)} == {1}


def test_small_scans_are_fetched_many_ahead_and_those_of_unknown_size_are_not(reads):
    rows = bare_rows(9)
    next(fetched(rows, with_label=True))
    assert eventually(reads, rows, 9)
    reads.clear()
    next(fetched(bare_rows(9, size_bytes=None), with_label=True))
    assert eventually(reads, rows, 2)


def test_what_is_larger_than_may_be_held_or_known_to_be_unusable_is_left_to_its_turn(reads):
    large, unusable = bare_rows(1, LARGEST_BYTES)[0], bare_rows(1)[0] | {"problem_code": "MISSING_FILE"}
    assert list(fetched([large, unusable], with_label=True)) == [large, unusable]
    assert not set(reads) & places([large, unusable])


def test_a_label_that_nobody_wants_is_not_fetched(tmp_path):
    row = write_scan(tmp_path, make_scan((3, 16, 16)))
    for with_label in (False, True):
        (coming,) = fetched([row], with_label=with_label)
        assert {s["role"] for s in coming["sources"] if "fetched" in s} == ({"image", "label"} if with_label else {"image"})


def test_a_file_that_is_gone_fails_its_own_scan_in_the_same_words(tmp_path):
    rows = [write_scan(tmp_path, make_scan((3, 16, 16), seed=n, name=f"s{n}")) for n in range(3)]
    (tmp_path / "s1-t1c.nii.gz").unlink()
    first, second, third = fetched(rows, with_label=True)
    with pytest.raises(ScanError) as alone:
        load_scan(rows[1])
    with pytest.raises(ScanError) as found:
        load_scan(second)
    assert (found.value.code, str(found.value)) == (Code.MISSING_FILE, str(alone.value))
    assert [load_scan(first).scan_id, load_scan(third).scan_id] == ["s0", "s2"]


def test_a_store_that_hangs_keeps_no_other_scan_waiting(monkeypatch):
    """Its threads are lost to it; the others read for themselves what was not begun."""
    never = Event()

    def read(uri):
        if uri.startswith("/s0/"):
            never.wait()
        return uri.encode()

    monkeypatch.setattr(storage, "read_bytes", read)
    rows = [bare_rows(1, files=AT_ONCE)[0], *bare_rows(3)[1:]]
    _, second, third = fetched(rows, with_label=True)
    try:
        assert [bytes_of(source) for row in (second, third) for source in row["sources"]] == [
            uri.encode() for uri in ("/s1/0", "/s1/1", "/s2/0", "/s2/1")
        ]
    finally:
        never.set()


def test_fetched_bytes_are_let_go_with_their_scan(reads):
    coming = fetched(bare_rows(3), with_label=True)
    row = next(coming)
    held = [weakref.ref(source["fetched"]) for source in row["sources"]]
    assert [bytes_of(source) for source in row["sources"]]
    assert eventually(reads, bare_rows(3), 3)
    del row
    next(coming)
    assert [ref() for ref in held] == [None, None]


def test_a_worker_has_the_next_scan_fetched_while_it_is_busy_with_one(tmp_path, monkeypatch):
    from types import SimpleNamespace

    rows = [write_scan(tmp_path, make_scan((3, 16, 16), seed=n, name=f"s{n}")) for n in range(3)]
    reads, read_bytes = defaultdict(int), storage.read_bytes

    def read(uri):
        reads[uri] += 1
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    monkeypatch.setattr(ahead, "MOST_BYTES", max(row["sources"][0]["size_bytes"] for row in rows) * 4)
    job = SimpleNamespace(settings=SimpleNamespace(score=True), scan_seconds=60.0)
    works = _decoded(rows, job)
    first = next(works)
    assert eventually(reads, rows, 2)
    rest = list(works)
    assert [work.scan.scan_id for work in (first, *rest)] == ["s0", "s1", "s2"]
    assert {reads[place] for place in places(rows)} == {1}
    assert all("fetched" not in source for work in (first, *rest) for source in work.row["sources"])
