"""What a cross-validation says once its folds are finished: plain and as chosen, and of the scans that a mean hides."""

from pathlib import Path

import pyarrow as pa
import pytest
from factory import make_network, make_row, tiny_config

from brainseg import manifest, storage
from brainseg.aggregate import aggregate
from brainseg.course import BASELINES_FILE, FAILED_FILE, HELD_OUT_CHOSEN_FILE, HELD_OUT_FILE
from brainseg.cross_validation import OUT_OF_FOLD, OUT_OF_FOLD_CHOSEN, cross_validate, describe
from brainseg.ensemble import fold_model
from brainseg.model import save_model
from brainseg.tables import BASELINES, MANIFEST, METRICS
from brainseg.train import draft

RECIPE = tiny_config(choose=True, flip_answers=True, validation_share=0.3)
FOLDS, PATIENTS = 3, 12
SUBSTITUTED = {"s3": ["t1c"], "s7": ["t1c"]}
GAIN = 0.05
CHOSEN = {"threshold": 0.4, "smallest_component": "largest", "chosen_on": "validation", "settings": {"flip": True}}


def dice_of(number):
    return round(0.3 + 0.05 * number, 2)


def scored(number, gain=0.0):
    """A row of `metrics`: patient n has a tumour of n thousand voxels, and patient 0 none, which the model sees."""
    counts = {"tp": 0, "fp": 0, "fn": 0, "label_voxels": 1000 * number, "prediction_voxels": 0, "lesions_prediction": 0}
    state, dice = ("both", dice_of(number) + gain) if number else ("both_empty", None)
    plain = dict.fromkeys(METRICS.names) | {"scan_id": f"s{number}", "patient_id": f"p{number}", "dataset": "made"}
    plain |= {"shape": [1, 2, 3], "attributes": [], "split": "test", "largest_lesion_voxels": 0, "touches_border": False}
    return plain | counts | {"region": "tumor", "state": state, "dice": dice}


@pytest.fixture
def finished(tmp_path):
    """A manifest of twelve patients and the models of its three folds, as trainings leave them."""
    rows = [make_row(f"s{n}", f"p{n}", fold=n % FOLDS) for n in range(PATIENTS)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST)
    manifest.write_manifest(str(tmp_path / "manifest.parquet"), table)
    for fold in range(FOLDS):
        leave_model(str(tmp_path / "cv"), table, fold)
    return str(tmp_path / "manifest.parquet"), str(tmp_path / "cv")


def leave_model(out, table, fold, **metrics):
    config = RECIPE.model_copy(update={"folds_held_out": fold})
    place, kept_back = fold_model(out, fold), [n for n in range(PATIENTS) if n % FOLDS == fold]
    substituted = {scan: equal for scan, equal in SUBSTITUTED.items() if int(scan[1:]) in kept_back}
    measured = {
        "held_out": {"tumor": {"dice_mean": 0.5}},
        "held_out_chosen": {"tumor": {"dice_mean": 0.6}},
        "held_out_scans": {"found": len(kept_back), "scored": len(kept_back), "failed": 0},
        "held_out_duplicated": substituted,
    } | metrics
    card = draft(table, config)[0].model_copy(update={"metrics": measured, "chosen": CHOSEN})
    save_model(place, card, make_network(card).state_dict())
    for name, gain in ((HELD_OUT_FILE, 0.0), (HELD_OUT_CHOSEN_FILE, GAIN)):
        rows = [scored(n, gain) for n in kept_back]
        storage.write_table(storage.join(place, name), pa.Table.from_pylist(rows, schema=METRICS))
    nothing = [scored(n) | {"baseline": "nothing", "dice": 0.0 if n else None} for n in kept_back]
    storage.write_table(storage.join(place, BASELINES_FILE), pa.Table.from_pylist(nothing, schema=BASELINES))
    storage.write_json(storage.join(place, FAILED_FILE), [])


def figures(body, name="regions"):
    return body[name]["tumor"]["exclude"]


def subgroup(body, name, which="subgroups"):
    (found,) = (group for group in body[which] if group["name"] == name)
    return found["regions"]["tumor"]["exclude"]


def test_plain_and_chosen_answers_are_gathered_each_scan_once(finished):
    body = cross_validate(*finished, RECIPE)
    for name, gain in ((OUT_OF_FOLD, 0.0), (OUT_OF_FOLD_CHOSEN, GAIN)):
        rows = storage.read_table(storage.join(finished[1], name))
        assert sorted(rows["scan_id"].to_pylist()) == sorted(f"s{n}" for n in range(PATIENTS))
        expected = {f"s{n}": pytest.approx(dice_of(n) + gain) for n in range(1, PATIENTS)} | {"s0": None}
        assert dict(zip(rows["scan_id"].to_pylist(), rows["dice"].to_pylist(), strict=True)) == expected
        summary = aggregate(rows)["tumor"]
        of_body = figures(body, "regions_chosen" if gain else "regions")
        assert (of_body["dice_mean"], of_body["dice_median"]) == (summary.dice.mean, summary.dice.median)
    assert figures(body, "regions_chosen")["dice_mean"] == pytest.approx(figures(body)["dice_mean"] + GAIN)
    assert body["chosen"] == dict.fromkeys(["0", "1", "2"], CHOSEN)


