"""Aggregates: what a mean says under its rule, that finding less never pays, and the laws of intervals."""

import math
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import aggregate as aggregate_module
from brainseg import tables
from brainseg.aggregate import (
    Distances,
    RegionSummary,
    Spread,
    aggregate,
    bootstrap_interval,
    in_words,
)
from brainseg.metrics import TRUST_FROM_NETWORK, score_region

INF = math.inf


def cube(size, shift=0):
    """A cube of `size` voxels a side in 8x8x8, `shift` columns along; empty for size 0."""
    mask = np.zeros((8, 8, 8), bool)
    mask[1 : 1 + size, 1 : 1 + size, 1 + shift : 1 + shift + size] = True
    return mask


def row(label, prediction, patient="p", region="tumor", spacing=(1.0, 1.0, 1.0)):
    """A scored row; masks are given as (size, shift), None for no label."""
    truth = None if label is None else cube(*label)
    return score_region(region, truth, cube(*prediction), spacing) | {"patient_id": patient}


NOTHING = (0,)
COHORT = [
    row((3,), (3,), "a"),  # dice 1, hd95 0
    row((3,), (3, 1), "a"),  # dice 2/3, hd95 1
    row((2,), NOTHING, "b"),  # missed
    row(NOTHING, (1,), "c"),  # spurious
    row(NOTHING, NOTHING, "c"),  # both empty
    row(None, (4,), "d"),  # no label
]


def test_the_default_rule_leaves_out_both_empty_and_counts_misses_as_zero():
    summary = aggregate(COHORT)["tumor"]
    assert (summary.num_rows, summary.num_labelled, summary.num_scored, summary.num_patients) == (6, 5, 4, 4)
    assert summary.num_patients_scored == 3
    assert summary.states == {"both": 2, "missed": 1, "spurious": 1, "both_empty": 1, "no_label": 1}
    assert summary.rule == "exclude"
    assert summary.dice == Spread(4, pytest.approx((1 + 2 / 3) / 4), pytest.approx(1 / 3), 0.0, pytest.approx(0.75))
    assert summary.recall.num == 3
    assert summary.precision.num == 3


def test_the_brats_rule_counts_both_empty_as_one_and_infinite_as_the_diagonal():
    summary = aggregate(COHORT, rule="brats")["tumor"]
    assert (summary.num_scored, summary.rule) == (5, "brats")
    assert summary.dice.mean == pytest.approx((1 + 2 / 3 + 1) / 5)
    assert summary.hd95_mm.num_infinite == 0
    assert summary.hd95_mm.num == 5
    assert summary.hd95_mm.mean_finite == pytest.approx((0 + 1 + 373.13 * 2 + 0) / 5)


def test_hd95_keeps_infinite_values_in_the_median_and_out_of_the_mean():
    distances = aggregate(COHORT)["tumor"].hd95_mm
    assert (distances.num, distances.num_infinite, distances.mean_finite) == (4, 2, 0.5)
    assert (distances.q1, distances.median, distances.q3) == (0.75, INF, INF)
    assert aggregate(COHORT)["tumor"].hd95_px.num == 0


def test_pixels_stay_pixels_under_both_rules():
    rows = [row(a, b, spacing=None) for a, b in (((3,), (3, 1)), ((2,), NOTHING), (NOTHING, NOTHING))]
    plain, brats = (aggregate(rows, rule=rule)["tumor"] for rule in ("exclude", "brats"))
    assert (plain.hd95_px.num, plain.hd95_px.num_infinite, plain.hd95_mm.num) == (2, 1, 0)
    assert (brats.hd95_px.num, brats.hd95_px.num_infinite, brats.hd95_mm.num) == (3, 1, 0)
    assert (plain.volume_error_ml.num, plain.volume_error_relative.num) == (0, 2)


def test_pooled_dice_weighs_voxels_and_patient_mean_weighs_patients():
    summary = aggregate(COHORT)["tumor"]
    tp, fp, fn = 27 + 18, 9 + 1, 9 + 8
    assert summary.pooled_dice == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert summary.patient_mean_dice == pytest.approx(((1 + 2 / 3) / 2 + 0 + 0) / 3)


def test_volume_errors_are_signed_millilitres():
    summary = aggregate([row((3,), (4,)), row((3,), (3,)), row((2,), NOTHING)])["tumor"]
    assert summary.volume_error_ml.mean == pytest.approx((37 + 0 - 8) / 3 / 1000)
    assert summary.volume_error_relative.median == 0


def test_failed_scans_pull_the_mean_down_as_zeros():
    summary = aggregate(COHORT)["tumor"]
    assert summary.mean_with_failures_zero(0) == pytest.approx(summary.dice.mean)
    assert summary.mean_with_failures_zero(6) == pytest.approx((1 + 2 / 3) / 10)
    nothing = aggregate([row(NOTHING, NOTHING)])["tumor"]
    assert nothing.mean_with_failures_zero(0) is None
    assert nothing.mean_with_failures_zero(2) == 0


