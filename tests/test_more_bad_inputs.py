"""Odd inputs of our own, beyond the collection's: each kind made here, each with the verdict and the code that it deserves.

The codes of a kind that is accepted with a warning are all that it is told, in order.
"""

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from crafted import (
    AFFINE,
    BEFORE_VOXELS,
    IMAGE_H5,
    MASK_H5,
    PICTURE,
    SHAPE,
    VOLUME,
    chunk,
    h5,
    h5_chunks,
    nii,
    nii_2,
    nii_gz,
    picture,
    png,
    png_rows,
    tif,
    tif_entry,
    tif_with_strip,
)

from brainseg.errors import Code, ScanError
from brainseg.scans import load_scan

NAN, INF = float("nan"), float("inf")
ACCEPT, WARN, REFUSE = "accept", "accept-warn", "quarantine"


@dataclass(frozen=True)
class Kind:
    """One odd input: its files as (name, bytes, role, modality, index), how they are read, what should become of it."""

    name: str
    files: Sequence[tuple[str, bytes, str, str | None, int | None]]
    want: str
    codes: str = ""
    reader: str = "volumes"
    modalities: tuple[str, ...] = ("t1",)
    label_map: str = "brats2020"


def volume(name: str, data: bytes, want: str, codes: str = "", file: str = "x.nii") -> Kind:
    return Kind(name, [(file, data, "image", "t1", None)], want, codes)


def packed(name: str, data: bytes, want: str, codes: str = "") -> Kind:
    return volume(name, data, want, codes, "x.nii.gz")


def label(name: str, data: bytes, want: str, codes: str = "", label_map: str = "brats2020") -> Kind:
    files = [("t1.nii", nii(), "image", "t1", None), ("seg.nii", data, "label", None, None)]
    return Kind(name, files, want, codes, label_map=label_map)


def case(name: str, want: str, codes: str = "", **volumes: bytes) -> Kind:
    files = [(f"{modality}.nii", data, "image", modality, None) for modality, data in volumes.items()]
    return Kind(name, files, want, codes, modalities=tuple(volumes))


def image(name: str, data: bytes, want: str, codes: str = "", file: str = "x.png") -> Kind:
    return Kind(name, [(file, data, "image", None, 0)], want, codes, "stack")


def tiff(name: str, data: bytes, want: str, codes: str = "") -> Kind:
    return image(name, data, want, codes, "x.tif")


def slice_h5(name: str, data: bytes, want: str, codes: str = "") -> Kind:
    return Kind(name, [("x.h5", data, "both", None, 0)], want, codes, "h5slices", ("flair", "t1", "t1c", "t2"))


def in_zip(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return out.getvalue()


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=allow_pickle)
    return out.getvalue()


