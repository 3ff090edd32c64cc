"""Sliding: every voxel is answered, from the patches that cover it, most by those in whose middle it lies."""

import numpy as np
import pytest
import torch
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.sliding import importance, slide, starts

PATCH = (4, 8, 8)


def mean_and_first(patches):
    """Two "regions" whose answer at a voxel depends on that voxel alone."""
    return torch.stack([patches.mean(dim=1), patches[:, 0]], dim=1)


@FEW
@given(length=st.integers(2, 200), half=st.integers(1, 40))
def test_patches_reach_from_end_to_end_and_overlap_by_half_or_more(length, half):
    side = 2 * half
    if length < side:
        return
    begins = starts(length, side)
    assert begins[0] == 0
    assert begins[-1] + side == length
    assert all(0 < gap <= half for gap in np.diff(begins))
    assert len(begins) <= 1 + -(-2 * (length - side) // side)


@FEW
@given(
    depth=st.integers(1, 11),
    height=st.integers(8, 20),
    width=st.integers(8, 20),
    together=st.sampled_from([1, 2, 5, 1000]),
)
def test_an_answer_that_depends_on_the_voxel_alone_comes_out_as_without_patches(depth, height, width, together):
    volume = torch.rand(depth, 3, height, width, generator=torch.Generator().manual_seed(depth))
    answer = slide(volume, PATCH, 2, mean_and_first, together)
    assert answer.shape == (depth, 2, height, width)
    assert torch.allclose(answer[:, 0], volume.mean(dim=1), atol=1e-5)
    assert torch.allclose(answer[:, 1], volume[:, 0], atol=1e-5)


def test_no_more_go_through_at_once_than_allowed_and_each_is_a_patch():
    seen = []

    def forward(patches):
        seen.append(tuple(patches.shape))
        return patches[:, :1]

    slide(torch.zeros(9, 3, 20, 8), PATCH, 1, forward, 4)
    assert [shape[0] for shape in seen] == [4, 4, 4, 4]
    assert {shape[1:] for shape in seen} == {(3, *PATCH)}


def test_the_ends_of_a_thin_volume_are_repeated():
    seen = []

    def forward(patches):
        seen.append(patches)
        return patches[:, :1]

    slide(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 8, 8), PATCH, 1, forward, 4)
    assert seen[0][0, 0, :, 0, 0].tolist() == [0, 0, 1, 1]


def test_the_middle_of_a_patch_outweighs_its_rim():
    """A network that says 1 in the middle of its patches and 0 at their rims: where patches meet, the middle has its way."""
    rim = torch.zeros(PATCH)
    rim[:, 2:6, 2:6] = 1
    answer = slide(torch.zeros(4, 1, 8, 24), PATCH, 1, lambda patches: rim.expand(len(patches), 1, *PATCH), 9)
    assert (answer[:, 0, 2:6, 2:-2] > 0.5).all()


@pytest.mark.parametrize("patch", [(4, 8, 8), (64, 64, 64), (64, 96, 128)])
def test_weights_are_largest_in_the_middle_alike_on_both_sides_and_never_nothing(patch):
    weight = importance(patch)
    assert weight.shape == patch
    assert weight.max() == 1 == weight[tuple(n // 2 for n in patch)]
    assert torch.allclose(weight, weight.flip(0, 1, 2))
    assert weight.min() > 1e-12
