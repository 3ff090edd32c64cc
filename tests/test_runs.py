"""Runs: a run folder tells the truth, survives what kills its writers, and anything wrong with it is found."""

import hashlib
import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from factory import FEW, make_row
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import runs, storage
from brainseg.card import Split
from brainseg.errors import RunError, StorageError
from brainseg.metrics import score_region
from brainseg.runs import Identity
from brainseg.tables import METRICS, SCANS

IDENTITY = Identity("manifest-1", "model-1", "config-1")
START = datetime(2026, 1, 1, tzinfo=UTC)


def source(scan_id, size=10, role="image"):
    uri = f"/archive/{scan_id}.nii.gz"
    return {"uri": uri, "role": role, "modality": "flair", "index": None, "size_bytes": size, "tag": "t", "sha256": None}


def manifest_row(scan_id, size=10, label=False):
    roles = ("image", "label") if label else ("image",)
    return make_row(scan_id, f"of-{scan_id}", sources=[source(scan_id, size, role) for role in roles])


def finished(scan_id, minute=0, size=10, status="ok", label=False, **changes):
    """A row of the `scans` table as a stage would hand it over."""
    mask = f"mask of {scan_id}".encode()
    known = manifest_row(scan_id, size, label)
    kept = {k: known[k] for k in ("scan_id", "patient_id", "dataset", "label_map", "fold", "sources", "attributes")}
    ok = {
        "mask": mask,
        "mask_encoding": "nii.gz",
        "mask_sha256": hashlib.sha256(mask).hexdigest(),
        "regions": [],
        "shape": [1, 2, 3],
    }
    return {
        **kept,
        "status": status,
        "warnings": [],
        "model_fingerprint": IDENTITY.model_fingerprint,
        "config_fingerprint": IDENTITY.config_fingerprint,
        "content_tag": runs.content_tag(known),
        "run_id": "run",
        "attempt": 1,
        "finished_at": START + timedelta(minutes=minute),
        **(ok if status == "ok" else {"error_code": "CORRUPT", "error_stage": "decode", "error_message": "found rubbish"}),
        **changes,
    }


def expected(*scan_ids):
    return {s: runs.content_tag(manifest_row(s)) for s in scan_ids}


