"""Geometry: what an affine says of a grid, and canonical views that undo without a trace."""

import nibabel as nib
import numpy as np
import pytest
from factory import FEW, affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from brainseg.geometry import Grid, canonical_axes, from_canonical, occupied, to_canonical

shapes = st.tuples(*[st.integers(1, 5)] * 3)
orders = st.permutations(["LR", "PA", "IS"]).flatmap(lambda pairs: st.tuples(*(st.sampled_from(p) for p in pairs))).map("".join)
spacings = st.tuples(*[st.floats(0.3, 8)] * 3)
any_affine = st.integers(0, 2**32).map(lambda seed: np.vstack([np.random.default_rng(seed).normal(size=(3, 4)), [0, 0, 0, 1]]))


def numbered(shape, lead=()):
    return np.arange(np.prod([*lead, *shape])).reshape(*lead, *shape)


@FEW
@given(shape=shapes, matrix=any_affine)
def test_from_canonical_undoes_to_canonical_for_any_affine(shape, matrix):
    grid, array = Grid.of(shape, matrix), numbered(shape, lead=(2,))
    assert np.array_equal(from_canonical(to_canonical(array, grid), grid), array)


@FEW
@given(shape=shapes, matrix=any_affine)
def test_to_canonical_undoes_from_canonical_for_any_affine(shape, matrix):
    grid = Grid.of(shape, matrix)
    view = to_canonical(numbered(shape), grid)
    assert np.array_equal(to_canonical(from_canonical(view, grid), grid), view)


@FEW
@given(order=orders, spacing=spacings, shape=shapes)
def test_a_canonical_view_runs_from_feet_to_head_front_to_back_and_right_to_left(order, spacing, shape):
    """Seen through nibabel: voxel positions in the view grow in z, shrink in y (front to back) and x (right to left)."""
    matrix = affine(order, spacing)
    grid = Grid.of(shape, matrix)
    k, j, i = np.indices(shape)
    world = nib.affines.apply_affine(matrix, np.stack([i, j, k], axis=-1))
    view = to_canonical(np.moveaxis(world, -1, 0), grid)
    for axis, (coordinate, sign) in enumerate([(2, 1), (1, -1), (0, -1)]):
        assert (np.diff(view[coordinate], axis=axis) * sign > 0).all()


def test_the_canonical_view_of_an_lps_volume_is_the_volume_itself():
    grid = Grid.of((3, 4, 5), affine("LPS"))
    assert canonical_axes(grid) == ((0, 1, 2), (False, False, False))
    assert np.array_equal(to_canonical(numbered((3, 4, 5)), grid), numbered((3, 4, 5)))


def test_a_ras_volume_is_flipped_in_the_plane():
    array = numbered((3, 4, 5))
    assert np.array_equal(to_canonical(array, Grid.of((3, 4, 5), affine("RAS"))), array[:, ::-1, ::-1])


def test_a_volume_of_unknown_orientation_is_left_alone():
    array = numbered((3, 4, 5))
    assert np.array_equal(to_canonical(array, Grid.of((3, 4, 5))), array)


def test_a_canonical_view_copies_nothing():
    array = numbered((3, 4, 5))
    assert np.shares_memory(to_canonical(array, Grid.of((3, 4, 5), affine("SRA"))), array)


@FEW
@given(order=orders, spacing=spacings)
def test_spacing_orientation_and_voxel_volume_are_nibabels(order, spacing):
    matrix = affine(order, spacing)
    grid = Grid.of((2, 3, 4), matrix)
    assert grid.orientation == "".join(nib.aff2axcodes(matrix)) == order
    assert grid.spacing_mm == pytest.approx(nib.affines.voxel_sizes(matrix)[::-1])
    assert grid.voxel_mm3 == pytest.approx(np.prod(spacing))


@FEW
@given(angle=st.floats(-0.7, 0.7), order=orders, spacing=spacings)
def test_a_tilted_volume_keeps_its_spacing_and_the_nearest_axes(angle, order, spacing):
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grid = Grid.of((2, 3, 4), turn @ affine(order, spacing))
    assert grid.orientation == order
    assert grid.spacing_mm == pytest.approx(spacing[::-1])


def test_what_no_affine_tells_is_none():
    grid = Grid.of((2, 3, 4))
    assert (grid.spacing_mm, grid.voxel_mm3, grid.orientation, grid.matrix) == (None, None, None, None)
    assert grid.describe() == "2x3x4 voxels"


def test_a_grid_is_described_in_one_phrase():
    assert Grid.of((155, 240, 240), affine("LPS")).describe() == "155x240x240 voxels, 1x1x1 mm, LPS"


@FEW
@given(moved=st.floats(0, 0.2), axis=st.integers(0, 2))
def test_grids_are_the_same_while_no_corner_moves_by_more_than_a_hundredth_mm(moved, axis):
    near = affine("LPS")
    near[axis, 3] += moved
    one, other = Grid.of((5, 6, 7), affine("LPS")), Grid.of((5, 6, 7), near)
    if abs(moved - 0.01) > 1e-9:
        assert one.same_as(other) is other.same_as(one) is (moved < 0.01)


def test_a_small_error_of_spacing_adds_up_over_a_long_axis():
    """0.1 % of 1 mm is nothing over 5 voxels and 0.24 mm over 240."""
    for length, same in ((5, True), (240, False)):
        shape = (1, 1, length)
        assert Grid.of(shape, affine("LPS")).same_as(Grid.of(shape, affine("LPS", (1.001, 1, 1)))) is same


def test_grids_of_other_shape_or_orientation_differ_and_an_unknown_position_fits_any():
    grid = Grid.of((5, 5, 5), affine("LPS"))
    assert not grid.same_as(Grid.of((5, 5, 6), affine("LPS")))
    assert not grid.same_as(Grid.of((5, 5, 5), affine("RAS")))
    assert grid.same_as(Grid.of((5, 5, 5)))


def test_equal_grids_are_equal_values():
    assert Grid.of((1, 2, 3), affine("LPS")) == Grid.of((1, 2, 3), affine("LPS"))
    assert len({Grid.of((1, 2, 3)), Grid.of((1, 2, 3)), Grid.of((1, 2, 4))}) == 2


@given(
    st.lists(
        npst.arrays(
            np.uint8,
            st.shared(npst.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=9)),
            elements=st.sampled_from([0, 0, 0, 4]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_occupied_is_the_smallest_box_around_all_of_it(arrays):
    places = np.argwhere(np.bitwise_or.reduce(arrays))
    expected = tuple(slice(int(a.min()), int(a.max()) + 1) for a in places.T) if len(places) else (slice(0, 0),) * 3
    assert occupied(*arrays) == expected
    assert occupied(*(a.transpose(2, 0, 1) for a in arrays)) == tuple(expected[axis] for axis in (2, 0, 1))