def test_figures_over_nothing_are_none_and_never_nan():
    for rows in ([row(None, (2,))], [row(NOTHING, NOTHING)]):
        summary = aggregate(rows)["tumor"]
        assert (summary.dice, summary.pooled_dice, summary.patient_mean_dice) == (Spread(0, None, None, None, None), None, None)
        assert (summary.hd95_mm.median, summary.hd95_mm.mean_finite, summary.hd95_mm.num_infinite) == (None, None, 0)
    assert aggregate([]) == {}


def test_patients_without_a_name_count_one_by_one():
    summary = aggregate([row((3,), (3,), None), row((3,), NOTHING, None), row((3,), NOTHING, "a"), row((3,), NOTHING, "a")])[
        "tumor"
    ]
    assert (summary.num_patients, summary.num_unnamed) == (3, 2)
    assert summary.patient_mean_dice == pytest.approx(1 / 3)


def test_patients_whom_nobody_named_are_never_counted_in_words():
    assert in_words(24, 12, 0) == "24 scans of 12 patients"
    assert in_words(24, 24, 24) == "24 scans, patients not named"
    assert in_words(24, 13, 2) == "24 scans of 13 patients (each of 2 unnamed scans counted as one)"
    assert in_words(0, 0, 0) == "0 scans of 0 patients"


# --- lesions, and what finding nothing is worth


def lesion_row(state, tp=0, fp=0, fn=0, dice=0.0, hd95_mm=0.0, in_mm=True):
    """The columns of a scan's lesion-wise figures; `dice` and `hd95_mm` are sums over its true positives."""
    num = tp + fp + fn
    return {
        "region": "tumor",
        "patient_id": "p",
        "state": state,
        "prediction_volume_mm3": 8.0 if in_mm else None,
        "lesionwise_tp": tp,
        "lesionwise_fp": fp,
        "lesionwise_fn": fn,
        "lesionwise_dice": dice / num if num else None,
        "lesionwise_hd95_mm": (hd95_mm + 374 * (fp + fn)) / num if num and in_mm else None,
    }


LESIONS = [
    lesion_row("both", tp=1, fn=1, dice=0.8, hd95_mm=2),  # 0.4, 188
    lesion_row("missed", fn=1),  # 0, 374
    lesion_row("both"),  # all label lesions too small to count, nothing wrong predicted
    lesion_row("both_empty"),
]


def test_a_scan_without_lesions_has_no_lesion_figure_or_a_perfect_one():
    plain, brats = (aggregate(LESIONS, rule=rule)["tumor"] for rule in ("exclude", "brats"))
    assert (plain.lesionwise_dice.num, plain.lesionwise_dice.mean) == (2, pytest.approx(0.2))
    assert (plain.lesionwise_hd95_mm.num, plain.lesionwise_hd95_mm.mean) == (2, pytest.approx((188 + 374) / 2))
    assert (brats.lesionwise_dice.num, brats.lesionwise_dice.mean) == (4, pytest.approx((0.4 + 0 + 1 + 1) / 4))
    assert (brats.lesionwise_hd95_mm.num, brats.lesionwise_hd95_mm.mean) == (4, pytest.approx((188 + 374) / 4))


def test_lesion_distances_stay_null_where_spacing_is_unknown():
    in_pixels = [lesion_row("both", tp=1, dice=0.8, in_mm=False), lesion_row("both_empty", in_mm=False)]
    brats = aggregate(in_pixels, rule="brats")["tumor"]
    assert (brats.lesionwise_dice.num, brats.lesionwise_hd95_mm.num) == (2, 0)


def test_a_table_without_lesion_columns_has_no_lesion_figures_under_either_rule():
    names = ("lesion_recall", "lesion_precision", "lesion_f1", "lesionwise_dice", "lesionwise_hd95_mm")
    old = [{name: value for name, value in r.items() if not name.startswith("lesion")} for r in COHORT]
    for rule in ("exclude", "brats"):
        for rows in (old, pa.Table.from_pylist(old)):
            summary = aggregate(rows, rule=rule)["tumor"]
            assert {getattr(summary, name) for name in names} == {Spread(0, None, None, None, None)}


def test_plain_lesion_figures_are_means_over_the_scans_that_have_them():
    rows = [r | {"lesion_recall": v, "lesion_f1": v} for r, v in zip(LESIONS, (0.5, 0.0, 1.0, None), strict=True)]
    for rule in ("exclude", "brats"):
        summary = aggregate(rows, rule=rule)["tumor"]
        assert (summary.lesion_recall, summary.lesion_precision.num) == (Spread(3, 0.5, 0.5, 0.25, 0.75), 0)
        assert summary.lesion_f1 == summary.lesion_recall


