"""Comparison: two runs pair by pair, their difference over patients, and what an infinite distance or an empty scan counts."""

import math
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from brainseg import tables
from brainseg.comparison import compare_runs, paired_comparison

INF = math.inf


def test_equal_runs_do_not_differ():
    result = paired_comparison([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], ["a", "b", "c"])
    assert (result.difference, result.interval, result.wilcoxon_p, result.num_pairs) == (0, (0, 0), 1, 3)


def test_a_steady_gain_is_told_from_chance_and_noise_is_not():
    rng = np.random.default_rng(5)
    before, patients = rng.random(60), np.arange(60) // 2
    gain = paired_comparison(before + 0.05 + 0.01 * rng.random(60), before, patients)
    assert gain.num_patients == 30
    assert gain.interval[0] > 0.04
    assert gain.wilcoxon_p < 0.001
    noise = paired_comparison(before + rng.normal(0, 0.05, 60), before, patients)
    assert noise.interval[0] < 0 < noise.interval[1]
    assert noise.wilcoxon_p > 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0.25, 0.5, 1]), st.sampled_from([0, 0.25, 0.5, 1]), st.integers(0, 5)),
        min_size=2,
        max_size=20,
    )
)
def test_exchanging_the_runs_turns_the_difference_round(rows):
    a, b, patients = map(list, zip(*rows, strict=True))
    one, two = paired_comparison(a, b, patients, draws=100), paired_comparison(b, a, patients, draws=100)
    assert one.difference == pytest.approx(-two.difference)
    assert one.wilcoxon_p == pytest.approx(two.wilcoxon_p)
    assert 0 < one.wilcoxon_p <= 1
    if len(set(patients)) > 1:
        assert one.interval == pytest.approx((-two.interval[1], -two.interval[0]))


def test_pairs_with_a_null_are_left_out_and_counted():
    result = paired_comparison([0.5, None, 0.9], [0.4, 0.4, 0.8], ["a", "b", "c"])
    assert (result.num_pairs, result.num_patients) == (2, 2)
    assert result.difference == pytest.approx(0.1)
    assert math.isnan(paired_comparison([None], [0.1], ["a"]).difference)


def test_infinite_distances_are_not_compared():
    with pytest.raises(ValueError, match="infinite"):
        paired_comparison([1, INF], [1, 2], ["a", "b"])


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(1, 9)), st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_signed_rank_test_is_its_enumeration(ranks, signs):
    differences = [rank / 100 * (1 if sign else -1) for rank, sign in zip(ranks, signs, strict=True)]
    low = sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
    low = min(low, sum(ranks) - low)
    as_far = sum(min(total, sum(ranks) - total) <= low for total in (sum(s) for s in product(*((0, r) for r in ranks))))
    found = paired_comparison(differences, np.zeros(8), [*range(8)], draws=10)
    assert found.wilcoxon_p == pytest.approx(as_far / 2**8)


def test_a_comparison_is_over_the_pairs_and_clustered_by_patient_as_written_out():
    rng = np.random.default_rng(6)
    a, b, patients = rng.random(40), rng.random(40), rng.integers(0, 12, 40)
    groups = [(a - b)[patients == p] for p in np.unique(patients)]
    means = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]).mean() for _ in range(4000)]
    found = paired_comparison(a, b, patients)
    assert found.difference == pytest.approx(np.mean(a - b))
    assert found.interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.02)
    assert found.wilcoxon_p == pytest.approx(wilcoxon([group.mean() for group in groups]).pvalue)


def metrics_table(*rows):
    """A table of (scan, region, patient, dice, hd95_mm); a scan without figures is one in which nothing was to be found."""
    names = ("scan_id", "region", "patient_id", "dice", "hd95_mm")
    schema = pa.schema([tables.METRICS.field(name) for name in (*names, "state")])
    stated = [{**dict(zip(names, r, strict=True)), "state": "both_empty" if r[3] is None else "both"} for r in rows]
    return pa.Table.from_pylist(stated, schema)


ONE = metrics_table(
    ("s1", "WT", "a", 0.9, 1.0), ("s1", "ET", "a", 0.5, 2.0), ("s2", "WT", "b", 0.6, INF), ("s3", "WT", "c", None, None)
)
TWO = metrics_table(
    ("s3", "WT", "c", 0.0, INF), ("s2", "WT", "b", 0.4, 4.0), ("s1", "WT", "a", 0.6, 3.0), ("s4", "WT", "d", 1.0, 0.0)
)


def test_runs_are_compared_on_the_scans_that_both_have_whatever_their_order():
    found = compare_runs(ONE, TWO)
    assert list(found) == ["WT"]
    wt = found["WT"]
    assert (wt.num_pairs, wt.num_left_out, wt.num_unmatched, wt.num_patients) == (3, 0, 1, 3)
    assert wt.difference == pytest.approx((0.3 + 0.2 + 1.0) / 3)
    assert wt.interval == paired_comparison([0.9, 0.6, 1.0], [0.6, 0.4, 0.0], ["a", "b", "c"]).interval
    assert (wt.num_infinite, wt.infinite_as) == (0, None)


def test_a_run_does_not_differ_from_itself():
    found = compare_runs(ONE, ONE)
    assert {region: (c.num_pairs, c.num_unmatched, c.difference, c.wilcoxon_p) for region, c in found.items()} == {
        "WT": (2, 0, 0, 1),
        "ET": (1, 0, 0, 1),
    }
    assert found["WT"].num_left_out == 1


def test_an_infinite_distance_counts_its_stand_in_and_the_comparison_says_so():
    wt = compare_runs(ONE, TWO, "hd95_mm")["WT"]
    assert wt.difference == pytest.approx(((1 - 3) + (373.13 - 4) + (0 - 373.13)) / 3)
    assert (wt.num_pairs, wt.num_left_out, wt.num_infinite, wt.infinite_as) == (3, 0, 2, 373.13)
    assert compare_runs(ONE, TWO, "hd95_mm", infinite_as=50)["WT"].difference == pytest.approx((-2 + 46 - 50) / 3)


def test_rightly_finding_nothing_beats_marking_something():
    right, wrong = metrics_table(("s", "WT", "a", None, None)), metrics_table(("s", "WT", "a", 0.0, INF))
    assert compare_runs(right, wrong)["WT"].difference == 1
    assert compare_runs(wrong, right)["WT"].difference == -1
    assert compare_runs(right, wrong, "hd95_mm")["WT"].difference == -373.13


def test_finding_nothing_never_beats_a_distance_beyond_the_stand_in():
    far, nothing = (metrics_table(("s", "WT", "a", 0.1, v), ("t", "WT", "b", 0.1, v)) for v in (500.0, INF))
    found = compare_runs(nothing, far, "hd95_mm")["WT"]
    assert (found.difference, found.infinite_as) == (0, 500)


def test_scans_that_stand_twice_and_runs_that_share_none_are_refused():
    twice = pa.concat_tables([ONE, ONE.slice(0, 1)])
    for tables_given in ((twice, ONE), (ONE, twice)):
        with pytest.raises(ValueError, match="s1 stands twice for region WT"):
            compare_runs(*tables_given)
    with pytest.raises(ValueError, match="no scan and region in common"):
        compare_runs(ONE, TWO.slice(3))
