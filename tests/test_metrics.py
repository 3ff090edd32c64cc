"""Metrics against brute force and a hand-worked table. MONAI stands in `test_monai.py`, lesions in `test_lesions.py`."""

import math
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from brute_force import MM, distances_of, mask_pairs, voxels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from brainseg import tables
from brainseg.errors import ScanError
from brainseg.geometry import Grid
from brainseg.metrics import TRUST_FROM_NETWORK, score_region, score_scan
from brainseg.regions import label_map

RATIOS = ("dice", "iou", "precision", "recall", "specificity", "accuracy")
INF = math.inf


@settings(max_examples=1000, deadline=None)
@given(mask_pairs())
def test_overlap_equals_its_formula_voxel_by_voxel(case):
    label, prediction, spacing = case
    row = score_region("tumor", label, prediction, spacing)
    pairs = list(zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True))
    tp, fp, fn, tn = (pairs.count(p) for p in ((True, True), (False, True), (True, False), (False, False)))
    assert [row[k] for k in ("tp", "fp", "fn", "tn")] == [tp, fp, fn, tn]
    assert (row["label_voxels"], row["prediction_voxels"]) == (tp + fn, tp + fp)
    if not tp + fp + fn:
        assert [row[k] for k in RATIOS] == [None] * 6
        return
    fractions = [
        (2 * tp, 2 * tp + fp + fn),
        (tp, tp + fp + fn),
        (tp, tp + fp),
        (tp, tp + fn),
        (tn, tn + fp),
        (tp + tn, label.size),
    ]
    assert [row[k] for k in RATIOS] == [part / whole if whole else None for part, whole in fractions]


@settings(max_examples=1000, deadline=None)
@given(mask_pairs())
def test_distances_equal_those_of_every_pair_of_surface_voxels(case):
    label, prediction, spacing = case
    row = score_region("tumor", label, prediction, spacing, lesions=None)
    unit, other = ("px", "mm") if spacing is None else ("mm", "px")
    found = [row[name + unit] for name in ("hd95_", "nsd_1", "nsd_2")]
    assert [row[name + other] for name in ("hd95_", "nsd_1", "nsd_2")] == [None] * 3
    if label.any() and prediction.any():
        voxels = voxels_of(label), voxels_of(prediction)
        assert found == pytest.approx(distances_of(*voxels, spacing or MM, flat=label.shape[0] == 1), abs=1e-9)
    elif label.any() or prediction.any():
        assert found == [INF, 0, 0]
    else:
        assert found == [None] * 3


@settings(max_examples=80, deadline=None)
@given(mask_pairs())
def test_swapping_label_and_prediction_swaps_the_counts_and_keeps_what_is_symmetric(case):
    label, prediction, spacing = case
    one, two = (score_region("tumor", *pair, spacing) for pair in ((label, prediction), (prediction, label)))
    assert (one["fp"], one["fn"]) == (two["fn"], two["fp"])
    assert (one["precision"], one["recall"]) == (two["recall"], two["precision"])
    for name in ("tp", "tn", "dice", "iou", "accuracy", "hd95_mm", "hd95_px", "nsd_1mm", "nsd_2mm", "nsd_1px", "nsd_2px"):
        assert one[name] == pytest.approx(two[name]), name


@settings(max_examples=80, deadline=None)
@given(mask_pairs(), st.tuples(*[st.integers(1, 3)] * 3))
def test_empty_space_around_a_scan_changes_nothing_but_the_true_negatives(case, margin):
    label, prediction, spacing = case
    if label.shape[0] == 1:
        margin = (0, *margin[1:])
    padded = [np.pad(mask, [(n, n) for n in margin]) for mask in (label, prediction)]
    before, after = score_region("tumor", label, prediction, spacing), score_region("tumor", *padded, spacing)
    assert not after["touches_border"]
    assert after["tn"] - before["tn"] == padded[0].size - label.size
    changing = {"tn", "specificity", "accuracy", "touches_border"}
    assert {k: v for k, v in after.items() if k not in changing} == {k: v for k, v in before.items() if k not in changing}


@settings(max_examples=100, deadline=None)
@given(mask_pairs())
def test_a_perfect_prediction_is_perfect(case):
    label, _, spacing = case
    row = score_region("tumor", label, label.copy(), spacing)
    unit = "px" if spacing is None else "mm"
    wanted = {"dice": 1, "iou": 1, f"hd95_{unit}": 0, f"nsd_1{unit}": 1, f"nsd_2{unit}": 1} if label.any() else {"dice": None}
    assert {k: row[k] for k in wanted} == wanted
    assert row["lesions_found"] == row["lesions_label"]
    assert row["lesions_spurious"] == 0


def cube(shape=(5, 5, 5), *corners):
    """A mask of the boxes [start, stop) given as pairs of corners."""
    mask = np.zeros(shape, bool)
    for start, stop in corners:
        mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