class Boom:
    """What leaves a mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("UNPICKLED",)


PICKLE = pickle.dumps({"image": Boom()})
OBJECTS = npy(np.array([Boom()], object), allow_pickle=True)


def with_value(value: float, kind: str = "f4", at: Any = (2, 2, 3)) -> np.ndarray:
    array = VOLUME.astype(kind)
    array[at] = value
    return array


def labels(value: float = 1, kind: str = "u1") -> np.ndarray:
    array = np.zeros(SHAPE, kind)
    array[2, 2:4, 3:5] = value
    return array


def signalling() -> bytes:
    data = bytearray(nii(VOLUME.astype("f4")))
    struct.pack_into("<I", data, BEFORE_VOXELS + 4 * 100, 0x7F800001)
    return bytes(data)


def volumes() -> Iterator[Kind]:
    row = AFFINE[:3].reshape(-1)
    mirrored, upside, front, quarter = (AFFINE.copy() for _ in range(4))
    mirrored[0] *= -1
    upside[1:3] *= -1
    front[:2] *= -1
    quarter[[0, 1]] = quarter[[1, 0]] * [[1], [-1]]
    by_quaternion = {"qform_code": 1, "quatern": (0, 0, 1), "qoffset": (3, 3, -2), "pixdim": (1,) * 8}  # half a turn: as AFFINE
    yield volume("both forms agree", nii(**by_quaternion), ACCEPT)
    for name, matrix in (("mirrored", mirrored), ("turned front to back, left to right", front)):
        yield volume(
            f"qform against a sform {name}", nii(srow=matrix[:3].reshape(-1), **by_quaternion), REFUSE, "AFFINE_MISMATCH"
        )
    for name, matrix in (("upside down", upside), ("a quarter round", quarter)):
        found = volume(
            f"qform against a sform {name}", nii(srow=matrix[:3].reshape(-1), **by_quaternion), WARN, "AFFINE_MISMATCH"
        )
        yield found
    flipped = {**by_quaternion, "pixdim": (-1, *(1,) * 7)}
    yield volume("qfac of -1 under a right-handed sform", nii(**flipped), REFUSE, "AFFINE_MISMATCH")
    yield volume("qform elsewhere", nii(**{**by_quaternion, "qoffset": (30, 3, -2)}), WARN, "AFFINE_MISMATCH")
    yield volume("qform that is no number beside a sform", nii(**{**by_quaternion, "qoffset": (NAN, 3, -2)}), ACCEPT)
    alone = {**by_quaternion, "sform_code": 0}
    yield volume("qform alone", nii(**alone), ACCEPT)
    yield volume("quaternion longer than 1", nii(**{**alone, "quatern": (1, 1, 1)}), REFUSE, "BAD_AFFINE")
    yield volume("quaternion of NaN", nii(**{**alone, "quatern": (NAN, 0, 0)}), REFUSE, "BAD_AFFINE")
    yield volume("qform with a size of 0", nii(**{**alone, "pixdim": (1, 1, 0, 1, 1, 1, 1, 1)}), REFUSE, "BAD_SPACING")
    yield volume("qform with an infinite size", nii(**{**alone, "pixdim": (1, 1, INF, 1, 1, 1, 1, 1)}), REFUSE, "BAD_SPACING")
    yield volume("size of 0 beside a sform", nii(pixdim=(1, 0, 1, 1, 1, 1, 1, 1)), WARN, "BAD_SPACING")
    yield volume("sizes that the sform contradicts", nii(pixdim=(1, 2, 2, 2, 1, 1, 1, 1)), WARN, "BAD_SPACING")
    yield volume("sform of zeros", nii(srow=(0,) * 12), REFUSE, "BAD_AFFINE")
    yield volume("sform with an infinity", nii(srow=(INF, *row[1:])), REFUSE, "BAD_AFFINE")
    yield volume("sform that overflows", nii(srow=(3e38, *row[1:])), REFUSE, "BAD_SPACING")
    yield volume("sform sheared flat", nii(srow=(1, 1, 0, 0, 0, 1e-9, 0, 0, 0, 0, 1, 0)), REFUSE, "BAD_AFFINE")
    yield volume("origin beyond the moon", nii(srow=(*row[:3], 4e11, *row[4:])), REFUSE, "BAD_AFFINE")
    huge, tiny = AFFINE * 1e7, AFFINE * 1e-9
    yield volume("voxels of kilometres", nii(srow=huge[:3].reshape(-1)), REFUSE, "BAD_SPACING")
    yield volume("voxels of atoms", nii(srow=tiny[:3].reshape(-1)), REFUSE, "BAD_SPACING")
    yield volume("metres said, millimetres meant", nii(units=1), WARN, "SPACING")
    yield volume("negative form codes", nii(sform_code=-1, qform_code=-1), WARN, "NO_ORIENTATION")


def headers() -> Iterator[Kind]:
    sizes = SHAPE[::-1]
    yield volume("a negative size", nii(dim=(3, -7, 6, 5, 1, 1, 1, 1)), REFUSE, "BAD_HEADER")
    yield volume("a negative count of dimensions", nii(dim=(-3, *sizes, 1, 1, 1, 1)), REFUSE, "BAD_HEADER")
    yield volume("the largest sizes of all", nii(dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), REFUSE, "TOO_LARGE")
    yield volume("four dimensions, one volume", nii(dim=(4, *sizes, 1, 1, 1, 1)), ACCEPT)
    yield volume("seven dimensions, one volume", nii(dim=(7, *sizes, 1, 1, 1, 1)), ACCEPT)
    yield volume("no volume in time", nii(dim=(4, *sizes, 0, 1, 1, 1)), REFUSE, "BAD_HEADER")
    yield volume("a vector a voxel", nii(dim=(5, *sizes, 1, 3, 1, 1)), REFUSE, "NOT_3D")
    yield volume(
        "dim big-endian in a little-endian file", nii(dim=(768, *(n << 8 for n in sizes), 1, 1, 1, 1)), REFUSE, "BAD_HEADER"
    )
    yield volume("a header and nothing else", nii()[:BEFORE_VOXELS], REFUSE, "TRUNCATED")
    yield volume("a third of a header", nii()[:100], REFUSE, "TRUNCATED")
    yield volume("three bytes", nii()[:3], REFUSE, "NOT_NIFTI")
    yield volume("one byte short", nii()[:-1], REFUSE, "TRUNCATED")
    for code, word in (
        (1, "bits"),
        (32, "complex"),
        (128, "colour"),
        (1536, "quad"),
        (2304, "RGBA"),
        (9999, "unknown"),
        (-4, "-4"),
    ):
        yield volume(f"datatype {word}", nii(datatype=code), REFUSE, "BAD_DATATYPE")
    yield volume("bitpix against datatype", nii(bitpix=32), WARN, "BAD_HEADER")
    yield volume("doubles promised, shorts there", nii(datatype=64, bitpix=64), REFUSE, "TRUNCATED")
    yield volume("bytes promised, shorts there", nii(datatype=2, bitpix=8), WARN, "TRAILING_DATA")
    for offset in (NAN, INF, -352.0, 352.5, 340.0, 1e30):
        yield volume(f"vox_offset {offset}", nii(vox_offset=offset), REFUSE, "BAD_HEADER")
    yield volume("magic of zeros: Analyze 7.5", nii(magic=b"\0\0\0\0"), REFUSE, "BAD_MAGIC")
    yield volume("slope NaN, as old writers have it", nii(slope=NAN), WARN, "BAD_SCALE")
    yield volume("slope too small for a float", nii(slope=1e-44), WARN, "BAD_SCALE")
    yield volume("slope of minus nothing", nii(slope=-0.0, inter=INF), ACCEPT)
    yield volume("slope that overflows", nii(slope=3e38), REFUSE, "NON_FINITE")
    yield volume("intercept that drowns the values", nii(inter=1e30), REFUSE, "EMPTY_VOLUME")
    yield volume("NIfTI-2", nii_2(), ACCEPT)
    yield volume("NIfTI-2 sent as text", nii_2(magic=b"n+2\0\n\x1a\n\n"), REFUSE, "BAD_MAGIC")
    yield volume("NIfTI-2 of exabytes", nii_2(dim=(3, 1 << 40, 1 << 40, 1 << 40, 1, 1, 1, 1)), REFUSE, "TOO_LARGE")
    yield volume("NIfTI-2 longer than a mask can be", nii_2(dim=(3, 40_000, 1, 1, 1, 1, 1, 1)), REFUSE, "TOO_LARGE")
    yield volume("NIfTI-2 with a negative size", nii_2(dim=(3, -1, 6, 5, 1, 1, 1, 1)), REFUSE, "BAD_HEADER")
    yield volume("NIfTI-2 with an offset of 2 to 62", nii_2(vox_offset=1 << 62), REFUSE, "BAD_HEADER")
    yield volume("NIfTI-2 with a slope of 1e300", nii_2(slope=1e300), REFUSE, "NON_FINITE")


def streams() -> Iterator[Kind]:
    plain, good = nii(), nii_gz()
    raw = zlib.compress(plain, wbits=-15)
    flags = b"\x1f\x8b\x08\x1c" + bytes(4) + b"\0\x03" + b"\4\0extr" + b"name\0" + b"comment\0"
    tail = struct.pack("<II", zlib.crc32(plain), len(plain))
    yield packed("gzip with name, comment and extra field", flags + raw + tail, ACCEPT)
    yield packed(
        "gzip whose own header is damaged",
        flags.replace(b"\x08\x1c", b"\x08\x1e", 1) + b"\0\0" + raw + tail,
        REFUSE,
        "CORRUPT_GZIP",
    )
    yield packed("the same stream twice", good + good, WARN, "TRAILING_DATA")
    yield packed("another stream after it", good + gzip.compress(b"more"), WARN, "TRAILING_DATA")
    yield packed("garbage that ends like the stream", good + b"garbage" + good[-4:], WARN, "TRAILING_DATA")
    yield packed(
        "block-wise gzip with its empty last block",
        gzip.compress(plain[:200]) + gzip.compress(plain[200:]) + gzip.compress(b""),
        ACCEPT,
    )
    yield packed("second member damaged", good + gzip.compress(b"more")[:-3], REFUSE, "TRUNCATED")
    yield packed("length at the end wrong", good[:-4] + b"\1\0\0\0", REFUSE, "CORRUPT_GZIP")
    yield packed("unknown method", b"\x1f\x8b\x07" + good[3:], REFUSE, "CORRUPT_GZIP")
    yield packed("gzip of nothing", gzip.compress(b""), REFUSE, "EMPTY_FILE")
    yield packed("the start of a gzip header", good[:5], REFUSE, "TRUNCATED")
    yield packed("gzip cut after the header", gzip.compress(plain[:400]), REFUSE, "TRUNCATED")
    yield packed("bzip2", bz2.compress(plain), REFUSE, "NOT_NIFTI")
    yield packed("xz", lzma.compress(plain), REFUSE, "NOT_NIFTI")
    yield packed("zlib without gzip", zlib.compress(plain), REFUSE, "NOT_NIFTI")
    yield packed("zip", in_zip("x.nii", plain), REFUSE, "NOT_NIFTI")
    yield packed("NumPy archive", in_zip("image.npy", npy(VOLUME)), REFUSE, "NOT_NIFTI")
    for name, data in (
        ("pickle", PICKLE),
        ("pickle of protocol 0", pickle.dumps({"image": Boom()}, protocol=0)),
        ("pickle of protocol 2", pickle.dumps([Boom()], protocol=2)),
        ("NumPy array of objects", OBJECTS),
        ("NumPy archive of objects", in_zip("image.npy", OBJECTS)),
        ("torch checkpoint", in_zip("archive/data.pkl", PICKLE)),
        ("zip with a pickle under another name", in_zip("image.bin", PICKLE)),
    ):
        yield packed(f"{name} as a volume", data, REFUSE, "UNSAFE_PICKLE")
        yield image(f"{name} as a picture", data, REFUSE, "UNSAFE_PICKLE")
        yield slice_h5(f"{name} as HDF5", data, REFUSE, "UNSAFE_PICKLE")
    yield packed("packed pickle", gzip.compress(PICKLE), REFUSE, "UNSAFE_PICKLE")
    yield packed("a sentence", b"(this is a note about the scan.", REFUSE, "NOT_NIFTI")
    yield volume("an HDF5 file, as MINC is", h5(), REFUSE, "NOT_NIFTI")
    yield volume("a DICOM file", bytes(128) + b"DICM" + bytes(200), REFUSE, "NOT_NIFTI")


def values() -> Iterator[Kind]:
    yield volume("one NaN in a corner", nii(with_value(NAN, at=(0, 0, 0))), REFUSE, "NON_FINITE")
    yield volume("one infinity", nii(with_value(-INF)), REFUSE, "NON_FINITE")
    yield volume("a signalling NaN", signalling(), REFUSE, "NON_FINITE")
    yield volume("doubles beyond float32", nii(with_value(1e300, "f8")), REFUSE, "NON_FINITE")
    yield volume("the largest int64", nii(with_value(2**63 - 1, "i8")), WARN, "OUTLIER")
    yield volume("the largest uint64", nii(with_value(2**64 - 1, "u8")), WARN, "OUTLIER")
    yield volume(
        "values that float32 cannot tell apart", nii(2_000_000_000 + (VOLUME > 0).astype("i4")), REFUSE, "EMPTY_VOLUME"
    )
    yield volume("subnormal values", nii((VOLUME > 0) * np.float32(1e-44)), REFUSE, "EMPTY_VOLUME")
    yield volume("one value that is not 0", nii(np.full(SHAPE, -1024, "i2")), REFUSE, "EMPTY_VOLUME")
    yield volume("a single voxel", nii(np.ones((1, 1, 1), "i2")), REFUSE, "EMPTY_VOLUME")
    yield volume("two voxels", nii(np.array([[[1, 2]]], "i2")), ACCEPT)
    yield volume("a plane", nii(VOLUME[2:3]), ACCEPT)
    yield label("label of -1", nii(labels(-1, "i2")), REFUSE, "BAD_LABELS")
    yield label("label of 256, which is 0 in a byte", nii(labels(256, "i2")), REFUSE, "BAD_LABELS")
    yield label("label of 65537, which is 1 in a byte", nii(labels(65537, "i4")), REFUSE, "BAD_LABELS")
    yield label("label of 2 to 63", nii(labels(2**63, "u8")), REFUSE, "BAD_LABELS")
    yield label("label of 1e30", nii(labels(1e30, "f4")), REFUSE, "BAD_LABELS")
    yield label("label of NaN", nii(labels(NAN, "f4")), REFUSE, "NON_FINITE")
    yield label("label of infinity", nii(labels(INF, "f4")), REFUSE, "NON_FINITE")
    yield label("label of -0.0", nii(labels(1, "f4") * -0.0 + labels(1, "f4")), ACCEPT)
    yield label("label of halves", nii(labels(), slope=0.5), REFUSE, "MASK_NOT_INTEGER")
    yield label("label of 1/255 of 255", nii(labels(255), slope=1 / 255), ACCEPT)
    yield label("label that is the image", nii(), REFUSE, "BAD_LABELS")
    yield label("label of 3 before 2023", nii(labels(3)), REFUSE, "BAD_LABELS")
    yield label("label of nothing", nii(labels(0)), WARN, "EMPTY_MASK")
    yield label("label of 255 under a binary map", nii(labels(255)), WARN, "BAD_LABELS", "binary")
    yield label("label in colour", nii(labels(), datatype=128), REFUSE, "BAD_DATATYPE")
    yield label("label in four dimensions", nii(labels(), dim=(4, *SHAPE[::-1], 2, 1, 1, 1)), REFUSE, "NOT_3D")
    yield label("label without orientation", nii(labels(), sform_code=0), REFUSE, "AFFINE_MISMATCH")
    yield label("label cut short", nii(labels())[:-9], REFUSE, "TRUNCATED")
    yield case("a modality on another grid", REFUSE, "SHAPE_MISMATCH", t1=nii(), t2=nii(VOLUME[:-1]))
    yield case("a modality copied", REFUSE, "DUPLICATE_CONTENT", t1=nii(), t2=nii_gz())
    yield case("a modality copied as floats", REFUSE, "DUPLICATE_CONTENT", t1=nii(), t2=nii(VOLUME.astype("f4")))
    yield case("a modality of nothing", REFUSE, "EMPTY_VOLUME", t1=nii(), t2=nii(VOLUME * 0))
    yield from exchanged()


def exchanged() -> Iterator[Kind]:
    """A head in three contrasts, as physics has it, under right and under wrong names."""
    rng = np.random.default_rng(1)
    water = np.zeros((10, 12, 12))
    water[1:-1, 1:-1, 1:-1] = rng.uniform(0.1, 0.9, (8, 10, 10))
    head = water > 0
    t1 = np.where(head, 900 - 700 * water + rng.normal(0, 20, water.shape), 0)
    t1c = np.where(head, 1.3 * t1 + rng.normal(0, 80, water.shape), 0)
    t2 = np.where(head, 200 + 900 * water + rng.normal(0, 60, water.shape), 0)
    a, b, c = (nii(array.astype("i2")) for array in (t1, t1c, t2))
    yield case("three contrasts", ACCEPT, t1=a, t1c=b, t2=c)
    yield case("t1 and t1c exchanged, which nothing can tell", ACCEPT, t1=b, t1c=a, t2=c)
    yield case("t1c and t2 exchanged", WARN, "MODALITY_SUSPECT", t1=a, t1c=c, t2=b)
    yield case("t1 and t2 exchanged", WARN, "MODALITY_SUSPECT", t1=c, t1c=b, t2=a)


def pictures() -> Iterator[Kind]:
    width, height = PICTURE.shape[::-1]
    rows = png_rows()
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01%s\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    yield image("png", png(), ACCEPT)
    yield image("png, bytes after its end", png(end=in_zip("a", b"b")), WARN, "TRAILING_DATA")
    yield image("png, more rows than its header", png(data=zlib.compress(rows * 2)), REFUSE, "CORRUPT")
    yield image("png, fewer rows than its header", png(data=zlib.compress(rows[:-9])), REFUSE, "CORRUPT")
    yield image("png, half a bomb", png(data=zlib.compress(bytes(1 << 26))), REFUSE, "CORRUPT")
    yield image("png, pixels of a wrong checksum", png(data=zlib.compress(rows)[:-1] + b"\0"), REFUSE, "CORRUPT")
    yield image("png, bytes after its pixels", png(data=zlib.compress(rows) + b"more"), WARN, "TRAILING_DATA")
    yield image("png, unknown filter", png(data=zlib.compress(b"\x09" + rows[1:])), REFUSE, "CORRUPT")
    for name, head in {
        "3 bits": (width, height, 3, 0, 0, 0, 0),
        "colour type 5": (width, height, 8, 5, 0, 0, 0),
        "interlacing 7": (width, height, 8, 0, 0, 0, 7),
        "compression 1": (width, height, 8, 0, 1, 0, 0),
        "no width": (0, height, 8, 0, 0, 0, 0),
        "a palette that is missing": (width, height, 8, 3, 0, 0, 0),
    }.items():
        yield image(f"png, {name}", png(head), REFUSE, "CORRUPT")
    yield image("png, the largest size", png(((1 << 31) - 1, (1 << 31) - 1, 16, 6, 0, 0, 0)), REFUSE, "TOO_LARGE")
    yield image("png, two headers", png(before=chunk(b"IHDR", bytes(13))), REFUSE, "CORRUPT")
    yield image("png, no header", b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"IEND", b""), REFUSE, "CORRUPT")
    yield image(
        "png, header of 12 bytes", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(12)) + chunk(b"IEND", b""), REFUSE, "CORRUPT"
    )
    yield image("png, unknown chunk that is needed", png(before=chunk(b"NEED", b"x")), REFUSE, "UNSUPPORTED")
    yield image("png, unknown chunk that is not", png(before=chunk(b"neEd", b"x")), ACCEPT)
    yield image("png, animated", png(before=chunk(b"acTL", struct.pack(">II", 2, 0))), REFUSE, "MULTI_PAGE")
    yield image("png, a bomb as text", png(before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 27)))), ACCEPT)
    yield image("png, a bomb as colour profile", png(before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 27)))), ACCEPT)
    yield image("png, one value made transparent", png(before=chunk(b"tRNS", b"\0\0")), WARN, "ALPHA")
    yield image("png, to be turned", png(before=chunk(b"eXIf", exif % b"\3")), WARN, "EXIF_ROTATION")
    yield image("png, words for a turn", png(before=chunk(b"eXIf", exif % b"\2")), WARN, "EXIF_ROTATION")
    yield image("png, damaged EXIF", png(before=chunk(b"eXIf", b"what")), WARN, "EXIF_ROTATION")
    yield image("png, interlaced", interlaced(), ACCEPT)
    yield image("png, end missing and tail cut", png()[:-14], REFUSE, "TRUNCATED")
    progressive = picture("JPEG", progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield image("jpeg, a thousand passes", progressive[:-2] + last * 1000 + progressive[-2:], REFUSE, "TOO_LARGE", "x.jpg")
    yield image("jpeg, bytes after its end", picture("JPEG") + b"PK\3\4", WARN, "TRAILING_DATA", "x.jpg")
    yield image("jpeg, end missing", picture("JPEG")[:-2], REFUSE, "TRUNCATED", "x.jpg")
    yield image("jpeg, grey stored as colour", picture("JPEG", mode="RGB"), ACCEPT, "", "x.jpg")
    yield image("jpeg of its magic alone", b"\xff\xd8\xff\xe0", REFUSE, "TRUNCATED", "x.jpg")
    yield image("bmp", picture("BMP"), REFUSE, "NOT_IMAGE", "x.bmp")
    yield image("webp", picture("WEBP", mode="RGB"), REFUSE, "NOT_IMAGE", "x.webp")
    yield image("jpeg 2000", picture("JPEG2000"), REFUSE, "NOT_IMAGE", "x.jp2")
    yield image("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", REFUSE, "NOT_IMAGE", "x.svg")
    yield image("a gif of one frame", picture("GIF"), WARN, "PALETTE", "x.gif")
    yield image("one value", png(data=zlib.compress(bytes(len(rows)))), REFUSE, "EMPTY_VOLUME")


def interlaced() -> bytes:
    """Adam7 by hand: pixels in the order of the seven passes, each row behind its filter's byte."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = (PICTURE[y::down, x::across] for y, x, down, across in passes)
    data = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png((*PICTURE.shape[::-1], 8, 0, 0, 0, 1), data=zlib.compress(data))


