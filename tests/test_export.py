"""Export: every stored mask comes out once, voxel for voxel, under a name that is safe anywhere."""

import hashlib
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainseg import storage, tables
from brainseg.errors import RunError, UsageError
from brainseg.export import export_run, file_name
from brainseg.formats.images import read_image, write_png
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.geometry import Grid

GRID = Grid.of((11, 6, 5), np.diag([-1.0, -1.0, 2.0, 1.0]))


def mask_row(scan_id, array, *, encoding="nii.gz", **changes):
    data = write_png(array[0]) if encoding == "png" else write_nifti(array, GRID)
    row = {"scan_id": scan_id, "dataset": "synthetic", "label_map": "brats2020", "sources": [], "warnings": [], "status": "ok"}
    row |= {"model_fingerprint": "f", "config_fingerprint": "c", "content_tag": "t", "run_id": "run-1", "attempt": 1}
    row |= {"finished_at": datetime(2026, 3, 1, tzinfo=UTC), "mask": data, "mask_encoding": encoding}
    return row | {"mask_sha256": hashlib.sha256(data).hexdigest()} | changes


def write_run(folder, rows, label_map="brats2020", rows_a_part=2):
    storage.write_json(str(folder / "run.json"), {"run_id": "run-1", "model": {"label_map": label_map}})
    for start in range(0, len(rows), rows_a_part):
        table = pa.Table.from_pylist(rows[start : start + rows_a_part], schema=tables.SCANS)
        storage.write_table(str(folder / "scans" / f"{start}.parquet"), table, row_group_rows=1)
    return str(folder)


def volume(seed, top=5):
    return np.random.default_rng(seed).integers(0, top, GRID.shape).astype(np.uint8)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_nifti_is_the_bytes_as_they_were_stored(tmp_path):
    rows = [mask_row(f"s{i}", volume(i)) for i in range(5)]
    rows.append(mask_row("bad", volume(9), status="failed", mask=None, mask_encoding=None, mask_sha256=None))
    assert export_run(write_run(tmp_path / "run", rows), str(tmp_path / "out")) == 5
    assert names(tmp_path / "out") == [f"s{i}.nii.gz" for i in range(5)]
    for row in rows[:5]:
        assert (tmp_path / "out" / f"{row['scan_id']}.nii.gz").read_bytes() == row["mask"]


def test_a_mask_stored_as_png_becomes_a_nifti_that_claims_no_position(tmp_path):
    plane = volume(1)[:1]
    export_run(write_run(tmp_path / "run", [mask_row("image", plane, encoding="png")]), str(tmp_path / "out"))
    found = read_nifti((tmp_path / "out" / "image.nii.gz").read_bytes(), "image.nii.gz")
    assert (found.array == plane).all()
    assert any(line.startswith("NO_ORIENTATION") for line in found.warnings)


def test_png_slices_stack_up_to_the_mask(tmp_path):
    mask = volume(2)
    assert export_run(write_run(tmp_path / "run", [mask_row("s", mask)]), str(tmp_path / "out"), format="png") == 1
    assert names(tmp_path / "out") == [f"s_{k:02d}.png" for k in range(11)]
    stacked = [read_image((tmp_path / "out" / name).read_bytes(), name)[0] for name in names(tmp_path / "out")]
    assert (np.stack(stacked) == mask).all()


def test_a_tumour_can_be_seen_where_the_label_map_is_binary(tmp_path):
    plane = volume(3, top=2)[:1]
    run = write_run(tmp_path / "run", [mask_row("image", plane, encoding="png")], label_map="binary")
    export_run(run, str(tmp_path / "out"), format="png")
    shown = read_image((tmp_path / "out" / "image.png").read_bytes(), "image.png")[0]
    assert (shown == plane[0] * 255).all()


def test_a_scan_written_twice_is_one_scan_and_a_second_export_changes_nothing(tmp_path):
    run = write_run(tmp_path / "run", [mask_row("s", volume(1)), mask_row("t", volume(2)), mask_row("s", volume(1))])
    assert export_run(run, str(tmp_path / "out")) == 2
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert export_run(run, str(tmp_path / "out")) == 2
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


def test_a_mask_that_does_not_match_its_hash_is_not_exported(tmp_path):
    run = write_run(tmp_path / "run", [mask_row("s", volume(1), mask_sha256="0" * 64)])
    with pytest.raises(RunError, match="mask of s"):
        export_run(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"format": "jpeg"}, {"layout": "bids"}])
def test_what_it_cannot_write_is_refused_with_what_it_can(wrong, tmp_path):
    with pytest.raises(UsageError, match="known: "):
        export_run(write_run(tmp_path / "run", [mask_row("s", volume(1))]), str(tmp_path / "out"), **wrong)


def test_a_place_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no run\.json"):
        export_run(str(tmp_path), str(tmp_path / "out"))


def test_a_hostile_id_stays_inside_the_folder(tmp_path):
    rows = [
        mask_row(name, volume(i))
        for i, name in enumerate(["../../escape", "/etc/passwd", "a/b", "..", "con", "x\ny", ".hidden"])
    ]
    assert export_run(write_run(tmp_path / "run", rows), str(tmp_path / "out")) == len(rows)
    assert len(names(tmp_path / "out")) == len(rows)
    assert names(tmp_path) == ["out", "run"]


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_every_id_has_a_safe_name_and_different_ids_have_different_names(one, other):
    name = file_name(one)
    assert PurePosixPath(name).name == name
    assert name not in (".", "..")
    assert not any(ord(letter) < 32 or letter in '/\\:*?"<>|' for letter in name)
    assert (file_name(other) == name) == (other == one)


def test_an_ordinary_id_keeps_its_name():
    for scan_id in ("TCGA_CS_4941_19960909", "BraTS-GLI-00000-000", "Müller 3", "brats_2013_pat0003_1"):
        assert file_name(scan_id) == scan_id
