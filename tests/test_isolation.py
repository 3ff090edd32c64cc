"""One bad scan never touches another: with every odd input among good scans, each good scan's mask is the same to the bit."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import test_bad_inputs
from factory import make_card, make_model, make_row, make_scan, tiny_config, write_scan
from test_bad_inputs import bad_inputs
from test_more_bad_inputs import KINDS, REFUSE, row_of

from brainseg import runs, segment, stages, storage
from brainseg.config import SegmentConfig
from brainseg.errors import Code
from brainseg.formats.nifti import read_nifti
from brainseg.model import Model
from brainseg.stages import Job, Work
from brainseg.tables import SCANS

SETTINGS = SegmentConfig(threshold=0.12, thumbnails=False)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isolation")


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return make_model(place / "model", make_card(tiny_config(modalities=("t1",))), SETTINGS)


@pytest.fixture(scope="module")
def good(place: Path) -> list[Work]:
    """Decoded scans whose network answers are worth comparing."""
    scans = [make_scan(shape=(4, 20 + n, 24), modalities=("t1",), seed=n, name=f"good-{n}") for n in range(3)]
    return [stages.decode(write_scan(place / "good", scan), with_label=True) for scan in scans]


@pytest.fixture(scope="module")
def alone(good: Sequence[Work], model: Model) -> dict[str, str]:
    """What each good scan's mask hashes to where nothing odd is near."""
    rows = finished(good, model)
    assert all(row["status"] == "ok" for row in rows)
    assert all(0 < read_nifti(row["mask"], "mask").array.mean() < 1 for row in rows)
    return {row["scan_id"]: row["mask_sha256"] for row in rows}


def finished(works: Sequence[Work], model: Model) -> list[Row]:
    """Predict together, finish, and pass each row through its table, as a part of a run does."""
    job = Job("run", "model", SETTINGS, "run-1", 1, model.fingerprint, "config", model.card)
    rows = [stages.finish(work, job) for work in stages.predict(model, works)]
    return pa.Table.from_pylist(rows, schema=SCANS).to_pylist()


def among_good(row: Mapping[str, Any], good: Sequence[Work]) -> list[Work]:
    """The odd scan first, in the middle, and last."""
    odd = [stages.decode(make_row(**{**row, "scan_id": f"odd-{n}"}), with_label=True) for n in range(3)]
    return [odd[0], *good[:2], odd[1], *good[2:], odd[2]]


def requires_isolation(row: Mapping[str, Any], good: Sequence[Work], model: Model, alone: Mapping[str, str]) -> list[Row]:
    """Returns the rows of the odd scans."""
    rows = finished(among_good(row, good), model)
    assert [r["scan_id"] for r in rows] == ["odd-0", "good-0", "good-1", "odd-1", "good-2", "odd-2"]
    assert {r["scan_id"]: r["mask_sha256"] for r in rows if r["scan_id"] in alone} == alone
    odd = [r for r in rows if r["scan_id"] not in alone]
    assert len({(r["status"], r["error_code"], r["mask_sha256"]) for r in odd}) == 1
    return odd


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_odd_scan_among_good_ones_changes_none_of_them(kind, good, model, alone, tmp_path):
    for row in requires_isolation(row_of(kind, tmp_path), good, model, alone):
        assert row["error_code"] != Code.INTERNAL
        if kind.want == REFUSE:
            assert (row["status"], row["error_code"], row["error_stage"]) == ("failed", kind.codes, "decode")
            assert row["mask"] is None
        elif "t1" in kind.modalities:
            assert row["status"] == "ok"


def collected() -> Iterator[Any]:
    for parameter in bad_inputs():
        entry = parameter.values[0]
        if not entry or entry["family"] in ("nifti", "fs", "image", "h5"):
            yield parameter


folder = test_bad_inputs.folder


@pytest.mark.parametrize("entry", list(collected()))
def test_an_odd_scan_of_the_collection_changes_no_good_one(entry, folder, good, model, alone):
    row = test_bad_inputs.row_for(entry["family"], entry["kind"], folder / entry["path"])
    statuses = {r["status"] for r in requires_isolation(row, good, model, alone)}
    assert statuses == ({"failed"} if entry["want"] == "quarantine" else {"ok"})


def odd_archive(root: Path) -> list[str]:
    """Every volume of our own that is refused, as cases around three good ones; returns the ids of the bad ones."""
    bad = [kind for kind in KINDS if kind.want == REFUSE and [name for name, *_ in kind.files] in (["x.nii"], ["x.nii.gz"])]
    for n, kind in enumerate(bad):
        name, data, *_ = kind.files[0]
        (root / f"case-{n:03d}").mkdir(parents=True)
        (root / f"case-{n:03d}" / f"case-{n:03d}-t1{name[1:]}").write_bytes(data)
    return [f"case-{n:03d}" for n in range(len(bad))]


def test_a_run_over_an_archive_of_odd_scans_on_ray_loses_none_and_keeps_good_masks(
    local_ray, good, model, alone, place, tmp_path
):
    bad = odd_archive(tmp_path / "archive")
    names = {}
    for work, after in zip(good, ("case-000x", f"{bad[len(bad) // 2]}x", "case-999"), strict=True):
        case = tmp_path / "archive" / after
        case.mkdir()
        (case / f"{after}-t1.nii.gz").write_bytes(storage.read_bytes(work.row["sources"][0]["uri"]))
        names[after] = alone[work.row["scan_id"]]
    run = str(tmp_path / "run")
    segment.segment_archive(str(tmp_path / "archive"), str(place / "model"), run, SETTINGS)
    rows = [row for part in runs.parts(run) for row in storage.read_table(part).to_pylist()]
    assert sorted(row["scan_id"] for row in rows) == sorted([*bad, *names])
    assert {row["scan_id"]: row["mask_sha256"] for row in rows if row["status"] == "ok"} == names
    assert not {row["error_code"] for row in rows} & {Code.INTERNAL, "WORKER_DIED"}
    assert json.loads(storage.read_text(storage.join(run, "run.json")))["counts"]["failed"] == len(bad)