def tiffs() -> Iterator[Kind]:
    yield tiff("tiff", tif(), ACCEPT)
    yield tiff("tiff, strip beyond the file", tif(tags={273: 1 << 30}), REFUSE, "TRUNCATED")
    yield tiff("tiff, strip of no bytes", tif(tags={279: 0}), REFUSE, "CORRUPT")
    yield tiff("tiff, twice as high as its strips", tif(rowsperstrip=5, tags={257: 10}), REFUSE, "CORRUPT")
    yield tiff("tiff, no width", tif(tags={256: 0}), REFUSE, "CORRUPT")
    yield tiff("tiff, no samples", tif(tags={277: 0}), REFUSE, "CORRUPT")
    yield tiff(
        "tiff, tiles of a gigapixel",
        tif(VOLUME[0].astype("u1"), tile=(16, 16), tags={322: 1 << 20, 323: 1 << 20}),
        REFUSE,
        "TOO_LARGE",
    )
    yield tiff("tiff, complex", tif(PICTURE.astype("c8")), REFUSE, "BAD_DATATYPE")
    yield tiff("tiff, doubles beyond float32", tif(PICTURE * 1e300), REFUSE, "NON_FINITE")
    yield tiff("tiff, NaN", tif(np.where(PICTURE, np.float32(NAN), 1)), REFUSE, "NON_FINITE")
    yield tiff("tiff, half floats", tif(PICTURE.astype("f2")), ACCEPT)
    yield tiff("tiff, int64", tif(PICTURE.astype("i8")), ACCEPT)
    yield tiff(
        "tiff, strip that unpacks to too little", tif_with_strip(zlib.compress(PICTURE.tobytes()[:5])), REFUSE, "CORRUPT"
    )
    yield tiff(
        "tiff, strip of a wrong checksum", tif_with_strip(zlib.compress(PICTURE.tobytes())[:-1] + b"x"), REFUSE, "CORRUPT"
    )
    yield tiff("tiff, strip that is a bomb", tif_with_strip(zlib.compress(PICTURE.tobytes() + bytes(1 << 26))), ACCEPT)
    yield tiff("tiff, photometric of a camera", tif(tags={262: 32803}), REFUSE, "UNSUPPORTED")
    yield tiff("tiff, CMYK", tif(np.stack([PICTURE] * 4, -1), photometric="separated"), REFUSE, "NOT_GREY")
    yield tiff("tiff, unknown compression", tif(tags={259: 60_000}), REFUSE, "CORRUPT")
    yield tiff("tiff, palette of 8 bits", with_palette(1), WARN, "PALETTE")
    yield tiff("tiff, palette of 16 bits", with_palette(257), WARN, "PALETTE")
    yield tiff("tiff, two pages", tif(np.stack([PICTURE] * 2), photometric="minisblack"), REFUSE, "MULTI_PAGE")
    yield tiff("tiff, a stack of ImageJ", tif(np.stack([PICTURE] * 2), imagej=True), REFUSE, "MULTI_PAGE")
    yield tiff("tiff, a tag of a billion values", with_count(1 << 30), REFUSE, "TRUNCATED")
    yield tiff("tiff, tags that share their bytes", with_count(1 << 21) + bytes(1 << 24), REFUSE, "TOO_LARGE")
    yield tiff("tiff, directory beyond the file", tif()[:4] + b"\xff\xff\xff\0" + tif()[8:], REFUSE, "TRUNCATED")
    yield tiff("tiff, no directory", tif()[:4] + bytes(4) + tif()[8:], REFUSE, "MULTI_PAGE")
    yield tiff("tiff, directories in a ring", ring(), REFUSE, "CORRUPT")
    yield tiff("tiff, pages without end", thumbnails(5000), REFUSE, "MULTI_PAGE")
    yield tiff("tiff, eight bytes", tif()[:8], REFUSE, "TRUNCATED")
    yield tiff("tiff, its magic alone", b"II*\0", REFUSE, "TRUNCATED")
    yield tiff("tiff, to be turned", tif(extratags=[(274, 3, 1, 6, True)]), WARN, "EXIF_ROTATION")


