"""Images: the bytes of one PNG, TIFF, JPEG or GIF -> pixels as stored, and a mask back into a PNG.

No colour is turned into grey, no 16-bit value into 8 bits: whether three channels are three modalities or a picture is for
`scans` to say. Headers are judged here, before a decoder allocates; imagecodecs and Pillow then decode.
"""

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainseg.errors import Code, ScanError
from brainseg.formats import Notes, describe_content, require_bytes
from brainseg.formats.tiff import read_tiff, require_size, without_alpha

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112

_ENDS = {"JPEG": b"\xff\xd9", "GIF": b"\0;"}

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
    raise notes.error(Code.NOT_IMAGE, f"found {describe_content(data)}, expected PNG, TIFF, JPEG or GIF")


# --- PNG ------------------------------------------------------------------------------------------------------------


@dataclass
class _Chunks:
    """What a walk over a PNG's chunks found; `ended` when the closing IEND is there."""

    types: set[bytes] = field(default_factory=set)
    header: bytes = b""
    exif: bytes = b""
    ended: bool = False


def _read_png(data: bytes, notes: Notes) -> NDArray[Any]:
    chunks = _walk_png(data, notes)
    if len(chunks.header) != 13:
        raise notes.error(Code.CORRUPT if chunks.ended else Code.TRUNCATED, "found a PNG without a header chunk")
    width, height, bits, colour = struct.unpack(">IIBB", chunks.header[:10])
    require_size(width, height, 4, notes)
    if b"acTL" in chunks.types:
        raise notes.error(Code.MULTI_PAGE, "found an animated PNG, expected a single picture")
    array = _decode_png(data, chunks, notes)
    if chunks.exif:
        exif = Image.Exif()
        exif.load(chunks.exif)
        _note_rotation(exif, notes)
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = without_alpha(array, notes)
    if colour == 3:
        return grey_palette(array, notes)
    return (array != 0).astype(np.uint8) if bits == 1 else array


def _walk_png(data: bytes, notes: Notes) -> _Chunks:
    """Visit all chunks (PNG specification, 5.3), checking each one's CRC; stops where the file does."""
    found, at = _Chunks(), len(PNG_MAGIC)
    while at + 12 <= len(data) and not found.ended:
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        if at + 12 + size > len(data):
            break
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[at + 8 + size : at + 12 + size], "big"):
            raise notes.error(Code.CORRUPT, "found a PNG chunk whose checksum does not fit; fetch the file again")
        found.types.add(kind)
        found.header = body if kind == b"IHDR" else found.header
        found.exif = body if kind == b"eXIf" else found.exif
        found.ended = kind == b"IEND"
        at += 12 + size
    return found


def _decode_png(data: bytes, chunks: _Chunks, notes: Notes) -> NDArray[Any]:
    try:
        array: NDArray[Any] = imagecodecs.png_decode(data)
    except Exception as error:  # a foreign decoder on foreign bytes
        code = Code.CORRUPT if chunks.ended else Code.TRUNCATED
        raise notes.error(code, "found a PNG that cannot be decoded, expected all its pixels; fetch the file again") from error
    if not chunks.ended:
        notes.warn(Code.TRUNCATED, "found a PNG without its end marker; its pixels are complete")
    return array


# --- JPEG and GIF ---------------------------------------------------------------------------------------------------


def _read_pillow(data: bytes, kind: str, notes: Notes) -> NDArray[Any]:
    ended = _ENDS[kind] in data
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
    return array


def _pixels(image: Image.Image, notes: Notes) -> NDArray[Any]:
    require_size(image.width, image.height, 4, notes)
    if getattr(image, "n_frames", 1) > 1:
        raise notes.error(Code.MULTI_PAGE, f"found {getattr(image, 'n_frames', 0)} frames, expected a single picture")
    if image.mode == "P":
        rgba = without_alpha(np.asarray(image.convert("RGBA")), notes)
        return grey_palette(rgba, notes)
    if image.mode not in ("L", "RGB"):
        raise notes.error(Code.NOT_GREY, f"found a {image.mode} picture, expected grey values")
    array = np.asarray(image)
    _note_rotation(image.getexif(), notes)
    return array


def _note_rotation(exif: Image.Exif, notes: Notes) -> None:
    turn = exif.get(EXIF_ORIENTATION, 1)
    if turn != 1:
        text = f"found EXIF orientation {turn}; the pixels were left as stored, where their mask lies"
        notes.warn(Code.EXIF_ROTATION, text)


def grey_palette(rgb: NDArray[Any], notes: Notes) -> NDArray[Any]:
    """Note that colours came from a palette; return `(H, W)` where red, green and blue are equal throughout."""
    notes.warn(Code.PALETTE, "found palette indices; they were replaced by the palette's values")
    grey = rgb.ndim == 3 and bool((rgb == rgb[..., :1]).all())
    return rgb[..., 0] if grey else rgb
