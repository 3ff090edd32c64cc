"""DICOM pixels: the pixel data of one file -> its frames as numbers, judged before anything is allocated or decoded.

A compressed frame says its own size once more; a codec is only let loose on one that says what the header says. Meaning of
the attributes: DICOM PS3.3 C.7.6.3; coding: PS3.5 section 8 and annexes A and G (RLE); frame headers: ITU-T T.81, T.87, T.800.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import MAX_VOXELS, Notes
from brainseg.formats import dicom_elements as tags
from brainseg.formats.dicom_elements import File

MAX_FRAMES = 65_536

_START_OF_FRAME = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xF7))
RLE_HEADER_BYTES = 64
RLE_SLACK_BYTES = 2
"""How much a segment may unpack to beyond its pixels: some encoders pad."""


@dataclass(frozen=True)
class Plan:
    """How the frames of a file are stored: `frames` times `(rows, columns)` of `dtype`, of which `bits` count."""

    frames: int
    rows: int
    columns: int
    dtype: np.dtype[Any]
    bits: int
    inverted: bool

    @property
    def voxels(self) -> int:
        """How many values the file claims."""
        return self.frames * self.rows * self.columns

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame, uncompressed."""
        return self.rows * self.columns * self.dtype.itemsize


def judge_pixels(file: File, notes: Notes) -> Plan:
    """Decide from the header what the pixels are, and whether the file can hold them. Raises ScanError with the reason."""
    if tags.PIXELS not in file.elements:
        other = tags.FLOAT_PIXELS in file.elements or tags.DOUBLE_PIXELS in file.elements
        code, found = (Code.UNSUPPORTED, "floating-point pixels") if other else (Code.NOT_IMAGE, "no pixels")
        raise notes.error(code, f"found {found}, expected an MR image with integer pixels")
    frames, rows, columns = _shape(file, notes)
    _require_grey(file, notes)
    dtype, bits = _kind(file, notes)
    inverted = file.elements.text(tags.PHOTOMETRIC) == "MONOCHROME1"
    plan = Plan(frames, rows, columns, dtype, bits, inverted)
    if inverted:
        notes.warn(Code.INVERTED, "found the lowest value shown as white; values were inverted, so that bright is high")
    if file.syntax.lossy:
        notes.warn(Code.LOSSY, f"found pixels compressed with loss ({file.syntax.name}); they were decoded as they are")
    _require_data(file, plan, notes)
    return plan


def read_frame(file: File, plan: Plan, index: int, notes: Notes) -> NDArray[Any]:
    """Decode one frame to `(rows, columns)` of the plan's type in native order, bright is high."""
    element = file.elements[tags.PIXELS]
    if element.fragments is None:
        kind = plan.dtype.newbyteorder(element.order)  # type: ignore[arg-type]
        if plan.dtype.itemsize == 1 and element.order == ">" and element.vr == "OW":
            stored = _swapped_bytes(element.value, plan, index)
        else:
            count, offset = plan.rows * plan.columns, index * plan.frame_bytes
            stored = np.frombuffer(element.value, kind, count, offset)
        frame = stored.reshape(plan.rows, plan.columns).astype(plan.dtype)
    else:
        frame = _decoded(_coded(element.fragments, plan.frames, index), file, plan, notes).astype(plan.dtype)
    _clear_unused_bits(frame, plan)
    if plan.inverted:
        np.subtract(_sum_of_extremes(plan), frame, out=frame, casting="unsafe")
    return frame


def _shape(file: File, notes: Notes) -> tuple[int, int, int]:
    rows, columns = file.elements.whole(tags.ROWS), file.elements.whole(tags.COLUMNS)
    frames = file.elements.whole(tags.FRAMES) if tags.FRAMES in file.elements else 1
    if not rows or not columns or frames is None or min(rows, columns, frames) < 1:
        raise notes.error(Code.BAD_HEADER, "found no Rows, Columns or NumberOfFrames of at least 1")
    if frames > MAX_FRAMES or rows * columns * frames > MAX_VOXELS:
        found = f"{frames}x{rows}x{columns}"
        raise notes.error(Code.TOO_LARGE, f"found a claim of {found} voxels, expected at most {MAX_VOXELS:,}")
    return frames, rows, columns


