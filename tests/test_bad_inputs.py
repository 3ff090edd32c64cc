"""The collection of malformed and odd inputs: every kind gets its verdict, and never in silence.

It lies beside the real scans (`BRAINSEG_DATA/../bad-inputs`). Judged here are its single files: NIfTI, pictures, HDF5.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainseg.errors import ScanError
from brainseg.scans import load_scan

_DATA = os.environ.get("BRAINSEG_DATA")
_BAD_INPUTS = Path(_DATA).resolve().parent / "bad-inputs" if _DATA else None

OTHERWISE = {
    "tif_lgg_rgb": ("accept", "", "the collection's LGG names a layout, not a code"),
    "h5_ok": ("accept-warn", "NO_CHECKSUM", "nothing tells it from h5_bit_flip, so both carry the warning"),
    "h5_group_loop": ("accept-warn", "NO_CHECKSUM", "likewise"),
    "npz_pickle": ("quarantine", "NOT_HDF5", "what is no HDF5 file is never opened, so whether it holds pickles is not asked"),
}
"""Kinds decided otherwise than the collection proposes: verdict, code, reason."""


def bad_inputs() -> Iterator[Any]:
    if _BAD_INPUTS is None or not (_BAD_INPUTS / "manifest.json").is_file():
        yield pytest.param({}, marks=pytest.mark.skip(reason="no bad-inputs beside the folder that BRAINSEG_DATA names"))
        return
    for entry in json.loads((_BAD_INPUTS / "manifest.json").read_text()):
        if entry["family"] in ("nifti", "image", "h5"):
            yield pytest.param(entry, id=entry["kind"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if _BAD_INPUTS is None or not _BAD_INPUTS.is_dir():
        pytest.skip("no bad-inputs beside the folder that BRAINSEG_DATA names")
    out = tmp_path_factory.mktemp("bad-inputs")
    with tarfile.open(_BAD_INPUTS / "inputs.tar.gz") as archive:
        archive.extractall(out, filter="data")
    return out


def row_of(reader: str, modalities: Sequence[str], path: Path, role: str = "image", index: int | None = None) -> dict[str, Any]:
    file = {"uri": str(path), "role": role, "modality": None if index == 0 else modalities[0], "index": index}
    row = {
        "scan_id": "scan-1",
        "reader": reader,
        "modalities": list(modalities),
        "sources": [file],
        "has_label": role == "both",
    }
    return row | {"label_map": "brats2020", "problem_code": None, "problem": None}


def row_for(entry: Mapping[str, str], folder: Path) -> dict[str, Any]:
    path = folder / entry["path"]
    if entry["family"] == "nifti":
        return row_of("volumes", ["t1"], path)
    if entry["family"] == "h5":
        return row_of("h5slices", ["flair", "t1", "t1c", "t2"], path, "both", 0)
    return row_of("stack", ["pre", "flair", "post"] if entry["kind"] == "tif_lgg_rgb" else ["t1"], path, index=0)


def verdict_on(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The verdict, its codes, and all that is said of it."""
    try:
        scan = load_scan(row)
    except ScanError as error:
        return "quarantine", error.code, error.message
    return (
        "accept-warn" if scan.warnings else "accept",
        ",".join(w.split(":")[0] for w in scan.warnings),
        " ".join(scan.warnings),
    )


@pytest.mark.parametrize("entry", list(bad_inputs()))
def test_every_odd_input_gets_its_verdict(entry, folder):
    wanted = OTHERWISE.get(entry["kind"], (entry["want"], entry["code"], ""))[:2]
    verdict, codes, said = verdict_on(row_for(entry, folder))
    assert (verdict, codes) == wanted
    assert str(folder) not in said


def test_byte_order_and_version_make_no_difference(folder):
    entries = [{"family": "nifti", "path": f"nifti/{kind}/x.nii.gz"} for kind in ("ok_nii_gz", "ok_big_endian", "ok_nifti2")]
    first, *others = (load_scan(row_for(entry, folder)) for entry in entries)
    for other in others:
        np.testing.assert_array_equal(other.image, first.image)
