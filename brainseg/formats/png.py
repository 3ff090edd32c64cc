"""PNG: its chunks, judged one by one before libpng (by way of imagecodecs) is shown those that hold pixels.

libpng unpacks what comes after the last row, opens texts and colour profiles, and says little of either; so chunks are
walked here, checksums and lengths compared, and the rest is never passed on. Layout: PNG specification, third edition.
"""

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import Notes
from brainseg.formats.pixels import grey_palette, require_size, without_alpha
from brainseg.formats.tiff import note_rotation

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""What a decoder needs. Texts, times and colour profiles are never shown to it: they can be bombs, and say who it is."""

_PNG_CHANNELS = {0: 2, 2: 4, 3: 4, 4: 2, 6: 4}
"""Channels after decoding, by colour type: transparency adds one, a palette becomes four."""
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((8, 8, 0, 0), (8, 8, 4, 0), (4, 8, 0, 4), (4, 4, 2, 0), (2, 4, 0, 2), (2, 2, 1, 0), (1, 2, 0, 1))
"""Interlacing's seven passes: steps along a row and down, first column and row (PNG specification, 8.2)."""


@dataclass
class _Chunks:
    """What a walk over a PNG's chunks found; `ended` when the closing IEND is there, `extra` bytes come after it."""

    types: set[bytes] = field(default_factory=set)
    header: bytes = b""
    exif: bytes = b""
    pixels: list[bytes] = field(default_factory=list)
    packed: list[bytes] = field(default_factory=list)
    ended: bool = False
    extra: int = 0


def read_png(data: bytes, notes: Notes) -> NDArray[Any]:
    """Decode a PNG to `(H, W)` or `(H, W, C)`, alpha dropped, palettes expanded, 1-bit as uint8 0 and 1.

    Raises ScanError CORRUPT, TRUNCATED, TOO_LARGE, MULTI_PAGE or UNSUPPORTED; appends ALPHA, PALETTE, TRUNCATED (an end
    marker that is missing), TRAILING_DATA and EXIF_ROTATION to the notes.
    """
    chunks = _walk_png(data, notes)
    if len(chunks.header) != 13:
        raise notes.error(Code.CORRUPT if chunks.ended else Code.TRUNCATED, "found a PNG without a header chunk")
    width, height, bits, colour = struct.unpack(">IIBB", chunks.header[:10])
    require_size(width, height, _PNG_CHANNELS.get(colour, 4), bits, notes)
    if b"acTL" in chunks.types:
        raise notes.error(Code.MULTI_PAGE, "found an animated PNG, expected a single picture")
    _require_no_more(b"".join(chunks.packed), _png_bytes(width, height, bits * _PNG_SAMPLES.get(colour, 4), chunks), notes)
    array = _decode_png(chunks, notes)
    if chunks.exif:
        note_rotation(chunks.exif, notes)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = without_alpha(array, notes)
    if colour == 3:
        return grey_palette(array, notes)
    return (array != 0).astype(np.uint8) if bits == 1 else array


def _png_bytes(width: int, height: int, bits: int, chunks: _Chunks) -> int:
    """Bytes of the unpacked pixel data by the header: each row of each pass begins with a byte that names its filter."""
    passes = _ADAM7 if chunks.header[12] else ((1, 1, 0, 0),)
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for across, down, x, y in passes)
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def _require_no_more(packed: bytes, expected: int, notes: Notes) -> None:
    """Refuse pixel data that go on after the last row, which libpng would unpack to their end and drop."""
    stream = zlib.decompressobj()
    try:
        found = len(stream.decompress(packed, expected + 1))
    except zlib.error:
        return  # what is wrong with it the decoder will say
    if found > expected:
        raise notes.error(Code.CORRUPT, f"found more pixel data than the {expected} bytes of its header; one of them is wrong")
    if stream.unused_data:
        notes.warn(Code.TRAILING_DATA, f"found {len(stream.unused_data)} bytes after the pixel data; they were ignored")


def _walk_png(data: bytes, notes: Notes) -> _Chunks:
    """Visit all chunks (PNG specification, 5.3), checking each one's CRC; stops where the file does."""
    found, at = _Chunks(), len(PNG_MAGIC)
    while at + 12 <= len(data) and not found.ended:
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data):
            break
        body = data[at + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
            raise notes.error(Code.CORRUPT, "found a PNG chunk whose checksum does not fit; fetch the file again")
        if (kind == b"IHDR") != (at == len(PNG_MAGIC)):
            raise notes.error(Code.CORRUPT, "found a PNG whose header chunk is not the first and only one")
        found.types.add(kind)
        found.header = found.header or body
        found.exif = body if kind == b"eXIf" else found.exif
        if kind in _PIXEL_CHUNKS:
            found.pixels.append(data[at:end])
        elif not kind[0] & 0x20:
            raise notes.error(Code.UNSUPPORTED, "found a PNG with a chunk that is needed and unknown (PNG specification, 5.4)")
        if kind == b"IDAT":
            found.packed.append(body)
        found.ended = kind == b"IEND"
        at = end
    found.extra = len(data) - at if found.ended else 0
    return found


def _decode_png(chunks: _Chunks, notes: Notes) -> NDArray[Any]:
    try:
        array: NDArray[Any] = imagecodecs.png_decode(PNG_MAGIC + b"".join(chunks.pixels))
    except Exception as error:  # a foreign decoder on foreign bytes
        code = Code.CORRUPT if chunks.ended else Code.TRUNCATED
        raise notes.error(code, "found a PNG that cannot be decoded, expected all its pixels; fetch the file again") from error
    if not chunks.ended:
        notes.warn(Code.TRUNCATED, "found a PNG without its end marker; its pixels are complete")
    if chunks.extra:
        notes.warn(Code.TRAILING_DATA, f"found {chunks.extra} bytes after the PNG's end; they were ignored")
    return array
