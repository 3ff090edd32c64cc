"""Requests: one exchange with an object store each, and the proof that what came is what was promised.

Each takes an Attempt, a bucket and a key or prefix, and is run by `attempts.whole`, which decides what a failure means.
"""

import base64
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from socket import SHUT_RDWR
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from brainseg.errors import StorageError
from brainseg.storage.attempts import (
    Attempt,
    DamagedError,
    adds_checksums,
    code_of,
    is_encrypted,
    is_passing_code,
    plain_words,
    refusal,
    status_of,
)
from brainseg.storage.place import SCHEME, Leftover, one_line

CHUNK_BYTES = 1 << 20
_MD5 = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def head(attempt: Attempt, bucket: str, key: str) -> Any:
    """What the store says about an object."""
    return attempt.client.head_object(Bucket=bucket, Key=key)


def delete(attempt: Attempt, bucket: str, key: str) -> Any:
    """Delete one object."""
    return attempt.client.delete_object(Bucket=bucket, Key=key)


# ---- bodies ----------------------------------------------------------------------------------------------------------


def read(attempt: Attempt, bucket: str, key: str) -> bytes:
    """Return a whole object. DamagedError where it is short, late, or has not the MD5 that its ETag names."""
    answer = attempt.client.get_object(Bucket=bucket, Key=key)
    data = _body(attempt, answer)
    _check_md5(answer, hashlib.md5(data, usedforsecurity=False).hexdigest())
    return data


def digest(attempt: Attempt, bucket: str, key: str) -> tuple[int, str]:
    """Return size and sha256 of a whole object, which is proven as by `read`."""
    answer = attempt.client.get_object(Bucket=bucket, Key=key)
    sha256, md5, size_bytes = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    for piece in _pieces(attempt, answer):
        sha256.update(piece)
        md5.update(piece)
        size_bytes += len(piece)
    _check_md5(answer, md5.hexdigest())
    return size_bytes, sha256.hexdigest()


@dataclass(frozen=True)
class Range:
    """Some bytes of an object, and its whole size and tag."""

    data: bytes
    size_bytes: int
    tag: str


def read_range(attempt: Attempt, bucket: str, key: str, wanted: str) -> Range:
    """Return a range: `100-199`, or `-100` for the last 100 bytes. Over plain HTTP it is fetched twice and must agree."""
    got = _read_range(attempt, bucket, key, wanted)
    if not is_encrypted(attempt) and _read_range(attempt, bucket, key, wanted) != got:
        raise DamagedError(f"two readings of the bytes {wanted} differ")
    return got


def _read_range(attempt: Attempt, bucket: str, key: str, wanted: str) -> Range:
    try:
        answer = attempt.client.get_object(Bucket=bucket, Key=key, Range=f"bytes={wanted}")
    except refusal() as error:
        if code_of(error) in ("InvalidRange", "416"):  # nothing is in it
            return Range(b"", 0, "")
        raise
    found = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
    data = _body(attempt, answer)
    if found is None:
        raise DamagedError("the store does not read ranges")
    start, end, size_bytes = map(int, found.groups())
    as_asked = wanted in (f"{start}-{end}", f"-{size_bytes - start}") or (wanted.startswith("-") and start == 0)
    if not as_asked or len(data) != end - start + 1:
        raise DamagedError(f"asked for the bytes {wanted}, got {len(data)} of {start}-{end}")
    return Range(data, size_bytes, answer.get("ETag", ""))


def _body(attempt: Attempt, answer: Any) -> bytes:
    return b"".join(_pieces(attempt, answer))


def _pieces(attempt: Attempt, answer: Any) -> Iterator[bytes]:
    """A body piece by piece. DamagedError where it ends before or after the length that was promised."""
    promised, read = int(answer["ContentLength"]), 0
    attempt.allow(promised)
    with closing(answer["Body"]) as body, _cut_off(body, attempt.left_s()):  # as a context it would be urllib3's own
        while piece := body.read(CHUNK_BYTES):
            read += len(piece)
            yield piece
    if read != promised:
        raise DamagedError(f"got {read} of {promised} bytes")


