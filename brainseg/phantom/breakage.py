"""Breakage: how stored scans go wrong. Each kind takes a good scan's files and returns them with one thing broken."""

import gzip
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import h5py
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainseg.phantom.files import Files, encode_hdf5, encode_nifti, encode_picture

Spoil = Callable[[Files, np.random.Generator], Files]


@dataclass(frozen=True)
class Breakage:
    """One way to go wrong: `says` is what a person would be told, `spoil` does it."""

    says: str
    spoil: Spoil


def _is_label(name: str) -> bool:
    return name.endswith(("_mask.tif", "_seg.nii.gz")) or name.startswith("masks/")


def _pick(files: Files, rng: np.random.Generator, *, label: bool = False) -> str:
    """One of the scan's image files, or of its label files; never the first or last of a stack."""
    names = sorted((n for n in files if _is_label(n) == label), key=lambda n: [int(d) for d in re.findall(r"\d+", n)])
    return names[int(rng.integers(1, len(names) - 1))] if len(names) > 2 else names[0]


def _truncate(files: Files, rng: np.random.Generator) -> Files:
    name = _pick(files, rng)
    return files | {name: files[name][: int(len(files[name]) * rng.uniform(0.3, 0.8))]}


def _empty(files: Files, rng: np.random.Generator) -> Files:
    return files | {_pick(files, rng): b""}


def _web_page(files: Files, rng: np.random.Generator) -> Files:
    page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><p>Your session has ended.</p></body></html>\n"
    return files | {_pick(files, rng): page.encode()}


def _lfs_pointer(files: Files, rng: np.random.Generator) -> Files:
    name = _pick(files, rng)
    digest, size = hashlib.sha256(files[name]).hexdigest(), len(files[name])
    return files | {name: f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()}


def _missing_label(files: Files, rng: np.random.Generator) -> Files:
    gone = _pick(files, rng, label=True)
    return {name: data for name, data in files.items() if name != gone}


def _missing_file(files: Files, rng: np.random.Generator) -> Files:
    gone = _pick(files, rng)
    return {name: data for name, data in files.items() if name != gone}


def _picture_shape(files: Files, rng: np.random.Generator) -> Files:
    """A picture cut to three quarters of its rows: valid, but of another shape."""
    name = _pick(files, rng)
    plane = _picture(files[name])
    return files | {name: encode_picture(np.ascontiguousarray(plane[: len(plane) * 3 // 4]), _kind(name))}


def _picture_values(files: Files, rng: np.random.Generator) -> Files:
    """A mask resampled with interpolation, so that its rim holds values between 0 and 255."""
    name = _pick(files, rng, label=True)
    plane = _picture(files[name]).copy()
    middle = len(plane) // 2
    plane[middle : middle + 3, middle : middle + 3] = (60, 128, 190)
    return files | {name: encode_picture(plane, _kind(name))}


def _picture(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def _kind(name: str) -> Literal["PNG", "TIFF"]:
    return "TIFF" if name.endswith(".tif") else "PNG"


def _volume_nan(files: Files, rng: np.random.Generator) -> Files:
    """A modality saved as float by a script that divided by zero."""
    name = _pick(files, rng)
    volume, spacing = _volume(files[name])
    volume = volume.astype(np.float32)
    volume[volume == 0] = np.nan
    return files | {name: encode_nifti(volume, spacing)}


def _volume_grid(files: Files, rng: np.random.Generator) -> Files:
    """A modality left on the grid on which it was acquired: every other row and column."""
    name = _pick(files, rng)
    volume, (depth, row, column) = _volume(files[name])
    return files | {name: encode_nifti(np.ascontiguousarray(volume[:, ::2, ::2]), (depth, 2 * row, 2 * column))}


def _volume_values(files: Files, rng: np.random.Generator) -> Files:
    """A label with a value that its convention does not know."""
    name = _pick(files, rng, label=True)
    volume, spacing = _volume(files[name])
    volume[len(volume) // 2, 10:14, 10:14] = 7
    return files | {name: encode_nifti(volume, spacing)}


def _volume(data: bytes) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Array (D, H, W) and spacing of a `.nii.gz`."""
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    i, j, k = (float(s) for s in image.header.get_zooms())
    return np.asarray(image.dataobj).transpose(2, 1, 0).copy(), (k, j, i)


def _block_shape(files: Files, rng: np.random.Generator) -> Files:
    name = _pick(files, rng)
    return files | {name: encode_hdf5({key: array[:, : array.shape[1] * 3 // 4] for key, array in _block(files[name]).items()})}


def _block_values(files: Files, rng: np.random.Generator) -> Files:
    """A mask that counts 3 where only 0 and 1 can stand."""
    name = _pick(files, rng)
    block = _block(files[name])
    block["mask"][10:14, 10:14, 1] = 3
    return files | {name: encode_hdf5(block)}


def _block_no_mask(files: Files, rng: np.random.Generator) -> Files:
    name = _pick(files, rng)
    return files | {name: encode_hdf5({"image": _block(files[name])["image"]})}


def _block(data: bytes) -> dict[str, NDArray[Any]]:
    with h5py.File(io.BytesIO(data)) as file:
        return {key: file[key][()] for key in file}


TRUNCATED = Breakage("a file is cut off in the middle", _truncate)
EMPTY = Breakage("a file has zero bytes", _empty)
WEB_PAGE = Breakage("a web page stands in place of a file", _web_page)
LFS_POINTER = Breakage("a git-LFS pointer stands in place of a file", _lfs_pointer)

BREAKAGES: Mapping[str, tuple[Breakage, ...]] = {
    "lgg": (
        TRUNCATED,
        WEB_PAGE,
        Breakage("one slice has another shape", _picture_shape),
        Breakage("one slice has no mask", _missing_label),
        EMPTY,
        Breakage("a mask holds values between 0 and 255", _picture_values),
        LFS_POINTER,
    ),
    "figshare": (
        TRUNCATED,
        WEB_PAGE,
        Breakage("the image has another shape than its mask", _picture_shape),
        EMPTY,
        Breakage("a mask holds values between 0 and 255", _picture_values),
        LFS_POINTER,
    ),
    "brats": (
        TRUNCATED,
        Breakage("a modality lies on another grid", _volume_grid),
        Breakage("a modality holds voxels that are not numbers", _volume_nan),
        WEB_PAGE,
        Breakage("the label holds the value 7", _volume_values),
        EMPTY,
        LFS_POINTER,
    ),
    "h5slices": (
        TRUNCATED,
        Breakage("one slice has another shape", _block_shape),
        Breakage("one slice has no mask", _block_no_mask),
        WEB_PAGE,
        Breakage("a mask holds the value 3", _block_values),
        Breakage("one slice is missing", _missing_file),
        EMPTY,
        LFS_POINTER,
    ),
}
"""For every layout the ways in which its scans break, in the order in which an archive cycles through them."""