def _require_grey(file: File, notes: Notes) -> None:
    samples, photometric = file.elements.whole(tags.SAMPLES), file.elements.text(tags.PHOTOMETRIC)
    if samples not in (None, 1) or (photometric and not photometric.startswith("MONOCHROME")):
        raise notes.error(Code.NOT_GREY, "found pixels in colour or of a palette, expected grey values")


def _kind(file: File, notes: Notes) -> tuple[np.dtype[Any], int]:
    """The stored type and how many of its bits count: BitsAllocated, BitsStored, HighBit, PixelRepresentation."""
    numbers = [file.elements.whole(tag) for tag in (tags.ALLOCATED, tags.STORED, tags.HIGH_BIT, tags.SIGNED)]
    allocated, stored, high, signed = numbers
    if allocated is None or signed not in (0, 1):
        raise notes.error(Code.BAD_HEADER, "found no BitsAllocated or PixelRepresentation, expected both")
    stored = allocated if stored is None else stored
    if allocated not in (8, 16, 32):
        raise notes.error(Code.UNSUPPORTED, f"found {allocated} bits a pixel, expected 8, 16 or 32")
    if not 1 <= stored <= allocated or high not in (None, stored - 1):
        found = f"{stored} bits, the highest at {high}, of {allocated} allocated"
        raise notes.error(Code.BAD_HEADER, f"found pixels of {found}, expected them in the lowest bits")
    return np.dtype(f"{'i' if signed else 'u'}{allocated // 8}"), stored


def _require_data(file: File, plan: Plan, notes: Notes) -> None:
    """Compare what the header claims with what is there: bytes of plain pixels, fragments of compressed ones."""
    fragments = file.elements[tags.PIXELS].fragments
    if (fragments is None) != (file.syntax.codec == ""):
        found = f"{'plain' if fragments is None else 'compressed'} pixels where the transfer syntax says {file.syntax.name}"
        raise notes.error(Code.CORRUPT, f"found {found}")
    if fragments is None:
        found_bytes, expected = len(file.elements[tags.PIXELS].value), plan.frames * plan.frame_bytes
        if found_bytes < expected:
            claim = f"{plan.frames}x{plan.rows}x{plan.columns} pixels of {plan.dtype.itemsize * 8} bits"
            raise notes.error(Code.TRUNCATED, f"found {found_bytes} bytes of pixels, expected {expected} for {claim}")
        if found_bytes > expected + expected % 2:
            notes.warn(Code.TRAILING_DATA, f"found {found_bytes - expected} bytes of pixels too many; they were ignored")
    elif len(fragments) < plan.frames + 1:
        found = f"{max(len(fragments) - 1, 0)} fragments of compressed pixels"
        raise notes.error(Code.TRUNCATED, f"found {found}, expected at least {plan.frames}, one a frame")


