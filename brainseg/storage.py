"""Storage: the one door to files, on local disk and under `s3://` alike. Everything read or written passes here.

A place is a `str`: a local path or `s3://bucket/key`. On S3 every operation is retried as a whole (boto3 never retries a
body that breaks off), with jitter, up to a deadline; what arrives is measured against what was promised. Writing is
atomic: write beside, then rename on disk; one put on S3. Parquet is built in memory first, because a stream that fails
half-way still publishes what it has. Only this module imports boto3, and only when the first `s3://` is touched; endpoint,
region and credentials are whatever boto3 finds (`AWS_ENDPOINT_URL`, profiles, roles).
"""

import functools
import itertools
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from brainseg.errors import Code, StorageError

T = TypeVar("T")

SCHEME = "s3://"
DEADLINE_S = 120.0
MAX_ATTEMPTS = 8
CHUNK_BYTES = 1 << 20
RAW_COLUMNS = ("mask", "thumbnail")
"""Parquet columns that hold files: already compressed, so neither dictionary nor statistics are worth their bytes."""

_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "InternalError", "BadDigest"})
_TRANSIENT_ERRORS = frozenset({"HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "FlexibleChecksumError"})
_PLAIN_WORDS = {
    "404": "there is no such object",
    "NoSuchKey": "there is no such object",
    "NoSuchBucket": "there is no such bucket",
    "403": "the store refuses access with these credentials",
    "AccessDenied": "the store refuses access with these credentials",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the store rejects the signature: the secret key is wrong, or the region",
    "NoCredentialsError": "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
    "EndpointConnectionError": "nothing answers at the endpoint: is AWS_ENDPOINT_URL right?",
}


class _ShortReadError(Exception):
    """A body ended before its announced length, or took longer than the deadline."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file. `tag` changes when the content does: ETag on S3, modification time in ns on disk.

    `problem` is set where listing already shows that the name cannot be read as a file of this root: NOT_A_FILE (a pipe,
    a dangling or looping link, a link to a folder), OUTSIDE_ROOT (a link that leaves the root), UNREADABLE, or BAD_ID (a
    name that is not UTF-8; `uri` then shows the odd bytes escaped).
    """

    uri: str
    size_bytes: int
    tag: str
    problem: Code | None = None


def is_remote(uri: str) -> bool:
    """Whether the place lies on S3."""
    return uri.startswith(SCHEME)


def name_of(uri: str) -> str:
    """Return the last component of a place."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def join(base: str, *parts: str) -> str:
    """Append parts to a place; a part may hold several components. No part can lead out of `base`.

    Raises StorageError for a part that is absolute or empty, or has an empty, `.`, `..` or NUL-bearing component.
    """
    for part in parts:
        components = part.replace("\\", "/").split("/")
        if "\0" in part or any(c in ("", ".", "..") for c in components):
            raise StorageError(f"{part!r} is not a relative path below {base}")
    return "/".join([base.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """Expand `~`, make a local path absolute (links are kept), drop trailing slashes; s3:// keeps its words."""
    if is_remote(uri):
        _split(uri)
        return uri.rstrip("/")
    scheme, colon, _ = uri.partition("://")
    if colon and scheme.isalnum():
        raise StorageError(f"{uri}: '{scheme}://' is not supported; use a local path or {SCHEME}bucket/key")
    with _foreign("find", uri):
        return os.path.normpath(Path(uri).expanduser().absolute())


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise StorageError(f"'{uri}' names no bucket; expected {SCHEME}bucket/key")
    return bucket, key


def _folder_prefix(uri: str) -> str:
    key = _split(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def list_files(root: str) -> Iterator[Entry]:
    """List every file below `root`, recursively, sorted by uri, as a stream. Where nothing is, yields nothing.

    Skips directories and nothing else: what is not a readable file of this root is listed with its `problem`. Links are
    followed to files that lie inside the root; a link to a folder is listed but not entered (no loops, no doubles).
    Raises StorageError when the listing itself fails.
    """
    return _list_s3(root) if is_remote(root) else _list_local(absolute(root))


def _list_s3(root: str) -> Iterator[Entry]:
    bucket = _split(root)[0]
    request = {"Bucket": bucket, "Prefix": _folder_prefix(root)}
    while True:
        page = _on_s3("list", root, lambda client: client.list_objects_v2(**request))
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                yield Entry(f"{SCHEME}{bucket}/{item['Key']}", int(item["Size"]), item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _list_local(root: str) -> Iterator[Entry]:
    if not Path(root).is_dir():
        return
    real_root = Path(os.path.realpath(root))
    stack = [_children(root)]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, Entry):
            yield item
        elif item.is_dir(follow_symlinks=False):
            stack.append(_children(item.path))
        else:
            yield _local_entry(item, real_root)


def _children(folder: str) -> Iterator["os.DirEntry[str] | Entry"]:
    """A folder's entries in the order of their full uris: a folder sorts as if its name ended in a slash."""
    try:
        with os.scandir(folder) as found:
            yield from sorted(found, key=lambda e: e.name + "/" if e.is_dir(follow_symlinks=False) else e.name)
    except OSError:
        yield Entry(_printable(folder), 0, "", Code.UNREADABLE)


def _local_entry(item: "os.DirEntry[str]", real_root: Path) -> Entry:
    uri = _printable(item.path)
    try:
        status = item.stat()
    except OSError:
        return Entry(uri, 0, "", Code.NOT_A_FILE)
    problem = None
    if item.is_symlink() and not Path(os.path.realpath(item.path)).is_relative_to(real_root):
        problem = Code.OUTSIDE_ROOT
    elif not stat.S_ISREG(status.st_mode):
        problem = Code.NOT_A_FILE
    elif uri != item.path:
        problem = Code.BAD_ID
    return Entry(uri, status.st_size if problem is None else 0, str(status.st_mtime_ns), problem)


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def exists(uri: str) -> bool:
    """Whether a file (not a folder) is there. Raises StorageError where the store will not say."""
    if not is_remote(uri):
        with _foreign("look for", uri):
            return Path(uri).is_file()
    bucket, key = _split(uri)
    return bool(_on_s3("look for", uri, lambda client: client.head_object(Bucket=bucket, Key=key), missing=False))


def is_dir(uri: str) -> bool:
    """Whether this is a local folder, or an S3 prefix under which something lies."""
    if not is_remote(uri):
        with _foreign("look for", uri):
            return Path(uri).is_dir()
    bucket, prefix = _split(uri)[0], _folder_prefix(uri)
    page = _on_s3("look for", uri, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
    return bool(page.get("Contents"))


def read_bytes(uri: str) -> bytes:
    """Return a whole object. Raises StorageError where it is missing, not a regular file, cut short or refused."""
    if is_remote(uri):
        bucket, key = _split(uri)
        return _on_s3("read", uri, lambda client: _whole_body(client.get_object(Bucket=bucket, Key=key)))
    with _foreign("read", uri), open(uri, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"could not read {uri}: it is not a regular file")
        data = file.readall()
    if len(data) < status.st_size:
        raise StorageError(f"could not read {uri}: got {len(data)} of {status.st_size} bytes")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer: a pipe in an archive must not hang a job."""
    return os.open(path, flags | os.O_NONBLOCK)


def _whole_body(response: Any) -> bytes:
    deadline, chunks = time.monotonic() + DEADLINE_S, []
    with response["Body"] as body:
        while chunk := body.read(CHUNK_BYTES):
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise _ShortReadError(f"the body did not end within {DEADLINE_S:.0f} s")
    data, promised = b"".join(chunks), int(response["ContentLength"])
    if len(data) != promised:
        raise _ShortReadError(f"got {len(data)} of {promised} bytes")
    return data


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object atomically, making the folders above it; replaces what was there.

    On disk a killed writer can leave a `.tmp-*` file beside the target, never half a target.
    """
    if is_remote(uri):
        bucket, key = _split(uri)
        _on_s3("write", uri, lambda client: client.put_object(Bucket=bucket, Key=key, Body=data))
        return
    with _foreign("write", uri):
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent / f".tmp-{uuid4().hex}"
        try:
            with beside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system lets a folder be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def delete(uri: str) -> None:
    """Delete a file; a missing one is no error."""
    if is_remote(uri):
        bucket, key = _split(uri)
        _on_s3("delete", uri, lambda client: client.delete_object(Bucket=bucket, Key=key), missing=None)
        return
    with _foreign("delete", uri):
        Path(uri).unlink(missing_ok=True)


def delete_tree(root: str) -> None:
    """Delete everything under a folder or prefix, and on disk the folder itself; a missing one is fine."""
    if is_remote(root):
        for entry in list_files(root):
            delete(entry.uri)
        return
    with _foreign("delete", root):
        if Path(root).exists():
            shutil.rmtree(root)


def check_writable(folder: str) -> None:
    """Put, read back and delete a probe below `folder`, so that a mistake shows before any work is done."""
    probe = join(folder, f".probe-{uuid4().hex}")
    write_bytes(probe, b"brainseg")
    try:
        if read_bytes(probe) != b"brainseg":
            raise StorageError(f"{folder} does not give back what was written to it")
    finally:
        delete(probe)


def read_text(uri: str) -> str:
    """Return a UTF-8 text."""
    with _foreign("read", uri):
        return read_bytes(uri).decode("utf-8-sig")


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 text atomically."""
    write_bytes(uri, text.encode("utf-8"))


def read_json(uri: str) -> Any:
    """Return what a JSON file holds."""
    with _foreign("read as JSON", uri):
        return json.loads(read_text(uri))


def write_json(uri: str, obj: Any, indent: int | None = 2) -> None:
    """Write an object as JSON, atomically. NaN and infinities are refused: no other reader accepts them."""
    with _foreign("write as JSON", uri):
        write_text(uri, json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet table, or only some of its columns. Raises StorageError when torn, or when a column is absent."""
    source = pa.BufferReader(read_bytes(uri)) if is_remote(uri) else uri
    with _foreign("read as Parquet", uri), pq.ParquetFile(source, page_checksum_verification=True) as file:
        missing = [c for c in columns or () if c not in file.schema_arrow.names]
        if missing:
            raise StorageError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
        return file.read(columns=columns)


def write_table(uri: str, table: pa.Table, *, row_group_rows: int = 64) -> None:
    """Write a Parquet table whole: zstd, page checksums, row groups small enough to fetch a few masks without the rest."""
    small = _leaf_columns(table.schema)
    sink = pa.BufferOutputStream()
    with _foreign("write as Parquet", uri):
        how = {"compression": "zstd", "use_dictionary": small, "write_statistics": small, "write_page_checksum": True}
        pq.write_table(table, sink, row_group_size=row_group_rows, **how)
    write_bytes(uri, sink.getvalue().to_pybytes())


def _leaf_columns(schema: pa.Schema) -> list[str]:
    """Parquet's own paths of all leaves, such as `regions.list.element.dice`, but those below `RAW_COLUMNS`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = (str(leaves.column(i).path) for i in range(len(leaves)))
    return [path for path in paths if path.split(".")[0] not in RAW_COLUMNS]


@contextmanager
def _foreign(doing: str, uri: str) -> Iterator[None]:
    """Translate what the operating system, codecs and pyarrow raise."""
    try:
        yield
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(_line(doing, uri, reason)) from error


def _line(doing: str, uri: str, reason: str) -> str:
    return " ".join(f"could not {doing} {uri}: {reason}".split())[:500]


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """The process's one S3 client; `process` is its id, so that a fork makes its own."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": 2}
    config = Config(retries=retries, connect_timeout=10, read_timeout=30, max_pool_connections=32, tcp_keepalive=True)
    return boto3.session.Session().client("s3", config=config)


_NEVER: Any = object()


def _on_s3(doing: str, uri: str, call: Callable[[Any], T], *, missing: Any = _NEVER) -> T:
    """Run one whole operation, again while it fails for passing reasons; `missing` is the answer for an absent object."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + DEADLINE_S
    for attempt in itertools.count(1):
        try:
            return call(_client(os.getpid()))
        except (BotoCoreError, ClientError, _ShortReadError, OSError, ValueError) as error:
            if missing is not _NEVER and _code(error) in ("404", "NoSuchKey"):
                return missing  # type: ignore[no-any-return]
            wait_s = random.uniform(0.5, 1.0) * min(10.0, 0.1 * 2**attempt)
            if attempt == MAX_ATTEMPTS or not _is_transient(error) or time.monotonic() + wait_s > deadline:
                reason = _PLAIN_WORDS.get(_code(error), str(error))
                raise StorageError(_line(doing, uri, reason)) from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _code(error: Exception) -> str:
    """The store's own error code, or the name of the client's exception."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else type(error).__name__


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: a broken connection or body, a busy or failing store."""
    if isinstance(error, _ShortReadError):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status == 429 or _code(error) in _TRANSIENT_CODES
    return any(kind.__name__ in _TRANSIENT_ERRORS for kind in type(error).__mro__)