def test_a_fold_that_another_job_finished_meanwhile_is_summed_up_too(finished):
    manifest_uri, out = finished
    kept, moved = fold_model(out, 1), f"{out}-elsewhere"
    Path(kept).rename(moved)
    said = []

    def say(line):
        if not said:
            Path(moved).rename(kept)
        said.append(line)

    assert cross_validate(manifest_uri, out, RECIPE, folds=[0], say=say)["folds"] == [0, 1, 2]
    assert said[0].startswith("fold 0")


def test_the_patients_that_are_named_are_those_behind_the_mean(finished):
    body = cross_validate(*finished, RECIPE)
    assert [(rule["num_scans"], rule["num_patients"]) for rule in body["regions"]["tumor"].values()] == [(11, 11), (12, 12)]
    assert "(per scan, exclude, 11 scans of 11 patients)" in describe(body, "OUT")


def test_small_tumours_have_figures_of_their_own(finished):
    body = cross_validate(*finished, RECIPE)
    small = subgroup(body, "small_tumours")
    assert small["num_scans"] == 5
    assert small["dice_mean"] == pytest.approx(sum(dice_of(n) for n in range(1, 6)) / 5)
    assert subgroup(body, "small_tumours", "subgroups_chosen")["dice_mean"] == pytest.approx(small["dice_mean"] + GAIN)
    assert small["states"]["both_empty"] == 0
    assert "dice_mean_failed_zero" not in small
    assert subgroup(cross_validate(*finished, RECIPE, small_tumour_voxels=2001), "small_tumours")["num_scans"] == 2


def test_small_tumours_are_no_group_where_nearly_all_are_small(finished):
    body = cross_validate(*finished, RECIPE, small_tumour_voxels=10**9)
    assert figures(body)["num_scans"] > 0
    assert body["subgroups"][0]["regions"] == {}
    assert "label under" not in describe(body, "OUT")


def test_patients_with_a_substituted_modality_have_figures_of_their_own(finished):
    body = cross_validate(*finished, RECIPE)
    group = subgroup(body, "substituted_modality")
    assert (group["num_scans"], group["dice_mean"]) == (2, pytest.approx((dice_of(3) + dice_of(7)) / 2))
    assert next(g["scans"] for g in body["subgroups"] if g["name"] == "substituted_modality") == SUBSTITUTED


def test_a_group_nobody_recorded_or_belongs_to_is_not_made_up(finished):
    table = manifest.read_manifest(finished[0])
    for fold in range(FOLDS):
        leave_model(finished[1], table, fold, **({"held_out_duplicated": None} if fold == 1 else {}))
    body = cross_validate(*finished, RECIPE, small_tumour_voxels=1)
    assert [group["name"] for group in body["subgroups"]] == ["small_tumours"]
    assert body["subgroups"][0]["regions"] == {}
    assert "label under 1 voxels" not in describe(body, "OUT")


def test_the_words_say_both_figures_the_groups_and_what_was_chosen(finished):
    body = cross_validate(*finished, RECIPE)
    text = describe(body, "OUT")
    for name, words in (("regions", "out of fold, tumor"), ("regions_chosen", "as chosen, tumor")):
        low, high = figures(body, name)["dice_interval_95"]
        assert f"{words}: Dice mean {figures(body, name)['dice_mean']:.4f} (95 % {low:.4f} to {high:.4f}), median" in text
    assert text.count("  label under 6000 voxels: Dice mean ") == 2
    assert text.count("  one modality equal to another in every voxel: Dice mean ") == 2
    assert "threshold and smallest component: 0: 0.4 and largest, 1: 0.4 and largest, 2: 0.4 and largest, flipped" in text


def test_without_a_choice_in_the_recipe_there_is_one_figure(finished, tmp_path):
    table = manifest.read_manifest(finished[0])
    plain = RECIPE.model_copy(update={"choose": False})
    for fold in range(FOLDS):
        place = fold_model(str(tmp_path / "plain"), fold)
        card = draft(table, plain.model_copy(update={"folds_held_out": fold}))[0]
        measured = {"held_out": {"tumor": {"dice_mean": 0.5}}, "held_out_scans": {"found": 4, "scored": 4, "failed": 0}}
        save_model(place, card.model_copy(update={"metrics": measured}), make_network(card).state_dict())
        for name in (HELD_OUT_FILE, BASELINES_FILE, FAILED_FILE):
            source = storage.join(fold_model(finished[1], fold), name)
            storage.write_bytes(storage.join(place, name), storage.read_bytes(source))
    body = cross_validate(finished[0], str(tmp_path / "plain"), plain)
    assert not [name for name in body if "chosen" in name]
    assert not storage.exists(storage.join(str(tmp_path / "plain"), OUT_OF_FOLD_CHOSEN))
    assert "as chosen" not in describe(body, "OUT")