def _swapped_bytes(value: memoryview, plan: Plan, index: int) -> NDArray[np.uint8]:
    """8-bit pixels coded as big-endian 16-bit words: neighbours change places (PS3.5 section 7.3)."""
    size = plan.rows * plan.columns
    words = np.frombuffer(value, np.uint8, len(value) // 2 * 2).reshape(-1, 2)[:, ::-1].reshape(-1)
    return words[index * size : (index + 1) * size]


def _clear_unused_bits(frame: NDArray[Any], plan: Plan) -> None:
    """Drop what old files keep above the stored bits (overlays), and extend the sign from the highest of them."""
    unused = plan.dtype.itemsize * 8 - plan.bits
    if unused:
        np.left_shift(frame, unused, out=frame)
        np.right_shift(frame, unused, out=frame)


def _sum_of_extremes(plan: Plan) -> Any:
    """Lowest plus highest value that the stored bits can say: x taken from it is x inverted."""
    return plan.dtype.type(-1 if plan.dtype.kind == "i" else (1 << plan.bits) - 1)


# --- compressed frames ----------------------------------------------------------------------------------------------


def _coded(fragments: tuple[memoryview, ...], frames: int, index: int) -> bytes:
    """The bytes of one frame: all fragments after the table of offsets, or the one in the frame's place."""
    table, *rest = fragments
    if frames == 1:
        return b"".join(rest)
    if len(rest) == frames:
        return bytes(rest[index])
    starts = np.frombuffer(table, "<u4", len(table) // 4).tolist()
    places = np.cumsum([0, *(len(part) + 8 for part in rest)]).tolist()
    stop = starts[index + 1] if index + 1 < len(starts) else places[-1]
    if len(starts) != frames:
        return b""
    return b"".join(part for part, at in zip(rest, places[:-1], strict=True) if starts[index] <= at < stop)


def _decoded(data: bytes, file: File, plan: Plan, notes: Notes) -> NDArray[Any]:
    """Decode one compressed frame whose own header agrees with the file's."""
    name = file.syntax.name
    if file.syntax.codec != "rle":
        claim, bits = (_jpeg2000_claim if file.syntax.codec == "jpeg2000" else _jpeg_claim)(data)
        if claim is None:
            raise notes.error(Code.CORRUPT, f"found a frame that is no {name}; fetch the file again")
        if claim != (plan.rows, plan.columns, 1) or not 1 <= bits <= plan.dtype.itemsize * 8:
            found = f"a {name} frame of {claim[0]}x{claim[1]} pixels, {claim[2]} samples of {bits} bits"
            expected = f"{plan.rows}x{plan.columns}, 1 sample of at most {plan.dtype.itemsize * 8} bits"
            raise notes.error(Code.CORRUPT, f"found {found}, expected {expected} as the header says")
    try:
        frame: NDArray[Any] = _DECODERS[file.syntax.codec](data, plan)
    except Exception as error:  # a foreign decoder on foreign bytes; what it says may quote them
        raise notes.error(Code.CORRUPT, f"found a {name} frame that cannot be decoded; fetch the file again") from error
    if frame.shape != (plan.rows, plan.columns) or frame.dtype.kind not in "iu":
        raise notes.error(Code.CORRUPT, f"found a {name} frame that decodes to {frame.dtype} {frame.shape}")
    return frame


def _jpeg_claim(data: bytes) -> tuple[tuple[int, int, int] | None, int]:
    """(rows, columns, samples) and bits of a JPEG or JPEG-LS frame header; None where none is found."""
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _START_OF_FRAME and at + 10 <= len(data):
            bits, rows, columns, samples = struct.unpack_from(">BHHB", data, at + 4)
            return (rows, columns, samples), bits
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return None, 0


def _jpeg2000_claim(data: bytes) -> tuple[tuple[int, int, int] | None, int]:
    """(rows, columns, samples) and bits of a JPEG 2000 codestream, bare or in the boxes of a JP2 file; None without one."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or at + 43 > len(data) or not (at == 0 or data[4:8] == b"jP  "):
        return None, 0
    width, height, left, top = struct.unpack_from(">IIII", data, at + 8)
    samples, depth = struct.unpack_from(">HB", data, at + 40)
    return (height - top, width - left, samples), (depth & 0x7F) + 1


def _decode_rle(data: bytes, plan: Plan) -> NDArray[Any]:
    """PackBits, one segment a byte of the pixels, the most significant first; each ends at its own size."""
    count, *starts = struct.unpack_from("<16I", data)
    if count != plan.dtype.itemsize:
        raise ValueError(f"{count} segments")
    stops = [*starts[1:count], len(data)]
    size = plan.rows * plan.columns
    planes = np.empty((size, count), np.uint8)
    for place, (start, stop) in enumerate(zip(starts[:count], stops, strict=True)):
        if not RLE_HEADER_BYTES <= start < stop <= len(data):
            raise ValueError("segment out of place")
        planes[:, place] = _unpacked(data[start:stop], size)
    frame: NDArray[Any] = planes.view(plan.dtype.newbyteorder(">")).reshape(plan.rows, plan.columns)
    return frame


def _unpacked(packed: bytes, size: int) -> NDArray[np.uint8]:
    plane = np.frombuffer(imagecodecs.packbits_decode(packed, out=size + RLE_SLACK_BYTES), np.uint8)
    if plane.size < size:
        raise ValueError("segment too short")
    return plane[:size]


# jpeg8_decode is libjpeg-turbo alone: jpeg_decode tries liblj92 next, which a damaged frame can bring down.
_DECODERS: Mapping[str, Callable[[bytes, Plan], NDArray[Any]]] = {
    "rle": _decode_rle,
    "jpeg": lambda data, plan: imagecodecs.jpeg8_decode(data),
    "jpegls": lambda data, plan: imagecodecs.jpegls_decode(data),
    "jpeg2000": lambda data, plan: imagecodecs.jpeg2k_decode(data),
}
