"""Cross-validation: every labelled scan is judged once by a model that never saw it, and whoever is missing is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from brainseg import commands, manifest, storage
from brainseg.aggregate import aggregate, bootstrap_interval
from brainseg.card import load_card
from brainseg.config import NetworkConfig, PrepareConfig, TrainConfig
from brainseg.cross_validation import OUT_OF_FOLD, OUT_OF_FOLD_CHOSEN, SUMMARY, cross_validate, describe
from brainseg.errors import PreflightError, StorageError, UsageError
from brainseg.folds import FoldPlan
from brainseg.phantom import write_archive
from brainseg.tables import BASELINES, METRICS

pytestmark = pytest.mark.usefixtures("local_ray")

RECIPE = TrainConfig(
    name="tiny",
    precision="fp32",
    network=NetworkConfig(widths=(8, 8), norm="group"),
    prepare=PrepareConfig(size=16),
    epochs=1,
    batch_size=4,
    samples_per_epoch=8,
    validation_share=0.2,
    choose=True,
    flip_answers=True,
)
TORN_FOLD = 1


@pytest.fixture(scope="module")
def manifest_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten patients in two folds; of fold 1 one scan's files were torn after the archive was indexed."""
    place = tmp_path_factory.mktemp("cohort")
    write_archive(place / "archive", "lgg", scans=10, broken=0, shape=(4, 32, 32), seed=5)
    table, _ = manifest.index_archive(str(place / "archive"), FoldPlan(folds=2))
    torn = next(r for r in table.to_pylist() if r["fold"] == TORN_FOLD)
    for source in torn["sources"]:
        Path(source["uri"]).write_bytes(b"torn")
    manifest.write_manifest(str(place / "manifest.parquet"), table)
    return str(place / "manifest.parquet")


class Story:
    """A cross-validation that broke off in fold 1, was summed up with fold 0 alone, then with both; what stood after each."""

    def __init__(self, manifest_uri: str, out: Path) -> None:
        self.out, self.rows = out, manifest.read_manifest(manifest_uri).to_pylist()
        self.said: list[str] = []
        obstacle = out / "fold-1.work"
        out.mkdir()
        obstacle.write_text("in the way")
        with pytest.raises(StorageError):
            cross_validate(manifest_uri, str(out), RECIPE, say=self.said.append)
        self.after_the_break = {p.name for p in out.iterdir()}
        self.first_model = (out / "fold-0" / "model.json").read_bytes()
        obstacle.unlink()
        self.some: dict[str, Any] = cross_validate(manifest_uri, str(out), RECIPE, folds=[0])
        self.all: dict[str, Any] = cross_validate(manifest_uri, str(out), RECIPE)

    def scans_of(self, *folds: int) -> set[str]:
        return {r["scan_id"] for r in self.rows if r["fold"] in folds}

    @property
    def torn(self) -> str:
        return next(str(r["scan_id"]) for r in self.rows if r["fold"] == TORN_FOLD)