ONE = ((2, 2, 2), (3, 3, 3))
NEXT = ((2, 2, 3), (2 + 1, 3, 4))
BOTH_EMPTY = {
    "dice": None,
    "iou": None,
    "precision": None,
    "recall": None,
    "specificity": None,
    "accuracy": None,
    "hd95_mm": None,
}

EDGE_CASES = {
    # label, prediction, what the row says; 5x5x5 voxels of (2, 1, 1) mm
    "both empty": (
        [],
        [],
        {**BOTH_EMPTY, "state": "both_empty", "tn": 125, "nsd_1mm": None, "volume_error_mm3": 0, "volume_error_relative": None},
    ),
    "missed": (
        [ONE],
        [],
        {
            "state": "missed",
            "dice": 0,
            "iou": 0,
            "precision": None,
            "recall": 0,
            "specificity": 1,
            "accuracy": 0.992,
            "hd95_mm": INF,
        }
        | {
            "nsd_1mm": 0,
            "nsd_2mm": 0,
            "volume_error_mm3": -2,
            "volume_error_relative": -1,
            "lesions_found": 0,
            "largest_lesion_voxels": 0,
        },
    ),
    "spurious": (
        [],
        [ONE],
        {"state": "spurious", "dice": 0, "iou": 0, "precision": 0, "recall": None, "specificity": 0.992, "accuracy": 0.992}
        | {"hd95_mm": INF, "nsd_1mm": 0, "volume_error_mm3": 2, "volume_error_relative": None, "lesions_spurious": 1},
    ),
    "disjoint neighbours in a row": (
        [ONE],
        [NEXT],
        {
            "state": "both",
            "dice": 0,
            "iou": 0,
            "precision": 0,
            "recall": 0,
            "hd95_mm": 1,
            "nsd_1mm": 1,
            "nsd_2mm": 1,
            "volume_error_mm3": 0,
        },
    ),
    "disjoint neighbours across slices": (
        [ONE],
        [((3, 2, 2), (4, 3, 3))],
        {"state": "both", "dice": 0, "hd95_mm": 2, "nsd_1mm": 0, "nsd_2mm": 1, "lesions_found": 0, "lesions_spurious": 1},
    ),
    "one voxel of two": (
        [ONE, NEXT],
        [ONE],
        # surfaces 2 + 1; distances forth (0, 1), back (0): linear 95th percentile of (0, 1) is 0.95
        {
            "dice": 2 / 3,
            "iou": 0.5,
            "precision": 1,
            "recall": 0.5,
            "specificity": 1,
            "hd95_mm": 0.95,
            "nsd_1mm": 1,
            "volume_error_relative": -0.5,
        },
    ),
    "full scan": (
        [((0, 0, 0), (5, 5, 5))],
        [((0, 0, 0), (5, 5, 5))],
        {
            "dice": 1,
            "specificity": None,
            "accuracy": 1,
            "tn": 0,
            "hd95_mm": 0,
            "touches_border": True,
            "largest_lesion_voxels": 125,
        },
    ),
    "touching only the first slice": ([ONE], [((0, 2, 2), (3, 3, 3))], {"touches_border": False, "lesions_found": 1}),
    "touching the last row": ([ONE], [((2, 2, 2), (3, 5, 3))], {"touches_border": True}),
    "touching the first column": ([ONE], [((2, 2, 0), (3, 3, 3))], {"touches_border": True}),
    "corners join": ([ONE, ((3, 3, 3), (4, 4, 4))], [ONE], {"lesions_label": 1, "lesions_prediction": 1, "lesions_found": 1}),
    "a gap parts": ([ONE, ((2, 2, 4), (3, 3, 5))], [ONE], {"lesions_label": 2, "lesions_prediction": 1, "lesions_found": 1}),
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_the_hand_worked_table(name):
    label, prediction, expected = EDGE_CASES[name]
    row = score_region("tumor", cube((5, 5, 5), *label), cube((5, 5, 5), *prediction), (2.0, 1.0, 1.0))
    assert {k: row[k] for k in expected} == pytest.approx(expected)


def test_a_model_that_predicts_nothing_is_rewarded_nowhere():
    label = cube((20, 20, 20), ((2, 2, 2), (8, 8, 8)), ((15, 15, 15), (20, 20, 20)))
    row = score_region("tumor", label, np.zeros_like(label), MM)
    assert row["state"] == "missed"
    assert (row["hd95_mm"], row["lesionwise_hd95_mm"]) == (INF, 374)
    zero = ("dice", "iou", "recall", "nsd_1mm", "nsd_2mm", "lesion_recall", "lesion_f1", "lesionwise_dice")
    assert {name: row[name] for name in zero} == dict.fromkeys(zero, 0)
    assert (row["precision"], row["lesion_precision"]) == (None, None)
    assert (row["lesionwise_tp"], row["lesionwise_fp"], row["lesionwise_fn"], row["lesions_label"]) == (0, 0, 2, 2)


def test_a_row_has_exactly_the_columns_of_the_table_and_arrow_takes_it():
    wanted = {field.name for field in tables.REGION}
    boxes = [], [ONE], [NEXT]
    for label, prediction, spacing in product((None, *boxes), boxes, (MM, None)):
        masks = None if label is None else cube((5, 5, 5), *label), cube((5, 5, 5), *prediction)
        row = score_region("tumor", *masks, spacing)
        assert set(row) == wanted - set(TRUST_FROM_NETWORK)
        stored = pa.array([row | dict.fromkeys(TRUST_FROM_NETWORK)], tables.REGION).to_pylist()[0]
        assert {name: stored[name] for name in row} == row
        assert {type(value) for value in row.values()} <= {str, int, float, bool, type(None)}


def test_without_a_label_only_the_prediction_is_described():
    row = score_region("tumor", None, cube((5, 5, 5), ONE), (2.0, 1.0, 1.0))
    filled = {k: v for k, v in row.items() if v is not None}
    assert filled == {
        "region": "tumor",
        "state": "no_label",
        "prediction_voxels": 1,
        "prediction_volume_mm3": 2.0,
        "lesions_prediction": 1,
        "largest_lesion_voxels": 1,
        "touches_border": False,
    }


def test_an_unknown_spacing_gives_pixels_and_no_volume():
    row = score_region("tumor", cube((5, 5, 5), ONE), cube((5, 5, 5), ((4, 2, 2), (5, 3, 3))), None)
    assert (row["hd95_px"], row["nsd_1px"], row["nsd_2px"]) == (2, 0, 1)
    assert [k for k in row if k.endswith(("_mm", "_mm3", "mm")) and row[k] is not None] == []
    assert row["volume_error_relative"] == 0


def test_a_single_slice_has_its_surface_in_the_plane():
    label, prediction = cube((1, 9, 9), ((0, 1, 1), (1, 8, 8))), cube((1, 9, 9), ((0, 1, 1), (1, 8, 7)))
    # The column that differs has 7 of the label's 24 surface pixels at distance 1, among them its two corners.
    row = score_region("tumor", label, prediction, None)
    assert row["hd95_px"] == 1
    in_volume = score_region(
        "tumor", np.pad(label, [(1, 1), (0, 0), (0, 0)]), np.pad(prediction, [(1, 1), (0, 0), (0, 0)]), None
    )
    # As one slice of a volume every pixel is surface: 7 of 49 at distance 1 one way, none the other.
    assert in_volume["hd95_px"] == 1
    assert (row["nsd_1px"], in_volume["nsd_1px"]) == (1, 1)
    half = score_region("tumor", label, prediction, (50.0, 3.0, 3.0))
    assert half["nsd_1mm"] == pytest.approx(1 - (7 + 5) / (24 + 22))
    assert half["label_volume_mm3"] == 49 * 450


def test_a_spacing_rounded_to_float32_is_still_within_tolerance():
    apart = cube((5, 5, 5), ONE), cube((5, 5, 5), NEXT)
    for spacing in (1.0, 0.99999994, 1.0000001, 1.000001):
        assert score_region("tumor", *apart, (spacing,) * 3)["nsd_1mm"] == 1
    assert score_region("tumor", *apart, (1.001,) * 3)["nsd_1mm"] == 0


def test_a_prediction_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ScanError, match=r"\(5, 5, 4\).*\(5, 5, 5\)"):
        score_region("tumor", np.zeros((5, 5, 4), bool), np.zeros((5, 5, 5), bool), MM)
    volume = np.zeros((5, 5, 5), np.uint8)
    with pytest.raises(ScanError, match=r"\(5, 5, 5\).*\(5, 5, 4\)"):
        score_scan(None, volume, label_map("binary"), ["tumor"], Grid((5, 5, 4)))


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint8, (2, 4, 6, 5), elements=st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4])), st.booleans(), st.booleans())
def test_a_scan_is_scored_as_its_regions_are_one_by_one(volumes, labelled, spaced):
    label, prediction = (volumes[0] if labelled else None), volumes[1]
    grid = Grid.of(prediction.shape, np.diag([0.5, 1, 3, 1]) if spaced else None)
    known, names = label_map("brats2013"), ("WT", "TC", "ET")
    alone = [
        score_region(
            name, None if label is None else known.masks(label, [name])[0], known.masks(prediction, [name])[0], grid.spacing_mm
        )
        for name in names
    ]
    assert score_scan(label, prediction, known, names, grid) == alone


def test_an_empty_scan_is_scored():
    empty = np.zeros((3, 4, 5), np.uint8)
    (row,) = score_scan(empty, empty, label_map("binary"), ["tumor"], Grid((3, 4, 5)))
    assert (row["state"], row["tn"], row["touches_border"], row["lesions_prediction"]) == ("both_empty", 60, False, 0)
