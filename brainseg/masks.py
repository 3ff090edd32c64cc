"""Masks: a scan's predicted label volume as the bytes that a run stores, and back again.

The stored bytes are a file that opens anywhere as it is: what `segment` writes, `evaluate`, `export` and `view` read.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import RunError
from brainseg.formats.images import read_image, write_png
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.geometry import Grid


def encode_mask(label: NDArray[np.uint8], grid: Grid) -> tuple[bytes, str]:
    """A label volume `(D, H, W)` as file bytes and their kind: PNG for a single image, NIfTI for everything else."""
    if label.shape[0] == 1 and grid.affine is None:
        return write_png(label[0]), "png"
    return write_nifti(label, grid), "nii.gz"


def decode_mask(row: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The mask of a `scans` row as `(D, H, W)` label values.

    Where it lies is the row's to say (`mask_grid`): a file of a scan without positions looks as if its voxels were 1 mm.
    """
    name = f"mask of {row['scan_id']}"
    if row["mask_encoding"] == "png":
        return read_image(row["mask"], name)[0][None].astype(np.uint8)
    return read_nifti(row["mask"], name).array.astype(np.uint8)


def mask_grid(row: Mapping[str, Any]) -> Grid:
    """The native grid of a `scans` row that is `ok`."""
    depth, height, width = row["shape"]
    return Grid((depth, height, width), None if row["affine"] is None else tuple(row["affine"]))


def check_mask(row: Mapping[str, Any], part: str) -> None:
    """Raise RunError where the mask of a `scans` row is not the one that was hashed when it was written."""
    found = hashlib.sha256(row["mask"]).hexdigest()
    if found != row["mask_sha256"]:
        raise RunError(
            f"{part}: the mask of {row['scan_id']} has sha256 {found[:12]}, its row says {str(row['mask_sha256'])[:12]}"
        )
