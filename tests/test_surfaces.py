"""Surfaces: the quick ways to a distance give the slow way's answer; the choice between them changes nothing."""

import math

import numpy as np
import pytest
from brute_force import MM, distances_of, mask_pairs, surface_of, voxels_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from brainseg import surfaces


@settings(max_examples=200, deadline=None)
@given(mask_pairs())
def test_a_surface_is_what_has_a_face_neighbour_outside(case):
    mask, _, _ = case
    assert voxels_of(surfaces.surface(mask)) == set(surface_of(voxels_of(mask), flat=False))
    in_plane = {(0, *place) for place in np.argwhere(surfaces.surface(mask[0])).tolist()}
    assert in_plane == set(surface_of(voxels_of(mask[:1]), flat=True))


@settings(max_examples=200, deadline=None)
@given(mask_pairs())
def test_every_way_to_a_distance_gives_one_answer(case):
    label, target, spacing = case
    own, spacing = label & ~target, spacing or MM
    assume(target.any() and own.any())
    slow = [min(math.dist(a, b) for b in np.argwhere(target) * spacing) for a in np.argwhere(own) * spacing]
    asked = np.flatnonzero(own), np.flatnonzero(target), own.shape, spacing
    for search in (surfaces._by_matrix, surfaces._by_tree, surfaces._by_transform):
        assert search(*asked).tolist() == pytest.approx(slow, abs=1e-9)
    reach = surfaces.REACH * min(spacing)
    assert surfaces._by_steps(*asked).tolist() == pytest.approx([d if d <= reach + 1e-9 else math.inf for d in slow])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 400), min_size=1, max_size=50))
def test_the_percentile_is_numpys(values):
    assert surfaces.percentile_95(np.array(values)) == pytest.approx(np.percentile(values, 95))


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("limit", [0, 10**7])
@pytest.mark.parametrize("spacing", [MM, (2.5, 0.94, 0.94)])
def test_however_a_distance_is_found_the_figures_are_the_same(few, limit, spacing, monkeypatch):
    monkeypatch.setattr(surfaces, "FEW", few)
    monkeypatch.setattr(surfaces, "TREE_LIMIT", limit)
    monkeypatch.setattr(surfaces, "MATRIX_LIMIT", limit)
    rng = np.random.default_rng(3)
    label, prediction = np.zeros((2, 20, 20, 20), bool)
    for mask in (label, prediction):
        for start in rng.integers(0, 15, (4, 3)):
            mask[tuple(slice(n, n + 5) for n in start)] = True
    label[0, 0, 0] = label[-1, -1, -1] = prediction[-1, 0, 0] = True
    pair = surfaces.surface_pair(label, prediction, spacing)
    slow = distances_of(voxels_of(label), voxels_of(prediction), spacing, flat=False)
    assert [pair.hd95, pair.nsd(1), pair.nsd(2)] == pytest.approx(slow)
    reach = surfaces.REACH * min(spacing)
    assert min(max(d) for d in pair.distances) > reach  # so that the steps alone do not settle it