@pytest.fixture(scope="module")
def story(manifest_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(manifest_uri, tmp_path_factory.mktemp("cv") / "out")


def test_a_fold_that_fails_leaves_the_finished_ones_and_the_same_command_goes_on(story: Story) -> None:
    assert story.after_the_break == {"fold-0", "fold-1.work"}
    assert "fold 1 did not finish; 1 of 2 are kept" in story.said[-1]
    assert (story.out / "fold-0" / "model.json").read_bytes() == story.first_model
    assert {p.name for p in story.out.iterdir()} == {
        *("fold-0", "fold-1", OUT_OF_FOLD, OUT_OF_FOLD_CHOSEN),
        *("baselines.parquet", SUMMARY),
    }


def test_every_labelled_scan_is_judged_once_by_the_model_that_kept_it_back(story: Story) -> None:
    rows = storage.read_table(str(story.out / OUT_OF_FOLD))
    assert rows.schema.equals(METRICS)
    assert sorted(rows["scan_id"].to_pylist()) == sorted(story.scans_of(0, 1) - {story.torn})
    for fold in (0, 1):
        split = load_card(str(story.out / f"fold-{fold}")).split
        for row in rows.to_pylist():
            assert split.part_of(row["patient_id"], row["scan_id"]) in (
                ("test",) if row["fold"] == fold else ("train", "validation")
            )


def test_who_is_missing_is_named_with_the_reason(story: Story) -> None:
    (torn,) = story.all["missing"]
    assert torn["scan_id"] == story.torn
    assert torn["code"] not in ("", "NOT_TRAINED")
    assert torn["reason"]
    assert {m["scan_id"]: m["code"] for m in story.some["missing"]} == dict.fromkeys(story.scans_of(1), "NOT_TRAINED")


def test_the_denominators_add_up(story: Story) -> None:
    assert story.all["scans"] == {"found": 10, "with_label": 10, "unusable": 0, "held_out": 10, "scored": 9, "failed": 1}
    held_out = len(story.scans_of(0))
    expected = {"found": 10, "with_label": 10, "unusable": 0, "held_out": held_out, "scored": held_out, "failed": 0}
    assert story.some["scans"] == expected
    assert (story.some["folds"], story.all["folds"]) == ([0], [0, 1])


def test_the_figures_are_those_of_the_rows(story: Story) -> None:
    rows = storage.read_table(str(story.out / OUT_OF_FOLD))
    summary = aggregate(rows)["tumor"]
    figures = story.all["regions"]["tumor"]["exclude"]
    assert (figures["dice_mean"], figures["num_scans"]) == (summary.dice.mean, summary.num_scored)
    assert figures["dice_mean_failed_zero"] == summary.mean_with_failures_zero(1)
    assert figures["dice_interval_95"] == list(bootstrap_interval(rows["dice"].to_pylist(), rows["patient_id"].to_pylist()))
    assert story.all["regions"]["tumor"]["brats"]["rule"] == "per scan, brats"
    assert json.loads((story.out / SUMMARY).read_text()) == story.all


def test_each_model_keeps_the_rows_behind_the_figures_of_its_card(story: Story) -> None:
    for fold in (0, 1):
        place = story.out / f"fold-{fold}"
        card, rows = load_card(str(place)), storage.read_table(str(place / "held_out.parquet"))
        assert rows.schema.equals(METRICS)
        assert set(rows["split"].to_pylist()) == {"test"}
        recorded, summary = card.metrics["held_out"]["tumor"], aggregate(rows)["tumor"]
        assert (recorded["dice_mean"], recorded["dice_median"]) == (summary.dice.mean, summary.dice.median)
        assert recorded["states"] == dict(summary.states)
        assert None not in rows["mean_entropy"].to_pylist()
        assert None not in rows["shape"].to_pylist()
        failed = int(fold == TORN_FOLD)
        found = len(story.scans_of(fold))
        assert card.metrics["held_out_scans"] == {"found": found, "scored": found - failed, "failed": failed}
        assert len(storage.read_json(str(place / "held_out_failed.json"))) == failed
        assert story.all["per_fold"][str(fold)]["held_out"] == card.metrics["held_out"]


def test_what_validation_patients_chose_stands_in_the_card_and_in_rows_of_its_own(story: Story) -> None:
    plain, chosen = (storage.read_table(str(story.out / name)) for name in (OUT_OF_FOLD, OUT_OF_FOLD_CHOSEN))
    assert chosen.schema.equals(METRICS)
    assert chosen["scan_id"].to_pylist() == plain["scan_id"].to_pylist()
    for fold in (0, 1):
        place = story.out / f"fold-{fold}"
        card, rows = load_card(str(place)), storage.read_table(str(place / "held_out_chosen.parquet"))
        assert card.metrics["held_out_chosen"]["tumor"]["dice_mean"] == aggregate(rows)["tumor"].dice.mean
        assert card.chosen["settings"]["flip"] is True
        assert set(card.chosen.get("patients", ())) <= set(card.split.validation)
        assert card.metrics["held_out_duplicated"] == {}


def test_both_baselines_stand_beside_the_model_on_the_same_scans(story: Story) -> None:
    rows = storage.read_table(str(story.out / "baselines.parquet"))
    assert rows.schema.equals(BASELINES)
    judged = sorted(storage.read_table(str(story.out / OUT_OF_FOLD))["scan_id"].to_pylist())
    for name in ("nothing", "nearest_training_mask"):
        assert [r["scan_id"] for r in rows.to_pylist() if r["baseline"] == name] == judged
        assert story.all["baselines"][name]["tumor"]["exclude"]["states"].keys() >= {"missed", "spurious", "both_empty"}
    assert story.all["baselines"]["nothing"]["tumor"]["exclude"]["dice_mean"] == 0


def test_the_audit_of_each_split_is_kept_and_said(story: Story) -> None:
    audits = [load_card(str(story.out / f"fold-{fold}")).audit for fold in (0, 1)]
    assert all(audit["sides"] == ["test", "train", "validation"] and audit["shared_patients"] == 0 for audit in audits)
    assert any(line.startswith("leakage audit: ") for line in story.said)


def test_the_words_give_mean_interval_folds_baselines_and_the_missing(story: Story) -> None:
    text = describe(story.all, "OUT")
    figures = story.all["regions"]["tumor"]["exclude"]
    low, high = figures["dice_interval_95"]
    assert f"Dice mean {figures['dice_mean']:.4f} (95 % {low:.4f} to {high:.4f})" in text
    assert text.count("baseline ") == 2
    assert "10 found, 10 with a label, 10 held out, 9 scored, 1 failed" in text
    assert f"missing: {story.torn}: " in text


def test_another_recipe_or_manifest_is_refused_and_nothing_is_touched(story: Story, manifest_uri: str, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in story.out.rglob("*")}
    with pytest.raises(UsageError, match="another model"):
        cross_validate(manifest_uri, str(story.out), RECIPE.model_copy(update={"epochs": 2}), folds=[1])
    other = tmp_path / "other.parquet"
    manifest.write_manifest(str(other), manifest.read_manifest(manifest_uri).slice(0, 8))
    with pytest.raises(UsageError, match="another model"):
        cross_validate(str(other), str(story.out), RECIPE)
    assert {p: p.stat().st_mtime_ns for p in story.out.rglob("*")} == before


def test_a_fold_that_the_manifest_does_not_have_is_refused_before_anything_is_written(
    manifest_uri: str, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=r"no fold 7; it has \[0, 1\]"):
        cross_validate(manifest_uri, str(tmp_path / "out"), RECIPE, folds=[0, 7])
    assert not (tmp_path / "out").exists()


class TestWords:
    def test_folds_are_numbers_with_commas(self) -> None:
        assert commands.picked_folds(True, "0,2", None) == (0, 2)
        assert commands.picked_folds(True, None, None) is None
        assert commands.picked_folds(False, None, 3) is None

    @pytest.mark.parametrize(
        ("cv", "folds", "fold"), [(False, "0", None), (True, None, 1), (True, "0;2", None), (True, "", None)]
    )
    def test_words_that_contradict_each_other_are_refused(self, cv: bool, folds: str | None, fold: int | None) -> None:
        with pytest.raises(UsageError, match="--folds"):
            commands.picked_folds(cv, folds, fold)
