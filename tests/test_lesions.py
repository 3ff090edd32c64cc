"""Lesions: counted and matched as brute force does, and as the hand-worked table says, beside the BraTS 2023 code."""

import math

import numpy as np
import pytest
from brute_force import MM, components_of, lesionwise_of, mask_pairs, voxels_of
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.geometry import Grid
from brainseg.lesions import LESION_RULES, LESIONWISE, PLAIN, LesionRule, components, dilate, match_lesions
from brainseg.metrics import score_region, score_scan
from brainseg.regions import label_map
from brainseg.surfaces import surface_pair

LONG = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(6, 24)),
    st.tuples(st.integers(6, 20), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.just(1), st.integers(5, 12), st.integers(5, 12)),
)
"""Room for lesions that stay apart when dilated."""

COUNTS = ("lesionwise_tp", "lesionwise_fp", "lesionwise_fn")


@settings(max_examples=700, deadline=None)
@given(mask_pairs())
def test_plain_lesions_equal_a_flood_fill(case):
    label, prediction, spacing = case
    row = score_region("tumor", label, prediction, spacing, lesions=None)
    labelled, predicted = components_of(voxels_of(label)), components_of(voxels_of(prediction))
    found = sum(bool(lesion & voxels_of(prediction)) for lesion in labelled)
    confirmed = sum(bool(lesion & voxels_of(label)) for lesion in predicted)
    assert (row["lesions_label"], row["lesions_prediction"]) == (len(labelled), len(predicted))
    assert (row["lesions_found"], row["lesions_spurious"]) == (found, len(predicted) - confirmed)
    assert row["largest_lesion_voxels"] == max(map(len, predicted), default=0)
    assert row["lesion_recall"] == (found / len(labelled) if labelled else None)
    assert row["lesion_precision"] == (confirmed / len(predicted) if predicted else None)
    shares = [row["lesion_recall"], row["lesion_precision"]]
    known = [share for share in shares if share is not None]
    mean = 0 if len(known) == 1 or not all(known) else 2 / sum(1 / share for share in known) if known else None
    assert row["lesion_f1"] == (None if not known else pytest.approx(mean))


@settings(max_examples=800, deadline=None)
@given(mask_pairs(LONG), st.integers(0, 3), st.integers(0, 8))
def test_lesionwise_figures_equal_those_of_lesion_after_lesion(case, dilations, smallest):
    label, prediction, spacing = case
    spacing = spacing or MM
    seen = [mask[0] if label.shape[0] == 1 else mask for mask in (label, prediction)]
    match = match_lesions(components(seen[0]), components(seen[1]), LesionRule(dilations, smallest))
    pair = surface_pair(*seen, spacing[-seen[0].ndim :]) if label.any() and prediction.any() else None
    tp, fp, fn, dice, hd95 = lesionwise_of(label, prediction, dilations, lambda voxels: voxels < smallest, spacing)
    assert (match.tp, match.fp, match.fn) == (tp, fp, fn)
    assert match.dice == (None if dice is None else pytest.approx(dice))
    assert match.hd95_mm(pair) == (None if hd95 is None else pytest.approx(hd95))


@settings(max_examples=200, deadline=None)
@given(mask_pairs(LONG), st.sampled_from(sorted(LESION_RULES)))
def test_a_row_holds_the_lesionwise_figures_of_its_preset(case, preset):
    label, prediction, spacing = case
    rule = LESION_RULES[preset]
    row = score_region("tumor", label, prediction, spacing, lesions=preset)
    limit = rule.smallest_voxels
    tp, fp, fn, dice, hd95 = lesionwise_of(label, prediction, rule.dilations, lambda n: n < limit, spacing or MM)
    assert [row[name] for name in COUNTS] == [tp, fp, fn]
    assert row["lesionwise_dice"] == (None if dice is None else pytest.approx(dice))
    assert row["lesionwise_hd95_mm"] == (None if hd95 is None or spacing is None else pytest.approx(hd95))