def with_palette(factor: int) -> bytes:
    colours = np.tile(np.arange(256) * factor, (3, 1)).astype("u2")
    return tif(photometric="palette", colormap=colours)


def with_count(count: int) -> bytes:
    data = bytearray(tif(rowsperstrip=1))
    struct.pack_into("<I", data, tif_entry(data, 273) + 4, count)
    return bytes(data)


def ring() -> bytes:
    """Two directories, each naming the other as the next; reduced copies both, so that neither is the page."""
    one = struct.pack("<HHHII", 1, 254, 4, 1, 1)
    return b"II*\0" + struct.pack("<I", 8) + one + struct.pack("<I", 26) + one + struct.pack("<I", 8)


def thumbnails(count: int) -> bytes:
    """A chain of directories that each call themselves a reduced copy."""
    step = struct.calcsize("<HHHIII")
    chain = (struct.pack("<HHHIII", 1, 254, 4, 1, 1, 8 + step * (n + 1) if n + 1 < count else 0) for n in range(count))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(chain)


def written(**datasets: Any) -> bytes:
    def make(file: h5py.File) -> None:
        for key, values in datasets.items():
            file[key] = values

    return h5(make)


def made(**options: Any) -> bytes:
    """An HDF5 slice whose image is created with these options."""
    plain = {"data": IMAGE_H5} if "shape" not in options else {}
    return h5(lambda file: file.create_dataset("image", **plain, **options))


