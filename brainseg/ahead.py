"""Ahead: the files of the next scans are fetched while this one is decoded and segmented.

An object store answers after some milliseconds, a far one after fifty, and a process that works on one scan at a time would
wait that long before each. Only bytes are fetched, packed as they lie there: what is wrong with a file is found when its scan's
turn comes, by who reads it.
"""

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

from brainseg import storage

AT_ONCE = 8
"""Files that a process fetches at the same time."""
MOST_BYTES = 32 << 20
"""Small scans are asked for many at a time, up to this; large ones one by one."""
LARGEST_BYTES = 256 << 20
"""A scan of more is read when its turn comes: its files would take as much memory as the scan before it."""

Row = Mapping[str, Any]


def fetched(rows: Sequence[Row], *, with_label: bool) -> Iterator[Row]:
    """Yield manifest rows in order, each with its files on their way: its sources name the future of their bytes, `fetched`.

    Whoever waits for a file that has not been begun yet may cancel it and read for himself. A yielded row is not kept.
    """
    waiting: deque[Row] = deque()
    to_come = deque(rows)
    while waiting or to_come:
        while to_come and (len(waiting) < 2 or sum(map(_size, (*waiting, to_come[0]))) <= MOST_BYTES):
            waiting.append(_begun(to_come.popleft(), with_label))
        yield waiting.popleft()


def bytes_of(source: Mapping[str, Any]) -> bytes:
    """The bytes of one file of a row, fetched already or not. Raises StorageError."""
    coming: Future[bytes] | None = source.get("fetched")
    if coming is None or coming.cancel():
        return storage.read_bytes(source["uri"])
    return coming.result()


def _size(row: Row) -> int:
    """Bytes of a scan's files; where a size is not known, as many as are fetched at a time."""
    sizes = [source.get("size_bytes") for source in row["sources"]]
    return MOST_BYTES if None in sizes else sum(sizes)


def _begun(row: Row, with_label: bool) -> Row:
    """A row whose files are being fetched; as it was where it is known to be unusable, or too large to be held twice."""
    if row.get("problem_code") or _size(row) > LARGEST_BYTES:
        return row
    wanted = [
        s if s["role"] == "label" and not with_label else {**s, "fetched": _fetchers().ask(s["uri"])} for s in row["sources"]
    ]
    return {**row, "sources": wanted}


@functools.cache
def _fetchers() -> "_Fetchers":
    """This process's own."""
    return _Fetchers(AT_ONCE)


class _Fetchers:
    """Threads that read files. One that hangs in a dead mount hangs alone, and does not keep the process from ending."""

    def __init__(self, count: int) -> None:
        self._asked: SimpleQueue[tuple[Future[bytes], str]] = SimpleQueue()
        for _ in range(count):
            Thread(target=self._work, daemon=True).start()

    def ask(self, uri: str) -> Future[bytes]:
        future: Future[bytes] = Future()
        self._asked.put((future, uri))
        return future

    def _work(self) -> None:
        while True:
            future, uri = self._asked.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(storage.read_bytes(uri))
                except BaseException as error:  # noqa: BLE001  whatever it is, it is raised where the bytes are wanted
                    future.set_exception(error)
            del future