@settings(max_examples=150, deadline=None)
@given(mask_pairs(LONG), st.tuples(*[st.integers(0, 4)] * 3), st.sampled_from(sorted(LESION_RULES)))
def test_empty_space_around_a_scan_joins_and_parts_no_lesions(case, margin, preset):
    label, prediction, spacing = case
    margin = (0, *margin[1:]) if label.shape[0] == 1 else margin
    padded = [np.pad(mask, [(n, n) for n in margin]) for mask in (label, prediction)]
    rows = [score_region("tumor", *masks, spacing, lesions=preset) for masks in ((label, prediction), padded)]
    assert {name: rows[0][name] for name in PLAIN + LESIONWISE} == {name: rows[1][name] for name in PLAIN + LESIONWISE}


def test_the_presets_are_those_of_brats_2023():
    told = {name: (rule.dilations, rule.smallest_voxels) for name, rule in LESION_RULES.items()}
    assert told == {"glioma": (3, 50), "meningioma": (1, 50), "metastasis": (1, 2)}


def test_a_dilation_reaches_through_faces_and_edges_but_not_corners():
    point = np.zeros((7, 7, 7), bool)
    point[3, 3, 3] = True
    once, thrice = dilate(point, 1), dilate(point, 3)
    away = np.abs(np.indices(point.shape) - 3)
    assert once.sum() == 19
    assert (once == ((away.max(axis=0) <= 1) & (away.sum(axis=0) <= 2))).all()
    assert (thrice == ((away.max(axis=0) <= 3) & (away.sum(axis=0) <= 6))).all()
    assert dilate(point[3], 3).all()
    assert dilate(point, 0).sum() == 1


def box(start, stop):
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def scan(*boxes, shape=(24, 24, 24)):
    mask = np.zeros(shape, bool)
    for where in boxes:
        mask[where] = True
    return mask


BIG = box((2, 2, 2), (8, 8, 8))  # 216 voxels
FAR = box((16, 16, 16), (22, 22, 22))  # 216 voxels, out of the reach of BIG
FIFTY = box((2, 2, 2), (4, 7, 7))  # exactly 50
SMALL = box((2, 2, 2), (5, 6, 6))  # 48

