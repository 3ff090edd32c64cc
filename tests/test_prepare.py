"""Prepare: whatever the grid, orientation and intensities of a scan, the network sees the same head, and its answer finds
its way back to the voxels it is about."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factory import CPU, FEW, affine, iou, make_scan
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from brainseg.config import PrepareConfig
from brainseg.errors import Code, ScanError
from brainseg.geometry import Grid, to_canonical
from brainseg.prepare import (
    CLIP,
    Plan,
    _moments,
    gather_context,
    model_masks,
    model_slices,
    native_probabilities,
    plan_scan,
    select_modalities,
    stack_context,
    uncrop,
)
from brainseg.uploads import to_tensor

BOTH = ("flair", "t1c")
orders = st.sampled_from(["LPS", "RAS", "ASR", "SPL", "LIP"])
mild = st.sampled_from([(1.0, 1.0, 1.0), (0.8, 1.0, 1.2), (1.2, 1.0, 0.9)])
in_plane = st.sampled_from([(1.0, 1.0, 1.0), (0.5, 1.0, 3.0), (1.2, 0.8, 1.0)])
shapes = st.tuples(st.integers(3, 6), st.integers(24, 44), st.integers(24, 44))


def seen(scan, config=PrepareConfig(size=32), context=0, modalities=BOTH):  # noqa: B008  a frozen value
    """What the network is given of a scan: its plan and its model slices."""
    plan = plan_scan(scan, modalities, config, context)
    crop, _ = select_modalities(scan, modalities)
    return plan, model_slices(to_tensor(gather_context(crop, range(crop.shape[1]), context), CPU), plan)


def label_crop(scan):
    """The label inside the scan's box, canonical, as float masks `(D, 1, h, w)`."""
    inside = scan.label[tuple(slice(a, b) for a, b in scan.box)]
    return torch.from_numpy(np.ascontiguousarray(to_canonical(inside, scan.grid)))[:, None].float()


class TestThereAndBack:
    @FEW
    @given(shape=shapes, order=orders, spacing=mild, frame=st.sampled_from(["full", "head"]), size=st.sampled_from([64, 80]))
    def test_a_mask_comes_back_to_where_it_was(self, shape, order, spacing, frame, size):
        """On a model grid about as fine as the scan's own."""
        scan = make_scan(shape, order=order, spacing=spacing)
        plan = plan_scan(scan, BOTH, PrepareConfig(size=size, frame=frame), 0)
        there = label_crop(scan)
        back = native_probabilities(model_masks(there, plan), plan, *there.shape[2:]) > 0.5
        label = uncrop(back[:, 0].numpy(), scan.grid, scan.box)
        assert iou(label, scan.label > 0) > 0.85

    @FEW
    @given(seed=st.integers(0, 1000), top=st.integers(-4, 4), left=st.integers(-4, 4))
    def test_nothing_is_lost_where_model_grid_and_frame_are_equally_fine(self, seed, top, left):
        """Any frame that holds the crop: the way there and back is the identity, to the last bit."""
        masks = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
        plan = Plan(
            (0.0,),
            (1.0,),
            (0.0,),
            top=min(top, 0),
            left=min(left, 0),
            height=16,
            width=16,
            size=16,
            context=0,
            per_slice_max=False,
        )
        assert torch.equal(native_probabilities(model_masks(masks, plan), plan, 12, 12), masks)

    def test_a_full_frame_of_square_pixels_at_its_own_size_is_the_identity(self):
        scan = make_scan((4, 32, 32), order="RAS")
        plan = plan_scan(scan, BOTH, PrepareConfig(size=32), 0)
        there = label_crop(scan)
        assert torch.equal(native_probabilities(model_masks(there, plan), plan, *there.shape[2:]), there)

    @FEW
    @given(shape=shapes, order=orders, spacing=in_plane)
    def test_a_full_frame_sees_every_voxel_of_the_crop(self, shape, order, spacing):
        scan = make_scan(shape, order=order, spacing=spacing)
        plan = plan_scan(scan, BOTH, PrepareConfig(size=16), 0)
        h, w = label_crop(scan).shape[2:]
        assert torch.allclose(native_probabilities(torch.ones(1, 1, 16, 16), plan, h, w), torch.ones(1, 1, h, w))

    def test_voxels_outside_the_frame_get_nothing(self):
        plan = Plan((0.0,), (1.0,), (0.0,), top=2, left=3, height=4, width=4, size=16, context=0, per_slice_max=False)
        back = native_probabilities(torch.ones(1, 1, 16, 16), plan, 10, 12)[0, 0]
        assert back.shape == (10, 12)
        assert torch.allclose(back[2:6, 3:7], torch.ones(4, 4))
        assert back.sum() == pytest.approx(16)

    @FEW
    @given(shape=shapes, order=orders)
    def test_uncrop_puts_a_crop_back_and_leaves_the_rest_empty(self, shape, order):
        scan = make_scan(shape, order=order)
        crop, _ = select_modalities(scan, BOTH)
        whole = uncrop(crop, scan.grid, scan.box)
        inside = (slice(None), *(slice(a, b) for a, b in scan.box))
        assert whole.shape == (2, *scan.grid.shape)
        assert np.array_equal(whole[inside], scan.image)
        assert np.count_nonzero(whole) == np.count_nonzero(scan.image)


