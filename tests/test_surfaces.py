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


def by_tree(own, target, shape, spacing):
    distances = surfaces.Distances(surfaces.Surface(own[:0], np.zeros(0, bool)), target, shape, spacing)
    return distances._tree.query(surfaces._places(own, shape, spacing))[0]


@settings(max_examples=200, deadline=None)
@given(mask_pairs())
def test_every_way_to_a_distance_gives_one_answer(case):
    label, target, spacing = case
    own, spacing = label & ~target, spacing or MM
    assume(target.any() and own.any())
    slow = [min(math.dist(a, b) for b in np.argwhere(target) * spacing) for a in np.argwhere(own) * spacing]
    asked = np.flatnonzero(own), np.flatnonzero(target), own.shape, spacing
    for search in (surfaces._by_matrix, surfaces._by_transform, by_tree):
        assert search(*asked).tolist() == pytest.approx(slow, abs=1e-9)
    reach = surfaces.REACH * min(spacing)
    assert surfaces._by_steps(*asked).tolist() == pytest.approx([d if d <= reach + 1e-9 else math.inf for d in slow])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 400), min_size=1, max_size=50))
def test_the_percentile_is_numpys(values):
    assert surfaces.percentile_95(np.array(values)) == pytest.approx(np.percentile(values, 95))


def two_masks():
    """With some surface of either more than a step or two from the other's."""
    rng = np.random.default_rng(3)
    label, prediction = np.zeros((2, 20, 20, 20), bool)
    for mask in (label, prediction):
        for start in rng.integers(0, 15, (4, 3)):
            mask[tuple(slice(n, n + 5) for n in start)] = True
    label[0, 0, 0] = label[-1, -1, -1] = prediction[-1, 0, 0] = True
    return label, prediction


@pytest.mark.parametrize("few", [0, 30, 10**6])
@pytest.mark.parametrize("limit", [0, 10**7])
@pytest.mark.parametrize("cell", [1, 3, 50])
@pytest.mark.parametrize("spacing", [MM, (2.5, 0.94, 0.94), (1e-3, 7.0, 1e3)])
def test_however_a_distance_is_found_the_figures_are_the_same(few, limit, cell, spacing, monkeypatch):
    for name, value in (("FEW", few), ("TREE_LIMIT", limit), ("MATRIX_LIMIT", limit), ("CELL", cell)):
        monkeypatch.setattr(surfaces, name, value)
    label, prediction = two_masks()
    slow = distances_of(voxels_of(label), voxels_of(prediction), spacing, flat=False)
    pair, other = (surfaces.surface_pair(label, prediction, spacing) for _ in range(2))
    assert [pair.hd95, pair.nsd(1), pair.nsd(2)] == pytest.approx(slow)
    assert [other.nsd(2), other.nsd(1), other.hd95] == pytest.approx(slow[::-1])  # what is known by then does not matter
    reach = surfaces.REACH * min(spacing)
    assert slow[0] > reach  # so that the steps alone do not settle it


@pytest.mark.parametrize("tolerance", [0.5, 4, 6.5])
def test_a_tolerance_beyond_the_steps_is_searched_for(tolerance, monkeypatch):
    monkeypatch.setattr(surfaces, "FEW", 0)
    label, prediction = two_masks()
    edges = [np.argwhere(surfaces.surface(mask)) for mask in (label, prediction)]
    near = [min(math.dist(a, b) for b in other) <= tolerance + 1e-4 for mine, other in (edges, edges[::-1]) for a in mine]
    assert surfaces.surface_pair(label, prediction, MM).nsd(tolerance) == pytest.approx(sum(near) / len(near))


def ball(centre, radius, size=72):
    return sum((axis - c) ** 2 for axis, c in zip(np.ogrid[:size, :size, :size], centre, strict=True)) <= radius**2


def test_of_a_surface_that_is_far_away_only_what_matters_is_searched_for(monkeypatch):
    """HD95 is about the largest twentieth."""
    searched, search = [], surfaces.Distances._search
    monkeypatch.setattr(surfaces.Distances, "_search", lambda self, own: searched.append(own.size) or search(self, own))
    pair = surfaces.surface_pair(ball((24, 36, 36), 20), ball((52, 36, 36), 13), MM)
    hd95, sizes = pair.hd95, [pair.label.index.size, pair.prediction.index.size]
    assert min(sizes) > surfaces.FEW
    assert sum(searched) < 0.3 * sum(sizes)
    every = [distances._tree.query(surfaces._places(distances.own, pair.shape, MM))[0] for distances in pair.distances]
    shared = [side.shared.sum() for side in (pair.label, pair.prediction)]
    full = [np.percentile(np.append(np.zeros(n), each), 95) for n, each in zip(shared, every, strict=True)]
    assert hd95 == pytest.approx(max(full))
    for distances, each in zip(pair.distances, every, strict=True):
        assert (distances.lower[: each.size] <= each + 1e-9).all()
        assert (distances.upper[: each.size] >= each - 1e-9).all()
