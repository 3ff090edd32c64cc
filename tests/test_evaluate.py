"""Evaluate: a run's stored masks give its figures again, against its own labels or others', beside the baselines."""

import json
from pathlib import Path

import factory
import numpy as np
import pyarrow as pa
import pytest

from brainseg import manifest, report, runs, storage
from brainseg.card import Split
from brainseg.cli import app
from brainseg.config import SegmentConfig
from brainseg.errors import PreflightError, RunError, UsageError
from brainseg.evaluate import compare_evaluations, evaluate_run
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.geometry import Grid
from brainseg.model import Prediction
from brainseg.phantom import write_archive
from brainseg.scans import load_scan
from brainseg.stages import Job, Work, finish
from brainseg.tables import MANIFEST
from brainseg.verify import verify_run

NUM, TRAINED = 6, ("of-s0", "of-s1", "of-s2")
SETTINGS = SegmentConfig(thumbnails=False)


def shifted(label):
    """A prediction that is nearly right: the label, one column to the side."""
    return np.roll(label, 1, axis=2)


def volumes(folder):
    """Six scans as NIfTI volumes; their manifest rows."""
    return [factory.write_scan(folder, factory.make_scan(seed=n, name=f"s{n}"), fold=n % 2) for n in range(NUM)]


def pictures(folder):
    """Six scans as TIFF slices, which know no millimetres; their manifest rows."""
    write_archive(folder, "lgg", scans=NUM, shape=(3, 48, 48))
    return manifest.index_archive(str(folder))[0].to_pylist()


def predicted(rows, predict):
    """The rows' scans with their predictions."""
    works = []
    for row in rows:
        scan = load_scan(row)
        trust = ({"mean_probability": 0.9, "mean_entropy": 0.2, "outside_head_fraction": 0.0},)
        works.append(Work(row, scan, Prediction(predict(scan.label), trust, 0.1)))
    return works


def make_run(folder: Path, predict=shifted, *, accept_leakage=False, archive=volumes) -> str:
    """A finished run of six scans in two parts, three of them the model's training patients; written without a network."""
    rows = archive(folder / "archive")
    works = predicted(rows, predict)
    card = factory.make_card(split=Split(train=TRAINED, test=("of-s3", "of-s4", "of-s5")), accept_leakage=accept_leakage)
    run = str(folder / "run")
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    manifest.write_manifest(storage.join(run, "manifest.parquet"), table)
    identity = runs.Identity(manifest.fingerprint(table), "m", "c")
    kept = ("name", "regions", "modalities", "label_map", "dataset", "split", "metrics", "accept_leakage", "selection_biased")
    model = {k: card.model_dump(mode="json")[k] for k in kept}
    body = runs.open_run(run, identity, {"source": "archive", "model": model, "config": SETTINGS.model_dump(mode="json")})
    job = Job(run, "model", SETTINGS, body["run_id"], 1, "m", "c", card)
    for part in (works[:4], works[4:]):
        runs.write_part(run, [finish(work, job) for work in part])
    counts = runs.settle(run, runs.expected_tags(table)) | runs.write_metrics(run, card.split)
    runs.finish_run(run, body, counts, {})
    return run


def metrics_of(run):
    return storage.read_table(storage.join(run, "metrics.parquet"))


