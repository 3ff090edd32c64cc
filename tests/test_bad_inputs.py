"""The collection of malformed and odd inputs: every kind gets its verdict, and never in silence.

It lies beside the real scans (`BRAINSEG_DATA/../bad-inputs`). Its DICOM family is judged in `test_dicom.py`.
"""

import csv
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainseg.errors import Code, ScanError, UsageError
from brainseg.layouts import FoundScan, settle
from brainseg.manifest import index_archive
from brainseg.scans import load_scan

_DATA = os.environ.get("BRAINSEG_DATA")
_BAD_INPUTS = Path(_DATA).resolve().parent / "bad-inputs" if _DATA else None

_UNPACKED_BY_NOBODY = "brainseg unpacks no archive, so no member can climb out: what is packed is refused before it is opened"
OTHERWISE = {
    "tif_lgg_rgb": ("accept", "", "the collection's LGG names a layout, not a code"),
    "h5_ok": ("accept-warn", "NO_CHECKSUM", "nothing tells it from h5_bit_flip, so both carry the warning"),
    "h5_group_loop": ("accept-warn", "NO_CHECKSUM", "likewise"),
    "tar_slip": ("refuse", "UsageError", _UNPACKED_BY_NOBODY),
    "zip_slip": ("refuse", "UsageError", _UNPACKED_BY_NOBODY),
    "tar_truncated": ("refuse", "UsageError", _UNPACKED_BY_NOBODY),
}
"""Kinds decided otherwise than the collection proposes: verdict, code, reason."""

DECLARED = {"labels_0124": "brats2020", "labels_255": "binary"}
"""Cases whose label map a person must declare. Nothing guesses what 4 means: undeclared, they are refused (see below)."""

Verdict = tuple[str, str, str]
"""The verdict, its codes, and all that is said."""


def bad_inputs() -> Iterator[Any]:
    if _BAD_INPUTS is None or not (_BAD_INPUTS / "manifest.json").is_file():
        yield pytest.param({}, marks=pytest.mark.skip(reason="no bad-inputs beside the folder that BRAINSEG_DATA names"))
        return
    for entry in json.loads((_BAD_INPUTS / "manifest.json").read_text()):
        if entry["family"] != "dicom":
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
    file |= {"size_bytes": path.stat().st_size, "tag": "t"}
    row = {
        "scan_id": "scan-1",
        "reader": reader,
        "modalities": list(modalities),
        "sources": [file],
        "has_label": role == "both",
    }
    return row | {"label_map": "brats2020", "problem_code": None, "problem": None}


def verdict_on(row: Mapping[str, Any], said_before: Sequence[str] = ()) -> Verdict:
    try:
        warnings = [*said_before, *load_scan(row).warnings]
    except ScanError as error:
        return "quarantine", error.code, error.message
    codes = dict.fromkeys(warning.split(":")[0] for warning in warnings)
    return "accept-warn" if warnings else "accept", ",".join(codes), " ".join(warnings)


def row_for(family: str, kind: str, path: Path) -> dict[str, Any]:
    """The manifest row of a family whose inputs are single files."""
    if family == "h5":
        return row_of("h5slices", ["flair", "t1", "t1c", "t2"], path, "both", 0)
    if family == "image":
        return row_of("stack", ["t1", "flair", "t1c"] if kind == "tif_lgg_rgb" else ["t1"], path, index=0)
    return row_of("volumes", ["t1"], path)


def on_file(family: str) -> Callable[[str, Path], Verdict]:
    return lambda kind, path: verdict_on(row_for(family, kind, path))


def on_case(kind: str, path: Path) -> Verdict:
    table, _ = index_archive(str(path.parent), label_map=DECLARED.get(kind))
    (row,) = table.to_pylist()
    return verdict_on(row)


def on_archive(kind: str, path: Path) -> Verdict:
    if kind == "ids_traversal":
        with path.open(newline="") as file:
            return on_ids([row["id"] for row in csv.DictReader(file)])
    try:
        table, inventory = index_archive(str(path))
    except UsageError as error:
        return "refuse", "UsageError", str(error)
    assert table.num_rows > 1
    (same,) = {verdict_on(row, inventory.warnings)[:2] for row in table.to_pylist()}
    return *same, ""


def on_ids(ids: Sequence[str]) -> Verdict:
    """What becomes of scans whose ids these are, found in an archive."""
    found = [FoundScan(name, "p", "d", "brats", "volumes", "brats2020", ("t1",), ()) for name in ids]
    scans = settle(found, []).scans
    assert len(scans) == len(ids)
    assert len({scan.scan_id for scan in scans}) == len(ids)
    kept = {scan.scan_id for scan in scans} & set(ids)
    assert not kept
    (code,) = {scan.problem_code for scan in scans}
    return "quarantine", str(code), " ".join(str(scan.problem) for scan in scans)


JUDGES: Mapping[str, Callable[[str, Path], Verdict]] = {
    **{family: on_file(family) for family in ("nifti", "fs", "image", "h5")},
    "case": on_case,
    "archive": on_archive,
}


@pytest.mark.parametrize("entry", list(bad_inputs()))
def test_every_odd_input_gets_its_verdict(entry, folder):
    wanted = OTHERWISE.get(entry["kind"], (entry["want"], entry["code"]))[:2]
    before = sorted(folder.parent.rglob("*"))
    verdict, codes, said = JUDGES[entry["family"]](entry["kind"], folder / entry["path"])
    assert (verdict, codes) == wanted
    assert sorted(folder.parent.rglob("*")) == before
    if verdict != "refuse":
        assert str(folder) not in said
        assert said.isprintable()


@pytest.mark.parametrize("kind", sorted(DECLARED))
def test_a_label_value_that_no_one_declared_is_refused(kind, folder):
    (row,) = index_archive(str(folder / "cases" / kind))[0].to_pylist()
    assert verdict_on(row)[:2] == ("quarantine", Code.BAD_LABELS)


def test_a_packed_archive_among_the_files_is_named_and_left_packed(folder):
    _, inventory = index_archive(str(folder / "cases"), layout="brats")
    reasons = {Path(uri).name: reason for uri, reason in inventory.ignored}
    for name in ("slip.tar.gz", "slip.zip", "trunc.tar.gz"):
        assert "unpack it" in reasons[name]
    assert not list(folder.rglob("evil*"))


def test_byte_order_and_version_make_no_difference(folder):
    paths = [folder / "nifti" / kind / "x.nii.gz" for kind in ("ok_nii_gz", "ok_big_endian", "ok_nifti2")]
    first, *others = (load_scan(row_of("volumes", ["t1"], path)) for path in paths)
    for other in others:
        np.testing.assert_array_equal(other.image, first.image)