@contextmanager
def _cut_off(body: Any, seconds: float) -> Iterator[None]:
    """Close the connection at the deadline: a body that drips in never trips a timeout on silence."""
    try:
        line = body._raw_stream._fp.fp.raw._sock  # as botocore itself finds it; a body that is in already has none
    except AttributeError:
        yield
        return

    def cut() -> None:
        with suppress(OSError):
            line.shutdown(SHUT_RDWR)

    timer = threading.Timer(max(0.0, seconds), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plain_md5(answer: Any) -> str | None:
    """The ETag where it is the MD5 of the object's bytes: not for uploads in pieces, nor with a key service's or own keys."""
    tag = str(answer.get("ETag", "")).strip('"').lower()
    foreign_key = answer.get("ServerSideEncryption", "AES256") != "AES256" or answer.get("SSECustomerAlgorithm")
    return tag if _MD5.fullmatch(tag) and not foreign_key else None


def _check_md5(answer: Any, md5: str) -> None:
    if _plain_md5(answer) not in (None, md5):
        raise DamagedError("its bytes have not the MD5 that the store names as their ETag")


# ---- puts ------------------------------------------------------------------------------------------------------------


class Put:
    """One object that is to be there. Several attempts may be needed to bring it, or to learn that it has arrived.

    Its data are in memory, or in a file if they are large.
    """

    def __init__(self, data: bytes | BinaryIO, size_bytes: int) -> None:
        md5 = _md5_of(data)
        self._data, self._size_bytes = data, size_bytes
        self._md5, self._digest = md5.hex(), base64.b64encode(md5).decode()

    def replace(self, attempt: Attempt, bucket: str, key: str) -> None:
        """Put it, unless it turns out that an earlier attempt whose answer was lost has."""
        attempt.allow(self._size_bytes)
        if attempt.is_first or not self._has_arrived(attempt, bucket, key):
            self._send(attempt, bucket, key)

    def if_absent(self, attempt: Attempt, bucket: str, key: str) -> bool:
        """Put it under the condition that nothing is there; False where something is."""
        attempt.allow(self._size_bytes)
        try:
            self._send(attempt, bucket, key, IfNoneMatch="*")
        except refusal() as error:
            if status_of(error) == 412:
                return False
            if status_of(error) != 501:
                raise
            self._send(attempt, bucket, key)  # a store without conditions
        return True

    def is_what_lies_there(self, attempt: Attempt, bucket: str, key: str) -> bool:
        """Whether the object has this very content."""
        try:
            return read(attempt, bucket, key) == self._data
        except refusal() as error:
            if code_of(error) == "NoSuchKey":
                return False
            raise

    def _send(self, attempt: Attempt, bucket: str, key: str, **conditions: str) -> None:
        proof = {} if adds_checksums(attempt) else {"ContentMD5": self._digest}
        if not isinstance(self._data, bytes):
            self._data.seek(0)
        answer = attempt.client.put_object(Bucket=bucket, Key=key, Body=self._data, **proof, **conditions)
        _check_md5(answer, self._md5)

    def _has_arrived(self, attempt: Attempt, bucket: str, key: str) -> bool:
        if not is_taken(attempt, bucket, key):
            return False
        found = head(attempt, bucket, key)
        return int(found["ContentLength"]) == self._size_bytes and _plain_md5(found) == self._md5


def _md5_of(data: bytes | BinaryIO) -> bytes:
    if isinstance(data, bytes):
        return hashlib.md5(data, usedforsecurity=False).digest()
    digest = hashlib.md5(usedforsecurity=False)
    data.seek(0)
    while piece := data.read(CHUNK_BYTES):
        digest.update(piece)
    return digest.digest()


def is_taken(attempt: Attempt, bucket: str, key: str) -> bool:
    """Whether an object is there."""
    try:
        head(attempt, bucket, key)
    except refusal() as error:
        if status_of(error) == 404:
            return False
        raise
    return True


# ---- listings and batches --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a listing; bytes of its key that are not UTF-8 stand as surrogates."""

    key: str
    size_bytes: int
    tag: str
    modified_at: float


@dataclass(frozen=True)
class Page:
    """One page of a listing, and the token of the next."""

    items: list[Item]
    next_token: str | None


def list_page(attempt: Attempt, bucket: str, prefix: str, most: int, token: str | None) -> Page:
    """List up to `most` objects under a prefix. DamagedError where the page contradicts itself."""
    request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": most, "EncodingType": "url"}
    page = attempt.client.list_objects_v2(**request, **({"ContinuationToken": token} if token else {}))
    items = [
        Item(_decoded(i["Key"], page), int(i["Size"]), i["ETag"].strip('"'), i["LastModified"].timestamp())
        for i in page.get("Contents", ())
    ]
    next_token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
    if page.get("KeyCount", len(items)) != len(items) or (page.get("IsTruncated") and not next_token):
        raise DamagedError(f"a page of the listing is not whole: {len(items)} of {page.get('KeyCount')} keys")
    if not all(item.key.startswith(prefix) for item in items):
        raise DamagedError("a page of the listing names keys of another prefix")
    return Page(items, next_token)


def list_uploads(attempt: Attempt, bucket: str, prefix: str, after: tuple[str, str] | None) -> tuple[list[Leftover], Any]:
    """List uploads in pieces that were not ended, and where the next page begins, None after the last one."""
    request = {"Bucket": bucket, "Prefix": prefix, "EncodingType": "url"}
    begin = {"KeyMarker": after[0], "UploadIdMarker": after[1]} if after else {}
    try:
        page = attempt.client.list_multipart_uploads(**request, **begin)
    except refusal() as error:
        if status_of(error) in (405, 501):  # a store without uploads in pieces
            return [], None
        raise
    found = [
        Leftover(f"{SCHEME}{bucket}/{_decoded(u['Key'], page)}", "upload", 0, u["Initiated"].timestamp(), u["UploadId"])
        for u in page.get("Uploads", ())
    ]
    more = (_decoded(page["NextKeyMarker"], page), page["NextUploadIdMarker"]) if page.get("IsTruncated") else None
    return found, more


def abort_upload(attempt: Attempt, bucket: str, key: str, token: str) -> Any:
    """End an upload in pieces and free what it holds."""
    return attempt.client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=token)


def _decoded(name: str, page: Any) -> str:
    """A key as it is: asked for in URL encoding, since XML cannot carry every letter that a key may hold."""
    if page.get("EncodingType") != "url":
        return name
    return unquote_to_bytes(name.replace("+", " ")).decode("utf-8", "surrogateescape")


def delete_batch(attempt: Attempt, bucket: str, prefix: str, keys: Sequence[str]) -> bool:
    """Delete objects in one request; False where the store knows no such request. StorageError where it keeps one."""
    wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
    try:
        answer = attempt.client.delete_objects(Bucket=bucket, Delete=wanted)
    except refusal() as error:
        if status_of(error) in (405, 501):
            return False
        raise
    for refused in answer.get("Errors", ()):
        code = str(refused.get("Code"))
        if code == "NoSuchKey":
            continue
        if is_passing_code(code):
            raise DamagedError(f"the store kept some objects ({code})")
        raise StorageError(one_line("delete", f"{SCHEME}{bucket}/{prefix}", plain_words(code)))
    return True