TABLE = {
    # label, prediction, preset, (tp, fp, fn, Dice), what the code of BraTS 2023 gives, in the same order
    "found": ([BIG], [BIG], "glioma", (1, 0, 0, 1), "same"),
    "missed": ([BIG], [], "glioma", (0, 0, 1, 0), "same"),
    "spurious": ([], [BIG], "glioma", (0, 1, 0, 0), "same"),
    "one found, one missed": ([BIG, FAR], [BIG], "glioma", (1, 0, 1, 0.5), "same"),
    "one found, one spurious": ([BIG], [BIG, FAR], "glioma", (1, 1, 0, 0.5), "same"),
    "a spurious component of one voxel counts like a large one": (
        *([BIG], [BIG, box((20, 20, 20), (21, 21, 21))], "glioma", (1, 1, 0, 0.5), "same"),
    ),
    "seven voxels apart is one lesion after three dilations": (
        *([BIG, box((2, 2, 14), (8, 8, 20))], [BIG], "glioma", (1, 0, 0, 2 * 216 / (432 + 216)), "same"),
    ),
    "and two after one": ([BIG, box((2, 2, 14), (8, 8, 20))], [BIG], "meningioma", (1, 0, 1, 0.5), "same"),
    "a component in the dilation only reaches the lesion": (
        # Found, with Dice 0: it is compared with the lesion as drawn, not with the dilated one.
        *([BIG], [box((2, 2, 10), (8, 8, 12))], "glioma", (1, 0, 0, 0), "same"),
    ),
    "one voxel beyond the dilation it does not": ([BIG], [box((2, 2, 11), (8, 8, 12))], "glioma", (0, 1, 1, 0), "same"),
    "two components are one answer": (
        *([BIG], [box((2, 2, 2), (8, 8, 4)), box((2, 2, 6), (8, 8, 8))], "glioma", (1, 0, 0, 2 * 144 / (216 + 144)), "same"),
    ),
    "one component across two lesions counts in full for both": (
        *([BIG, FAR], [BIG, FAR, box((5, 5, 5), (19, 19, 19))], "glioma", (2, 0, 0, 2 * 216 / (216 + 3122)), "same"),
    ),
    "a lesion under the limit is neither found nor missed": ([SMALL, FAR], [FAR], "glioma", (1, 0, 0, 1), "same"),
    "what reaches only such a lesion is not spurious": ([SMALL, FAR], [SMALL, FAR], "glioma", (1, 0, 0, 1), "same"),
    "a lesion at the limit counts": ([FIFTY, FAR], [FAR], "glioma", (1, 0, 1, 0.5), (1, 0, 0, 1)),
    "two voxels are a metastasis": (*([box((2, 2, 2), (3, 3, 4)), FAR], [FAR], "metastasis", (1, 0, 1, 0.5), (1, 0, 0, 1)),),
    "one voxel is not": ([box((2, 2, 2), (3, 3, 3)), FAR], [FAR], "metastasis", (1, 0, 0, 1), "same"),
    "nothing to count": ([], [], "glioma", (0, 0, 0, None), (0, 0, 0, 1)),
    "nothing but a small lesion": ([SMALL], [SMALL], "glioma", (0, 0, 0, None), (0, 0, 0, 1)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_hand_worked_table(name):
    label, prediction, preset, expected, theirs = TABLE[name]
    masks = scan(*label), scan(*prediction)
    row = score_region("tumor", *masks, MM, lesions=preset)
    found = [row[name] for name in (*COUNTS, "lesionwise_dice")]
    assert found == [*expected[:3], None if expected[3] is None else pytest.approx(expected[3])]
    # Their rule, read from their code: `<=` the limit is ignored, and nothing to count is perfect.
    rule = LESION_RULES[preset]
    tp, fp, fn, dice, _ = lesionwise_of(*masks, rule.dilations, lambda voxels: voxels <= rule.smallest_voxels, MM)
    told = expected if theirs == "same" else theirs
    assert (tp, fp, fn, 1 if dice is None else dice) == (*told[:3], pytest.approx(told[3]))


def test_hd95_counts_374_for_each_missed_and_spurious_lesion():
    shifted = box((2, 2, 3), (8, 8, 9))
    row = score_region("tumor", scan(BIG, box((2, 16, 2), (8, 22, 8))), scan(shifted, FAR), MM)
    assert [row[name] for name in COUNTS] == [1, 1, 1]
    assert row["lesionwise_hd95_mm"] == pytest.approx((1 + 374 + 374) / 3)


def test_pixels_have_no_stand_in_for_an_absent_lesion():
    row = score_region("tumor", scan(BIG), scan(BIG), None)
    assert (row["lesionwise_dice"], row["lesionwise_tp"], row["lesionwise_hd95_mm"]) == (1, 1, None)


def test_a_single_slice_is_matched_in_the_plane():
    label, prediction = np.zeros((2, 1, 30, 30), bool)
    label[0, 2:10, 2:10] = label[0, 12:20, 12:20] = prediction[0, 2:10, 2:10] = True
    row = score_region("tumor", label, prediction, (5.0, 1.0, 1.0), lesions="glioma")
    assert [row[name] for name in COUNTS] == [1, 0, 0]
    assert row["lesionwise_dice"] == pytest.approx(2 * 64 / (128 + 64))


def test_without_a_preset_or_a_label_there_are_no_lesionwise_figures():
    rows = [score_region("tumor", scan(BIG), scan(BIG), MM, lesions=None), score_region("tumor", None, scan(BIG), MM)]
    assert [[row[name] for name in LESIONWISE] for row in rows] == [[None] * 5] * 2
    assert (rows[0]["lesion_f1"], rows[1]["lesion_f1"]) == (1, None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(LESION_RULES)))
def test_skipping_the_lesionwise_figures_changes_no_other(seed, preset):
    rng = np.random.default_rng(seed)
    label, prediction = (np.where(rng.random((4, 9, 9)) < 0.2, rng.integers(1, 5, (4, 9, 9)), 0).astype(np.uint8) for _ in "ab")
    known, grid = label_map("brats2013"), Grid.of((4, 9, 9), np.diag([1, 1, 2, 1]))
    full, skipped = (
        score_scan(label, prediction, known, ("WT", "TC", "ET"), grid, lesions=lesions) for lesions in (preset, None)
    )
    assert [row | dict.fromkeys(LESIONWISE) for row in full] == skipped
    assert math.isfinite(full[0]["lesionwise_hd95_mm"] or 0)
