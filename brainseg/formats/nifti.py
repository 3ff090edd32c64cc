"""NIfTI: the bytes of a `.nii` or `.nii.gz` -> a volume and its grid, and a mask back into a `.nii.gz`.

An own header parse and libdeflate take a quarter to an eighth of nibabel's time for a BraTS volume; nibabel is the oracle
of the tests. The header is judged before anything of the claimed size is allocated. Layout of both headers, meaning of
the two affines and of the quaternion: nifti1.h and nifti2.h of the NIfTI Data Format Working Group.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import MAX_BYTES, MAX_VOXELS, Decoded, Notes, require_bytes, unexpected
from brainseg.formats.gzipped import GZIP_MAGIC, first_bytes, pack, unpack
from brainseg.formats.nifti_grid import read_grid
from brainseg.geometry import Grid

Order = Literal["<", ">"]

BLOCK_VOXELS = 1 << 20
MAX_SIDE = 32_767
"""NIfTI-1 counts voxels along an axis in 16 bits; a mask could not be written for a volume that is longer."""
MAX_OFFSET_BYTES = 1 << 24
"""Header extensions before the voxels longer than this are a damaged `vox_offset`."""

_HEADER_BYTES = {348: 1, 540: 2}
_DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_UNUSABLE = {0: "none", 1: "1-bit", 32: "complex", 128: "RGB", 1536: "128-bit float", 1792: "complex", 2304: "RGBA"}
_FIELDS_1 = {
    "sizeof_hdr": ("i4", 0),
    "dim": ("8i2", 40),
    "datatype": ("i2", 70),
    "bitpix": ("i2", 72),
    "pixdim": ("8f4", 76),
    "vox_offset": ("f4", 108),
    "slope": ("f4", 112),
    "inter": ("f4", 116),
    "units": ("u1", 123),
    "qform_code": ("i2", 252),
    "sform_code": ("i2", 254),
    "quatern": ("3f4", 256),
    "qoffset": ("3f4", 268),
    "srow": ("(3,4)f4", 280),
    "magic": ("S4", 344),
}
_FIELDS_2 = {
    "sizeof_hdr": ("i4", 0),
    "magic": ("S8", 4),
    "datatype": ("i2", 12),
    "bitpix": ("i2", 14),
    "dim": ("8i8", 16),
    "pixdim": ("8f8", 104),
    "vox_offset": ("i8", 168),
    "slope": ("f8", 176),
    "inter": ("f8", 184),
    "qform_code": ("i4", 344),
    "sform_code": ("i4", 348),
    "quatern": ("3f8", 352),
    "qoffset": ("3f8", 376),
    "srow": ("(3,4)f8", 400),
    "units": ("i4", 500),
}


@dataclass(frozen=True)
class _Plan:
    """What a judged header promises: where the voxels lie and what they mean."""

    grid: Grid
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    header_bytes: int
    order: Order

    @property
    def voxels(self) -> int:
        """How many there are."""
        return int(np.prod(self.grid.shape, dtype=np.int64))

    @property
    def is_scaled(self) -> bool:
        """Whether values are computed, to float32, from the stored ones."""
        return (self.slope, self.inter) != (1.0, 0.0)

    @property
    def decoded_bytes(self) -> int:
        """What the array that is handed out takes."""
        return self.voxels * (4 if self.is_scaled else self.dtype.itemsize)

    @property
    def end(self) -> int:
        """Bytes from the start of the (unpacked) file to the end of its voxels."""
        return self.offset + self.dtype.itemsize * self.voxels


def read_nifti(data: bytes, name: str, at_most: int = MAX_BYTES) -> Decoded:
    """Decode a NIfTI-1 or -2 single file, packed or not, of either byte order, to no more than `at_most` bytes.

    The array is `(D, H, W)` = the file's `(k, j, i)` in its stored type, a view of the unpacked bytes; float32 where the
    header has a slope or intercept other than 1 and 0. The affine is the sform, else the qform, else (NO_ORIENTATION)
    the pixdim along RAS+. Raises ScanError with the reason.
    """
    notes = Notes(name)
    require_bytes(data, notes)
    packed = data.startswith(GZIP_MAGIC)
    _compare_name(packed, notes)
    head = first_bytes(data, 540, notes) if packed else data[:540]
    if not head:
        raise notes.error(Code.EMPTY_FILE, "found gzip data of 0 bytes, expected an image; fetch the file again")
    plan = _judge(head, data, notes)
    if max(plan.decoded_bytes, plan.end) > at_most:
        found = f"a claim of {plan.grid.describe()} of {plan.dtype.itemsize} bytes each"
        raise notes.error(Code.TOO_LARGE, f"found {found}, expected at most {at_most:,} bytes, by the size of the scan's files")
    content = unpack(data, plan.end, notes) if packed else _whole(data, plan, notes)
    _check_extensions(content, plan, notes)
    stored = np.frombuffer(content, plan.dtype, plan.voxels, plan.offset).reshape(plan.grid.shape)
    native = stored if plan.dtype.isnative else stored.astype(plan.dtype.newbyteorder("="))
    return Decoded(_scaled(native, plan), plan.grid, tuple(notes.warnings))


def write_nifti(array: NDArray[Any], grid: Grid) -> bytes:
    """Encode a `(D, H, W)` array as the bytes of a `.nii.gz`: NIfTI-1, sform = the grid's affine, code 1 (scanner).

    The same array and grid give the same bytes (no time, no name inside). An unknown affine is written as both codes 0.
    """
    dtype = np.dtype(np.uint8) if array.dtype == np.bool_ else array.dtype.newbyteorder("<")
    codes = [code for code, kind in _DATATYPES.items() if np.dtype(kind).newbyteorder("<") == dtype]
    if not codes or array.shape != grid.shape or max(array.shape) > MAX_SIDE:
        raise ValueError(f"cannot write {array.dtype} {array.shape} on the grid {grid.shape} as NIfTI-1")
    header = np.zeros((), _layout(1, "<"))
    header["sizeof_hdr"], header["magic"], header["vox_offset"] = 348, b"n+1", 352
    header["dim"] = (3, *array.shape[::-1], 1, 1, 1, 1)
    header["datatype"], header["bitpix"] = codes[0], dtype.itemsize * 8
    header["pixdim"], header["slope"] = 1, 1
    if grid.matrix is not None and grid.spacing_mm is not None:
        header["srow"], header["sform_code"], header["units"] = grid.matrix[:3], 1, 2
        header["pixdim"][1:4] = grid.spacing_mm[::-1]
    voxels = np.ascontiguousarray(array, dtype).reshape(-1)
    return pack(header.tobytes() + bytes(4), voxels.view(np.uint8))


@functools.cache
def _layout(version: int, order: Order) -> np.dtype[Any]:
    fields = _FIELDS_1 if version == 1 else _FIELDS_2
    formats = [np.dtype(kind).newbyteorder(order) for kind, _ in fields.values()]
    size = 348 if version == 1 else 540
    return np.dtype({"names": list(fields), "formats": formats, "offsets": [at for _, at in fields.values()], "itemsize": size})


def _compare_name(packed: bool, notes: Notes) -> None:
    lower = notes.name.lower()
    if packed == lower.endswith(".gz") or not lower.endswith((".gz", ".nii")):
        return
    found, expected = ("gzip data", "plain NIfTI") if packed else ("plain NIfTI", "gzip data")
    notes.warn(Code.WRONG_EXTENSION, f"found {found}, its name promises {expected}; it was read as what it is")


# --- the header: from its bytes to a plan ---------------------------------------------------------------------------


def _judge(head: bytes, data: bytes, notes: Notes) -> _Plan:
    """Decide from the first (unpacked) bytes whether the file can be read, before anything is allocated for it."""
    header = _parse(head, data, notes)
    shape = _shape(header["dim"].tolist(), notes)
    dtype = _dtype(header, notes)
    offset = _offset(header, notes)
    slope, inter = _scale(float(header["slope"]), float(header["inter"]), notes)
    grid = read_grid(header, shape, notes)
    return _Plan(grid, dtype, offset, slope, inter, header.dtype.itemsize, _order(header))


def _parse(head: bytes, data: bytes, notes: Notes) -> np.void:
    """Find version and byte order by `sizeof_hdr`, and require the magic of a single file."""
    orders: tuple[Order, Order] = ("<", ">")
    for order in orders:
        version = _HEADER_BYTES.get(int(np.frombuffer(head, order + "i4", 1)[0])) if len(head) >= 4 else None
        if version is None:
            continue
        layout = _layout(version, order)
        if len(head) < layout.itemsize:
            raise notes.error(Code.TRUNCATED, f"found {len(head)} bytes, expected a header of {layout.itemsize}")
        header: np.void = np.frombuffer(head, layout, 1)[0]
        _require_magic(bytes(header["magic"]), version, notes)
        return header
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2"):
        raise notes.error(Code.BAD_HEADER, "found a sizeof_hdr that is neither 348 nor 540 in either byte order")
    if head.startswith(GZIP_MAGIC):
        raise notes.error(Code.BAD_MAGIC, "found gzip data inside gzip data, expected NIfTI; unpack it once")
    raise unexpected(head if data.startswith(GZIP_MAGIC) else data, Code.NOT_NIFTI, "NIfTI", notes)


def _require_magic(magic: bytes, version: int, notes: Notes) -> None:
    expected = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    if magic == expected:
        return
    if magic[:3] in (b"ni1", b"ni2"):
        pair = "the header of a .hdr/.img pair, whose voxels are in another file"
        code = Code.MISSING_FILE if notes.name.lower().endswith((".hdr", ".hdr.gz")) else Code.BAD_MAGIC
        raise notes.error(code, f"found {pair}, expected a single file; convert it to .nii.gz")
    raise notes.error(Code.BAD_MAGIC, "found a header of the right size without NIfTI's magic (Analyze 7.5, or damaged)")


def _shape(dim: list[int], notes: Notes) -> tuple[int, int, int]:
    """Return `(D, H, W)` of `dim`, which is counted: `[n, i, j, k, t, ...]`."""
    rank, sizes = dim[0], dim[1 : dim[0] + 1]
    if not 1 <= rank <= 7 or min(sizes) < 1:
        raise notes.error(Code.BAD_HEADER, f"found dim {dim}, expected 1 to 7 dimensions of at least 1")
    if rank < 3 or max(sizes[3:], default=1) > 1:
        found = "x".join(str(n) for n in sizes)
        raise notes.error(Code.NOT_3D, f"found {found} ({rank} dimensions), expected one volume of 3; split or stack it first")
    if sizes[0] * sizes[1] * sizes[2] > MAX_VOXELS or max(sizes[:3]) > MAX_SIDE:
        found = "x".join(str(n) for n in sizes[:3])
        most = f"at most {MAX_VOXELS:,}, and {MAX_SIDE:,} along an axis"
        raise notes.error(Code.TOO_LARGE, f"found a claim of {found} voxels, expected {most}")
    return sizes[2], sizes[1], sizes[0]


def _dtype(header: np.void, notes: Notes) -> np.dtype[Any]:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in _DATATYPES:
        kind = _UNUSABLE.get(code, "unknown")
        raise notes.error(
            Code.BAD_DATATYPE, f"found datatype {code} ({kind}), expected real numbers of one of {sorted(_DATATYPES)}"
        )
    native = np.dtype(_DATATYPES[code])
    stored = native.newbyteorder(_order(header))
    if bits != native.itemsize * 8:
        notes.warn(Code.BAD_HEADER, f"found bitpix {bits} with datatype {code}; the datatype was believed")
    return native if stored.isnative else stored


def _order(header: np.void) -> Order:
    """Byte order of the file: `<` or `>`."""
    return ">" if header.dtype["sizeof_hdr"] == np.dtype(">i4") else "<"


def _offset(header: np.void, notes: Notes) -> int:
    found, least = float(header["vox_offset"]), header.dtype.itemsize + 4
    if not (least <= found <= MAX_OFFSET_BYTES and found.is_integer()):
        raise notes.error(
            Code.BAD_HEADER, f"found vox_offset {found:g}, expected a whole number from {least} to {MAX_OFFSET_BYTES}"
        )
    return int(found)


def _scale(slope: float, inter: float, notes: Notes) -> tuple[float, float]:
    """Return slope and intercept to apply, (1, 0) for none: slope 0 means none, and so do NaN slopes of older writers."""
    if slope == 0.0:
        return 1.0, 0.0
    if np.isnan(slope) or 0.0 < abs(slope) < float(np.finfo(np.float32).tiny):
        notes.warn(Code.BAD_SCALE, f"found slope {slope:g}, which float32 cannot apply; stored values were used")
        return 1.0, 0.0
    if not np.isfinite([slope, inter]).all():
        raise notes.error(Code.BAD_SCALE, f"found slope {slope:g} and intercept {inter:g}, expected finite numbers")
    if slope < 0.0:
        notes.warn(Code.BAD_SCALE, f"found slope {slope:g}: bright and dark are exchanged as the header asks")
    return slope, inter


# --- the voxels -----------------------------------------------------------------------------------------------------


def _whole(data: bytes, plan: _Plan, notes: Notes) -> memoryview:
    if len(data) < plan.end:
        raise notes.error(Code.TRUNCATED, f"found {len(data)} bytes, expected {plan.end} for {plan.grid.describe()}")
    if len(data) > plan.end:
        notes.warn(Code.TRAILING_DATA, f"found {len(data) - plan.end} bytes after the last voxel; they were ignored")
    return memoryview(data)


def _check_extensions(content: memoryview, plan: _Plan, notes: Notes) -> None:
    """Warn where header extensions do not add up: each gives its size, a multiple of 16, before its code (nifti1.h)."""
    at = plan.header_bytes + 4
    if not content[at - 4]:
        return
    while at + 16 <= plan.offset:
        size = int.from_bytes(content[at : at + 4], "big" if plan.order == ">" else "little")
        if size % 16 or not 16 <= size <= plan.offset - at:
            found = f"a header extension of {size} bytes at byte {at} of the {plan.offset} before the voxels"
            notes.warn(Code.BAD_HEADER, f"found {found}, expected a multiple of 16 that fits; it was skipped")
            return
        at += size


def _scaled(array: NDArray[Any], plan: _Plan) -> NDArray[Any]:
    """Apply slope and intercept block by block; small integers are exact in float32, wider types go by way of float64."""
    if not plan.is_scaled:
        return array
    wide = np.result_type(array.dtype, np.float32)
    flat, scaled = array.reshape(-1), np.empty(array.size, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        slope, inter = wide.type(plan.slope), wide.type(plan.inter)
        for start in range(0, flat.size, BLOCK_VOXELS):
            block = slice(start, start + BLOCK_VOXELS)
            scaled[block] = np.multiply(flat[block], slope, dtype=wide) + inter
    return scaled.reshape(array.shape)