def virtual(target: str) -> bytes:
    layout = h5py.VirtualLayout(IMAGE_H5.shape, "f8")
    layout[:] = h5py.VirtualSource(target, "other", IMAGE_H5.shape)
    return h5(lambda file: file.create_virtual_dataset("image", layout))


def typed(dtype: Any) -> bytes:
    return h5(lambda file: file.create_dataset("image", (2, 2, 4), dtype))


def partly_written() -> bytes:
    def make(file: h5py.File) -> None:
        image = file.create_dataset("image", IMAGE_H5.shape, "f8", chunks=(*IMAGE_H5.shape[:2], 1))
        image[..., 0] = IMAGE_H5[..., 0]

    return h5(make)


def flipped(data: bytes, needle: bytes) -> bytes:
    at = data.index(needle) + len(needle) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def hdf5_links() -> Iterator[Kind]:
    outside = REFUSE, "OUTSIDE_ROOT"
    yield slice_h5("hdf5", h5(), ACCEPT)
    yield slice_h5("hdf5, values from another file by a virtual dataset", virtual("/etc/other.h5"), *outside)
    yield slice_h5("hdf5, values from itself by a virtual dataset", virtual("."), *outside)
    yield slice_h5(
        "hdf5, values of a host's file",
        made(external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)], shape=IMAGE_H5.shape, dtype="f8"),
        *outside,
    )
    yield slice_h5("hdf5, a link into another file", written(image=h5py.ExternalLink("/etc/x.h5", "/image")), *outside)
    yield slice_h5(
        "hdf5, a link to a link into another file",
        written(far=h5py.ExternalLink("x.h5", "/"), image=h5py.SoftLink("/far/image")),
        *outside,
    )
    yield slice_h5("hdf5, a link to itself", written(image=h5py.SoftLink("/image")), REFUSE, "MISSING_KEY")
    yield slice_h5(
        "hdf5, links in a ring", written(a=h5py.SoftLink("/image"), image=h5py.SoftLink("/a")), REFUSE, "MISSING_KEY"
    )
    yield slice_h5("hdf5, a link to nothing", written(image=h5py.SoftLink("/nothing")), REFUSE, "MISSING_KEY")
    yield slice_h5("hdf5, a link that climbs", written(image=h5py.SoftLink("../../image")), REFUSE, "MISSING_KEY")
    yield slice_h5("hdf5, a link to the values", written(there=IMAGE_H5, image=h5py.SoftLink("there")), WARN, "NO_CHECKSUM")


