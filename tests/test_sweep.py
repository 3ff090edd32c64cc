"""The sweep: the best threshold is found where it is known beforehand, on validation scans alone, and only recorded."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from factory import CPU, make_card, make_model, make_network, make_scan, tiny_config, write_scan
from torch import nn

from brainseg import manifest, storage
from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig
from brainseg.errors import ConfigError, PreflightError
from brainseg.model import CARD, WEIGHTS, Split, fingerprint_of, load_card, load_model, resolved, save_model
from brainseg.scoring import score_regions
from brainseg.segment import segment_archive
from brainseg.sweep import score_at, sweep_thresholds, validation_rows
from brainseg.tables import MANIFEST

GAIN, OFFSET, BRIGHTEST = 8.0, -4.0, 1000
"""The hand-made network below answers sigmoid(GAIN * intensity / BRIGHTEST + OFFSET), voxel by voxel."""
SPLIT = Split(train=("of-train",), validation=("of-a", "of-b"), test=("of-test",))


def intensity_for(probability):
    """The stored intensity to which the hand-made network answers with this probability."""
    return round(BRIGHTEST * (math.log(probability / (1 - probability)) - OFFSET) / GAIN)


def hand_made_model(folder: Path, table: pa.Table, split: Split = SPLIT) -> str:
    """A network that passes one channel through and reads a probability off it."""
    config = tiny_config(
        modalities=("flair",),
        network=NetworkConfig(widths=(8, 8), norm="none"),
        prepare=PrepareConfig(size=16, normalise="volume_max"),
    )
    card = make_card(config, split=split, manifest_fingerprint=manifest.fingerprint(table))
    network = make_network(card)
    for weights in network.parameters():
        nn.init.zeros_(weights)
    with torch.no_grad():
        for block in (network.down[0], network.up[0]):
            block.conv1.weight[0, 0, 1, 1] = block.conv2.weight[0, 0, 1, 1] = 1
        network.head.weight[0, 0] = GAIN
        network.head.bias[0] = OFFSET
    save_model(str(folder), card, network.state_dict())
    return str(folder)


def tumour_seen_as(inside, outside, name, order="LPS", seed=0):
    """A head in which the network sees half of the tumour surely, the rest at one probability, what is healthy at another."""
    scan = make_scan((4, 16, 16), ("flair",), order, seed=seed, name=name)
    label = scan.label[tuple(slice(a, b) for a, b in scan.box)].astype(bool)
    image = np.where(scan.image[0] != 0, intensity_for(outside), 0).astype(np.int16)
    image[label] = intensity_for(inside)
    image[label & (np.indices(label.shape).sum(axis=0) % 2 == 0)] = BRIGHTEST
    return replace(scan, image=image[None])


def write_cohort(folder: Path, inside=0.33, outside=0.27, names=("a", "b", "train", "test")) -> pa.Table:
    """A manifest of heads, two of them of validation patients, with the network's probabilities on either side of 0.3."""
    orders = ("LPS", "ASR", "LPS", "RAS")
    rows = [
        write_scan(folder / "scans", tumour_seen_as(inside, outside, name, order, seed))
        for seed, (name, order) in enumerate(zip(names, orders, strict=False))
    ]
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    manifest.write_manifest(str(folder / "manifest.parquet"), table)
    return table


@pytest.fixture
def cohort(tmp_path):
    table = write_cohort(tmp_path)
    return hand_made_model(tmp_path / "model", table), str(tmp_path / "manifest.parquet")