class TestWhatTheNetworkSees:
    @pytest.mark.parametrize("frame", ["full", "head"])
    @pytest.mark.parametrize("order", ["RAS", "ASR", "SPL", "LIP"])
    def test_one_head_looks_the_same_in_whatever_orientation_it_is_stored(self, order, frame):
        config = PrepareConfig(size=32, frame=frame)
        _, plain = seen(make_scan(order="LPS"), config)
        _, turned = seen(make_scan(order=order), config)
        assert torch.equal(turned, plain)

    @FEW
    @given(gain=st.floats(0.01, 50), offset=st.floats(-500, 500), frame=st.sampled_from(["full", "head"]))
    def test_z_scores_do_not_depend_on_gain_or_offset(self, gain, offset, frame):
        """Raw integers and an export whose background was shifted away from 0 give the same input."""
        scan = make_scan()
        image = (scan.image * gain + offset).astype(np.float32)
        shifted = replace(scan, image=image, background=(float(np.float32(offset)),) * 2)
        config = PrepareConfig(size=32, frame=frame)
        assert torch.allclose(seen(shifted, config)[1], seen(scan, config)[1], atol=5e-3)

    def test_z_scores_have_mean_0_and_deviation_1_inside_the_head(self):
        scan = make_scan((4, 32, 32))
        _, x = seen(scan)
        crop, _ = select_modalities(scan, BOTH)
        whole = to_canonical(uncrop(crop, scan.grid, scan.box), scan.grid)
        for channel in range(2):
            inside = x[:, channel].numpy()[whole[channel, scan.box[0][0] : scan.box[0][1]] != 0]
            assert inside.mean() == pytest.approx(0, abs=1e-4)
            assert inside.std() == pytest.approx(1, abs=1e-4)

    def test_a_slice_maximum_makes_every_slice_end_at_1_and_a_volume_maximum_the_volume(self):
        scan = make_scan((5, 32, 32))
        _, by_slice = seen(scan, PrepareConfig(size=32, normalise="slice_max"))
        _, by_volume = seen(scan, PrepareConfig(size=32, normalise="volume_max"))
        assert by_slice.amax(dim=(2, 3)).numpy() == pytest.approx(1)
        assert by_volume.amax(dim=(0, 2, 3)).numpy() == pytest.approx(1)
        assert by_slice.min() == by_volume.min() == 0

    @pytest.mark.parametrize("normalise", ["zscore", "volume_max", "slice_max"])
    def test_what_lies_beyond_the_crop_looks_like_background(self, normalise):
        scan = make_scan((4, 40, 24))
        plan, x = seen(scan, PrepareConfig(size=40, normalise=normalise))
        for channel in range(2):
            empty = (plan.background[channel] - plan.shift[channel]) / plan.scale[channel]
            assert torch.allclose(x[:, channel, :, :4], torch.tensor(max(empty, CLIP[0])), atol=1e-5)

    def test_a_hot_voxel_is_clipped(self):
        scan = make_scan()
        hot = scan.image.astype(np.float32)
        hot[0, 3, 5, 5] = 1e6
        _, x = seen(replace(scan, image=hot), PrepareConfig(size=40))
        assert x.min() >= CLIP[0]
        assert x.max() <= CLIP[1]

    def test_an_empty_slice_is_not_divided_by_nothing(self):
        scan = make_scan()
        gap = scan.image.copy()
        gap[:, 2] = 0
        _, x = seen(replace(scan, image=gap), PrepareConfig(size=32, normalise="slice_max"))
        assert torch.equal(x[2], torch.zeros_like(x[2]))

    @pytest.mark.parametrize("spacing", [(0.5, 1.0, 3.0), (2.0, 1.0, 1.0)])
    def test_model_pixels_are_square_in_mm(self, spacing):
        for frame in ("full", "head"):
            plan = plan_scan(make_scan(spacing=spacing), BOTH, PrepareConfig(size=32, frame=frame), 0)
            assert plan.width * spacing[0] == pytest.approx(plan.height * spacing[1], abs=max(spacing))

    def test_a_head_frame_follows_the_head_and_a_full_frame_does_not(self):
        small = make_scan((4, 40, 40))
        moved = np.zeros((4, 80, 80), np.int16)
        (a, b), (c, d), (e, f) = small.box
        box = ((a, b), (c + 30, d + 30), (e + 10, f + 10))
        label = moved.astype(np.uint8)
        far = replace(small, grid=Grid.of(moved.shape, affine("LPS")), box=box, label=label)
        head = PrepareConfig(size=32, frame="head")
        assert torch.equal(seen(far, head)[1], seen(small, head)[1])
        assert not torch.equal(seen(far)[1], seen(small)[1])

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32])
    def test_every_stored_type_is_understood(self, dtype):
        scan = make_scan()
        image = (scan.image // 12).astype(dtype)
        expected = seen(replace(scan, image=image.astype(np.float32)))[1]
        assert torch.equal(seen(replace(scan, image=image))[1], expected)

    def test_large_unsigned_values_stay_positive(self):
        scan = make_scan()
        image = scan.image.astype(np.uint16) * 60
        assert image.max() > 2**15
        assert torch.equal(seen(replace(scan, image=image))[1], seen(replace(scan, image=image.astype(np.float32)))[1])


class TestModalities:
    def test_they_come_in_the_order_that_was_asked_for(self):
        scan = make_scan(modalities=("t1", "flair", "t1c"))
        crop, _ = select_modalities(scan, ("t1c", "t1"))
        assert np.array_equal(crop, scan.image[[2, 0]])
        _, both = seen(scan, modalities=("t1c", "t1"))
        _, swapped = seen(scan, modalities=("t1", "t1c"))
        assert torch.equal(both.flip(1), swapped)

    def test_a_missing_one_is_named_with_what_is_there(self):
        with pytest.raises(ScanError, match="scan: lacks t2; found flair, t1c") as caught:
            select_modalities(make_scan(), ("t2", "flair"))
        assert caught.value.code is Code.MISSING_MODALITY


class TestContext:
    @FEW
    @given(depth=st.integers(1, 6), context=st.integers(0, 3), channels=st.integers(1, 3))
    def test_each_slice_stands_between_its_neighbours_and_the_ends_repeat(self, depth, context, channels):
        crop = np.arange(channels * depth * 4).reshape(channels, depth, 2, 2)
        stacked = gather_context(crop, range(depth), context)
        for number in range(depth):
            near = [min(max(number + k, 0), depth - 1) for k in range(-context, context + 1)]
            assert np.array_equal(stacked[number], np.concatenate([crop[:, n] for n in near]))

    def test_every_neighbour_is_normalised_as_its_own_modality(self):
        scan = make_scan((5, 32, 32))
        _, alone = seen(scan)
        _, together = seen(scan, context=1)
        assert torch.equal(together[2], torch.cat([alone[1], alone[2], alone[3]]))
        assert torch.equal(together[0], torch.cat([alone[0], alone[0], alone[1]]))

    @FEW
    @given(depth=st.integers(1, 6), context=st.integers(0, 3), channels=st.integers(1, 3))
    def test_slices_stacked_on_the_model_grid_are_those_stacked_before(self, depth, context, channels):
        crop = np.arange(channels * depth * 4).reshape(channels, depth, 2, 2)
        after = stack_context(torch.from_numpy(crop).transpose(0, 1), range(depth), context)
        assert np.array_equal(after, gather_context(crop, range(depth), context))


class TestResampling:
    @FEW
    @given(
        crop=st.tuples(st.integers(2, 70), st.integers(2, 70)),
        frame=st.tuples(st.integers(2, 90), st.integers(2, 90)),
        place=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
        size=st.sampled_from([8, 33, 64]),
    )
    def test_it_is_torchs_with_antialiasing_there_and_back(self, crop, frame, place, size):
        """The crop lies in a frame that may reach beyond it on any side, or leave part of it out."""
        (h, w), (height, width), (top, left) = crop, frame, place
        assume(-height < top < h and -width < left < w)  # they overlap
        plan = Plan((0.0,), (1.0,), (0.0,), top, left, height, width, size, context=0, per_slice_max=False)
        image = torch.rand(3, 1, h, w, generator=torch.Generator().manual_seed(h + w))
        framed = functional.pad(image, (-left, left + width - w, -top, top + height - h))
        expected = functional.interpolate(framed, (size, size), mode="bilinear", antialias=True)
        assert torch.allclose(model_slices(image, plan), expected, atol=1e-6)
        assert torch.allclose(model_masks(image, plan), expected, atol=1e-6)
        back = functional.interpolate(expected, (height, width), mode="bilinear", antialias=True)
        back = functional.pad(back, (left, w - left - width, top, h - top - height))
        assert torch.allclose(native_probabilities(expected, plan, h, w), back, atol=1e-6)

    @FEW
    @given(
        shape=st.tuples(st.integers(2, 5), st.integers(20, 70), st.integers(20, 70)),
        frame=st.sampled_from(["full", "head"]),
        normalise=st.sampled_from(["zscore", "slice_max", "volume_max"]),
        hot=st.booleans(),
    )
    def test_a_slice_comes_out_the_same_to_the_last_bit_alone_and_among_others(self, shape, frame, normalise, hot):
        """Also where another slice has a voxel to clip, and whatever its place in memory."""
        scan = make_scan(shape, seed=3)
        image = scan.image.copy()
        image[0, -1, 4, 4] = 30_000 if hot else image[0, -1, 4, 4]
        scan = replace(scan, image=image)
        plan, together = seen(scan, PrepareConfig(size=48, frame=frame, normalise=normalise))
        crop, _ = select_modalities(scan, BOTH)
        for index, expected in enumerate(together):
            alone = model_slices(to_tensor(gather_context(crop, [index], 0), CPU), plan)[0]
            assert torch.equal(alone, expected)

    @pytest.mark.parametrize("dtype", [np.float32, np.int16])
    def test_preparing_leaves_the_scan_as_it_was(self, dtype):
        scan = make_scan((3, 24, 24), seed=3)
        raw = to_tensor(scan.image.astype(dtype), CPU).transpose(0, 1)
        before = raw.clone()
        model_slices(raw, replace(plan_scan(scan, BOTH, PrepareConfig(size=32), 0), background=(2.0, 3.0)))
        assert torch.equal(raw, before)


def test_a_plan_survives_the_way_through_json():
    plan = plan_scan(make_scan(spacing=(0.5, 1, 1)), BOTH, PrepareConfig(size=32, frame="head"), 2)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("empty", [0, 7])
def test_moments_are_those_of_the_voxels_that_are_not_empty(dtype, empty):
    voxels = np.random.default_rng(3).integers(0, 120, (3, 300, 301)).astype(dtype)
    inside = voxels[voxels != empty].astype(np.float64)
    assert _moments(voxels, empty) == pytest.approx((inside.mean(), inside.std()), rel=1e-12)
    assert _moments(np.full((1, 4, 4), empty, dtype), empty) is None
