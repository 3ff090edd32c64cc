"""Small files that ask for much: each is refused, or read, for less than 2 GiB of memory and 5 s of one core.

Each is loaded in a process of its own, whose peak of resident memory and CPU time the kernel counts.
"""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from crafted import h5, h5_chunks, nii, nii_2, picture, png, tif
from test_more_bad_inputs import Kind, case, image, in_zip, label, packed, row_of, slice_h5, tiff

from brainseg.formats import MAX_BYTES, MAX_VOXELS, MOST_RATIO

GIB, SECONDS = 2.0, 5.0
MOST_FILE_BYTES = 8_000_000
BLOCK = 1 << 24

LOAD = """
import json, os, resource, sys
from brainseg.errors import ScanError
from brainseg.scans import load_scan

resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
before = resource.getrusage(resource.RUSAGE_SELF)
row = json.load(sys.stdin)
try:
    verdict = ["accept", *load_scan(row).warnings]
except ScanError as error:
    verdict = [error.code, error.message]
after = resource.getrusage(resource.RUSAGE_SELF)
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([verdict, seconds, after.ru_maxrss / 2**20]))
"""


def cost(kind: Kind, folder: Path) -> tuple[list[str], float, float]:
    """Verdict, seconds of CPU, peak GiB of a process that loads the scan."""
    row = row_of(kind, folder)
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=json.dumps(row), capture_output=True, text=True, cwd=folder, check=True
    )
    verdict, seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return verdict, seconds, peak