def stored(run):
    """Every row of a run: (scan, minute it was finished)."""
    tables = [storage.read_table(uri, ["scan_id", "finished_at"]).to_pylist() for uri in runs.parts(run)]
    return sorted((r["scan_id"], (r["finished_at"] - START).seconds // 60) for rows in tables for r in rows)


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


@pytest.fixture
def done(run):
    """A finished run of scans a, b, c in two parts, in which nothing is wrong."""
    body = runs.open_run(run, IDENTITY, {"source": "archive"})
    runs.write_part(run, [finished("a"), finished("b", status="failed")])
    runs.write_part(run, [finished("c")])
    counts = runs.settle(run, expected("a", "b", "c")) | runs.write_metrics(run, Split())
    runs.finish_run(run, body, counts, {"total_s": 1.5})
    return run


class TestOpening:
    def test_a_new_run_says_what_it_is(self, run):
        body = runs.open_run(run, IDENTITY, {"source": "archive"})
        assert body == storage.read_json(f"{run}/run.json")
        assert body["attempt"] == 1
        assert body["finished_at"] is None
        assert {k: body[k] for k in IDENTITY.__dict__} == IDENTITY.__dict__

    def test_the_same_run_is_taken_up_again_and_keeps_its_name(self, done):
        before = storage.read_json(f"{done}/run.json")
        after = runs.open_run(done, IDENTITY, {"source": "archive"})
        assert (after["run_id"], after["created_at"]) == (before["run_id"], before["created_at"])
        assert after["attempt"] == 2
        assert after["finished_at"] is None

    @pytest.mark.parametrize("what", ["manifest", "model", "config"])
    def test_another_manifest_model_or_config_is_refused_and_nothing_is_changed(self, run, what):
        runs.open_run(run, IDENTITY, {})
        before = Path(run, "run.json").read_bytes()
        with pytest.raises(RunError, match=f"another {what} .*choose another --out"):
            runs.open_run(run, Identity(**{**IDENTITY.__dict__, f"{what}_fingerprint": "other"}), {})
        assert Path(run, "run.json").read_bytes() == before


class TestParts:
    @FEW
    @given(ids=st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), min_size=1, unique=True))
    def test_a_part_is_named_by_its_scans_in_any_order(self, ids):
        assert runs.part_uri("/run", ids) == runs.part_uri("/run", ids[::-1])
        assert runs.part_uri("/run", ids) != runs.part_uri("/run", [*ids, "one more"])

    def test_a_retried_task_overwrites_itself(self, run):
        assert runs.write_part(run, [finished("a"), finished("b")]) == runs.write_part(
            run, [finished("b", 1), finished("a", 1)]
        )
        assert stored(run) == [("a", 1), ("b", 1)]

    def test_a_part_has_the_published_columns_and_gives_rows_back(self, run):
        row = finished("a")
        table = storage.read_table(runs.write_part(run, [row]))
        assert table.schema.equals(SCANS)
        assert {k: v for k, v in table.to_pylist()[0].items() if v is not None} == row

    def test_what_is_finished_is_known_by_its_content(self, done):
        assert runs.finished_rows(done, expected("a", "b", "c")).keys() == {"a", "b", "c"}
        assert runs.content_tag(manifest_row("a", size=11)) != expected("a")["a"]
        assert runs.finished_rows(f"{done}/nowhere", expected("a")) == {}

    def test_a_failure_of_the_store_is_tried_again_and_its_success_stays(self, run):
        runs.write_part(run, [{**finished("a", status="failed"), "error_code": "UNREADABLE"}, finished("b")])
        assert runs.finished_rows(run, expected("a", "b")).keys() == {"b"}
        runs.write_part(run, [finished("a", minute=5)])
        assert runs.settle(run, expected("a", "b"))["failed"] == 0
        assert stored(run) == [("a", 5), ("b", 0)]

    @pytest.mark.parametrize("left", [0, 1, 100, -1])
    def test_a_torn_part_is_set_aside_and_its_scans_are_done_again(self, done, left):
        torn = Path(runs.part_uri(done, ["c"]))
        data = torn.read_bytes()
        torn.write_bytes(data[:left])
        with pytest.raises(StorageError):
            list(runs.kept_rows(done, set_aside=False))
        assert torn.exists()
        assert runs.finished_rows(done, expected("a", "b", "c")).keys() == {"a", "b"}
        assert not torn.exists()
        assert Path(done, "torn", torn.name).read_bytes() == data[:left]


class TestSettling:
    def test_one_row_a_scan_is_left_alone(self, run):
        runs.write_part(run, [finished("a"), finished("b", status="failed")])
        before = Path(runs.parts(run)[0]).read_bytes()
        assert runs.settle(run, expected("a", "b")) == {"found": 2, "ok": 1, "failed": 1, "duplicates_removed": 0}
        assert Path(runs.parts(run)[0]).read_bytes() == before

    def test_a_missing_scan_is_named(self, run):
        runs.write_part(run, [finished("a")])
        with pytest.raises(RunError, match="1 scans of the manifest have no row, such as b"):
            runs.settle(run, expected("a", "b"))

    def test_of_two_rows_the_first_stays(self, run):
        runs.write_part(run, [finished("a", 1), finished("b", 1)])
        runs.write_part(run, [finished("b", 0), finished("c", 0)])
        assert runs.settle(run, expected("a", "b", "c"))["duplicates_removed"] == 1
        assert stored(run) == [("a", 1), ("b", 0), ("c", 0)]

    def test_a_row_of_files_that_have_changed_since_gives_way(self, run):
        runs.write_part(run, [finished("a", 0, size=9), finished("b", 0)])
        runs.write_part(run, [finished("a", 1)])
        assert runs.settle(run, expected("a", "b"))["duplicates_removed"] == 1
        assert stored(run) == [("a", 1), ("b", 0)]

    def test_a_scan_that_is_not_in_the_manifest_goes(self, run):
        runs.write_part(run, [finished("a"), finished("stranger")])
        runs.settle(run, expected("a"))
        assert stored(run) == [("a", 0)]

    def test_a_remainder_may_take_the_name_of_a_part_that_goes(self, run):
        runs.write_part(run, [finished("a", 0), finished("b", 0), finished("c", 9)])
        runs.write_part(run, [finished("c", 0)])
        runs.write_part(run, [finished("a", 5), finished("b", 5)])
        runs.settle(run, expected("a", "b", "c"))
        assert stored(run) == [("a", 0), ("b", 0), ("c", 0)]

    def test_a_scan_twice_in_one_part_stays_once(self, run):
        runs.write_part(run, [finished("a"), finished("a"), finished("b")])
        assert runs.settle(run, expected("a", "b"))["duplicates_removed"] == 1
        assert stored(run) == [("a", 0), ("b", 0)]

    def test_settling_again_changes_nothing(self, run):
        runs.write_part(run, [finished("a", 1), finished("b", 1)])
        runs.write_part(run, [finished("b", 0), finished("c", 0)])
        runs.settle(run, expected("a", "b", "c"))
        before = stored(run)
        assert runs.settle(run, expected("a", "b", "c"))["duplicates_removed"] == 0
        assert stored(run) == before

    @settings(max_examples=10, deadline=None)
    @given(parts=st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), min_size=1, max_size=4), max_size=5))
    def test_however_attempts_overlapped_each_scan_ends_up_once_at_its_earliest(self, tmp_path_factory, parts):
        run = str(tmp_path_factory.mktemp("run") / "run")
        for rows in parts:
            runs.write_part(run, [finished(scan, minute) for scan, minute in rows])
        rows = stored(run)
        found = {scan for scan, _ in rows}
        runs.settle(run, expected(*found))
        assert stored(run) == sorted((scan, min(m for s, m in rows if s == scan)) for scan in found)


