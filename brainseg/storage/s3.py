"""Object store: S3 and what speaks like it. One put a file, every answer measured against what was promised.

Proof of a body is its length and, where the store's ETag is the MD5 of the bytes, that. It is not for what was uploaded in
pieces or is encrypted by a key service; there the checksum counts that boto3 verifies, where the object carries one. A range
has no ETag of its own: over plain HTTP it is fetched twice and compared. A page of a listing has none at all: over plain
HTTP its form is proven, its count and its prefix, not every letter.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from tempfile import TemporaryFile
from time import sleep
from typing import Any, BinaryIO

import pyarrow as pa

from brainseg.errors import Code, StorageError
from brainseg.storage import s3_requests
from brainseg.storage.attempts import PATIENT, Attempt, Patience, is_aws, whole
from brainseg.storage.place import (
    SCHEME,
    Entry,
    Leftover,
    check_probe,
    is_path,
    is_temporary,
    name_of,
    one_line,
    printable,
    split_uri,
    translated,
)
from brainseg.storage.ranges import RangedFile

TAIL_BYTES = 64 << 10
"""Read from a Parquet file's end at once: the footer of most, all of a small one."""
MOST_BYTES = 5 << 30
"""What S3 takes in one put. Nothing is uploaded in pieces: a killed writer then leaves nothing that is stored and unseen."""
KEYS_A_PAGE = 1000
KEYS_A_DELETION = 250
SETTLE_S = 1.0
"""How long a store other than AWS may take for puts that passed the condition "not there yet" together."""


