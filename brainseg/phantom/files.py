"""Files: a phantom's arrays as the bytes of PNG, TIFF, NIfTI, HDF5 and CSV files. The same array gives the same bytes."""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import h5py
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Files: TypeAlias = dict[str, bytes]
"""Relative path to content."""


def encode_picture(plane: NDArray[np.uint8], kind: Literal["PNG", "TIFF"]) -> bytes:
    """A grey (H, W) or colour (H, W, 3) picture; TIFF is stored uncompressed, as in the LGG set."""
    buffer = io.BytesIO()
    Image.fromarray(plane).save(buffer, kind)
    return buffer.getvalue()


def encode_nifti(volume: NDArray[Any], spacing_mm: tuple[float, float, float]) -> bytes:
    """A `.nii.gz` of an array (D, H, W) whose rows run back and columns run left: LPS, placed as BraTS places it."""
    depth_mm, row_mm, column_mm = spacing_mm
    affine = np.diag([-column_mm, -row_mm, depth_mm, 1.0])
    affine[1, 3] = (volume.shape[1] - 1) * row_mm
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm", "sec")
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def encode_hdf5(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An HDF5 file of arrays (H, W, C), gzipped in chunks of a quarter by a quarter by one, as published."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, array in arrays.items():
            chunks = (max(array.shape[0] // 4, 1), max(array.shape[1] // 4, 1), 1)
            file.create_dataset(key, data=array, chunks=chunks, compression="gzip", track_times=False)
    return buffer.getvalue()


def encode_csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    """A table with a header line; every row has the keys of the first."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()