def repeated(head: bytes, pattern: bytes, size: int) -> tuple[bytes, int]:
    """Raw deflate data of `head` and then `pattern` again and again, `size` bytes in all; and their CRC."""
    blocks, rest = divmod(size - len(head), BLOCK)
    block = (pattern * (BLOCK // len(pattern) + 1))[:BLOCK]
    pieces = {piece: _closed(piece) for piece in (head, block, block[:rest])}
    crc = zlib.crc32(head)
    for _ in range(blocks):
        crc = zlib.crc32(block, crc)
    return pieces[head] + pieces[block] * blocks + pieces[block[:rest]] + b"\3\0", zlib.crc32(block[:rest], crc)


def _closed(data: bytes) -> bytes:
    """Data packed so that they can be put anywhere within a deflate stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)


def gz(head: bytes, pattern: bytes, size: int) -> bytes:
    body, crc = repeated(head, pattern, size)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\3" + body + struct.pack("<II", crc, size & 0xFFFFFFFF)


def zlib_of(pattern: bytes, size: int) -> bytes:
    """A zlib stream; where the pattern is not zeros its checksum is that of zeros, since nobody gets as far."""
    body, _ = repeated(b"", pattern, size)
    return b"\x78\xda" + body + struct.pack(">I", ((size % 65521) << 16) | 1)


def volume_of(voxels: int, itemsize: int, code: int, pattern: bytes = b"\0", extra: int = 0, **fields: Any) -> bytes:
    """A `.nii.gz` that claims so many voxels, and has them (and so many bytes more): `pattern` over and over."""
    dim = (3, 10_000, voxels // 10_000, 1, 1, 1, 1, 1)
    head = nii(dim=dim, datatype=code, bitpix=itemsize * 8, **fields)[:352]
    return gz(head, pattern, 352 + dim[1] * dim[2] * itemsize + extra)


def gzip_bombs() -> Mapping[str, Callable[[], Kind]]:
    ramp = bytes(range(256))
    most = MAX_VOXELS - 10_000
    return {
        "zeros, as many as may be": lambda: packed("b", volume_of(most, 4, 8), "", "TOO_LARGE"),
        "a ramp, as long as may be": lambda: packed("b", volume_of(most, 1, 2, ramp), "", "TOO_LARGE"),
        "a ramp of bytes, scaled to floats": lambda: packed("b", volume_of(most, 1, 2, ramp, slope=2.0), "", "TOO_LARGE"),
        "a ramp of doubles, scaled": lambda: packed("b", volume_of(most // 2, 8, 1024, ramp, slope=2.0), "", "TOO_LARGE"),
        "doubles, as many voxels as may be": lambda: packed("b", volume_of(most, 8, 64), "", "TOO_LARGE"),
        "a gigabyte behind a small volume": lambda: packed("b", gz(nii(), b"\0", 1 << 30), "", "TOO_LARGE"),
        "as much again behind a large volume": lambda: packed("b", volume_of(most, 4, 8, ramp, extra=1 << 30), "", "TOO_LARGE"),
        "a claim that the stream cannot hold": lambda: packed(
            "b", gz(nii_2(dim=(3, 9000, 9000, 2, 1, 1, 1, 1)), b"\0", 2000), "", "TOO_LARGE"
        ),
        "a hundred thousand empty members": lambda: packed("b", gz(b"", b"\0", 0) * 100_001, "", "TOO_LARGE"),
        "header extensions without end": lambda: packed("b", extensions(), "", "accept"),
        "four large modalities": lambda: four(MAX_VOXELS // 50, 4, 8, "accept"),
        "four that are each as large as may be": lambda: four(most, 4, 8, "TOO_LARGE"),
        "a label as large as may be": lambda: labelled(2, 1),
        "a label of doubles": lambda: labelled(64, 8),
    }


def extensions() -> bytes:
    """A volume behind a million header extensions of 16 bytes each."""
    data, offset = nii(vox_offset=352 + (1 << 24) - 352), (1 << 24) - 352
    step = struct.pack("<iii4x", 16, 0, 0)
    return gz(data[:348] + b"\1\0\0\0" + step * (offset // 16) + data[352:], b"\0", 352 + offset + len(data) - 352)


def four(voxels: int, itemsize: int, code: int, expected: str) -> Kind:
    names = ("flair", "t1", "t1c", "t2")
    files = {name: volume_of(voxels, itemsize, code, bytes([n, *range(1, 256)])) for n, name in enumerate(names)}
    kind = case("b", "", expected, **files)
    return Kind("b", [(f"{name}.gz", *rest) for name, *rest in kind.files], "", expected, modalities=names)


def labelled(code: int, itemsize: int) -> Kind:
    voxels = 60_000_000
    one = {2: b"\1", 64: struct.pack("<d", 1.0)}[code]
    kind = label("b", volume_of(voxels, itemsize, code, one), "", "accept")
    (_, *seg) = kind.files[1]
    files = [("t1.nii.gz", volume_of(voxels, 1, 2, bytes(range(256))), "image", "t1", None), ("seg.nii.gz", *seg)]
    return Kind("b", files, "", "accept")


def picture_bombs() -> Mapping[str, Callable[[], Kind]]:
    side = 7_000
    rows = side * (side + 1)
    head = (side, side, 8, 0, 0, 0, 0)
    large = np.zeros((5000, 5000), np.uint8)
    return {
        "a png of zeros, as large as may be": lambda: image("b", png(head, data=zlib_of(b"\0", rows)), "", "EMPTY_VOLUME"),
        "a png with a gigabyte too many": lambda: image("b", png(data=zlib_of(b"\0", 1 << 30)), "", "CORRUPT"),
        "a stack of large pngs": lambda: stack(png(head, data=zlib_of(b"\0", rows)), 30),
        "a jpeg, as large as may be": lambda: image("b", picture("JPEG", large), "", "EMPTY_VOLUME", "x.jpg"),
        "a progressive jpeg": lambda: image("b", picture("JPEG", large, progressive=True), "", "EMPTY_VOLUME", "x.jpg"),
        "a gif, as large as may be": lambda: image("b", picture("GIF", large), "", "EMPTY_VOLUME", "x.gif"),
        "a tiff of zeros": lambda: tiff("b", tif(np.zeros((9_900, 9_900), np.uint8), compression="deflate"), "", "TOO_LARGE"),
        "a tiff in tiles": lambda: tiff(
            "b", tif(np.zeros((9_900, 9_900), np.uint8), tile=(256, 256), compression="zstd"), "", "TOO_LARGE"
        ),
        "a pickle behind a bomb": lambda: image("b", in_zip("image.bin", bytes(1 << 28)), "", "NOT_IMAGE"),
    }


def stack(data: bytes, count: int) -> Kind:
    return Kind("b", [(f"{n}.png", data, "image", None, n) for n in range(count)], "", "TOO_LARGE", "stack")


def write_zeros(file: h5py.File) -> None:
    file.create_dataset("image", data=np.zeros((2000, 1500, 4)), compression="gzip", chunks=(1000, 1500, 4))


def hdf5_bombs() -> Mapping[str, Callable[[], Kind]]:
    shape = (1700, 1700, 4)
    one = zlib.compress(bytes(int(np.prod(shape)) * 8))
    return {
        "one chunk, as large as may be": lambda: slice_h5("b", h5_chunks(one, {1: (6,)}, shape), "", "SHAPE_MISMATCH"),
        "a chunk of a gigabyte too many": lambda: slice_h5("b", h5_chunks(zlib_of(b"\0", 1 << 30), {1: (6,)}), "", "CORRUPT"),
        "a chunk packed three times": lambda: slice_h5(
            "b", h5_chunks(zlib.compress(zlib.compress(one)), {1: (6,), 2: (8,), 32000: ()}, shape), "", "UNSUPPORTED"
        ),
        "zeros, as many as may be": lambda: slice_h5("b", h5(write_zeros), "", "SHAPE_MISMATCH"),
    }


ALL = gzip_bombs() | picture_bombs() | {f"hdf5: {name}": make for name, make in hdf5_bombs().items()}
FEW = (
    "zeros, as many as may be",
    "a gigabyte behind a small volume",
    "a png with a gigabyte too many",
    "hdf5: a chunk of a gigabyte too many",
    "four that are each as large as may be",
)
"""Those that every run of the tests sets off."""


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ALL])
def test_a_bomb_costs_less_than_2_gib_and_5_seconds(name, tmp_path, record_property):
    kind = ALL[name]()
    assert max(len(data) for _, data, *_ in kind.files) < MOST_FILE_BYTES
    (verdict, *said), seconds, peak = cost(kind, tmp_path)
    record_property("seconds", seconds)
    record_property("peak_gib", peak)
    print(f"{name}: {verdict}, {seconds:.2f} s, {peak:.2f} GiB {said[:1]}")
    assert verdict == kind.codes
    assert seconds < SECONDS
    assert peak < GIB


@pytest.mark.slow
@pytest.mark.parametrize("slope", [1.0, 2.0], ids=["as stored", "scaled to floats"])
def test_the_largest_volume_that_is_read_takes_less_than_2_gib(slope, tmp_path):
    """With so much noise behind it that nothing speaks of a bomb."""
    data = volume_of(MAX_VOXELS - 10_000, 1, 2, bytes(range(256)), slope=slope)
    noise = np.random.default_rng(0).bytes(MAX_BYTES // MOST_RATIO)
    (verdict, *_), _, peak = cost(packed("largest", data + noise, ""), tmp_path)
    assert verdict == "accept"
    assert peak < GIB
