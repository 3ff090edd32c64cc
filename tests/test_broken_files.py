"""Real broken files, as archives hold them: each gets the verdict that it deserves. The DICOM ones: `test_dicom.py`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainseg.errors import Code, ScanError
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.scans import load_scan

VERDICTS = {
    "all-ones-label.nii.gz": Code.EMPTY_VOLUME,
    "git-lfs-pointer.tif": Code.NOT_IMAGE,
    "html-page.nii.gz": Code.NOT_NIFTI,
    "utf8-mangled-TCGA_CS_4943_20000902_10.tif": Code.CORRUPT,
    "utf8-mangled-TCGA_CS_4943_20000902_11_mask.tif": Code.CORRUPT,
    "utf8-mangled-TCGA_CS_4943_20000902_14.tif": Code.CORRUPT,
    "utf8-mangled-TCGA_CS_4943_20000902_15.tif": Code.CORRUPT,
    "utf8-mangled-TCGA_CS_4943_20000902_16.tif": Code.CORRUPT,
    "utf8-mangled-TCGA_CS_4943_20000902_16_mask.tif": Code.CORRUPT,
    "utf8-mangled.nii.gz": Code.CORRUPT,
    "valid-but-constant.nii.gz": Code.EMPTY_VOLUME,
    "zero-bytes.nii.gz": Code.EMPTY_FILE,
}
WORDS = {
    "git-lfs-pointer.tif": "git lfs pull",
    "html-page.nii.gz": "web page",
    "utf8-mangled.nii.gz": "decoded as UTF-8",
}
"""What the line must say, where a person can do something about it."""


def row_of(*files: tuple[Path, str]) -> dict[str, Any]:
    stack = not files[0][0].name.endswith(".nii.gz")
    sources = [
        {"uri": str(path), "role": role, "modality": None if stack or role == "label" else "t1", "index": 0 if stack else None}
        for path, role in files
    ]
    row = {"scan_id": "scan-1", "reader": "stack" if stack else "volumes", "modalities": ["t1"], "sources": sources}
    return row | {"has_label": len(files) > 1, "label_map": "binary", "problem_code": None, "problem": None}


def refusal(row: dict[str, Any]) -> ScanError:
    with pytest.raises(ScanError) as caught:
        load_scan(row)
    return caught.value


def test_none_of_them_is_forgotten(data_dir):
    there = {path.name for path in (data_dir / "broken").iterdir() if path.suffix != ".dcm"}
    assert there <= set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_every_real_broken_file_is_refused_with_its_reason(name, data_dir):
    error = refusal(row_of((data_dir / "broken" / name, "image")))
    assert error.code is VERDICTS[name]
    assert WORDS.get(name, "found") in error.message
    assert error.message.isprintable()
    assert str(data_dir) not in error.message


def test_a_label_of_nothing_but_ones_is_no_label(data_dir, tmp_path):
    label = data_dir / "broken" / "all-ones-label.nii.gz"
    decoded = read_nifti(label.read_bytes(), label.name)
    image = tmp_path / "t1.nii.gz"
    image.write_bytes(write_nifti(np.arange(decoded.array.size, dtype="f4").reshape(decoded.grid.shape), decoded.grid))
    error = refusal(row_of((image, "image"), (label, "label")))
    assert error.code is Code.BAD_LABELS
    assert error.message.startswith("all-ones-label.nii.gz: ")


def test_a_broken_slice_is_named_among_the_whole_ones(data_dir, tmp_path):
    broken = data_dir / "broken" / "utf8-mangled-TCGA_CS_4943_20000902_10.tif"
    shutil.copy(broken, tmp_path / "scan_2.tif")
    assert refusal(row_of((tmp_path / "scan_2.tif", "image"))).message.startswith("scan_2.tif: ")