class TestChoice:
    def test_the_one_threshold_that_separates_tumour_from_healthy_is_chosen(self, cohort):
        chosen = sweep_thresholds(*cohort)
        assert chosen["threshold"] == 0.3
        assert dict(map(tuple, chosen["curve"]))[0.3] == 1.0
        assert sum(mean == 1.0 for _, mean in chosen["curve"]) == 1
        assert chosen["at_0.5"] == dict(map(tuple, chosen["curve"]))[0.5] == pytest.approx(2 / 3, abs=0.1)
        assert chosen["regions"]["tumor"] == chosen["curve"]

    def test_the_record_says_on_whom_and_how(self, cohort):
        chosen = sweep_thresholds(*cohort, rule="brats", settings=SegmentConfig(flip=True))
        assert load_card(cohort[0]).chosen == chosen
        assert {name: chosen[name] for name in ("chosen_on", "rule", "num_scans", "num_patients", "num_failed")} == {
            "chosen_on": "validation",
            "rule": "per scan, brats",
            "num_scans": 2,
            "num_patients": 2,
            "num_failed": 0,
        }
        assert chosen["settings"] == {"flip": True, "precision": "fp32"}

    def test_of_equals_the_one_nearest_a_half_is_chosen(self, tmp_path):
        table = write_cohort(tmp_path, inside=0.9, outside=0.1)
        chosen = sweep_thresholds(hand_made_model(tmp_path / "model", table), str(tmp_path / "manifest.parquet"))
        assert sum(mean == 1.0 for _, mean in chosen["curve"]) > 10
        assert chosen["threshold"] == 0.5

    def test_a_half_is_a_candidate_whatever_is_asked_for(self, cohort):
        assert [t for t, _ in sweep_thresholds(*cohort, thresholds=[0.7, 0.2])["curve"]] == [0.2, 0.5, 0.7]

    def test_a_scan_that_cannot_be_read_is_counted_and_named(self, cohort, tmp_path):
        (tmp_path / "scans" / "b-flair.nii.gz").write_bytes(b"no gzip")
        said = []
        chosen = sweep_thresholds(*cohort, say=said.append)
        assert (chosen["num_scans"], chosen["num_patients"], chosen["num_failed"]) == (1, 1, 1)
        assert any(line.startswith("left out: b: ") for line in said)

    def test_neither_weights_nor_fingerprint_change(self, cohort):
        card, weights = load_card(cohort[0]), (Path(cohort[0]) / WEIGHTS).read_bytes()
        sweep_thresholds(*cohort)
        after = load_card(cohort[0])
        assert after.chosen
        assert fingerprint_of(after) == fingerprint_of(card)
        assert after.model_copy(update={"chosen": {}}) == card
        assert (Path(cohort[0]) / WEIGHTS).read_bytes() == weights
        assert {p.name for p in Path(cohort[0]).iterdir()} == {CARD, WEIGHTS}


class TestWhoChooses:
    def test_only_validation_patients_are_looked_at(self, cohort, tmp_path):
        rows = validation_rows(load_card(cohort[0]), cohort[1])
        assert [row["scan_id"] for row in rows] == ["a", "b"]
        for name in ("train", "test"):
            (tmp_path / "scans" / f"{name}-flair.nii.gz").unlink()
        assert sweep_thresholds(*cohort)["num_failed"] == 0

    def refused(self, folder, table, split=SPLIT):
        manifest.write_manifest(str(folder / "manifest.parquet"), table)
        model = hand_made_model(folder / "model", table, split)
        with pytest.raises(PreflightError) as caught:
            sweep_thresholds(model, str(folder / "manifest.parquet"))
        assert load_card(model).chosen == {}
        return str(caught.value)

    def test_a_manifest_of_test_patients_alone_is_refused(self, tmp_path):
        assert "none of 1 scans stands in it; test scans must not" in self.refused(
            tmp_path, write_cohort(tmp_path, names=("test",))
        )

    def test_a_model_that_kept_nobody_for_validation_is_refused(self, tmp_path):
        assert "the model kept none" in self.refused(tmp_path, write_cohort(tmp_path), Split(test=("of-a",)))

    def test_validation_scans_without_any_tumour_are_refused(self, tmp_path):
        scan = tumour_seen_as(0.33, 0.27, "a")
        row = write_scan(tmp_path / "scans", replace(scan, label=np.zeros_like(scan.label)))
        assert "hold no tumour" in self.refused(tmp_path, pa.Table.from_pylist([row], schema=MANIFEST))

    def test_another_manifest_than_the_model_was_trained_on_is_refused(self, cohort, tmp_path):
        manifest.write_manifest(cohort[1], manifest.read_manifest(cohort[1]).slice(0, 2))
        with pytest.raises(PreflightError, match="is not the manifest that model 'unet' was trained on"):
            sweep_thresholds(*cohort)


