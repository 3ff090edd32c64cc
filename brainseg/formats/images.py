"""Images: the bytes of one PNG, TIFF, JPEG or GIF -> pixels as stored, and a mask back into a PNG.

No colour is turned into grey, no 16-bit value into 8 bits: whether three channels are three modalities or a picture is for
`scans` to say. Headers are judged here, before a decoder allocates; imagecodecs and Pillow then decode.
"""

from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import Notes, require_bytes, unexpected
from brainseg.formats.jpeg import read_pillow
from brainseg.formats.png import PNG_MAGIC, read_png
from brainseg.formats.tiff import TIFF_MAGICS, read_tiff

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
    reader = {"PNG": read_png, "TIFF": read_tiff}.get(kind)
    array = reader(data, notes) if reader else read_pillow(data, kind, notes)
    return np.ascontiguousarray(array), tuple(notes.warnings)


def write_png(array: NDArray[Any]) -> bytes:
    """Encode a `(H, W)` uint8 or uint16 array as a grey PNG. The same array gives the same bytes."""
    if array.ndim != 2 or array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"cannot write {array.dtype} {array.shape} as a grey PNG")
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(array), level=6))


def _kind(data: bytes, notes: Notes) -> str:
    if data.startswith(PNG_MAGIC):
        return "PNG"
    if data[:4] in TIFF_MAGICS:
        return "TIFF"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise unexpected(data, Code.NOT_IMAGE, "PNG, TIFF, JPEG or GIF", notes)
