"""Places: how a file is named, on disk and under `s3://`, and what every kind of storage owes the ones who use it."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from uuid import uuid4

import pyarrow as pa

from brainseg.errors import Code, StorageError

SCHEME = "s3://"
_OURS = re.compile(r"\.(?:tmp|probe)-[0-9a-f]{32}")
"""What a temporary file and a probe are called, and nothing else is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file. `tag` changes when the content does: ETag on S3, modification time in ns on disk.

    `problem` is set where listing already shows that the name cannot be read as a file of this root: NOT_A_FILE (a pipe,
    a dangling or looping link, a link to a folder), OUTSIDE_ROOT (a link that leaves the root), UNREADABLE, or BAD_ID (a
    name that is not UTF-8, whose odd bytes `uri` shows escaped, or a key that is no path, such as `a/../b` or `a//b`).
    """

    uri: str
    size_bytes: int
    tag: str
    problem: Code | None = None


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an interrupted write has left: a temporary file or probe, or an upload in pieces that was never ended.

    `token` is the upload's id on S3, empty for a file. `modified_at` is in seconds since 1970.
    """

    uri: str
    kind: Literal["file", "upload"]
    size_bytes: int
    modified_at: float
    token: str = ""


class Store(Protocol):
    """One kind of storage. All raise StorageError, in one line, where the store will not do what it is asked."""

    def list_files(self, root: str) -> Iterator[Entry]:
        """List every file below `root`, recursively, sorted by uri, as a stream."""

    def exists(self, uri: str) -> bool:
        """Whether a file (not a folder) is there."""

    def is_dir(self, uri: str) -> bool:
        """Whether files may lie below this place."""

    def read_bytes(self, uri: str) -> bytes:
        """Return a whole file, proven as far as the store allows."""

    def digest(self, uri: str) -> tuple[int, str]:
        """How many bytes a whole file has, proven as when it is read, and their sha256; a piece is in memory at a time."""

    def open_table(self, uri: str, columns: list[str] | None) -> Any:
        """Open a Parquet file for pyarrow, so that reading some columns costs little more than they are large."""

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write a whole file atomically."""

    def writing(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """A file to write piece by piece. It appears whole when the block ends well; when it fails nothing has happened."""

    def create_bytes(self, uri: str, data: bytes, *, rivals: bool) -> bool:
        """Write a file that must not be there yet; False where another one is."""

    def delete(self, uri: str) -> None:
        """Delete a file; a missing one is no error."""

    def delete_tree(self, root: str) -> None:
        """Delete everything below a folder, and the folder."""

    def check_readable(self, uri: str) -> None:
        """StorageError where nothing can be read at this place: neither a file nor anything below it."""

    def check_writable(self, folder: str) -> None:
        """StorageError where a probe below this folder cannot be put, read back and deleted. Leaves no trace."""

    def leftovers(self, root: str, older_than: float) -> Iterator[Leftover]:
        """What interrupted writes left below `root` before this time."""

    def remove_leftover(self, leftover: Leftover) -> None:
        """Delete the file, or end the upload; one that is gone is no error."""


def is_remote(uri: str) -> bool:
    """Whether the place lies on S3."""
    return uri.startswith(SCHEME)


def name_of(uri: str) -> str:
    """Return the last component of a place."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def parent_of(uri: str) -> str:
    """Return the folder in which a place lies; that of a bucket is the bucket, that of a bare name is `.`."""
    if is_remote(uri):
        bucket, key = split_uri(uri.rstrip("/"))
        above = key.rpartition("/")[0]
        return f"{SCHEME}{bucket}/{above}" if above else f"{SCHEME}{bucket}"
    return os.path.dirname(uri.rstrip("/")) or ("/" if uri.startswith("/") else ".")  # noqa: PTH120 - keeps `..` and links


def join(base: str, *parts: str) -> str:
    """Append parts to a place; a part may hold several components. No part can lead out of `base`.

    Raises StorageError for a part that is absolute or empty, or has an empty, `.`, `..` or NUL-bearing component.
    """
    for part in parts:
        if not is_path(part.replace("\\", "/")):
            raise StorageError(f"{part!r} is not a relative path below {base}")
    return "/".join([base.rstrip("/"), *parts])


def is_path(key: str) -> bool:
    """Whether a key's components could be those of a relative path on disk that leads downwards."""
    return "\0" not in key and not any(c in ("", ".", "..") for c in key.split("/"))


def absolute(uri: str) -> str:
    """Expand `~`, make a local path absolute (links are kept), drop trailing slashes; s3:// keeps its words."""
    if is_remote(uri):
        split_uri(uri)
        return uri.rstrip("/")
    scheme, colon, _ = uri.partition("://")
    if colon and scheme.isalnum():
        raise StorageError(f"{uri}: '{scheme}://' is not supported; use a local path or {SCHEME}bucket/key")
    with translated("find", uri):
        return os.path.normpath(Path(uri).expanduser().absolute())


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of a place on S3."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if "@" in bucket:  # repeated nowhere: what stands before it may be a password
        raise StorageError(f"a place cannot carry credentials; expected {SCHEME}bucket/key, and keys as boto3 finds them")
    if not bucket:
        raise StorageError(f"'{uri}' names no bucket; expected {SCHEME}bucket/key")
    return bucket, key


def printable(name: str) -> str:
    """The name with bytes that are not UTF-8 shown escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def temporary_name(kind: Literal["tmp", "probe"]) -> str:
    """A name that no other writer has and `is_temporary` knows."""
    return f".{kind}-{uuid4().hex}"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a write in progress, or an interrupted one, has made."""
    return _OURS.fullmatch(name) is not None


def check_probe(store: Store, folder: str) -> None:
    """Put, read back and delete a probe below `folder`; StorageError names the folder where one of these fails."""
    name, content = temporary_name("probe"), f"brainseg {time.time_ns()}".encode()
    probe = join(folder, name)
    try:
        store.write_bytes(probe, content)
        try:
            given = store.read_bytes(probe)
        finally:
            store.delete(probe)
    except StorageError as error:
        raise StorageError(str(error).replace(f"/{name}", "")) from error
    if given != content:
        raise StorageError(f"{folder} does not give back what was written to it")


@contextmanager
def translated(doing: str, uri: str) -> Iterator[None]:
    """Translate what the operating system, codecs and pyarrow raise."""
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(one_line(doing, uri, reason)) from error


def one_line(doing: str, uri: str, reason: str) -> str:
    """What a person is told: one line of bounded length."""
    return " ".join(f"could not {doing} {printable(uri)}: {reason}".split())[:500]