def hdf5_types() -> Iterator[Kind]:
    yield slice_h5("hdf5, a group of that name", h5(lambda file: file.create_group("image")), REFUSE, "MISSING_KEY")
    yield slice_h5("hdf5, a type of that name", written(image=np.dtype("f8")), REFUSE, "MISSING_KEY")
    for name, dtype in {
        "records": np.dtype([("a", "f8"), ("b", "f8")]),
        "text": h5py.string_dtype(),
        "text of fixed length": "S8",
        "lists": h5py.vlen_dtype("f8"),
        "references": h5py.ref_dtype,
        "references to regions": h5py.regionref_dtype,
        "raw bytes": np.dtype("V8"),
        "complex numbers": "c16",
        "long doubles": "longdouble",
        "arrays": np.dtype(("f8", (2,))),
    }.items():
        yield slice_h5(f"hdf5, {name}", typed(dtype), REFUSE, "BAD_DATATYPE")


def hdf5_shapes() -> Iterator[Kind]:
    yield slice_h5("hdf5, no values at all", written(image=h5py.Empty("f8")), REFUSE, "TOO_LARGE")
    yield slice_h5("hdf5, a single number", written(image=1.0), REFUSE, "SHAPE_MISMATCH")
    yield slice_h5("hdf5, no rows", written(image=np.zeros((0, 6, 4))), REFUSE, "SHAPE_MISMATCH")
    yield slice_h5("hdf5, one modality", written(image=IMAGE_H5[..., 0]), REFUSE, "SHAPE_MISMATCH")
    yield slice_h5("hdf5, a volume", written(image=IMAGE_H5[None]), REFUSE, "SHAPE_MISMATCH")
    yield slice_h5("hdf5, another size than its mask", written(image=IMAGE_H5[:-1]), REFUSE, "SHAPE_MISMATCH")
    yield slice_h5("hdf5, infinity", written(image=np.where(IMAGE_H5 > 500, INF, IMAGE_H5)), REFUSE, "NON_FINITE")
    yield slice_h5("hdf5, petabytes", made(shape=(1 << 20, 1 << 20, 4), dtype="f8", chunks=(64, 64, 4)), REFUSE, "TOO_LARGE")
    yield slice_h5(
        "hdf5, sizes whose product overflows",
        made(shape=(1 << 32, 1 << 32, 4), dtype="u1", chunks=(1, 1, 4)),
        REFUSE,
        "TOO_LARGE",
    )
    yield slice_h5(
        "hdf5, one giant chunk",
        made(shape=(4, 4, 4), maxshape=(None,) * 3, dtype="f8", chunks=(1 << 10, 1 << 10, 1 << 8)),
        REFUSE,
        "TOO_LARGE",
    )
    yield slice_h5(
        "hdf5, a million empty chunks", made(shape=(1000, 1000, 4), dtype="u1", chunks=(1, 1, 4)), REFUSE, "TRUNCATED"
    )