@pytest.mark.parametrize("meaning", ["brats2020", "binary"])
def test_counts_at_a_threshold_are_those_of_the_mask_that_a_run_would_store(tmp_path, meaning):
    card = make_card(tiny_config(regions=("WT", "TC", "ET")), label_map="brats2023")
    model = make_model(tmp_path, card)
    rng = np.random.default_rng(5)
    for order, spacing in (("LPS", (1.0, 1.0, 3.0)), ("ASR", (1.0, 2.0, 1.0)), (None, None)):
        scan = make_scan((5, 30, 26), order=order, **({"spacing": spacing} if spacing else {}))
        values = [0, 1, 2, 4] if meaning == "brats2020" else [0, 1]
        scan = replace(scan, label=rng.choice(values, scan.label.shape).astype(np.uint8))
        row = {"scan_id": "s", "patient_id": "p", "label_map": meaning}
        (probability,) = model.probabilities([scan])
        thresholds = [float(q) for q in torch.quantile(probability.flatten(), torch.tensor([0.1, 0.5, 0.9, 0.999]))]
        for threshold, entries in zip(thresholds, score_at(model, row, scan, probability, thresholds), strict=True):
            answer = load_model(str(tmp_path), SegmentConfig(threshold=threshold), CPU).predict([scan])[0]
            expected = score_regions(scan.label, meaning, answer.label, scan.grid, card)
            scored = [e for e in expected if e["state"] != "no_label"]
            assert entries == [{**{k: e[k] for k in entries[0] if k in e}, "scan_id": "s", "patient_id": "p"} for e in scored]
            assert len(scored) == (3 if meaning == "brats2020" else 1)


class TestUse:
    def test_without_a_choice_it_is_said_how_to_make_one(self, cohort, tmp_path):
        with pytest.raises(PreflightError, match="evaluate RUN --threshold-sweep"):
            segment_archive(cohort[1], cohort[0], str(tmp_path / "run"), SegmentConfig(threshold="chosen"))
        assert not (tmp_path / "run").exists()

    def test_a_chosen_threshold_is_the_number_that_the_model_records(self, cohort):
        chosen = sweep_thresholds(*cohort)
        asked = SegmentConfig(threshold="chosen", flip=True)
        assert resolved(asked, load_card(cohort[0])) == SegmentConfig(threshold=0.3, flip=True)
        assert load_model(cohort[0], asked, CPU).settings.threshold == chosen["threshold"]

    def test_nobody_gets_it_unasked(self, cohort):
        sweep_thresholds(*cohort)
        assert load_model(cohort[0], SegmentConfig(), CPU).settings.threshold == 0.5

    @pytest.mark.parametrize("value", [0, 1, 1.5, "best", None, True])
    def test_a_threshold_is_a_share_or_that_word(self, value):
        from brainseg.config import build

        with pytest.raises(ConfigError, match=r"^segment: threshold: .*'chosen'$"):
            build(SegmentConfig, {"threshold": value}, "segment")

    @pytest.mark.usefixtures("local_ray")
    def test_a_run_says_which_threshold_it_used_and_who_chose_it(self, cohort, tmp_path):
        sweep_thresholds(*cohort)
        for name, threshold, recorded in (
            ("asked", "chosen", {"value": 0.3, "chosen_on": "validation"}),
            ("given", 0.3, {"value": 0.3, "chosen_on": None}),
        ):
            run = str(tmp_path / name)
            segment_archive(cohort[1], cohort[0], run, SegmentConfig(threshold=threshold))
            body = storage.read_json(storage.join(run, "run.json"))
            assert body["threshold"] == recorded
            assert body["config"]["threshold"] == 0.3
            metrics = storage.read_table(storage.join(run, "metrics.parquet"))
            assert metrics["dice"].to_pylist() == [1.0] * 4
