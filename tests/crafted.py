"""Crafted: small files of every format with one thing wrong, for the tests of what is refused and why."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import h5py
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid

SHAPE = (5, 6, 7)
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
AFFINE[:3, 3] = (3, 3, -2)
VOLUME = np.zeros(SHAPE, np.int16)
VOLUME[1:4, 1:5, 2:6] = np.random.default_rng(0).integers(100, 900, (3, 4, 4))
PICTURE = VOLUME[2].astype(np.uint8)
BEFORE_VOXELS = 352

_NIFTI = {
    "sizeof_hdr": ("<i", 0),
    "dim": ("<8h", 40),
    "datatype": ("<h", 70),
    "bitpix": ("<h", 72),
    "pixdim": ("<8f", 76),
    "vox_offset": ("<f", 108),
    "slope": ("<f", 112),
    "inter": ("<f", 116),
    "units": ("<B", 123),
    "descrip": ("80s", 148),
    "aux_file": ("24s", 228),
    "db_name": ("18s", 14),
    "intent_name": ("16s", 328),
    "qform_code": ("<h", 252),
    "sform_code": ("<h", 254),
    "quatern": ("<3f", 256),
    "qoffset": ("<3f", 268),
    "srow": ("<12f", 280),
    "magic": ("4s", 344),
}
_NIFTI_2 = {
    "magic": ("8s", 4),
    "datatype": ("<h", 12),
    "bitpix": ("<h", 14),
    "dim": ("<8q", 16),
    "pixdim": ("<8d", 104),
    "vox_offset": ("<q", 168),
    "slope": ("<d", 176),
    "inter": ("<d", 184),
    "srow": ("<12d", 400),
    "sform_code": ("<i", 348),
}


def nii(array: NDArray[Any] = VOLUME, **fields: Any) -> bytes:
    """A plain `.nii` of the array, with header fields overwritten."""
    data = bytearray(gzip.decompress(write_nifti(array, Grid.of(array.shape, AFFINE))))
    return bytes(_overwritten(data, _NIFTI, fields))


def nii_gz(array: NDArray[Any] = VOLUME, **fields: Any) -> bytes:
    return gzip.compress(nii(array, **fields), mtime=0)


def nii_2(array: NDArray[Any] = VOLUME, **fields: Any) -> bytes:
    """A plain NIfTI-2 of an int16 array."""
    plain = {
        "magic": b"n+2\0\r\n\x1a\n",
        "datatype": 4,
        "bitpix": 16,
        "dim": (3, *array.shape[::-1], 1, 1, 1, 1),
        "pixdim": (1.0,) * 8,
        "vox_offset": 544,
        "slope": 1.0,
        "sform_code": 1,
        "srow": AFFINE[:3].reshape(-1),
    }
    data = bytearray(544)
    struct.pack_into("<i", data, 0, 540)
    return bytes(_overwritten(data, _NIFTI_2, plain | fields)) + array.tobytes()


def _overwritten(data: bytearray, places: Mapping[str, tuple[str, int]], fields: Mapping[str, Any]) -> bytearray:
    for name, value in fields.items():
        kind, at = places[name]
        struct.pack_into(kind, data, at, *(value if np.ndim(value) else (value,)))
    return data


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_rows(array: NDArray[Any] = PICTURE) -> bytes:
    """Unpacked pixel data of a grey 8-bit PNG: each row behind the byte that names its filter."""
    return b"".join(b"\0" + row.tobytes() for row in array)


def png(
    head: tuple[int, ...] | None = None, *, data: bytes | None = None, before: bytes = b"", after: bytes = b"", end: bytes = b""
) -> bytes:
    """A grey 8-bit PNG. `head`: width, height, bits, colour type, compression, filter, interlacing; `data`: its IDAT."""
    head = head or (PICTURE.shape[1], PICTURE.shape[0], 8, 0, 0, 0, 0)
    data = zlib.compress(png_rows()) if data is None else data
    body = before + chunk(b"IDAT", data) + after
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *head)) + body + chunk(b"IEND", b"") + end


def picture(kind: str, array: NDArray[Any] = PICTURE, mode: str | None = None, **options: Any) -> bytes:
    """The array as Pillow writes it."""
    out = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


def tif(array: NDArray[Any] = PICTURE, tags: Mapping[int, Any] | None = None, **options: Any) -> bytes:
    """The array as tifffile writes it, with values of tags overwritten in place (first directory, little-endian)."""
    out = io.BytesIO()
    tifffile.imwrite(out, array, byteorder="<", **options)
    data = bytearray(out.getvalue())
    for tag, value in (tags or {}).items():
        struct.pack_into("<I", data, tif_entry(data, tag) + 8, value)
    return bytes(data)


def tif_entry(data: bytes | bytearray, tag: int) -> int:
    """Where a tag's entry of 12 bytes stands in the first directory."""
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    places = {struct.unpack_from("<H", data, at)[0]: at for at in range(first + 2, first + 2 + 12 * count, 12)}
    return places[tag]


def tif_with_strip(strip: bytes) -> bytes:
    """A deflate TIFF of PICTURE's size whose one strip is given."""
    plain = tif(compression="deflate")
    return tif(compression="deflate", tags={273: len(plain), 279: len(strip)}) + strip


IMAGE_H5 = np.stack([VOLUME[2].T.astype(np.float64) * (n + 1) + n for n in range(4)], axis=-1)
"""One slice as BraTS 2020 HDF5 has it: (i, j, modality)."""
MASK_H5 = np.zeros((*IMAGE_H5.shape[:2], 3), np.uint8)
MASK_H5[3, 2, 0] = MASK_H5[3, 3, 1] = MASK_H5[4, 3, 2] = 1


def h5(make: Callable[[h5py.File], object] = lambda _file: None, **options: Any) -> bytes:
    """An HDF5 slice with `image` and `mask`, gzip with checksums, unless `make` writes them, or something else, itself."""
    out = io.BytesIO()
    with h5py.File(out, "w", **options) as file:
        make(file)
        for key, values in (("image", IMAGE_H5), ("mask", MASK_H5)):
            if file.get(key, getlink=True) is None:
                file.create_dataset(key, data=values, compression="gzip", fletcher32=True)
    return out.getvalue()


def h5_chunks(packed: bytes, filters: Mapping[int, tuple[int, ...]], shape: tuple[int, ...] = IMAGE_H5.shape) -> bytes:
    """An HDF5 slice whose image is one chunk with these bytes in it, said to have passed these filters."""

    def make(file: h5py.File) -> None:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk(shape)
        for number, values in filters.items():
            created.set_filter(number, h5py.h5z.FLAG_OPTIONAL, values)
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.NATIVE_DOUBLE, space, created)
        dataset.write_direct_chunk((0,) * len(shape), packed)

    return h5(make)