class TestMetrics:
    def scored(self, scan_id, label=True, **changes):
        mask = np.ones((1, 2, 3), bool)
        entry = score_region("tumor", mask if label else None, mask, (1.0, 1.0, 1.0))
        trust = {"mean_probability": 0.9, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
        return finished(scan_id, label=label, regions=[{**entry, **trust}], **changes)

    def test_every_scan_and_region_stands_in_a_flat_row(self, run):
        runs.write_part(run, [self.scored("b"), finished("c", status="failed", label=True)])
        runs.write_part(run, [self.scored("a"), self.scored("d", label=False)])
        counts = runs.write_metrics(run, Split(train=("of-a",), test=("of-b",)))
        table = storage.read_table(f"{run}/metrics.parquet")
        assert counts == {"labelled": 3, "evaluated": 2}
        assert table.schema.equals(METRICS)
        rows = table.to_pylist()
        assert [(r["scan_id"], r["split"], r["dice"]) for r in rows] == [
            ("a", "train", 1.0),
            ("b", "test", 1.0),
            ("d", None, None),
        ]
        assert rows[0]["attributes"] == [("site", "here")]

    def test_figures_that_do_not_fit_the_room_are_the_same_in_the_same_order(self, run, tmp_path, monkeypatch):
        for n in range(40):
            runs.write_part(run, [self.scored(f"s{n * 7 % 40:02d}-{half}") for half in "ba"])
        assert runs.write_metrics(run, Split()) == {"labelled": 80, "evaluated": 80}
        whole, local = storage.read_table(f"{run}/metrics.parquet"), tmp_path / "local"
        local.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(local))
        assert runs.write_metrics(run, Split(), room_bytes=2000) == {"labelled": 80, "evaluated": 80}
        assert storage.read_table(f"{run}/metrics.parquet").equals(whole)
        assert whole["scan_id"].to_pylist() == sorted(whole["scan_id"].to_pylist())
        assert list(local.iterdir()) == []

    def test_a_run_of_nothing_has_an_empty_table(self, run):
        assert runs.write_metrics(run, Split()) == {"labelled": 0, "evaluated": 0}
        assert storage.read_table(f"{run}/metrics.parquet").num_rows == 0


def test_a_finished_run_says_what_it_holds_and_seals_every_file(done):
    success, body = storage.read_json(f"{done}/_SUCCESS.json"), storage.read_json(f"{done}/run.json")
    assert success["counts"] == body["counts"]
    assert success["counts"] == {"found": 3, "ok": 2, "failed": 1, "duplicates_removed": 0, "labelled": 0, "evaluated": 0}
    assert body["timings"] == {"total_s": 1.5}
    parts = [f"scans/{storage.name_of(uri)}" for uri in runs.parts(done)]
    assert list(success["files"]) == ["run.json", "metrics.parquet", *parts]
    for name, seal in success["files"].items():
        data = Path(done, name).read_bytes()
        assert seal == {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_a_run_writes_is_json_anyone_reads(done):
    for name in ("run.json", "_SUCCESS.json"):
        json.loads(Path(done, name).read_text(), parse_constant=pytest.fail)
