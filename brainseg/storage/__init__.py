"""Storage: the one door to files, on local disk and under `s3://` alike. Everything read or written passes here.

A place is a `str`: a local path or `s3://bucket/key`. `place.py` says how places are named and what every kind of storage
owes; `disk.py` and `s3.py` are the two kinds. Writing is atomic: write beside, then rename on disk; one put on S3. On S3
every operation is retried as a whole, with jitter, up to a deadline (`attempts.py`), and what arrives is measured against
what was promised.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa

from brainseg.errors import PreflightError, StorageError
from brainseg.storage import parquet
from brainseg.storage.attempts import HURRIED
from brainseg.storage.disk import LocalDisk
from brainseg.storage.place import Entry, Leftover, Store, absolute, is_remote, join, name_of, one_line, parent_of, translated
from brainseg.storage.s3 import ObjectStore

__all__ = [
    "Entry",
    "Leftover",
    "absolute",
    "ahead",
    "check_readable",
    "check_writable",
    "create_bytes",
    "delete",
    "delete_tree",
    "digest",
    "exists",
    "is_dir",
    "is_remote",
    "join",
    "leftovers",
    "list_files",
    "name_of",
    "parent_of",
    "read_bytes",
    "read_json",
    "read_pieces",
    "read_table",
    "read_text",
    "remove_leftover",
    "write_bytes",
    "write_json",
    "write_pieces",
    "write_table",
    "write_text",
]

T = TypeVar("T")

PREFLIGHT_S = 9.0
LEFTOVER_AGE_S = 3600.0
"""Younger ones may belong to a writer that is still at it."""

_DISK, _S3, _S3_HURRIED = LocalDisk(), ObjectStore(), ObjectStore(HURRIED)


def _store(uri: str) -> Store:
    return _S3 if is_remote(uri) else _DISK


def list_files(root: str) -> Iterator[Entry]:
    """List every file below `root`, recursively, sorted by uri, as a stream. Where nothing is, yields nothing.

    Skips directories and nothing else: what is not a readable file of this root is listed with its `problem`. Links are
    followed to files that lie inside the root; a link to a folder is listed but not entered (no loops, no doubles).
    Raises StorageError when the listing itself fails.
    """
    return _store(root).list_files(root)


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is there. Raises StorageError where the store will not say."""
    return _store(uri).exists(uri)


def is_dir(uri: str) -> bool:
    """Whether this is a local folder, or an S3 prefix under which something lies."""
    return _store(uri).is_dir(uri)


def read_bytes(uri: str) -> bytes:
    """Return a whole object. Raises StorageError where it is missing, not a regular file, cut short, damaged or refused."""
    return _store(uri).read_bytes(uri)


def digest(uri: str) -> tuple[int, str]:
    """Return how many bytes a whole object has, and their sha256, in little memory. Raises as `read_bytes` does."""
    return _store(uri).digest(uri)


def ahead(read: Callable[[str], T], uris: Iterable[str], at_once: int) -> Iterator[T]:
    """Yield what `read` gives for each place, in order; `at_once` are read side by side, and few more than have been taken."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        for uri in uris:
            waiting.append(pool.submit(read, uri))
            if len(waiting) > 2 * at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object atomically, making the folders above it; replaces what was there."""
    _store(uri).write_bytes(uri, data)


def create_bytes(uri: str, data: bytes, *, rivals: bool = True) -> bool:
    """Write a whole object where none is; False, and nothing written, where one is. Of several writers at once one wins.

    The data should tell the writers apart (a host, a process, a time): after a lost answer it decides whose object it is.
    Without `rivals`, no other writer can be at it now, and a store that cannot keep to one winner need not be watched a second.
    """
    return _store(uri).create_bytes(uri, data, rivals=rivals)


def delete(uri: str) -> None:
    """Delete a file; a missing one is no error."""
    _store(uri).delete(uri)


def delete_tree(root: str) -> None:
    """Delete everything under a folder or prefix, and on disk the folder itself; a missing one is fine."""
    _store(root).delete_tree(root)


# ---- before and after a job ------------------------------------------------------------------------------------------


def check_readable(uri: str) -> None:
    """PreflightError, in one line and within 10 s, where neither a file nor anything below this place can be read."""
    _preflight("read", uri, lambda store: store.check_readable(uri))


def check_writable(folder: str) -> None:
    """Put, read back and delete a probe below `folder`; PreflightError, in one line and within 10 s, where that fails."""
    _preflight("write to", folder, lambda store: store.check_writable(folder))


def _preflight(doing: str, uri: str, check: Callable[[Store], None]) -> None:
    """Run a check beside this thread, for what no timeout reaches: a dead mount, a name server that is silent."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            check(_S3_HURRIED if is_remote(uri) else _DISK)
        except Exception as error:  # noqa: BLE001 - carried over to the thread that asked, and raised there
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PREFLIGHT_S)
    if thread.is_alive():
        raise PreflightError(one_line(doing, uri, f"no answer within {PREFLIGHT_S:.0f} s"))
    for error in failed:
        if isinstance(error, StorageError):
            raise PreflightError(str(error)) from error
        raise error


def leftovers(root: str, *, min_age_s: float = LEFTOVER_AGE_S, now: float | None = None) -> Iterator[Leftover]:
    """What interrupted writes left below `root`, if older than `min_age_s`: temporary files, probes, uploads in pieces.

    `now` is in seconds since 1970, by default this machine's clock.
    """
    return _store(root).leftovers(root, (time.time() if now is None else now) - min_age_s)


def remove_leftover(leftover: Leftover) -> None:
    """Delete a leftover, or end its upload; one that is gone is no error."""
    _store(leftover.uri).remove_leftover(leftover)


# ---- texts and tables ------------------------------------------------------------------------------------------------


def read_text(uri: str) -> str:
    """Return a UTF-8 text."""
    with translated("read", uri):
        return read_bytes(uri).decode("utf-8-sig")


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text atomically."""
    write_bytes(uri, text.encode("utf-8"))


def read_json(uri: str) -> Any:
    """Return what a JSON file holds."""
    with translated("read as JSON", uri):
        return json.loads(read_text(uri))


def write_json(uri: str, obj: Any, indent: int | None = 2) -> None:
    """Write an object as JSON, atomically. NaN and infinities are refused: no other reader accepts them."""
    with translated("write as JSON", uri):
        write_text(uri, json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet table, or only some of its columns; on S3 only their bytes travel, and the footer's.

    Raises StorageError when torn, or when a column is absent.
    """
    return parquet.read_table(_store(uri), uri, columns)


def write_table(uri: str, table: pa.Table, *, row_group_rows: int = 64) -> None:
    """Write a Parquet table whole: zstd, page checksums, row groups small enough to fetch a few masks without the rest."""
    parquet.write_table(_store(uri), uri, table, row_group_rows)


def read_pieces(uri: str) -> Iterator[pa.Table]:
    """Yield a Parquet table that is large row group by row group, after an empty one that tells the columns.

    Raises StorageError when torn.
    """
    return parquet.read_pieces(_store(uri), uri)


def write_pieces(uri: str, schema: pa.Schema, pieces: Iterable[pa.Table], *, row_group_rows: int) -> None:
    """Write a Parquet table that comes in pieces of any size, as `write_table` does: it appears whole, or not at all."""
    parquet.write_pieces(_store(uri), uri, schema, pieces, row_group_rows)