def test_labelled_dice_is_over_scans_with_tumour_under_both_rules():
    for rule in ("exclude", "brats"):
        labelled = aggregate(COHORT, rule=rule)["tumor"].labelled_dice
        assert (labelled.num, labelled.mean) == (3, pytest.approx((1 + 2 / 3 + 0) / 3))


def test_a_model_that_predicts_nothing_is_rewarded_nowhere():
    rows = [row((5,), NOTHING, f"p{i}") for i in range(4)]
    plain, brats = (aggregate(rows, rule=rule)["tumor"] for rule in ("exclude", "brats"))
    for summary in (plain, brats):
        assert summary.states == {"both": 0, "missed": 4, "spurious": 0, "both_empty": 0, "no_label": 0}
        zero = Spread(4, 0.0, 0.0, 0.0, 0.0)
        assert {summary.dice, summary.labelled_dice, summary.iou, summary.recall, summary.nsd_1mm, summary.nsd_2mm} == {zero}
        assert {summary.lesion_recall, summary.lesion_f1, summary.lesionwise_dice} == {zero}
        assert (summary.precision.num, summary.lesion_precision.num) == (0, 0)
        assert (summary.pooled_dice, summary.patient_mean_dice) == (0, 0)
        assert (summary.lesionwise_hd95_mm.mean, summary.volume_error_relative.mean) == (374, -1)
    assert plain.hd95_mm == Distances(4, 4, INF, INF, INF, None)
    assert (brats.hd95_mm.mean_finite, brats.hd95_mm.median) == (373.13, 373.13)


def test_regions_come_in_order_of_appearance_and_do_not_mix():
    rows = [row((3,), (3,), region="WT"), row((3,), NOTHING, region="ET"), row((3,), (3,), region="WT")]
    found = aggregate(rows)
    assert [(name, s.region, s.num_rows, s.dice.mean) for name, s in found.items()] == [("WT", "WT", 2, 1), ("ET", "ET", 1, 0)]


def test_an_arrow_table_and_its_rows_give_one_summary():
    schema = pa.schema([*tables.REGION, pa.field("patient_id", pa.string())])
    table = pa.Table.from_pylist([r | dict.fromkeys(TRUST_FROM_NETWORK) for r in COHORT], schema)
    assert aggregate(table) == aggregate(COHORT)
    assert aggregate(table.slice(0, 0)) == {}


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'zero'"):
        aggregate(COHORT, rule="zero")


PAIRS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.data())
def test_missing_a_tumour_never_improves_any_aggregate(pairs, data):
    rows = [row((size,), (found, shift)) for size, found, shift in pairs]
    lost = data.draw(st.integers(0, len(rows) - 1))
    worse = [row((size,), NOTHING) if i == lost else r for i, (r, (size, _, _)) in enumerate(zip(rows, pairs, strict=True))]
    for rule in ("exclude", "brats"):
        before, after = (aggregate(r, rule=rule)["tumor"] for r in (rows, worse))
        for name in ("dice", "labelled_dice", "iou", "recall", "nsd_1mm", "lesion_recall", "lesion_f1"):
            old, new = getattr(before, name), getattr(after, name)
            assert new.num == old.num
            assert new.mean <= old.mean + 1e-12
            assert new.median <= old.median + 1e-12
        assert after.hd95_mm.median >= before.hd95_mm.median
        assert after.hd95_mm.num_infinite >= before.hd95_mm.num_infinite
        assert after.patient_mean_dice <= before.patient_mean_dice + 1e-12
    assert after.hd95_mm.mean_finite >= before.hd95_mm.mean_finite


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 5), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=5), st.data())
def test_missing_a_lesion_that_counts_never_improves_a_lesionwise_figure(pairs, data):
    rows = [row((size,), (found, shift)) for size, found, shift in pairs]
    lost = data.draw(st.integers(0, len(rows) - 1))
    worse = [row((size,), NOTHING) if i == lost else r for i, (r, (size, _, _)) in enumerate(zip(rows, pairs, strict=True))]
    for rule in ("exclude", "brats"):
        before, after = (aggregate(r, rule=rule)["tumor"] for r in (rows, worse))
        assert after.lesionwise_dice.num == before.lesionwise_dice.num == len(pairs)
        assert after.lesionwise_dice.mean <= before.lesionwise_dice.mean + 1e-12
        assert after.lesionwise_hd95_mm.mean >= before.lesionwise_hd95_mm.mean - 1e-9
        assert after.lesionwise_hd95_mm.median >= before.lesionwise_hd95_mm.median


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(COHORT), min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    one, two = aggregate(rows)["tumor"], aggregate(shuffled)["tumor"]
    for field in fields(RegionSummary):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, Spread):
            assert (a.num, a.median, a.q1, a.q3) == (b.num, b.median, b.q1, b.q3)
            assert a.mean == pytest.approx(b.mean)
        else:
            assert a == (pytest.approx(b) if isinstance(b, float) else b), field.name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 100), st.just(INF)), min_size=1, max_size=12), st.floats(0, 1))
