"""JPEG and GIF, by way of Pillow, which is shown no more of a JPEG than it takes to decode the pixels.

Its texts, its EXIF and further pictures behind the first are judged or dropped here: Pillow would write their values to the
log. Layout of the segments: ITU T.81, annex B; Exif 2.3; CIPA DC-007 for several pictures in one file.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainseg.errors import Code, ScanError
from brainseg.formats import Notes
from brainseg.formats.pixels import grey_palette, require_size, without_alpha
from brainseg.formats.tiff import note_rotation

MAX_JPEG_SCANS = 100
"""Passes over the picture in a progressive JPEG: encoders write about ten, and a few bytes can ask for a thousand."""

_ENDS = {"JPEG": b"\xff\xd9", "GIF": b"\0;"}
_LAST_STARTS = {"JPEG": b"\xff\xda", "GIF": b"GIF8"}
"""After the last of these the end must come: a thumbnail inside a JPEG has an end of its own."""
_START_OF_SCAN, _ADOBE, _COMMENT = 0xDA, 0xEE, 0xFE
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xDA))
_EXIF, _SEVERAL = b"Exif\0\0", b"MPF\0"


def read_pillow(data: bytes, kind: str, notes: Notes) -> NDArray[Any]:
    """Decode a JPEG or GIF, whichever `kind` says."""
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise notes.error(Code.TOO_LARGE, f"found a JPEG of over {MAX_JPEG_SCANS} passes, expected about ten at most")
    end = data.rfind(_ENDS[kind]) + len(_ENDS[kind])
    ended = end > max(data.rfind(_LAST_STARTS[kind]), len(_ENDS[kind]) - 1)
    lean, exif = _lean_jpeg(data, notes) if kind == "JPEG" else (data, b"")
    try:
        with Image.open(io.BytesIO(lean), formats=(kind,)) as image:
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
    if exif:
        note_rotation(exif, notes)
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
    return np.asarray(image)


def _lean_jpeg(data: bytes, notes: Notes) -> tuple[bytes, bytes]:
    """A JPEG without its comments and application segments (but JFIF's and Adobe's, which say what colours mean); its EXIF."""
    kept, exif, at = [data[:2]], b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        marker = data[at + 1]
        size = 0 if marker in _WITHOUT_LENGTH else int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 1 if marker == 0xFF else at + 2 + size
        body = data[at + 4 : end]
        if body.startswith(_SEVERAL):
            raise notes.error(Code.MULTI_PAGE, "found several pictures in one JPEG, expected a single one")
        if body.startswith(_EXIF):
            exif = body[len(_EXIF) :] or b"\0"
        if marker != _COMMENT and not (0xE1 <= marker <= 0xEF and marker != _ADOBE):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), exif