def hdf5_chunks() -> Iterator[Kind]:
    yield slice_h5("hdf5, values never written", made(shape=IMAGE_H5.shape, dtype="f8"), REFUSE, "TRUNCATED")
    yield slice_h5(
        "hdf5, values that are all the fill value",
        made(shape=IMAGE_H5.shape, dtype="f8", chunks=True, fillvalue=7),
        REFUSE,
        "TRUNCATED",
    )
    yield slice_h5("hdf5, a quarter of the chunks written", partly_written(), REFUSE, "TRUNCATED")
    raw = IMAGE_H5.tobytes()
    yield slice_h5(
        "hdf5, a chunk packed twice", h5_chunks(zlib.compress(zlib.compress(raw)), {1: (6,)} | {}), REFUSE, "CORRUPT"
    )
    yield slice_h5("hdf5, a chunk that is a bomb", h5_chunks(zlib.compress(raw + bytes(1 << 26)), {1: (6,)}), REFUSE, "CORRUPT")
    yield slice_h5("hdf5, a chunk with too little in it", h5_chunks(zlib.compress(raw[:-8]), {1: (6,)}), REFUSE, "CORRUPT")
    yield slice_h5("hdf5, a filter that is code of the host", h5_chunks(raw, {32015: (3,)}), REFUSE, "UNSUPPORTED")
    yield slice_h5("hdf5, scaled and rounded", made(chunks=True, scaleoffset=2), REFUSE, "UNSUPPORTED")
    yield slice_h5("hdf5, lzf", made(chunks=True, compression="lzf"), WARN, "NO_CHECKSUM")
    yield slice_h5("hdf5, shuffled", made(chunks=True, compression="gzip", shuffle=True), ACCEPT)
    yield slice_h5("hdf5, contiguous", made(), WARN, "NO_CHECKSUM")
    checked = made(chunks=IMAGE_H5.shape, fletcher32=True)
    yield slice_h5("hdf5, a flipped bit under a checksum", flipped(checked, raw[-64:]), REFUSE, "CORRUPT")


