"""gzip (RFC 1952): packed bytes -> exactly the bytes a header promises, or the reason why not; and bytes -> packed ones.

libdeflate unpacks the usual file, one member whose recorded length is the one expected; zlib takes everything else in
steps, so that nothing is allocated on the word of a stream, and finds out what is wrong with a broken one.
"""

import functools
import struct
import zlib
from collections.abc import Iterator
from typing import cast

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import Notes

GZIP_MAGIC = b"\x1f\x8b"
_HEADER = GZIP_MAGIC + b"\x08\0\0\0\0\0\0\xff"
LEVEL = 4
RUN = 1 << 16
"""Zeros that are packed once and for all; some 70 bytes as deflate has them."""
MAX_RATIO = 1032
"""No deflate stream expands further (zlib's technical notes)."""
MAX_EXTRA_BYTES = 1 << 26
"""Unpacked bytes beyond the promised ones that are read, only to check that the stream ends well; more are a bomb."""
MAX_MEMBERS = 100_000
"""An empty member costs 20 bytes of file: without an end to them a small file would keep a core busy for minutes."""


def first_bytes(data: bytes, count: int, notes: Notes) -> bytes:
    """Return the first `count` unpacked bytes, or all if there are fewer, without unpacking the rest."""
    head = b""
    for chunk in _inflate(data, Notes(notes.name), out_bytes=count):
        head += chunk
        if len(head) >= count:
            break
    return head[:count]


def unpack(data: bytes, size: int, notes: Notes) -> memoryview:
    """Return the first `size` unpacked bytes, with the CRC and the length of every member checked.

    Raises ScanError TRUNCATED, CORRUPT_GZIP or TOO_LARGE; appends TRAILING_DATA to the notes.
    """
    if size > len(data) * MAX_RATIO:
        raise notes.error(Code.TRUNCATED, f"found {len(data)} packed bytes, which cannot hold the {size} of its header")
    content = memoryview(np.empty(size, np.uint8).data)
    if int.from_bytes(data[-4:], "little") != size or not _deflated(data, content):
        _inflate_into(content, data, notes)
    return content


def pack(head: bytes, body: NDArray[np.uint8]) -> bytes:
    """Return a head and the body after it as one gzip member, without a name or a time in it.

    zlib-ng makes masks, which are nearly all zeros, an eighth larger than libdeflate does, in a seventh of its time. The zeros
    that a body begins with are not even packed: what they become is known beforehand.
    """
    runs, content = _runs_of_zeros(body), cast(bytes, body)  # whatever has a buffer will do, though the types do not say so
    wrapped = imagecodecs.zlibng_encode(content[runs * RUN :], level=LEVEL)
    packed = wrapped[2:-4]  # it has two bytes and four that gzip has otherwise (RFC 1950)
    crc, size = imagecodecs.deflate_crc32(content, imagecodecs.deflate_crc32(head)), len(head) + len(body)
    pieces = [_HEADER, _opening(head), *[_packed_run()] * runs, packed]
    return b"".join([*pieces, struct.pack("<II", crc, size & 0xFFFFFFFF)])


def _runs_of_zeros(body: NDArray[np.uint8]) -> int:
    """How many whole runs of zeros a body begins with; its last byte is in none of them."""
    whole = body[: max(0, len(body) - 1) // RUN * RUN].reshape(-1, RUN)
    return next((number for number, run in enumerate(whole) if run.any()), len(whole))


@functools.cache
def _packed_run() -> bytes:
    return _opening(bytes(RUN))


def _opening(data: bytes) -> bytes:
    """Deflate blocks of some bytes, none of them the last, ended at a byte so that others can follow (Z_FULL_FLUSH)."""
    stream = zlib.compressobj(9, wbits=-15)
    return stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)


def _deflated(data: bytes, content: memoryview) -> bool:
    """Fill `content` by libdeflate; False where it refuses, or where more may follow its one member: zlib then looks.

    libdeflate stops after the first member without a word about the rest. It has checked that this member ends with the length
    of what it holds, so nothing follows where the file ends with these four bytes and has them nowhere else.
    """
    try:
        if len(imagecodecs.gzip_decode(data, out=content)) != len(content):
            return False
    except imagecodecs.GzipError:
        return False
    return data.rfind(struct.pack("<I", len(content) & 0xFFFFFFFF), 0, len(data) - 1) < 0  # backwards is twice as fast


def _inflate_into(content: memoryview, data: bytes, notes: Notes) -> None:
    filled = extra = 0
    for chunk in _inflate(data, notes):
        used = min(len(chunk), len(content) - filled)
        content[filled : filled + used] = chunk[:used]
        filled, extra = filled + used, extra + len(chunk) - used
        if extra > MAX_EXTRA_BYTES:
            raise notes.error(Code.TOO_LARGE, f"found over {extra:,} bytes after the {len(content):,} that its header promises")
    if filled < len(content):
        raise notes.error(Code.TRUNCATED, f"found {filled} unpacked bytes, expected {len(content)} by its header")
    if extra:
        notes.warn(Code.TRAILING_DATA, f"found {extra} bytes after the last voxel; they were ignored")


def _inflate(data: bytes, notes: Notes, out_bytes: int = 1 << 20) -> Iterator[bytes]:
    """Unpack in steps of at most `out_bytes`: any number of members, then zero padding or (with a warning) other bytes."""
    at = members = 0
    while data.startswith(GZIP_MAGIC, at):
        members += 1
        if members > MAX_MEMBERS:
            raise notes.error(Code.TOO_LARGE, f"found over {MAX_MEMBERS:,} gzip members, expected one")
        stream = zlib.decompressobj(wbits=31)
        while not stream.eof:
            piece = stream.unconsumed_tail
            if not piece:
                piece = data[at : at + (1 << 16)]
                at += len(piece)
            yield _step(stream, piece, out_bytes, notes)
        at -= len(stream.unused_data)
    if data.count(0, at) < len(data) - at:
        notes.warn(Code.TRAILING_DATA, f"found {len(data) - at} bytes after the gzip data; they were ignored")


def _step(stream: "zlib._Decompress", piece: bytes, out_bytes: int, notes: Notes) -> bytes:
    """Unpack one piece; an empty one says that the file has ended."""
    try:
        out = stream.decompress(piece, out_bytes) if piece else stream.flush()
    except zlib.error as error:
        raise notes.error(Code.CORRUPT_GZIP, f"found damaged gzip data ({error}); fetch the file again") from error
    if not piece and not stream.eof:
        raise notes.error(Code.TRUNCATED, "found the end of the file inside its gzip data; fetch the file again")
    return out
