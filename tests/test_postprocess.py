"""Postprocess: what goes is what a flood fill counts as too small, and regions that hold one another still do."""

import time

import numpy as np
import pytest
from brute_force import components_of, voxels_of
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from brainseg.postprocess import drop_components
from brainseg.regions import label_map

BINARY, BRATS = label_map("binary"), label_map("brats2020")
NESTED = ("WT", "TC", "ET")
SHAPES = array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7)
BINARY_LABELS = arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 1]))
BRATS_LABELS = arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 0, 1, 2, 4]))
RULES = st.one_of(st.integers(0, 9), st.just("largest"))


def masks_of(label):
    return dict(zip(NESTED, BRATS.masks(label, NESTED), strict=True))


@FEW
@given(BINARY_LABELS, st.integers(0, 9))
def test_the_components_that_stay_are_those_of_a_flood_fill_that_are_large_enough(label, smallest):
    expected = {voxel for found in components_of(voxels_of(label > 0)) if len(found) >= smallest for voxel in found}
    assert voxels_of(drop_components(label, BINARY, ("tumor",), smallest) > 0) == expected


@FEW
@given(BINARY_LABELS)
def test_largest_leaves_one_component_and_none_is_larger(label):
    found = components_of(voxels_of(label > 0))
    left = components_of(voxels_of(drop_components(label, BINARY, ("tumor",), "largest") > 0))
    assert [len(one) for one in left] == [max(map(len, found))] if found else left == []
    assert all(one in found for one in left)


@FEW
@given(BRATS_LABELS, RULES)
def test_nothing_appears_and_narrow_regions_stay_within_wide_ones(label, rule):
    before, after = masks_of(label), masks_of(drop_components(label, BRATS, NESTED, rule))
    assert all((after[name] <= before[name]).all() for name in NESTED)
    assert (after["TC"] <= after["WT"]).all()
    assert (after["ET"] <= after["TC"]).all()


@FEW
@given(BRATS_LABELS, RULES)
def test_every_region_that_is_left_obeys_the_rule(label, rule):
    for mask in masks_of(drop_components(label, BRATS, NESTED, rule)).values():
        sizes = [len(one) for one in components_of(voxels_of(mask))]
        assert len(sizes) <= 1 if rule == "largest" else all(size >= rule for size in sizes)


@FEW
@given(BRATS_LABELS, RULES)
def test_a_second_time_changes_nothing(label, rule):
    once = drop_components(label, BRATS, NESTED, rule)
    assert np.array_equal(drop_components(once, BRATS, NESTED, rule), once)


@FEW
@given(BRATS_LABELS)
def test_the_widest_region_goes_by_its_own_components_alone(label):
    alone = drop_components(np.where(label > 0, np.uint8(2), np.uint8(0)), BRATS, ("WT",), 4)
    assert np.array_equal(masks_of(drop_components(label, BRATS, NESTED, 4))["WT"], alone > 0)


def test_a_dropped_core_stays_tumour_and_a_dropped_tumour_takes_its_core_along():
    label = np.zeros((1, 6, 12), np.uint8)
    label[0, :4, :4] = 2
    label[0, 1, 1] = 4
    label[0, 5, 10:] = 4
    kept = drop_components(label, BRATS, NESTED, 3)
    assert (kept[0, :4, :4] == 2).all()
    assert not kept[0, 5].any()


def test_off_gives_back_the_very_label():
    label = np.ones((2, 3, 4), np.uint8)
    assert drop_components(label, BINARY, ("tumor",), 0) is label


def test_touching_at_a_corner_across_slices_is_being_joined():
    label = np.zeros((2, 3, 3), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1
    assert drop_components(label, BINARY, ("tumor",), 2).sum() == 2
    assert drop_components(label[:1], BINARY, ("tumor",), 2).sum() == 0


@pytest.mark.bench
@pytest.mark.parametrize("rule", [100, "largest"])
def test_a_whole_brats_scan_takes_tens_of_milliseconds(rule):
    rng = np.random.default_rng(0)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in (155, 240, 240)), indexing="ij")
    radius = np.sqrt(d**2 + h**2 + w**2)
    label = np.select([radius < 0.15, radius < 0.25, radius < 0.4], [4, 1, 2], 0).astype(np.uint8)
    label[rng.random(label.shape) < 1e-4] = 2
    seconds = []
    for _ in range(3):
        started = time.process_time()
        drop_components(label, BRATS, NESTED, rule)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.4
