"""Averaging: every rule agrees with its definition written out, and one prediction on real scans gives all their values."""

import re
import tarfile
from datetime import UTC, datetime

import cc3d
import numpy as np
import pytest
from factory import make_row
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import runs, storage
from brainseg.aggregate import aggregate
from brainseg.averaging import BATCH, dice_by_every_rule
from brainseg.card import Split
from brainseg.formats.images import read_image
from brainseg.metrics import score_region
from brainseg.tables import METRICS

PUBLISHED = {
    "slice_empty_0": 0.250,
    "slice_exclude": 0.605,
    "slice_labelled": 0.716,
    "volume": 0.778,
    "volume_median": 0.799,
    "pooled": 0.813,
    "slice_empty_1": 0.837,
}
"""One prediction over all 110 patients of the LGG set. The tests have 74 of them, so they agree to 0.02."""

NEAR = 0.02
BY_SLICE = ("slice_empty_0", "slice_exclude", "slice_labelled", "slice_empty_1")


# --- rules written out


def dice_of(label, prediction):
    """Dice of two masks; None where both are empty."""
    whole = int(label.sum()) + int(prediction.sum())
    return 2 * int((label & prediction).sum()) / whole if whole else None


def mean(values):
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def written_out(volumes):
    """Every rule but `batch` on (label, prediction) pairs of masks, one pair a patient, from the voxels themselves."""
    pairs = [pair for label, prediction in volumes for pair in zip(label, prediction, strict=True)]
    slices = [dice_of(*pair) for pair in pairs]
    whole = sorted(d for d in (dice_of(*pair) for pair in volumes) if d is not None)
    total = sum(int(label.sum()) + int(prediction.sum()) for label, prediction in volumes)
    shared = sum(int((label & prediction).sum()) for label, prediction in volumes)
    return {
        "slice_empty_0": mean([d or 0 for d in slices]),
        "slice_exclude": mean(slices),
        "slice_labelled": mean([d for d, (label, _) in zip(slices, pairs, strict=True) if label.any()]),
        "slice_empty_1": mean([1 if d is None else d for d in slices]),
        "volume": mean(whole),
        "volume_median": (whole[(len(whole) - 1) // 2] + whole[len(whole) // 2]) / 2 if whole else None,
        "pooled": 2 * shared / total if total else None,
    }


def scored(patient, label, prediction):
    """A row a slice of one patient, as the `regions` entries of a run are."""
    for index, pair in enumerate(zip(label, prediction, strict=True)):
        entry = score_region("tumor", *(mask[None] for mask in pair), None)
        yield {"scan_id": f"{patient}_{index:03d}", "patient_id": patient, "shape": [1, *label.shape[1:]], **entry}


# --- small cohorts

PIXELS = st.integers(0, 15)
SLICES = st.lists(st.tuples(PIXELS, PIXELS), min_size=1, max_size=4)
COHORTS = st.lists(SLICES, min_size=1, max_size=6)
FEW = settings(max_examples=25, deadline=None)


def masks(slices):
    """Labels and predictions (D, 2, 2) from pairs of four-bit numbers."""
    bits = ((np.array(slices)[..., None] >> np.arange(4)) & 1).astype(bool)
    return bits[:, 0].reshape(-1, 2, 2), bits[:, 1].reshape(-1, 2, 2)


def rows_of(volumes):
    return [row for number, pair in enumerate(volumes) for row in scored(f"patient-{number}", *pair)]


@FEW
@given(COHORTS)
def test_every_rule_is_its_definition_written_out(cohort):
    volumes = [masks(slices) for slices in cohort]
    found = dice_by_every_rule(rows_of(volumes))
    assert {name: found[name] for name in PUBLISHED} == pytest.approx(written_out(volumes))


@FEW
@given(COHORTS)
def test_the_two_rules_of_the_report_are_among_them(cohort):
    rows = rows_of([masks(slices) for slices in cohort])
    found = dice_by_every_rule(rows)
    plain, brats = (aggregate(rows, rule=rule)["tumor"] for rule in ("exclude", "brats"))
    assert found["slice_exclude"] == pytest.approx(plain.dice.mean)
    assert found["slice_empty_1"] == pytest.approx(brats.dice.mean)
    assert found["slice_labelled"] == pytest.approx(plain.labelled_dice.mean)
    assert found["pooled"] == pytest.approx(plain.pooled_dice)


@FEW
@given(COHORTS, st.randoms(use_true_random=False))
def test_only_the_batch_rule_knows_the_order_of_the_slices(cohort, random):
    rows = rows_of([masks(slices) for slices in cohort])
    one, two = dice_by_every_rule(rows), dice_by_every_rule(random.sample(rows, len(rows)))
    assert {name: one[name] for name in PUBLISHED} == pytest.approx({name: two[name] for name in PUBLISHED})


@FEW
@given(COHORTS, st.data())
def test_withdrawing_a_slice_of_tumour_pays_under_no_slice_rule(cohort, data):
    volumes = [masks(slices) for slices in cohort]
    before = dice_by_every_rule(rows_of(volumes))
    patient = data.draw(st.integers(0, len(volumes) - 1))
    label, prediction = volumes[patient]
    index = data.draw(st.integers(0, len(label) - 1))
    prediction[index] &= not label[index].any()
    after = dice_by_every_rule(rows_of(volumes))
    assert all((after[name] or 0) <= (before[name] or 0) + 1e-12 for name in BY_SLICE)


def test_batches_cover_every_slice_once_and_are_counted_together():
    whole, empty = np.ones((BATCH + 1, 2, 2), bool), np.zeros((BATCH + 1, 2, 2), bool)
    one_batch = rows_of([(whole[:8], whole[:8]), (whole[8:16], empty[8:16])])
    assert dice_by_every_rule(one_batch)["batch"] == pytest.approx(2 * 8 / (2 * 8 + 8))
    two_batches = rows_of([(whole, empty), (whole[:15], whole[:15])])
    found = {dice_by_every_rule(two_batches, seed=seed)["batch"] for seed in range(5)}
    assert len(found) > 1
    assert dice_by_every_rule(two_batches, seed=3)["batch"] == dice_by_every_rule(two_batches, seed=3)["batch"]
    assert dice_by_every_rule(rows_of([(whole, empty)]))["batch"] == 0


def test_slices_of_nobody_are_volumes_of_their_own():
    whole, empty = np.ones((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    rows = [*scored(None, whole[:1], whole[:1]), *scored(None, whole[:1], empty[:1]), *scored("a", whole, whole)]
    assert dice_by_every_rule(rows)["volume"] == pytest.approx(2 / 3)


def test_a_rule_with_nothing_to_average_says_none():
    empty = np.zeros((2, 2, 2), bool)
    found = dice_by_every_rule(rows_of([(empty, empty)]))
    assert {name for name, value in found.items() if value is not None} == {"slice_empty_0", "slice_empty_1"}
    assert (found["slice_empty_0"], found["slice_empty_1"]) == (0, 1)
    unlabelled = [score_region("tumor", None, empty[:1], None) | {"patient_id": "a"}]
    for rows in ([], unlabelled, METRICS.empty_table()):
        assert set(dice_by_every_rule(rows).values()) == {None}


def test_volumes_and_several_regions_are_refused():
    volume = score_region("tumor", np.ones((3, 2, 2), bool), np.ones((3, 2, 2), bool), None) | {"patient_id": "a"}
    with pytest.raises(ValueError, match="volume of 3 slices"):
        dice_by_every_rule([{**volume, "shape": [3, 2, 2]}])
    with pytest.raises(ValueError, match="WT, ET"):
        dice_by_every_rule([{**volume, "region": region} for region in ("WT", "ET")])


# --- the LGG set


def shifted(mask, by=4):
    """Masks (D, H, W) moved `by` pixels down and as many to the right."""
    out = np.zeros_like(mask)
    out[:, by:, by:] = mask[:, :-by, :-by]
    return out


def without_small_lesions(mask, smallest=150):
    """Masks (D, H, W) without those 8-connected components of a slice that are smaller."""
    kept = np.zeros_like(mask)
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        kept[index] = cc3d.dust(mask[index].astype(np.uint8), threshold=smallest, connectivity=8)
    return kept


def read_labels(folder):
    """Each patient of the packed LGG set with the label (D, H, W), slices in the order of their numbers."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.name.endswith("_mask.png")]
            members.sort(key=lambda m: int(re.search(r"_(\d+)_mask", m.name)[1]))
            yield path.stem, np.stack([read_image(tar.extractfile(m).read(), m.name)[0] for m in members]) > 0


def made_up(volumes):
    """Per patient: the label moved by 4 pixels, small lesions dropped, 6 x 6 false pixels on every tenth empty slice."""
    num_empty = 0
    for patient, label in volumes:
        prediction = shifted(without_small_lesions(label))
        for index in np.flatnonzero(~label.any(axis=(1, 2))):
            if num_empty % 10 == 0:
                prediction[index, 100:106, 100:106] = True
            num_empty += 1
        yield patient, label, prediction


def scans_row(row):
    """A row of the `scans` table for a scored slice."""
    keys = ("scan_id", "patient_id", "shape")
    known = make_row(row["scan_id"], row["patient_id"])
    carried = {name: known[name] for name in ("dataset", "label_map", "fold", "sources", "attributes")}
    entry = {name: value for name, value in row.items() if name not in keys}
    made_by = dict.fromkeys(("model_fingerprint", "config_fingerprint", "content_tag", "run_id"), "made up")
    when = {"attempt": 1, "finished_at": datetime(2026, 1, 1, tzinfo=UTC)}
    return {**{k: row[k] for k in keys}, **carried, "status": "ok", "warnings": [], "regions": [entry], **made_by, **when}


def run_of(volumes, folder):
    """Store a run over (patient, label, prediction), a scan a slice, and return its metrics as they are read back."""
    runs.write_part(folder, [scans_row(row) for one in volumes for row in scored(*one)])
    runs.write_metrics(folder, Split())
    return storage.read_table(storage.join(folder, runs.METRICS_FILE))


@pytest.fixture(scope="module")
def labels(data_dir):
    return list(read_labels(data_dir / "lgg"))


@pytest.fixture(scope="module")
def volumes(labels):
    return list(made_up(labels))


@pytest.fixture(scope="module")
def made_up_run(volumes, tmp_path_factory):
    return run_of(volumes, str(tmp_path_factory.mktemp("lgg") / "run"))


@pytest.fixture(scope="module")
def empty_run(labels, tmp_path_factory):
    """A run that predicts nothing."""
    nothing = ((patient, label, np.zeros_like(label)) for patient, label in labels)
    return run_of(nothing, str(tmp_path_factory.mktemp("nothing") / "run"))


class TestOnePredictionOnRealScans:
    def test_each_rule_gives_its_value_from_stored_counts_alone(self, made_up_run, volumes):
        found = dice_by_every_rule(made_up_run)
        print("\n74 LGG patients: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        assert made_up_run.schema.equals(METRICS)
        assert (made_up_run.num_rows, len(made_up_run["patient_id"].unique())) == (2547, 74)
        by_hand = written_out([(label, prediction) for _, label, prediction in volumes])
        assert {name: found[name] for name in PUBLISHED} == pytest.approx(by_hand, abs=1e-12)

    def test_the_values_are_about_the_published_ones_and_stand_in_their_order(self, made_up_run):
        found = dice_by_every_rule(made_up_run)
        assert {name: found[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=NEAR)
        assert sorted(PUBLISHED, key=found.__getitem__) == list(PUBLISHED)
        assert max(found.values()) > 3 * min(found.values())

    def test_batches_of_slices_give_another_value_between_volumes_and_pixels(self, made_up_run):
        found = dice_by_every_rule(made_up_run)
        assert found["volume"] < found["batch"] < found["pooled"]

    def test_the_order_of_the_rows_in_the_table_changes_no_rule_but_the_batches(self, made_up_run):
        turned = dice_by_every_rule(made_up_run.take(np.arange(made_up_run.num_rows)[::-1]))
        found = dice_by_every_rule(made_up_run)
        assert {name: turned[name] for name in PUBLISHED} == pytest.approx({name: found[name] for name in PUBLISHED})
        assert turned["batch"] != found["batch"]


class TestNothingPredictedOnRealScans:
    def test_only_the_rule_that_calls_empty_slices_perfect_rewards_it(self, empty_run, labels):
        found = dice_by_every_rule(empty_run)
        share_empty = np.mean([not plane.any() for _, label in labels for plane in label])
        assert found["slice_empty_1"] == pytest.approx(share_empty)
        assert found["slice_empty_1"] == pytest.approx(0.651, abs=0.03)  # 0.651 over all 110 patients
        assert {value for name, value in found.items() if name != "slice_empty_1"} == {0}

    def test_accuracy_rewards_it_too(self, empty_run):
        tp, fp, fn, tn = (sum(empty_run[name].to_pylist()) for name in ("tp", "fp", "fn", "tn"))
        assert (tp + tn) / (tp + fp + fn + tn) == pytest.approx(0.990, abs=0.003)  # 0.990 over all 110 patients

    def test_the_state_says_that_everything_was_missed(self, empty_run, labels):
        states = aggregate(empty_run)["tumor"].states
        num_tumour = sum(plane.any() for _, label in labels for plane in label)
        assert (states["missed"], states["both_empty"]) == (num_tumour, empty_run.num_rows - num_tumour)