def relabelled(run, folder, change):
    """A manifest of the run's scans whose labels were changed; `change` gives None for a scan to leave out."""
    rows = manifest.read_manifest(storage.join(run, "manifest.parquet")).to_pylist()
    kept = []
    for row in rows:
        source = next(s for s in row["sources"] if s["role"] == "label")
        old = read_nifti(Path(source["uri"]).read_bytes(), "label")
        new = change(row["scan_id"], old.array, old.grid)
        if new is None:
            continue
        place = folder / f"{row['scan_id']}-seg.nii.gz"
        folder.mkdir(exist_ok=True)
        place.write_bytes(new)
        kept.append({**row, "sources": [*(s for s in row["sources"] if s["role"] != "label"), {**source, "uri": str(place)}]})
    uri = str(folder / "labels.parquet")
    manifest.write_manifest(uri, pa.Table.from_pylist(kept, schema=MANIFEST))
    return uri


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run, its metrics before it was evaluated, and what the evaluation said."""
    run = make_run(tmp_path_factory.mktemp("evaluated"))
    before = metrics_of(run)
    return run, before, evaluate_run(run)


def test_stored_masks_give_the_same_figures_again(evaluated):
    run, before, body = evaluated
    assert metrics_of(run).equals(before)
    assert before.num_rows == NUM
    assert body["problems"] == []
    assert verify_run(run) == []


def test_a_scan_without_positions_is_measured_in_pixels_again(tmp_path):
    run = make_run(tmp_path, archive=pictures)
    before = metrics_of(run)
    assert before["hd95_mm"].null_count == before["label_volume_mm3"].null_count == NUM
    evaluate_run(run, baselines=False)
    assert metrics_of(run).equals(before)


def test_baselines_stand_beside_every_scan_that_was_not_trained_on(evaluated):
    run, _, body = evaluated
    rows = storage.read_table(storage.join(run, "baselines.parquet")).to_pylist()
    unseen = {"s3", "s4", "s5"}
    assert {(r["baseline"], r["scan_id"]) for r in rows} == {
        (name, scan) for name in ("nothing", "nearest_training_mask") for scan in unseen
    }
    assert {r["split"] for r in rows} == {"test"}
    assert [(r["dice"], r["hd95_mm"], r["state"]) for r in rows if r["baseline"] == "nothing"] == [(0, np.inf, "missed")] * 3
    assert all(0 < r["dice"] < 1 for r in rows if r["baseline"] == "nearest_training_mask")
    assert body["nearest_mask"] == {"known_scans": 3, "training_scans": 3}


def test_the_report_shows_the_model_and_the_baselines_on_the_same_scans(evaluated):
    run, before, _ = evaluated
    summary = report.summary([run])
    lead = next(g for g in summary["groups"] if g["split"] == summary["headline"] == "test")
    unseen = [r["dice"] for r in before.to_pylist() if r["split"] == "test"]
    assert lead["regions"][0]["dice"]["mean"] == pytest.approx(np.mean(unseen), abs=1e-12)
    assert {(b["name"], b["scans"], b["measured"]) for b in summary["baselines"]} == {
        ("nothing", 3, "evaluate"),
        ("nearest_training_mask", 3, "evaluate"),
    }
    assert summary["alerts"] == []


def test_a_run_against_itself_differs_by_nothing(evaluated):
    run, _, _ = evaluated
    compared = compare_evaluations(run, run)["tumor"]
    assert (compared["difference"], compared["num_pairs"], compared["num_patients"]) == (0.0, 3, 3)


class TestOtherLabels:
    def test_the_labels_of_another_manifest_count_and_scans_it_lacks_have_none(self, tmp_path):
        run = make_run(tmp_path)

        def emptied(scan_id, label, grid):
            return None if scan_id == "s5" else write_nifti(label * 0 if scan_id == "s4" else label, grid)

        labels = relabelled(run, tmp_path / "second-reader", emptied)
        body = evaluate_run(run, labels=labels, baselines=False)
        states = {r["scan_id"]: r["state"] for r in metrics_of(run).to_pylist()}
        assert states == {**{f"s{n}": "both" for n in range(4)}, "s4": "spurious", "s5": "no_label"}
        assert body["labels"] == labels
        assert body["scans_in_labels"] == 5
        counts = report.summary([run])["counts"]
        assert (counts["found"], counts["segmented"], counts["evaluated"]) == (6, 6, 5)

    def test_a_label_that_cannot_be_used_costs_its_scan_the_figures_and_is_named(self, tmp_path, capsys):
        run = make_run(tmp_path)

        def damaged(scan_id, label, grid):
            if scan_id == "s3":
                return b"not a volume"
            if scan_id == "s4":
                return write_nifti(label, Grid.of(grid.shape, grid.matrix @ np.diag([1, 1, 2.0, 1])))
            return write_nifti(label, grid)

        labels = relabelled(run, tmp_path / "damaged", damaged)
        with pytest.raises(SystemExit) as stopped:
            app(["evaluate", run, "--labels", labels, "--no-baselines", "--json", "--quiet"])
        said = json.loads(capsys.readouterr().out)
        assert stopped.value.code == 3
        assert [p["scan_id"] for p in said["problems"]] == ["s3", "s4"]
        assert said["problems"][1]["code"] == "AFFINE_MISMATCH"
        assert "expected the mask's" in said["problems"][1]["message"]
        assert {r["scan_id"] for r in metrics_of(run).to_pylist() if r["state"] == "no_label"} == {"s3", "s4"}
        assert any("labels of 2 scans could not be used" in line for line in said["alerts"])

    def test_labels_of_other_scans_are_refused(self, tmp_path):
        run = make_run(tmp_path)
        rows = manifest.read_manifest(storage.join(run, "manifest.parquet")).to_pylist()
        others = str(tmp_path / "others.parquet")
        renamed = [{**row, "scan_id": f"x{row['scan_id']}"} for row in rows]
        manifest.write_manifest(others, pa.Table.from_pylist(renamed, schema=MANIFEST))
        with pytest.raises(UsageError, match="none of its scans stands in the run"):
            evaluate_run(run, labels=others)


class TestWhatItSays:
    def test_a_model_that_predicts_nothing_is_rewarded_nowhere(self, tmp_path):
        run = make_run(tmp_path, np.zeros_like)
        evaluate_run(run)
        for row in metrics_of(run).to_pylist():
            assert (row["state"], row["dice"], row["hd95_mm"], row["lesionwise_dice"]) == ("missed", 0.0, np.inf, 0.0)
        summary = report.summary([run])
        lead = next(g for g in summary["groups"] if g["split"] == "test")["regions"][0]
        assert lead["states"]["missed"] == 3
        assert lead["hd95_mm"]["median"] == "inf"
        assert (lead["hd95_mm"]["mean_finite"], lead["hd95_mm"]["num_infinite"]) == (None, 3)
        assert sum("does not beat the baseline" in line for line in summary["alerts"]) == 2

    def test_accepted_leakage_is_said_with_what_a_look_up_table_scores(self, tmp_path):
        run = make_run(tmp_path, accept_leakage=True)
        evaluate_run(run)
        alerts = report.summary([run])["alerts"]
        assert alerts[0].startswith("Leakage was accepted in training")
        copied = storage.read_table(storage.join(run, "baselines.parquet")).to_pylist()
        mean = np.mean([r["dice"] for r in copied if r["baseline"] == "nearest_training_mask"])
        assert f"with no model at all, scores Dice {mean:.3f}" in alerts[1]
        report.build_report([run], str(tmp_path / "page.html"))
        page = (tmp_path / "page.html").read_text()
        assert "Held-out test scans" in page
        assert "Held-out test patients" not in page


class TestRefusals:
    def test_what_is_no_run_or_has_not_finished_is_refused(self, tmp_path):
        with pytest.raises(PreflightError, match="not a run folder"):
            evaluate_run(str(tmp_path))
        run = make_run(tmp_path)
        storage.delete(storage.join(run, "_SUCCESS.json"))
        with pytest.raises(UsageError, match="has not finished"):
            evaluate_run(run)

    def test_a_mask_that_was_changed_is_not_scored(self, tmp_path):
        run = make_run(tmp_path)
        part = runs.parts(run)[0]
        rows = storage.read_table(part).to_pylist()
        rows[0]["mask"] = rows[1]["mask"]
        storage.write_table(part, pa.Table.from_pylist(rows, schema=storage.read_table(part).schema))
        with pytest.raises(RunError, match="has sha256"):
            evaluate_run(run, baselines=False)
