"""The sweep: the best threshold is found where it is known beforehand, on validation scans alone, and only recorded."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from factory import CPU, FEW, make_card, make_model, make_network, make_scan, tiny_config, write_scan
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brainseg import commands, manifest, storage
from brainseg.aggregate import aggregate
from brainseg.card import CARD, Split, fingerprint_of, load_card, resolved, save_card
from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig, build
from brainseg.console import Voice
from brainseg.errors import ConfigError, PreflightError, UsageError
from brainseg.model import WEIGHTS, load_model, save_model
from brainseg.results import describe_model
from brainseg.scoring import score_regions
from brainseg.segment import segment_archive
from brainseg.sweep import Candidates, choose, describe, sweep_model, try_candidates, unchosen, validation_rows
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


def curve(record, smallest=0):
    """threshold -> mean Dice under a component rule."""
    return next(dict(map(tuple, row["curve"])) for row in record["table"] if row["smallest_component"] == smallest)


def spotted(scan, size):
    """The same head with as many sure voxels in a corner of its crop, far from the tumour."""
    image = scan.image.copy()
    image[0, 0, 0, :size] = BRIGHTEST
    return replace(scan, image=image)


class TestChoice:
    def test_the_one_threshold_that_separates_tumour_from_healthy_is_chosen(self, cohort):
        chosen = sweep_model(*cohort)
        assert (chosen["threshold"], chosen["smallest_component"]) == (0.3, 0)
        assert curve(chosen)[0.3] == chosen["mean"] == chosen["best"]["mean"] == 1.0
        assert sum(mean == 1.0 for mean in curve(chosen).values()) == 1
        assert chosen["default_mean"] == curve(chosen)[0.5] == pytest.approx(2 / 3, abs=0.1)
        assert chosen["regions"] == ["tumor"]

    @pytest.mark.parametrize("smallest", [[4], ["largest"], [4, "largest"]])
    def test_threshold_and_component_rule_are_chosen_together(self, tmp_path, smallest):
        rows = [
            write_scan(tmp_path / "scans", spotted(tumour_seen_as(0.33, 0.27, name, seed=seed), 3))
            for seed, name in enumerate("ab")
        ]
        table = pa.Table.from_pylist(rows, schema=MANIFEST)
        manifest.write_manifest(str(tmp_path / "manifest.parquet"), table)
        model = hand_made_model(tmp_path / "model", table)
        chosen = sweep_model(model, str(tmp_path / "manifest.parquet"), Candidates.of(smallest=smallest))
        assert (chosen["threshold"], chosen["smallest_component"]) == (0.3, smallest[0])
        assert curve(chosen)[0.3] < curve(chosen, smallest[0])[0.3] == chosen["mean"] == 1.0

    def test_the_record_says_on_whom_and_how(self, cohort):
        chosen = sweep_model(*cohort, rule="brats", settings=SegmentConfig(flip=True))
        assert load_card(cohort[0]).chosen == chosen
        assert {
            name: chosen[name] for name in ("chosen_on", "rule", "patients", "num_scans", "num_patients", "num_failed")
        } == {
            "chosen_on": "validation",
            "rule": "per scan, brats",
            "patients": ["of-a", "of-b"],
            "num_scans": 2,
            "num_patients": 2,
            "num_failed": 0,
        }
        assert chosen["settings"] == {"flip": True, "precision": "fp32"}

    def test_of_equals_the_one_nearest_a_half_is_chosen(self, tmp_path):
        table = write_cohort(tmp_path, inside=0.9, outside=0.1)
        chosen = sweep_model(hand_made_model(tmp_path / "model", table), str(tmp_path / "manifest.parquet"))
        assert sum(mean == 1.0 for mean in curve(chosen).values()) > 10
        assert (chosen["threshold"], chosen["smallest_component"]) == (0.5, 0)

    def test_the_default_is_a_candidate_whatever_is_asked_for(self):
        assert list(Candidates.of([0.7, 0.2], ["largest"])) == [(t, s) for t in (0.2, 0.5, 0.7) for s in (0, "largest")]

    def test_the_words_show_every_mean_and_mark_the_choice(self, cohort):
        said = []
        chosen = sweep_model(*cohort, say=said.append)
        assert said == list(describe(chosen))
        (marked,) = (line for line in said if "*" in line)
        assert marked.split()[:2] == ["0.30", "1.0000*"]
        assert len(said) == 2 + len(curve(chosen))

    def test_a_scan_that_cannot_be_read_is_counted_and_named(self, cohort, tmp_path):
        (tmp_path / "scans" / "b-flair.nii.gz").write_bytes(b"no gzip")
        said = []
        chosen = sweep_model(*cohort, say=said.append)
        assert (chosen["num_scans"], chosen["num_patients"], chosen["num_failed"]) == (1, 1, 1)
        assert (chosen["threshold"], chosen["standard_error"], chosen["best"]["threshold"]) == (0.5, None, 0.3)
        assert any(line.startswith("left out: b: ") for line in said)

    def test_neither_weights_nor_fingerprint_change(self, cohort):
        card, weights = load_card(cohort[0]), (Path(cohort[0]) / WEIGHTS).read_bytes()
        sweep_model(*cohort)
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
        assert sweep_model(*cohort)["num_failed"] == 0

    def refused(self, folder, table, split=SPLIT):
        manifest.write_manifest(str(folder / "manifest.parquet"), table)
        model = hand_made_model(folder / "model", table, split)
        with pytest.raises(PreflightError) as caught:
            sweep_model(model, str(folder / "manifest.parquet"))
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
            sweep_model(*cohort)


def entries(values, region="tumor", **which):
    """What one candidate makes of patients p0, p1 ... with a scan each: its Dice values."""
    return [
        {"scan_id": f"s{n}", "patient_id": f"p{n}", "region": region, "state": "both", "tp": 1, "fp": 0, "fn": 0, "dice": dice}
        | {"threshold": 0.5, "smallest_component": 0, **which}
        for n, dice in enumerate(values)
    ]


def choice_of(*tried, **options):
    record = choose([entry for one in tried for entry in one], SegmentConfig(), **options)
    return record["threshold"], record["smallest_component"], record


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=8)


class TestGuard:
    """A candidate must beat the default by more than one standard error of the paired difference over patients."""

    @FEW
    @given(SHARES, st.data())
    def test_with_a_scan_a_patient_the_error_is_s_over_root_n(self, before, data):
        after = data.draw(st.lists(st.floats(0, 1), min_size=len(before), max_size=len(before)))
        threshold, _, record = choice_of(entries(before), entries(after, threshold=0.4))
        gain = np.array(after) - np.array(before)
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        if abs(gain.mean() - error) > 1e-6:
            assert (threshold == 0.4) == (gain.mean() > error)
        if threshold == 0.4:
            assert record["standard_error"] == pytest.approx(error, abs=1e-9)

    @FEW
    @given(SHARES, st.data())
    def test_what_one_patient_gains_alone_is_never_enough(self, before, data):
        after = list(before)
        after[data.draw(st.integers(0, len(before) - 1))] = 1.0
        assert choice_of(entries(before), entries(after, smallest_component="largest"))[:2] == (0.5, 0)

    def test_one_patient_chooses_nothing(self):
        assert choice_of(entries([0.1]), entries([0.9], threshold=0.4))[:2] == (0.5, 0)

    def test_two_scans_of_one_patient_are_one_voice(self):
        tried = [*entries([0.5] * 4), *entries([0.9, 0.9, 0.5, 0.5], threshold=0.4)]
        assert choice_of(tried)[0] == 0.4
        pairs = {"s0": "p0", "s1": "p0", "s2": "p1", "s3": "p1"}
        assert choice_of([row | {"patient_id": pairs[row["scan_id"]]} for row in tried])[0] == 0.5

    def test_what_one_patient_gains_by_components_does_not_ride_on_what_all_gain_by_the_threshold(self):
        tried = [
            entries([0.50, 0.50, 0.50, 0.50]),
            entries([0.55, 0.54, 0.56, 0.55], threshold=0.4),
            entries([0.80, 0.50, 0.50, 0.50], smallest_component=50),
            entries([0.85, 0.54, 0.56, 0.55], threshold=0.4, smallest_component=50),
        ]
        threshold, smallest, record = choice_of(*tried)
        assert (threshold, smallest) == (0.4, 0)
        assert record["best"]["smallest_component"] == 50
        for row in tried[2] + tried[3]:
            row["dice"] += 0.04 if row["patient_id"] != "p0" else 0
        assert choice_of(*tried)[:2] == (0.4, 50)

    def test_a_steady_gain_is_preferred_to_a_larger_uncertain_one_which_is_named(self):
        steady, uncertain = [0.52, 0.52, 0.52], [0.9, 0.5, 0.5]
        threshold, _, record = choice_of(entries([0.5] * 3), entries(steady, threshold=0.4), entries(uncertain, threshold=0.3))
        assert threshold == 0.4
        assert record["best"] == {"threshold": 0.3, "smallest_component": 0, "mean": pytest.approx(1.9 / 3)}
        assert any("not by more than its standard error: threshold 0.3" in line for line in describe(record))

    def test_of_equals_the_smallest_change_wins(self):
        better = [0.8, 0.8, 0.8]
        tried = [entries([0.5] * 3), entries(better, smallest_component="largest"), entries(better, smallest_component=50)]
        tried += [entries([0.1] * 3, threshold=t, smallest_component=s) for t in (0.3, 0.4, 0.6) for s in (0, 50, "largest")]
        assert choice_of(*tried)[:2] == (0.5, 50)
        more = [entries(better, threshold=t) for t in (0.7, 0.45)]
        rest = [entries([0.1] * 3, threshold=t, smallest_component=s) for t in (0.7, 0.45) for s in (50, "largest")]
        assert choice_of(*tried, *more, *rest)[:2] == (0.45, 0)

    def test_regions_weigh_alike_and_one_without_a_tumour_has_no_say(self):
        def both(wide, narrow, **which):
            return [*entries(wide, "WT", **which), *entries(narrow, "ET", **which)]

        tried = [*both([0.8, 0.8], [0.4, 0.4]), *both([0.7, 0.7], [0.8, 0.8], threshold=0.4)]
        assert choice_of(tried)[0] == 0.4
        for row in tried:
            if row["region"] == "ET":
                row |= {"state": "spurious", "tp": 0, "fp": 9, "dice": 0.0}
        threshold, _, record = choice_of(tried)
        assert (threshold, record["regions"]) == (0.5, ["WT"])

    def test_the_order_of_the_entries_and_so_the_number_of_workers_is_no_matter(self):
        rng = np.random.default_rng(2)
        tried = [
            row for t in (0.3, 0.4, 0.5) for s in (0, 50) for row in entries(rng.random(7), threshold=t, smallest_component=s)
        ]
        records = [choose([tried[k] for k in rng.permutation(len(tried))], SegmentConfig()) for _ in range(4)]
        assert all(record == records[0] for record in records)

    @pytest.mark.parametrize("rule", ["exclude", "brats"])
    def test_the_means_are_those_that_aggregate_gives(self, rule):
        tried = [*entries([0.25, 0.5, 0.75]), *entries([0.1, 0.3, 0.2], threshold=0.4)]
        tried[4] |= {"state": "both_empty", "tp": 0, "dice": None}
        record = choose(tried, SegmentConfig(), rule)
        for threshold, mean in curve(record).items():
            rows = [row for row in tried if row["threshold"] == threshold]
            assert mean == pytest.approx(aggregate(rows, rule=rule)["tumor"].dice.mean)


@pytest.mark.parametrize("meaning", ["brats2020", "binary"])
def test_counts_of_a_candidate_are_those_of_the_mask_that_a_run_would_store(tmp_path, meaning):
    card = make_card(tiny_config(regions=("WT", "TC", "ET")), label_map="brats2023")
    model = make_model(tmp_path, card)
    rng = np.random.default_rng(5)
    for order, spacing in (("LPS", (1.0, 1.0, 3.0)), ("ASR", (1.0, 2.0, 1.0)), (None, None)):
        scan = make_scan((5, 30, 26), order=order, **({"spacing": spacing} if spacing else {}))
        values = [0, 1, 2, 4] if meaning == "brats2020" else [0, 1]
        scan = replace(scan, label=rng.choice(values, scan.label.shape).astype(np.uint8))
        row = {"scan_id": "s", "patient_id": "p", "label_map": meaning}
        (probability,) = model.probabilities([scan])
        thresholds = [float(q) for q in torch.quantile(probability.flatten(), torch.tensor([0.1, 0.9, 0.999]))]
        candidates = Candidates.of(thresholds, [0, 5, "largest"])
        tried = try_candidates(model, [(scan, row)], candidates)
        assert len(tried) == len(list(candidates)) * (3 if meaning == "brats2020" else 1)
        for threshold, smallest in candidates:
            settings = SegmentConfig(threshold=threshold, smallest_component=smallest)
            answer = load_model(str(tmp_path), settings, CPU).predict([scan])[0]
            expected = score_regions(scan.label, meaning, answer.label, scan.grid, card)
            who = {"scan_id": "s", "patient_id": "p", "threshold": threshold, "smallest_component": smallest}
            found = [entry for entry in tried if who.items() <= entry.items()]
            scored = [e for e in expected if e["state"] != "no_label"]
            assert found == [{**{k: e[k] for k in found[0] if k in e}, **who} for e in scored]


class TestUse:
    def test_without_a_choice_it_is_said_how_to_make_one(self, cohort, tmp_path):
        with pytest.raises(PreflightError, match="evaluate RUN --threshold-sweep"):
            segment_archive(cohort[1], cohort[0], str(tmp_path / "run"), SegmentConfig(threshold="chosen"))
        assert not (tmp_path / "run").exists()

    def test_a_chosen_threshold_is_the_number_that_the_model_records(self, cohort):
        chosen = sweep_model(*cohort)
        asked = SegmentConfig(threshold="chosen", smallest_component="chosen", flip=True)
        assert resolved(asked, load_card(cohort[0])) == SegmentConfig(threshold=0.3, smallest_component=0, flip=True)
        assert load_model(cohort[0], asked, CPU).settings.threshold == chosen["threshold"]

    def test_a_chosen_component_rule_is_the_one_that_the_model_records(self, cohort):
        card = load_card(cohort[0])
        for smallest in (0, 50, "largest"):
            told = card.model_copy(update={"chosen": {"threshold": 0.4, "smallest_component": smallest}})
            assert resolved(SegmentConfig(smallest_component="chosen"), told) == SegmentConfig(smallest_component=smallest)
        with pytest.raises(PreflightError, match="records no chosen smallest component"):
            resolved(SegmentConfig(smallest_component="chosen"), card.model_copy(update={"chosen": {"threshold": 0.4}}))

    @pytest.mark.parametrize("recorded", ["smallest", -1, True, 1.5, None, [3]])
    def test_a_record_that_is_no_component_rule_is_refused(self, cohort, recorded):
        card = load_card(cohort[0])
        save_card(cohort[0], card.model_copy(update={"chosen": {"threshold": 0.4, "smallest_component": recorded}}))
        with pytest.raises(PreflightError, match=r"chosen\.smallest_component is"):
            load_card(cohort[0])

    def test_nobody_gets_it_unasked(self, cohort):
        sweep_model(*cohort)
        assert load_model(cohort[0], SegmentConfig(), CPU).settings.threshold == 0.5

    @pytest.mark.parametrize("value", [0, 1, 1.5, "best", None, True])
    def test_a_threshold_is_a_share_or_that_word(self, value):
        with pytest.raises(ConfigError, match=r"^segment: threshold: .*'chosen'$"):
            build(SegmentConfig, {"threshold": value}, "segment")

    @pytest.mark.parametrize("value", [-1, 1.5, "smallest", None, True])
    def test_a_component_rule_is_a_number_of_voxels_or_one_of_two_words(self, value):
        with pytest.raises(ConfigError, match=r"^segment: smallest_component: .*'largest' or 'chosen'$"):
            build(SegmentConfig, {"smallest_component": value}, "segment")

    def test_keys_that_came_later_leave_the_fingerprint_of_a_run_that_does_not_use_them(self):
        known = SegmentConfig().model_dump(mode="json", exclude={"smallest_component", "members"})
        text = json.dumps(known, sort_keys=True, separators=(",", ":"))
        assert SegmentConfig().fingerprint() == hashlib.sha256(text.encode()).hexdigest()
        others = [SegmentConfig(smallest_component=3), SegmentConfig(smallest_component="largest")]
        assert len({one.fingerprint() for one in [SegmentConfig(), *others, SegmentConfig(members="out-of-fold")]}) == 4

    @pytest.mark.usefixtures("local_ray")
    def test_a_run_says_which_threshold_it_used_and_who_chose_it(self, cohort, tmp_path):
        sweep_model(*cohort)
        for name, threshold, recorded in (
            ("asked", "chosen", {"value": 0.3, "chosen_on": "validation"}),
            ("given", 0.3, {"value": 0.3, "chosen_on": None}),
        ):
            run = str(tmp_path / name)
            segment_archive(cohort[1], cohort[0], run, SegmentConfig(threshold=threshold))
            body = storage.read_json(storage.join(run, "run.json"))
            assert body["threshold"] == recorded
            assert body["smallest_component"] == {"value": 0, "chosen_on": None}
            assert body["config"]["threshold"] == 0.3
            metrics = storage.read_table(storage.join(run, "metrics.parquet"))
            assert metrics["dice"].to_pylist() == [1.0] * 4


class TestCommand:
    """`brainseg evaluate RUN|MODEL --threshold-sweep`."""

    def test_a_model_folder_serves_with_the_manifest_that_it_was_trained_on(self, cohort):
        chosen = commands.sweep(cohort[0], cohort[1], Voice(quiet=True), ["flip=true"])
        assert load_card(cohort[0]).chosen == chosen
        assert (chosen["threshold"], chosen["settings"]["flip"]) == (0.3, True)

    def test_without_a_manifest_a_model_folder_is_refused(self, cohort):
        with pytest.raises(UsageError, match="give the manifest that it was trained on with --labels"):
            commands.sweep(cohort[0], None, Voice(quiet=True))

    def test_a_run_leads_to_its_model_and_manifest(self, cohort, tmp_path):
        run = tmp_path / "run"
        storage.write_json(str(run / "run.json"), {"model": {"uri": cohort[0]}})
        manifest.write_manifest(str(run / "manifest.parquet"), manifest.read_manifest(cohort[1]))
        assert commands.sweep(str(run), None, Voice(quiet=True))["threshold"] == 0.3

    def test_a_run_of_several_models_has_none_to_choose_for(self, tmp_path):
        storage.write_json(str(tmp_path / "run.json"), {"model": {"uri": None}})
        with pytest.raises(PreflightError, match="made by several models"):
            commands.sweep(str(tmp_path), None, Voice(quiet=True))

    def test_any_other_folder_is_refused(self, tmp_path):
        with pytest.raises(PreflightError, match="neither a run folder nor a model"):
            commands.sweep(str(tmp_path), None, Voice(quiet=True))


def test_a_card_says_in_words_what_was_chosen_and_what_it_scores(cohort):
    chosen = sweep_model(*cohort, settings=SegmentConfig(flip=True))
    figures = {"rule": "per scan, exclude", "num_scans": 3, "dice_mean": 0.5, "dice_median": 0.6}
    figures |= {"states": {"missed": 1, "spurious": 0}}
    card = load_card(cohort[0]).model_copy(update={"metrics": {"held_out_chosen": {"tumor": figures}}, "chosen": chosen})
    said = describe_model(card, "OUT").splitlines()
    words = "held-out fold as chosen on 2 validation scans (threshold 0.3, smallest component 0, flipped), tumor: Dice mean 0.5"
    assert said[1].startswith(words)
    card = card.model_copy(update={"chosen": unchosen(SegmentConfig(), "no patient was kept for validation")})
    assert "as chosen by nobody: no patient was kept for validation (threshold 0.5" in describe_model(card, "OUT")