def test_quantiles_equal_numpys_where_finite_and_are_never_nan(values, q):
    ordered = np.sort(np.array(values))
    found = aggregate_module._quantile(ordered, q)
    assert not math.isnan(found)
    assert ordered[0] <= found <= ordered[-1]
    if np.isfinite(ordered).all():
        assert found == pytest.approx(np.quantile(ordered, q), abs=1e-9)


# --- intervals


def test_an_interval_is_repeatable_and_moves_with_the_seed():
    values, patients = [0.1, 0.5, 0.9, 0.7], ["a", "b", "c", "d"]
    assert bootstrap_interval(values, patients, draws=500) == bootstrap_interval(values, patients, draws=500)
    assert bootstrap_interval(values * 5, [*range(20)], draws=500) != bootstrap_interval(
        values * 5, [*range(20)], draws=500, seed=1
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 5))
def test_an_interval_lies_within_the_values_and_around_the_mean(values, seed):
    low, high = bootstrap_interval(values, [*range(len(values))], seed=seed, draws=1000, level=0.99)
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(0.5, 5), st.floats(-3, 3))
def test_an_interval_shifts_and_scales_with_its_values(values, scale, shift):
    patients = [*range(len(values))]
    plain = bootstrap_interval(values, patients, draws=300)
    moved = bootstrap_interval(np.array(values) * scale + shift, patients, draws=300)
    assert moved == pytest.approx([bound * scale + shift for bound in plain], abs=1e-9)


def test_scans_of_one_patient_do_not_narrow_the_interval():
    values = np.random.default_rng(0).random(30)
    once = bootstrap_interval(values, [*range(30)])
    repeated = bootstrap_interval(np.repeat(values, 8), np.repeat(np.arange(30), 8))
    as_if_independent = bootstrap_interval(np.repeat(values, 8), [*range(240)])
    assert repeated == pytest.approx(once)
    assert as_if_independent[1] - as_if_independent[0] < 0.5 * (once[1] - once[0])


def test_an_interval_agrees_with_resampling_written_out():
    rng = np.random.default_rng(1)
    values, patients = rng.random(25), rng.integers(0, 8, 25)
    groups = [values[patients == p] for p in np.unique(patients)]
    means = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]).mean() for _ in range(4000)]
    assert bootstrap_interval(values, patients) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.random(40), [*range(40)], draws=400)
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 200


def test_nulls_are_left_out_and_their_patients_with_them():
    with_nulls = bootstrap_interval([0.1, None, 0.9, math.nan], ["a", "a", "b", "c"])
    assert with_nulls == bootstrap_interval([0.1, 0.9], ["a", "b"])


def test_fewer_than_two_patients_have_no_interval():
    for values, patients in (([], []), ([0.5], ["a"]), ([0.5, 0.7], ["a", "a"]), ([0.5, None], ["a", "b"])):
        assert all(map(math.isnan, bootstrap_interval(values, patients)))


def test_an_infinite_value_makes_the_upper_bound_infinite():
    low, high = bootstrap_interval([1.0] * 30 + [INF], [*range(31)])
    assert (low, high) == (1, INF)
    many = aggregate_module.MANY_PATIENTS + 1
    assert bootstrap_interval(np.full(many, INF), np.arange(many)) == (INF, INF)


def test_values_and_patients_must_match():
    with pytest.raises(ValueError, match="2 values for 3 patients"):
        bootstrap_interval([1, 2], ["a", "b", "c"])


def test_the_limit_for_many_patients_continues_the_exact_draw():
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 4, 3000).astype(float)
    sums = rng.beta(5, 1, 3000) * counts
    exact, limit = (
        np.percentile(draw(sums, counts, 10_000, np.random.default_rng(0)), [2.5, 97.5])
        for draw in (aggregate_module._resampled, aggregate_module._resampled_in_the_limit)
    )
    assert limit == pytest.approx(exact, abs=0.05 * (exact[1] - exact[0]))


def test_the_interval_of_a_large_cohort_is_that_of_the_central_limit():
    rng = np.random.default_rng(4)
    values, patients = rng.random(200_000), rng.integers(0, 80_000, 200_000)
    low, high = bootstrap_interval(values, patients)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(200_000), rel=0.1)


# --- comparisons
