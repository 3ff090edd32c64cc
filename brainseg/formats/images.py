"""Images: the bytes of one PNG, TIFF, JPEG or GIF -> pixels as stored, and a mask back into a PNG.

No colour is turned into grey, no 16-bit value into 8 bits: whether three channels are three modalities or a picture is for
`scans` to say. Headers are judged here, before a decoder allocates; imagecodecs and Pillow then decode.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainseg.errors import Code, ScanError
from brainseg.formats import Notes, require_bytes, unexpected
from brainseg.formats.tiff import read_tiff, require_size, without_alpha

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112
MAX_JPEG_SCANS = 100
"""Passes over the picture in a progressive JPEG: encoders write about ten, and a few bytes can ask for a thousand."""

_ENDS = {"JPEG": b"\xff\xd9", "GIF": b"\0;"}
_LAST_STARTS = {"JPEG": b"\xff\xda", "GIF": b"GIF8"}
"""After the last of these the end must come: a thumbnail inside a JPEG has an end of its own."""

_SUFFIXES = {"PNG": (".png",), "TIFF": (".tif", ".tiff"), "JPEG": (".jpg", ".jpeg", ".jpe"), "GIF": (".gif",)}


def read_image(data: bytes, name: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Decode a single picture to `(H, W)` or `(H, W, C)` in its stored type (1-bit as uint8 0 and 1), with its warnings.

    Alpha is dropped, with ALPHA unless it is opaque throughout; a palette is expanded (PALETTE), to grey where all its
    colours are. Raises ScanError with the reason.
    """
    notes = Notes(name)
    require_bytes(data, notes)
    kind = _kind(data, notes)
    known = tuple(s for suffixes in _SUFFIXES.values() for s in suffixes)
    if name.lower().endswith(known) and not name.lower().endswith(_SUFFIXES[kind]):
        notes.warn(Code.WRONG_EXTENSION, f"found {kind} data, which its name does not promise")
    reader = {"PNG": _read_png, "TIFF": read_tiff}.get(kind)
    array = reader(data, notes) if reader else _read_pillow(data, kind, notes)
    return np.ascontiguousarray(array), tuple(notes.warnings)


def write_png(array: NDArray[Any]) -> bytes:
    """Encode a `(H, W)` uint8 or uint16 array as a grey PNG. The same array gives the same bytes."""
    if array.ndim != 2 or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"cannot write {array.dtype} {array.shape} as a grey PNG")
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(array), level=6))


def _kind(data: bytes, notes: Notes) -> str:
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise unexpected(data, Code.NOT_IMAGE, "PNG, TIFF, JPEG or GIF", notes)


# --- PNG ------------------------------------------------------------------------------------------------------------


_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""What a decoder needs. Texts, times and colour profiles are never shown to it: they can be bombs, and say who it is."""


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


def _read_png(data: bytes, notes: Notes) -> NDArray[Any]:
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
        _note_rotation(lambda exif: exif.load(chunks.exif), notes)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = without_alpha(array, notes)
    if colour == 3:
        return grey_palette(array, notes)
    return (array != 0).astype(np.uint8) if bits == 1 else array


_PNG_CHANNELS = {0: 2, 2: 4, 3: 4, 4: 2, 6: 4}
"""Channels after decoding, by colour type: transparency adds one, a palette becomes four."""
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((8, 8, 0, 0), (8, 8, 4, 0), (4, 8, 0, 4), (4, 4, 2, 0), (2, 4, 0, 2), (2, 2, 1, 0), (1, 2, 0, 1))
"""Interlacing's seven passes: steps along a row and down, first column and row (PNG specification, 8.2)."""


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


# --- JPEG and GIF ---------------------------------------------------------------------------------------------------


def _read_pillow(data: bytes, kind: str, notes: Notes) -> NDArray[Any]:
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise notes.error(Code.TOO_LARGE, f"found a JPEG of over {MAX_JPEG_SCANS} passes, expected about ten at most")
    end = data.rfind(_ENDS[kind]) + len(_ENDS[kind])
    ended = end > max(data.rfind(_LAST_STARTS[kind]), len(_ENDS[kind]) - 1)
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            array = _pixels(image, notes)
    except ScanError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise notes.error(Code.TOO_LARGE, f"found a {kind} that claims more pixels than any scan has") from error
    except Exception as error:  # a foreign decoder on foreign bytes
        code = Code.TRUNCATED if "truncated" in str(error) or not ended else Code.CORRUPT
        raise notes.error(
            code, f"found a {kind} that cannot be decoded, expected all its pixels; fetch the file again"
        ) from error
    if not ended:
        notes.warn(Code.TRUNCATED, f"found a {kind} without its end marker; its pixels are complete")
    elif data.count(0, end) < len(data) - end:
        notes.warn(Code.TRAILING_DATA, f"found {len(data) - end} bytes after the {kind}'s end; they were ignored")
    return array


def _pixels(image: Image.Image, notes: Notes) -> NDArray[Any]:
    require_size(image.width, image.height, 4, 8, notes)
    if getattr(image, "is_animated", False):
        raise notes.error(Code.MULTI_PAGE, "found more than one frame, expected a single picture")
    if image.mode == "P":
        rgba = without_alpha(np.asarray(image.convert("RGBA")), notes)
        return grey_palette(rgba, notes)
    if image.mode not in ("L", "RGB"):
        raise notes.error(Code.NOT_GREY, f"found a {image.mode} picture, expected grey values")
    array = np.asarray(image)
    _note_rotation(lambda exif: exif.update(image.getexif()), notes)
    return array


def _note_rotation(load: Callable[[Image.Exif], object], notes: Notes) -> None:
    exif = Image.Exif()
    try:
        load(exif)
        turn = exif.get(EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  a foreign decoder on foreign bytes; the pixels are whole
        notes.warn(Code.EXIF_ROTATION, "found EXIF data that cannot be read; the pixels were left as stored")
        return
    if turn != 1:
        shown = turn if isinstance(turn, int) else "that is no number"
        notes.warn(Code.EXIF_ROTATION, f"found EXIF orientation {shown}; the pixels were left as stored, where their mask lies")


def grey_palette(rgb: NDArray[Any], notes: Notes) -> NDArray[Any]:
    """Note that colours came from a palette; return `(H, W)` where red, green and blue are equal throughout."""
    notes.warn(Code.PALETTE, "found palette indices; they were replaced by the palette's values")
    grey = rgb.ndim == 3 and bool((rgb == rgb[..., :1]).all())
    return rgb[..., 0] if grey else rgb
