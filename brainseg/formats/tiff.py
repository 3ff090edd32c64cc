"""TIFF: its directories, judged before libtiff (by way of imagecodecs) decodes the one page they must hold.

libtiff reads the first page of many, follows what a directory claims, and leaves inverted grey as it is; so pages are
counted, claims compared with the file, and photometry applied here. Tags: TIFF 6.0 and the BigTIFF design note.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats import Notes
from brainseg.formats.pixels import require_size, without_alpha

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION = 254, 256, 257, 258, 262, 274
STRIP_OFFSETS, SAMPLES, STRIP_BYTES, PLANAR, SOFTWARE, COLOUR_MAP = 273, 277, 279, 284, 305, 320
ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, DEPTH = 278, 322, 323, 324, 325, 338, 32997
_WANTED = frozenset(
    {
        *(SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION, STRIP_OFFSETS, SAMPLES, STRIP_BYTES, PLANAR, COLOUR_MAP),
        *(ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, EXTRA_SAMPLES, DEPTH, SOFTWARE),
    }
)
TIFFFILE = b"tifffile"
_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 16: "u8"}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6

MAX_PAGES = 4096
MAX_TAG_VALUES = 1 << 20
"""Values of one tag: a strip for every row of the tallest picture. Tags can share bytes, so a small file can claim many."""

Tags = Mapping[int, NDArray[np.uint64]]


def read_tiff(data: bytes, notes: Notes) -> NDArray[Any]:
    """Decode the single page of a TIFF or BigTIFF to `(H, W)` or `(H, W, C)`, black as zero, alpha dropped.

    Raises ScanError MULTI_PAGE, TRUNCATED, TOO_LARGE, CORRUPT, NOT_GREY or UNSUPPORTED; appends ALPHA, INVERTED, PALETTE
    and EXIF_ROTATION to the notes.
    """
    index, tags = _single_page(data, notes)
    _judge(tags, len(data), notes)
    array = _decode(data, index, tags, notes)
    if _one(tags, ORIENTATION, 1) != 1:
        text = f"found orientation {_one(tags, ORIENTATION, 1)}; the pixels were left as stored, where their mask lies"
        notes.warn(Code.EXIF_ROTATION, text)
    if array.ndim == 3 and set(tags.get(EXTRA_SAMPLES, np.zeros(0)).tolist()) & {1, 2} and array.shape[2] in (2, 4):
        array = without_alpha(array, notes)
    return _plain_type(_black_as_zero(array, tags, notes), notes)


def note_rotation(exif: bytes, notes: Notes) -> None:
    """Note what a block of EXIF, which is a TIFF without a picture, says of turning; never what else it says."""
    turn = None
    if exif[:4] in TIFF_MAGICS:
        with suppress(ScanError):
            turn = _one(next(_directories(exif, notes), {}), ORIENTATION, 1)
    if turn is None or not 1 <= turn <= 8:
        notes.warn(Code.EXIF_ROTATION, "found EXIF data that cannot be read; the pixels were left as stored")
    elif turn != 1:
        text = f"found EXIF orientation {turn}; the pixels were left as stored, where their mask lies"
        notes.warn(Code.EXIF_ROTATION, text)


def _single_page(data: bytes, notes: Notes) -> tuple[int, Tags]:
    """The one page and its place in the file; reduced-resolution copies of it (NewSubfileType bit 0) do not count."""
    found: list[tuple[int, Tags]] = []
    for place, tags in enumerate(_directories(data, notes)):
        if place == MAX_PAGES:
            raise notes.error(Code.MULTI_PAGE, f"found over {MAX_PAGES} pages, expected 1; a stack is stored one slice a file")
        if not _one(tags, SUBFILE, 0) & 1:
            found.append((place, tags))
    if len(found) != 1:
        raise notes.error(Code.MULTI_PAGE, f"found {len(found)} pages, expected 1; a stack is stored one slice a file")
    return found[0]


def _directories(data: bytes, notes: Notes) -> Iterator[Tags]:
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    head, at_pointer = ("QQ", 8) if big else ("HI", 4)
    count_kind, pointer = order + head[0], order + head[1]
    entry_bytes = 20 if big else 12
    seen: set[int] = set()
    try:
        at = struct.unpack_from(pointer, data, at_pointer)[0]
        while at:
            if at in seen:
                raise notes.error(Code.CORRUPT, "found a TIFF directory that leads back to itself, expected a chain that ends")
            seen.add(at)
            count = struct.unpack_from(count_kind, data, at)[0]
            first = at + struct.calcsize(count_kind)
            yield _tags(data, first, min(count, 4096), order, big, notes)
            at = struct.unpack_from(pointer, data, first + count * entry_bytes)[0]
    except (struct.error, OverflowError) as error:
        raise notes.error(Code.TRUNCATED, f"found a TIFF directory beyond the file's {len(data)} bytes") from error


def _tags(data: bytes, first: int, count: int, order: str, big: bool, notes: Notes) -> Tags:
    tags: dict[int, NDArray[np.uint64]] = {}
    layout, entry_bytes, inline = (order + "HHQ", 20, 8) if big else (order + "HHI", 12, 4)
    for at in range(first, first + count * entry_bytes, entry_bytes):
        tag, kind, values = struct.unpack_from(layout, data, at)
        if tag not in _WANTED or kind not in _TYPES:
            continue
        dtype = np.dtype(order + _TYPES[kind])
        where = at + struct.calcsize(layout)
        if values * dtype.itemsize > inline:
            where = struct.unpack_from(order + ("Q" if big else "I"), data, where)[0]
        if where + values * dtype.itemsize > len(data):
            raise struct.error
        if tag == SOFTWARE:
            values = min(values, len(TIFFFILE))
        if values > MAX_TAG_VALUES:
            raise notes.error(Code.TOO_LARGE, f"found {values:,} values of TIFF tag {tag}, expected at most {MAX_TAG_VALUES:,}")
        tags[tag] = np.frombuffer(data, dtype, values, where).astype(np.uint64)
    return tags


def _one(tags: Tags, tag: int, default: int) -> int:
    return int(tags[tag][0]) if tag in tags and tags[tag].size else default


def _judge(tags: Tags, size: int, notes: Notes) -> None:
    """Compare what the page claims with what the file can hold."""
    samples, bits = _one(tags, SAMPLES, 1), int(max(tags.get(BITS, np.zeros(0)), default=8))
    if samples < 1:
        raise notes.error(Code.CORRUPT, "found a TIFF page of pixels without samples")
    require_size(_one(tags, WIDTH, 0), _one(tags, HEIGHT, 0), samples, bits, notes)
    require_size(_one(tags, TILE_WIDTH, 1), _one(tags, TILE_HEIGHT, 1), samples, bits, notes)
    if _one(tags, DEPTH, 1) != 1:
        raise notes.error(Code.MULTI_PAGE, f"found a volume of {_one(tags, DEPTH, 1)} planes, expected a single picture")
    photometric = _one(tags, PHOTOMETRIC, _BLACK_IS_ZERO)
    if photometric == _CMYK:
        raise notes.error(Code.NOT_GREY, "found a CMYK picture, expected grey values")
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR):
        raise notes.error(Code.UNSUPPORTED, f"found TIFF photometric interpretation {photometric}, expected grey or RGB")
    _judge_places(tags, size, notes)


def _judge_places(tags: Tags, size: int, notes: Notes) -> None:
    """Every strip or tile must be there and lie within the file: libtiff leaves what is not there black."""
    starts, lengths = (TILE_OFFSETS, TILE_BYTES) if TILE_OFFSETS in tags else (STRIP_OFFSETS, STRIP_BYTES)
    if starts not in tags or not tags[starts].size:
        raise notes.error(Code.CORRUPT, "found a TIFF page that does not say where its pixels are")
    expected = _num_places(tags, tiled=starts == TILE_OFFSETS)
    if len(tags[starts]) != expected:
        raise notes.error(Code.CORRUPT, f"found a TIFF page of {len(tags[starts])} strips or tiles, expected {expected}")
    if lengths not in tags:
        return
    if len(tags[lengths]) != expected or not tags[lengths].all():
        raise notes.error(Code.CORRUPT, "found a TIFF page with strips or tiles without a length, expected one for each")
    end = max(int(s) + int(n) for s, n in zip(tags[starts], tags[lengths], strict=True))
    if end > size:
        raise notes.error(Code.TRUNCATED, f"found {size} bytes, expected {end} for all the pixels; fetch the file again")


def _num_places(tags: Tags, *, tiled: bool) -> int:
    """How many strips or tiles the page takes (TIFF 6.0, sections 3 and 15); as many again for each plane stored apart."""
    width, height = _one(tags, WIDTH, 0), _one(tags, HEIGHT, 0)
    planes = _one(tags, SAMPLES, 1) if _one(tags, PLANAR, 1) == 2 else 1
    if tiled:
        across, down = max(_one(tags, TILE_WIDTH, 1), 1), max(_one(tags, TILE_HEIGHT, 1), 1)
        return planes * -(-width // across) * -(-height // down)
    return planes * -(-height // min(max(_one(tags, ROWS_PER_STRIP, height), 1), height))


def _decode(data: bytes, index: int, tags: Tags, notes: Notes) -> NDArray[Any]:
    try:
        array: NDArray[Any] = imagecodecs.tiff_decode(data, index=index)
    except Exception as error:  # a foreign decoder on foreign bytes
        raise notes.error(Code.CORRUPT, "found a TIFF page that cannot be decoded; fetch the file again") from error
    samples = _one(tags, SAMPLES, 1)
    if samples > 1 and _one(tags, PLANAR, 1) == 2:
        array = np.moveaxis(array, 0, -1)
    expected = (_one(tags, HEIGHT, 0), _one(tags, WIDTH, 0), *((samples,) if samples > 1 else ()))
    if array.shape != expected:
        raise notes.error(Code.UNSUPPORTED, f"found a TIFF page decoded to {array.shape}, expected {expected}")
    return array


def _black_as_zero(array: NDArray[Any], tags: Tags, notes: Notes) -> NDArray[Any]:
    """Apply the photometric interpretation: invert where zero is white, look palettes up."""
    photometric = _one(tags, PHOTOMETRIC, _BLACK_IS_ZERO)
    if photometric == _PALETTE:
        return _looked_up(array, tags, notes)
    if photometric != _WHITE_IS_ZERO:
        return array
    if array.dtype.kind not in "ub":
        raise notes.error(Code.UNSUPPORTED, f"found {array.dtype} pixels with zero as white, which has no definition")
    if array.dtype == np.bool_ and bytes(tags.get(SOFTWARE, np.zeros(0)).astype(np.uint8)).startswith(TIFFFILE):
        notes.warn(Code.INVERTED, "found 1-bit pixels of tifffile, which declares zero as white but stores it as black")
        return array
    notes.warn(Code.INVERTED, "found zero as white; values were inverted, so that zero is black")
    if array.dtype == np.bool_:
        return ~array
    top = (1 << min(_one(tags, BITS, 8), array.dtype.itemsize * 8)) - 1
    inverted: NDArray[Any] = array.dtype.type(top) - array
    return inverted


def _looked_up(array: NDArray[Any], tags: Tags, notes: Notes) -> NDArray[Any]:
    colours = tags.get(COLOUR_MAP, np.zeros(0, np.uint64))
    if colours.size % 3 or array.ndim != 2 or array.dtype.kind != "u" or int(array.max()) >= colours.size // 3:
        raise notes.error(Code.CORRUPT, "found palette indices without a palette that covers them")
    shift = 8 if (colours > 255).any() else 0  # of 16 bits by the specification; some writers fill 8
    rgb = (colours.reshape(3, -1) >> np.uint64(shift)).astype(np.uint8)
    notes.warn(Code.PALETTE, "found palette indices; they were replaced by the palette's values")
    grey = bool((rgb == rgb[:1]).all())
    return rgb[0][array] if grey else np.moveaxis(rgb[:, array], 0, -1)


def _plain_type(array: NDArray[Any], notes: Notes) -> NDArray[Any]:
    """1-bit as uint8 0 and 1, half and double floats as float32; everything else as stored."""
    if array.dtype.kind not in "biuf":
        raise notes.error(Code.BAD_DATATYPE, f"found {array.dtype} pixels, expected real numbers")
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    with np.errstate(over="ignore"):
        return array.astype(np.float32) if array.dtype in (np.float16, np.float64) else array
