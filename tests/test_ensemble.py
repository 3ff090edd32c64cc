"""Ensembles: probabilities are averaged whatever the order, and out of fold nobody answers a scan that it met in training."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
import torch
from factory import CPU, make_card, make_model, make_scan, tiny_config, write_scan

from brainseg import manifest, runs, segment, storage
from brainseg.card import Split, fingerprint_of, load_card, resolved, save_card
from brainseg.config import How, NetworkConfig, PrepareConfig, SegmentConfig
from brainseg.ensemble import SUMMARY, find_members, fold_model, joint_split, load_segmenter, may_answer
from brainseg.errors import PreflightError, RunError, UsageError
from brainseg.model import Model
from brainseg.tables import MANIFEST

ALL, OUT_OF_FOLD = SegmentConfig(), SegmentConfig(members="out-of-fold")
FOLDS = (
    Split(train=("p2", "p3"), validation=("p1",), test=("p0",)),
    Split(train=("p0", "p3"), validation=("p2",), test=("p1",)),
    Split(train=("p1",), validation=("p0",), test=("p2", "p3")),
)
"""Three folds of patients p0 to p3, each of whom one fold kept back."""


@pytest.fixture
def folds(tmp_path):
    """Three models that differ in weights, network, preparation and split, as a cross-validation leaves them."""
    recipes = (
        tiny_config(),
        tiny_config(prepare=PrepareConfig(size=32, frame="head")),
        tiny_config(network=NetworkConfig(widths=(8, 8), norm="group", context_slices=1)),
    )
    for fold, (recipe, split) in enumerate(zip(recipes, FOLDS, strict=True)):
        make_model(tmp_path / "cv" / f"fold-{fold}", make_card(recipe, split=split), seed=fold)
    (tmp_path / "cv" / SUMMARY).write_text(json.dumps({"folds": [0, 1, 2]}))
    return str(tmp_path / "cv")


def uris_of(folds):
    return [fold_model(folds, fold) for fold in range(3)]


def alone(uri, scan):
    (probability,) = load_segmenter([uri], ALL, CPU).probabilities([scan])
    return probability


SCANS = [
    make_scan((5, 30, 26), name="s0", seed=0),
    make_scan((3, 40, 20), order="ASR", name="s1", seed=1),
    make_scan((4, 24, 36), order=None, name="s2", seed=2),
]


class TestAnswers:
    def test_the_mean_of_the_members_is_what_is_painted(self, folds):
        ensemble = load_segmenter(uris_of(folds), ALL, CPU)
        for scan, answer in zip(SCANS, ensemble.probabilities(SCANS), strict=True):
            expected = sum(alone(uri, scan) for uri in uris_of(folds)) / 3
            assert torch.allclose(answer, expected, atol=1e-6)
        threshold = float(answer.median())
        painted = load_segmenter(uris_of(folds), SegmentConfig(threshold=threshold), CPU).predict(SCANS)[2].label
        assert painted.sum() == (answer > threshold).sum() > 0

    def test_the_order_of_the_members_changes_no_bit(self, folds):
        answers = [load_segmenter(order, ALL, CPU).probabilities(SCANS) for order in permutations(uris_of(folds))]
        for same in zip(*answers, strict=True):
            assert all(torch.equal(one, same[0]) for one in same[1:])

    def test_one_model_is_that_model_itself(self, folds):
        model = load_segmenter(uris_of(folds)[:1], ALL, CPU)
        assert type(model) is Model
        assert find_members(uris_of(folds)[:1], ALL).fingerprint == model.fingerprint

    def test_trust_figures_and_mask_follow_the_settings_of_the_ensemble(self, folds):
        answers = load_segmenter(uris_of(folds), SegmentConfig(threshold=0.3), CPU).predict(SCANS)
        assert all(0.3 < answer.trust[0]["mean_probability"] <= 1 for answer in answers if answer.label.any())

    @pytest.mark.parametrize("patient", ["p0", "p1", "p2", "p3"])
    def test_out_of_fold_only_the_model_that_kept_the_patient_back_answers(self, folds, patient):
        ensemble = load_segmenter(uris_of(folds), OUT_OF_FOLD, CPU)
        (kept_back,) = (uri for uri, split in zip(uris_of(folds), FOLDS, strict=True) if patient in split.test)
        (answer,) = ensemble.probabilities(SCANS[:1], [patient])
        assert torch.equal(answer, alone(kept_back, SCANS[0]))

    def test_out_of_fold_strangers_are_answered_by_all_and_scans_do_not_disturb_each_other(self, folds):
        ensemble = load_segmenter(uris_of(folds), OUT_OF_FOLD, CPU)
        together = list(ensemble.probabilities(SCANS, ["p0", "stranger", None]))
        for scan, patient, answer in zip(SCANS, ["p0", "stranger", None], together, strict=True):
            (single,) = ensemble.probabilities([scan], [patient])
            assert torch.allclose(answer, single, atol=1e-6)
        for scan, answer in zip(SCANS[1:], together[1:], strict=True):
            assert torch.allclose(answer, sum(alone(uri, scan) for uri in uris_of(folds)) / 3, atol=1e-6)


class TestMembers:
    def test_a_cross_validation_stands_for_its_folds(self, folds):
        assert find_members([folds], ALL) == find_members(uris_of(folds), ALL)
        assert {one["uri"] for one in find_members([folds], ALL).describe()} == set(uris_of(folds))

    def test_the_fingerprint_is_over_all_members_in_any_order(self, folds):
        found = [find_members(order, ALL).fingerprint for order in permutations(uris_of(folds))]
        assert len(set(found)) == 1
        singles = [find_members([uri], ALL).fingerprint for uri in uris_of(folds)]
        assert len({*found, *singles, find_members(uris_of(folds)[:2], ALL).fingerprint}) == 5
        assert load_segmenter(uris_of(folds), ALL, CPU).fingerprint == found[0]

    def test_a_model_that_is_named_twice_counts_once(self, folds):
        uri = uris_of(folds)[0]
        assert find_members([uri, uri], ALL).uris == (uri,)
        assert find_members([folds, uri], ALL) == find_members([folds], ALL)

    @pytest.mark.parametrize(
        "change",
        [{"modalities": ("t1c", "flair")}, {"regions": ("WT",)}, {"label_map": "brats2020", "regions": ("tumor",)}],
        ids=lambda change: next(iter(change)),
    )
    def test_members_that_eat_or_answer_otherwise_are_refused_in_one_line(self, folds, tmp_path, change):
        other = make_card(tiny_config(name="other"), **change)
        make_model(tmp_path / "other", other, seed=7)
        what = next(iter(change)).replace("_", " ")
        with pytest.raises(UsageError, match=f"must share their {what}: '.*' has .*, '.*' ") as caught:
            find_members([folds, str(tmp_path / "other")], ALL)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("body", ["[]", '{"folds": []}', '{"folds": [true]}', '{"folds": ["../x"]}', "{", '{"folds": 3}'])
    def test_a_cross_validation_that_names_no_folds_is_refused(self, tmp_path, body):
        (tmp_path / SUMMARY).write_text(body)
        with pytest.raises(PreflightError):
            find_members([str(tmp_path)], ALL)

    def test_a_folder_that_is_neither_is_no_model(self, tmp_path):
        with pytest.raises(PreflightError, match="not a model folder"):
            find_members([str(tmp_path)], ALL)

    def test_members_have_no_choice_in_common(self, folds):
        for uri in uris_of(folds):
            save_card(uri, load_card(uri).model_copy(update={"chosen": {"threshold": 0.4}}))
        with pytest.raises(PreflightError, match=r"3 models \(unet\)' records no chosen threshold"):
            resolved(SegmentConfig(threshold="chosen"), find_members([folds], ALL).card)


class TestSplit:
    def test_a_scan_is_train_if_any_member_was_trained_on_it(self):
        split = joint_split(FOLDS, ALL)
        assert (split.train, split.validation, split.test) == (("p0", "p1", "p2", "p3"), (), ())
        assert joint_split(FOLDS[:2], ALL) == Split(train=("p0", "p2", "p3"), validation=("p1",))

    def test_out_of_fold_whoever_was_met_is_test(self):
        assert joint_split(FOLDS, OUT_OF_FOLD) == Split(test=("p0", "p1", "p2", "p3"))

    def test_splits_by_patient_and_by_scan_do_not_mix(self):
        with pytest.raises(UsageError, match="some by patient, some by scan"):
            joint_split([FOLDS[0], Split(unit="scan")], ALL)

    def test_out_of_fold_neither_training_nor_validation_may_answer(self):
        card = make_card(split=FOLDS[0])
        may = [may_answer(card, patient, "s", OUT_OF_FOLD) for patient in ("p0", "p1", "p2", "stranger", None)]
        assert may == [True, False, False, True, True]
        assert all(may_answer(card, patient, "s", ALL) for patient in ("p0", "p1", "p2"))


def write_cohort(folder):
    """A manifest of four labelled heads of p0 to p3, and one of a stranger."""
    rows = []
    for number, patient in enumerate(["p0", "p1", "p2", "p3", "stranger"]):
        scan = replace(SCANS[number % 2], scan_id=f"s{number}")
        rows.append(write_scan(folder / "scans", scan) | {"patient_id": patient})
    place = str(folder / "manifest.parquet")
    manifest.write_manifest(place, pa.Table.from_pylist(rows, schema=MANIFEST))
    return place


class TestRuns:
    def test_out_of_fold_is_refused_where_some_scan_would_have_nobody(self, folds, tmp_path):
        with pytest.raises(PreflightError, match=r"3 of 5 scans, such as s1, were met in training by every model given"):
            segment.segment_archive(write_cohort(tmp_path), uris_of(folds)[0], str(tmp_path / "run"), OUT_OF_FOLD)
        assert not (tmp_path / "run").exists()

    def test_a_dry_run_names_the_ensemble(self, folds, tmp_path):
        said = []
        segment.segment_archive(
            write_cohort(tmp_path), folds, str(tmp_path / "run"), ALL, How(dry_run=True), segment.Ear(said.append)
        )
        assert "with model '3 models (unet)'" in said[0]

    @pytest.mark.usefixtures("local_ray")
    @pytest.mark.parametrize("settings", [ALL, OUT_OF_FOLD], ids=["all", "out-of-fold"])
    def test_a_run_holds_what_the_ensemble_answers_and_verifies(self, folds, tmp_path, settings):
        settings = settings.model_copy(update={"threshold": 0.2})
        source, run = write_cohort(tmp_path), str(tmp_path / "run")
        segment.segment_archive(source, folds, run, settings, How(actors=1))
        assert segment.verify_run(run) == []
        members = find_members([folds], settings)
        body = storage.read_json(storage.join(run, "run.json"))
        assert body["model_fingerprint"] == body["model"]["fingerprint"] == members.fingerprint
        assert body["model"]["members"] == members.describe()
        rows = [row for part in runs.parts(run) for row in storage.read_table(part).to_pylist()]
        assert {row["model_fingerprint"] for row in rows} == {members.fingerprint}
        split = {row["scan_id"]: row["split"] for row in storage.read_table(storage.join(run, "metrics.parquet")).to_pylist()}
        side = "test" if settings.members == "out-of-fold" else "train"
        assert split == {**dict.fromkeys(["s0", "s1", "s2", "s3"], side), "s4": None}
        refusal = (RunError, "another model") if settings.members == "all" else (PreflightError, "met in training")
        with pytest.raises(refusal[0], match=refusal[1]):
            segment.segment_archive(source, uris_of(folds)[:2], run, settings)
        ensemble = load_segmenter(members.uris, settings, CPU)
        for row in rows:
            scan = replace(SCANS[int(row["scan_id"][1:]) % 2], scan_id=row["scan_id"])
            expected = ensemble.predict([scan], [row["patient_id"]])[0].label
            (tumor,) = row["regions"]
            assert abs(tumor["prediction_voxels"] - int((expected > 0).sum())) <= 1


def test_the_fingerprint_of_a_model_alone_is_as_before(folds):
    card = load_card(uris_of(folds)[0])
    assert find_members(uris_of(folds)[:1], ALL).fingerprint == fingerprint_of(card)
    assert np.isfinite(alone(uris_of(folds)[0], SCANS[0]).numpy()).all()