def hdf5_files() -> Iterator[Kind]:
    yield slice_h5("hdf5, behind a block of 512 bytes", h5(userblock_size=512), ACCEPT)
    yield slice_h5("hdf5, behind a block of 8192 bytes", h5(userblock_size=8192), ACCEPT)
    yield slice_h5("hdf5, one byte short", h5()[:-1], REFUSE, "TRUNCATED")
    yield slice_h5("hdf5, its magic alone", h5()[:8], REFUSE, "CORRUPT")
    yield slice_h5("hdf4", b"\x0e\x03\x13\x01" + bytes(100), REFUSE, "NOT_HDF5")
    yield slice_h5("MATLAB 5", b"MATLAB 5.0 MAT-file" + bytes(200), REFUSE, "NOT_HDF5")
    yield slice_h5(
        "hdf5, keys of control characters",
        written(**{"a\x1b[2J\nb": 1, "x" * 5000: 2, "image": h5py.SoftLink("/no")}),
        REFUSE,
        "MISSING_KEY",
    )


def hdf5_masks() -> Iterator[Kind]:
    yield slice_h5("hdf5, two classes in one pixel", written(mask=MASK_H5 | MASK_H5[..., :1]), REFUSE, "BAD_LABELS")
    yield slice_h5("hdf5, half a class", written(mask=MASK_H5 * 0.5), REFUSE, "BAD_LABELS")
    yield slice_h5("hdf5, a mask of NaN", written(mask=np.where(MASK_H5, NAN, 0)), REFUSE, "BAD_LABELS")
    yield slice_h5("hdf5, a mask of 255", written(mask=MASK_H5 * 255), REFUSE, "BAD_LABELS")


def kinds() -> list[Kind]:
    hdf5s = hdf5_links, hdf5_types, hdf5_shapes, hdf5_chunks, hdf5_files, hdf5_masks
    return [kind for family in (volumes, headers, streams, values, pictures, tiffs, *hdf5s) for kind in family()]


KINDS = kinds()


def row_of(kind: Kind, folder: Path) -> dict[str, Any]:
    """Write a kind's files; return the manifest row that leads to them."""
    sources = []
    for name, data, role, modality, index in kind.files:
        (folder / name).write_bytes(data)
        file = {
            "uri": str(folder / name),
            "role": role,
            "modality": modality,
            "index": index,
            "size_bytes": len(data),
            "tag": "t",
        }
        sources.append(file)
    return {
        "scan_id": "scan-1",
        "reader": kind.reader,
        "modalities": list(kind.modalities),
        "sources": sources,
        "has_label": any(source["role"] != "image" for source in sources),
        "label_map": kind.label_map,
        "problem_code": None,
        "problem": None,
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_gets_its_verdict_in_one_line_without_a_path(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        scan = load_scan(row_of(kind, tmp_path))
        verdict, codes, lines = WARN if scan.warnings else ACCEPT, [w.split(":")[0] for w in scan.warnings], list(scan.warnings)
    except ScanError as error:
        verdict, codes, lines = REFUSE, [error.code], [error.message]
    assert (verdict, ",".join(codes)) == (kind.want, kind.codes)
    names = [name for name, *_ in kind.files]
    for line in lines:
        assert line.isprintable()
        assert str(tmp_path) not in line
        assert "/etc" not in line
        assert any(word in line for word in ("scan-1", *names))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_there_are_many_and_no_two_are_called_the_same():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 200


def test_what_is_refused_says_what_was_found_and_what_was_expected(tmp_path):
    for kind in KINDS:
        if kind.want != REFUSE or kind.codes == Code.BAD_LABELS:
            continue
        with pytest.raises(ScanError) as caught:
            load_scan(row_of(kind, tmp_path))
        assert "found" in caught.value.message, kind.name


def test_interlaced_and_plain_pixels_are_the_same(tmp_path):
    both = [image("interlaced", interlaced(), ACCEPT), image("plain", png(), ACCEPT)]
    one, other = (load_scan(row_of(kind, tmp_path)).image for kind in both)
    np.testing.assert_array_equal(one, other)


def test_a_palette_in_8_bits_means_what_one_in_16_bits_does(tmp_path):
    one, other = (load_scan(row_of(tiff("palette", with_palette(factor), WARN), tmp_path)).image for factor in (1, 257))
    np.testing.assert_array_equal(one, other)