class ObjectStore:
    """The buckets that this process's endpoint and credentials open."""

    def __init__(self, patience: Patience = PATIENT) -> None:
        self._patience = patience

    def _whole(self, doing: str, uri: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        bucket, key = split_uri(uri)
        with translated(doing, uri):
            return whole(doing, uri, lambda attempt: request(attempt, bucket, key, *arguments), self._patience, **options)

    # ---- list and look ------------------------------------------------------------------------------------------

    def list_files(self, root: str) -> Iterator[Entry]:
        """List every object below a prefix, page by page. Folder markers, whose keys end in a slash, are none."""
        for item in self._items(root):
            if not item.key.endswith("/"):
                name = printable(item.key)
                problem = None if name == item.key and is_path(item.key) else Code.BAD_ID
                yield Entry(_uri_in(root, name), item.size_bytes, item.tag, problem)

    def _items(self, root: str, most: int = KEYS_A_PAGE) -> Iterator[s3_requests.Item]:
        """Every object below a prefix, folder markers too, its key as the store has it."""
        token = None
        while True:
            page = self._whole("list", _folder(root), s3_requests.list_page, most, token)
            yield from page.items
            token = page.next_token
            if token is None:
                return

    def exists(self, uri: str) -> bool:
        """Whether an object is there."""
        return bool(split_uri(uri)[1]) and self._whole("look for", uri, s3_requests.head, missing=None) is not None

    def is_dir(self, uri: str) -> bool:
        """Whether an object lies under this prefix."""
        return next(self._items(uri, most=1), None) is not None

    # ---- read ---------------------------------------------------------------------------------------------------

    def read_bytes(self, uri: str) -> bytes:
        """Return a whole object."""
        return bytes(self._whole("read", uri, s3_requests.read))

    def digest(self, uri: str) -> tuple[int, str]:
        """Size and sha256 of a whole object."""
        found: tuple[int, str] = self._whole("read", uri, s3_requests.digest)
        return found

    def open_table(self, uri: str, columns: list[str] | None) -> Any:
        """The whole object in memory, or, for some of its columns, its tail and a way to fetch what else is needed."""
        if columns is None:
            return pa.BufferReader(self.read_bytes(uri))
        tail = self._whole("read", uri, s3_requests.read_range, f"-{TAIL_BYTES}")

        def fetch(start: int, end: int) -> bytes:
            got: s3_requests.Range = self._whole("read", uri, s3_requests.read_range, f"{start}-{end - 1}")
            if (got.tag, got.size_bytes) != (tail.tag, tail.size_bytes):
                raise StorageError(one_line("read", uri, "it was replaced while it was read"))
            return got.data

        return RangedFile(tail.size_bytes, fetch, tail.data)

    # ---- write --------------------------------------------------------------------------------------------------

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Put a whole object, up to 5 GiB of it."""
        self._whole("write", uri, _put(uri, data, len(data)).replace)

    @contextmanager
    def writing(self, uri: str) -> Iterator[BinaryIO]:
        """Open a file of this machine that has no name; what it holds is put as one object at the end."""
        with translated("write", uri), TemporaryFile() as file:
            yield file
            self._whole("write", uri, _put(uri, file, file.seek(0, os.SEEK_END)).replace)

    def create_bytes(self, uri: str, data: bytes, *, rivals: bool = True) -> bool:
        """Put an object under the condition that there is none.

        Only AWS is trusted to keep to that. Elsewhere (Swift lets two win, old Ceph and MinIO do not read the condition) the
        object is looked for first, and read back when the writers that passed the condition at the same moment are done: the
        last of them has won, if there can be others. The data must tell the writers apart.
        """
        put = _put(uri, data, len(data))

        def mine(attempt: Attempt, bucket: str, key: str) -> bool:
            if not is_aws(attempt):
                sleep(SETTLE_S)
            return put.is_what_lies_there(attempt, bucket, key)

        def create(attempt: Attempt, bucket: str, key: str) -> bool:
            in_doubt = not attempt.is_first  # an earlier attempt may have won, and its answer got lost
            if (in_doubt or not is_aws(attempt)) and s3_requests.is_taken(attempt, bucket, key):
                return in_doubt and mine(attempt, bucket, key)
            if not put.if_absent(attempt, bucket, key):
                return in_doubt and mine(attempt, bucket, key)
            return is_aws(attempt) or not rivals or mine(attempt, bucket, key)

        return bool(self._whole("create", uri, create))

    def delete(self, uri: str) -> None:
        """Delete an object; a missing one is no error."""
        self._whole("delete", uri, s3_requests.delete, missing=None)

    def delete_tree(self, root: str) -> None:
        """Delete everything under a prefix, some hundred objects a request; one by one what XML cannot name."""
        for keys in _batches((item.key for item in self._items(root)), KEYS_A_DELETION):
            batch = [key for key in keys if key.isprintable()]
            if batch and not self._whole("delete", _folder(root), s3_requests.delete_batch, batch):
                batch = []
            for key in keys:
                if key not in batch:
                    self.delete(_uri_in(root, key))

    # ---- before and after ---------------------------------------------------------------------------------------

    def check_readable(self, uri: str) -> None:
        """Read a byte of the object, or of the first one below it. Unlike a look, a refused reading says why."""
        if split_uri(uri)[1] and self._whole("read", uri, s3_requests.read_range, "0-0", missing=None) is not None:
            return
        first = next(self._items(uri, most=1), None)
        if first is None:
            raise StorageError(one_line("read", uri, "there is no such object, and none below it"))
        self._whole("read", _uri_in(uri, first.key), s3_requests.read_range, "0-0")

    def check_writable(self, folder: str) -> None:
        """Put, read back and delete a probe below a prefix."""
        check_probe(self, folder)

    def leftovers(self, root: str, older_than: float) -> Iterator[Leftover]:
        """Probes, and uploads in pieces that nobody ended: brainseg makes none, Ray's and other writers do."""
        for item in self._items(root):
            if is_temporary(name_of(item.key)) and item.modified_at < older_than:
                yield Leftover(_uri_in(root, item.key), "file", item.size_bytes, item.modified_at)
        for upload in self._uploads(root):
            if upload.modified_at < older_than:
                yield upload

    def _uploads(self, root: str) -> Iterator[Leftover]:
        after = None
        while True:
            found, after = self._whole("list the uploads below", _folder(root), s3_requests.list_uploads, after)
            yield from found
            if after is None:
                return

    def remove_leftover(self, leftover: Leftover) -> None:
        """Delete the probe, or abort the upload."""
        if leftover.kind == "file":
            self.delete(leftover.uri)
        else:
            self._whole("end the upload of", leftover.uri, s3_requests.abort_upload, leftover.token, missing=None)


def _put(uri: str, data: bytes | BinaryIO, size_bytes: int) -> s3_requests.Put:
    if size_bytes > MOST_BYTES:
        raise StorageError(one_line("write", uri, f"it has {size_bytes} bytes; the most for one object is {MOST_BYTES}"))
    with translated("write", uri):
        return s3_requests.Put(data, size_bytes)


def _folder(uri: str) -> str:
    """The place with the slash that makes its key a prefix of what lies below it; a bucket has no key."""
    bucket, key = split_uri(uri.rstrip("/"))
    return f"{SCHEME}{bucket}/{key}/" if key else f"{SCHEME}{bucket}"


def _uri_in(root: str, key: str) -> str:
    return f"{SCHEME}{split_uri(root)[0]}/{key}"


def _batches(keys: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(keys)
    while batch := list(islice(rest, size)):
        yield batch
