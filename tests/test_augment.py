"""Augmentation: drawn once for the whole batch, applied alike to image and mask, replayable, and nothing by default."""

import numpy as np
import pytest
import torch
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.augment import MARGIN, apply, draw, margin
from brainseg.config import AugmentConfig
from brainseg.presets import STRONG_AUGMENT

STRONG = STRONG_AUGMENT.model_copy(update={"modality_dropout": 0.5, "blur": 0.5, "elastic": 0.5, "low_resolution": 0.5})
EACH = {
    "rotate_degrees": 30.0,
    "log_scale": 0.3,
    "shift": 0.2,
    "flip": True,
    "intensity": 0.3,
    "gamma": 0.3,
    "noise": 0.3,
    "blur": 1.0,
    "modality_dropout": 1.0,
    "elastic": 1.0,
    "low_resolution": 1.0,
}


def batch(samples=6, modalities=2, context=0, size=24):
    """Images `(B, K*C, S, S)` and masks `(B, 1, S, S)`; every image is dim noise with its mask shining in it."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(samples, 1, size, size)
    for b in range(samples):
        masks[b, 0, 5 + b % 3 : 12, 8 : 16 + b % 3] = 1
    channels = modalities * (2 * context + 1)
    images = 0.1 * torch.rand(samples, channels, size, size, generator=generator) + masks
    return images, masks


@pytest.mark.parametrize("context", [0, 1])
def test_without_any_change_a_batch_stays_what_it_was(context):
    images, masks = batch(context=context)
    same_images, same_masks = apply(images, masks, draw(AugmentConfig(), 6, 2, (0, 0, 0)), AugmentConfig())
    assert torch.equal(same_images, images)
    assert torch.equal(same_masks, masks)


@pytest.mark.parametrize("name", EACH)
def test_every_setting_changes_something_and_by_itself(name):
    config = AugmentConfig(**{name: EACH[name]})
    images, masks = batch()
    changed, moved = apply(images, masks, draw(config, 6, 2, (0, 0, 0)), config)
    assert not torch.equal(changed, images)
    assert torch.equal(moved, masks) == (name not in ("rotate_degrees", "log_scale", "shift", "flip", "elastic"))
    assert changed.shape == images.shape
    assert moved.unique().tolist() == [0, 1]


@FEW
@given(seed=st.tuples(*[st.integers(0, 1000)] * 3))
def test_one_seed_is_one_draw_and_another_is_another(seed):
    one, same, other = draw(STRONG, 4, 3, seed), draw(STRONG, 4, 3, seed), draw(STRONG, 4, 3, (*seed[:2], seed[2] + 1))
    for name in one.__dataclass_fields__:
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.matrix, other.matrix)


@FEW
@given(workers=st.integers(1, 4), step=st.integers(0, 50))
def test_workers_make_together_what_one_makes_alone(workers, step):
    """A sample's changes belong to its place in the global batch, noise included, wherever it is computed."""
    images, masks = batch(samples=6, context=1)
    drawn = draw(STRONG, 6, 2, (0, 1, step))
    alone = apply(images, masks, drawn, STRONG)
    for rank in range(workers):
        mine = np.arange(rank, 6, workers)
        part = apply(images[mine], masks[mine], drawn.rows(mine), STRONG)
        assert torch.allclose(part[0], alone[0][mine], atol=1e-6)
        assert torch.equal(part[1], alone[1][mine])


def test_a_flip_is_a_mirror_of_image_and_mask():
    config = AugmentConfig(flip=True)
    images, masks = batch(samples=12)
    changed, moved = apply(images, masks, draw(config, 12, 2, (5, 0, 0)), config)
    mirrored = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(changed, images, strict=True)]
    assert 0 < sum(mirrored) < 12
    for b, turned in enumerate(mirrored):
        assert torch.allclose(changed[b], images[b].flip(2) if turned else images[b], atol=1e-5)
        assert torch.equal(moved[b], masks[b].flip(2) if turned else masks[b])


@FEW
@given(seed=st.integers(0, 500))
def test_a_mask_stays_on_what_it_marks(seed):
    """However a sample is turned, scaled and shifted, what shines in the image is what the mask marks."""
    config = AugmentConfig(rotate_degrees=45, log_scale=0.3, shift=0.1, flip=True)
    images, masks = batch()
    changed, moved = apply(images, masks, draw(config, 6, 2, (seed,)), config)
    shining = changed[:, :1] > 0.55
    assert (shining == moved.bool()).float().mean() > 0.97


def test_a_shift_of_a_quarter_moves_by_a_quarter_of_the_field_of_view():
    config = AugmentConfig(shift=0.25)
    images, masks = batch(samples=1, size=24)
    drawn = draw(config, 1, 2, (0,))
    drawn.matrix[0] = [[1, 0, 0.5], [0, 1, 0]]
    _, moved = apply(images, masks, drawn, config)
    assert torch.equal(moved[..., :18], masks[..., 6:])
    assert np.abs(draw(config, 200, 2, (0,)).matrix[:, :, 2]).max() <= 0.5


@pytest.mark.parametrize("zoom", [0.5, 2.0])
def test_scaling_changes_areas_by_its_square(zoom):
    config = AugmentConfig(log_scale=0.7)
    masks = torch.zeros(1, 1, 64, 64)
    masks[0, 0, 26:38, 26:38] = 1
    drawn = draw(config, 1, 1, (0,))
    drawn.matrix[0] = [[1 / zoom, 0, 0], [0, 1 / zoom, 0]]
    _, moved = apply(masks.clone(), masks, drawn, config)
    assert moved.sum() == pytest.approx(144 * zoom**2, rel=0.1)


def test_a_lost_modality_is_replaced_by_another_in_every_neighbouring_slice_alike():
    config = AugmentConfig(modality_dropout=1.0)
    images = torch.arange(9.0).view(1, 9, 1, 1).expand(8, 9, 4, 4).contiguous()  # 3 slices of 3 modalities
    drawn = draw(config, 8, 3, (1,))
    changed, _ = apply(images, torch.zeros(8, 1, 4, 4), drawn, config)
    for b, source in enumerate(drawn.source):
        assert changed[b, :, 0, 0].tolist() == [*source, *(source + 3), *(source + 6)]
        assert sum(source != np.arange(3)) <= 1
    assert (drawn.source != np.arange(3)).any()


def test_intensity_changes_are_one_gain_and_offset_a_modality():
    config = AugmentConfig(intensity=0.3)
    images, masks = batch(context=1)
    drawn = draw(config, 6, 2, (2,))
    changed, _ = apply(images, masks, drawn, config)
    for channel in range(6):
        gain, offset = (torch.from_numpy(x[:, channel % 2]).view(-1, 1, 1) for x in (drawn.gain, drawn.offset))
        assert torch.allclose(changed[:, channel], images[:, channel] * gain + offset)
    assert (np.abs(drawn.gain - 1) <= 0.3).all()


def test_gamma_keeps_the_darkest_and_the_brightest():
    config = AugmentConfig(gamma=0.5)
    images, masks = batch()
    changed, _ = apply(images, masks, draw(config, 6, 2, (2,)), config)
    assert torch.allclose(changed.amax(dim=(2, 3)), images.amax(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(changed.amin(dim=(2, 3)), images.amin(dim=(2, 3)), atol=1e-5)


def test_blur_keeps_a_flat_image_flat():
    config = AugmentConfig(blur=1.0)
    flat = torch.full((2, 2, 8, 8), 3.5)
    changed, _ = apply(flat, torch.zeros(2, 1, 8, 8), draw(config, 2, 2, (2,)), config)
    assert torch.allclose(changed, flat)


def test_noise_has_the_deviation_that_was_drawn():
    config = AugmentConfig(noise=0.5)
    drawn = draw(config, 8, 1, (4,))
    changed, _ = apply(torch.zeros(8, 1, 64, 64), torch.zeros(8, 1, 64, 64), drawn, config)
    assert changed.std(dim=(1, 2, 3)).numpy() == pytest.approx(drawn.noise, rel=0.1)
    assert 0 < np.count_nonzero(drawn.noise) < 8


class TestElastic:
    def displacement(self, config, samples=4, size=40, seed=0):
        """Where each pixel comes from, as far as bending moves it: `(B, size, size)` rows and columns, in pixels."""
        ramp = torch.arange(float(size)).expand(samples, 1, size, size)
        images = torch.cat([ramp.mT, ramp], dim=1)
        changed, _ = apply(images, torch.zeros(samples, 1, size, size), draw(config, samples, 2, (seed,)), config)
        return changed

    def test_a_share_of_the_samples_is_bent(self):
        images, masks = batch(samples=40)
        config = AugmentConfig(elastic=0.5)
        changed, _ = apply(images, masks, draw(config, 40, 2, (0,)), config)
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(changed, images, strict=True)]
        assert 10 < sum(same) < 30

    @FEW
    @given(seed=st.integers(0, 500), shift=st.sampled_from([0.02, 0.05, 0.1]))
    def test_nothing_moves_farther_than_allowed_nor_folds(self, seed, shift):
        rows, columns = self.displacement(AugmentConfig(elastic=1, elastic_shift=shift), seed=seed).unbind(1)
        plain = torch.arange(40.0)
        assert (rows - plain[:, None]).abs().max() <= 40 * shift + 1e-3
        assert (columns - plain).abs().max() <= 40 * shift + 1e-3
        inner = [torch.diff(x[:, 5:-5, 5:-5], dim=d)[:, :29, :29] for x in (rows, columns) for d in (1, 2)]
        rows_down, rows_right, columns_down, columns_right = inner
        assert (rows_down * columns_right - rows_right * columns_down).min() > 0

    def test_neighbours_move_together(self):
        rows, _ = self.displacement(AugmentConfig(elastic=1, elastic_shift=0.1)).unbind(1)
        assert torch.diff(torch.diff(rows[:, 4:-4], dim=1), dim=1).abs().max() < 0.1

    @FEW
    @given(seed=st.integers(0, 500))
    def test_a_mask_stays_on_what_it_marks_however_it_is_bent_and_turned(self, seed):
        config = AugmentConfig(rotate_degrees=30, log_scale=0.2, elastic=1, elastic_shift=0.1)
        images, masks = batch()
        changed, moved = apply(images, masks, draw(config, 6, 2, (seed,)), config)
        assert ((changed[:, :1] > 0.55) == moved.bool()).float().mean() > 0.97

    def test_a_bend_is_made_before_the_turn(self):
        """A flipped sample is the mirror image of what bending alone makes of it."""
        images, masks = batch(samples=1)
        config = AugmentConfig(elastic=1, flip=True)
        drawn = draw(config, 1, 2, (0,))
        drawn.matrix[0] = [[1, 0, 0], [0, 1, 0]]
        bent, _ = apply(images, masks, drawn, config)
        drawn.matrix[0] = [[-1, 0, 0], [0, 1, 0]]
        both, _ = apply(images.flip(3), masks.flip(3), drawn, config)
        assert torch.allclose(both, bent, atol=1e-5)


class TestLowResolution:
    def test_it_keeps_a_flat_image_flat_and_the_mask_as_it_is(self):
        config = AugmentConfig(low_resolution=1.0)
        flat, (_, masks) = torch.full((6, 2, 24, 24), 3.5), batch()
        changed, same = apply(flat, masks, draw(config, 6, 2, (2,)), config)
        assert torch.allclose(changed, flat)
        assert torch.equal(same, masks)

    def test_it_takes_away_detail_the_more_the_coarser(self):
        config = AugmentConfig(low_resolution=1.0)
        noise = torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))
        drawn = draw(config, 1, 1, (0,))
        left = []
        for coarseness in (1.0, 1.25, 1.5, 2.0):
            drawn.coarseness[0] = coarseness
            left.append(apply(noise, torch.zeros(1, 1, 48, 48), drawn, config)[0].std().item())
        assert left[0] == noise.std().item()
        assert left == sorted(left, reverse=True)
        assert left[-1] < 0.6

    def test_a_share_of_the_samples_loses_it(self):
        coarseness = draw(AugmentConfig(low_resolution=0.3), 1000, 1, (0,)).coarseness
        assert 0.25 < (coarseness > 1).mean() < 0.35
        assert coarseness.max() <= 2


def test_what_came_later_leaves_the_older_draws_as_they_were():
    """A recipe from before there was bending and low resolution draws the same samples now."""
    without = STRONG.model_copy(update={"elastic": 0.0, "low_resolution": 0.0})
    old, new = draw(without, 8, 2, (1, 2, 3)), draw(STRONG, 8, 2, (1, 2, 3))
    for name in set(old.__dataclass_fields__) - {"bend", "coarseness"}:
        assert np.array_equal(getattr(old, name), getattr(new, name))


SIZE = (12, 16, 20)


def volumes(samples=4, shape=SIZE):
    """Patches `(B, 2, D, H, W)` of dim noise with their masks `(B, 1, D, H, W)` shining in them."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(samples, 1, *shape)
    for b in range(samples):
        masks[b, 0, 3 : 8 + b % 2, 5 : 10 + b % 3, 7:14] = 1
    return 0.1 * torch.rand(samples, 2, *shape, generator=generator) + masks, masks


class TestVolumes:
    @pytest.mark.parametrize("name", EACH)
    def test_every_setting_changes_something_and_by_itself(self, name):
        config = AugmentConfig(**{name: EACH[name]})
        images, masks = volumes()
        changed, moved = apply(images, masks, draw(config, 4, 2, (0, 0, 0), 3), config)
        assert not torch.equal(changed, images)
        assert torch.equal(moved, masks) == (name not in ("rotate_degrees", "log_scale", "shift", "flip", "elastic"))
        assert changed.shape == images.shape
        assert moved.unique().tolist() == [0, 1]

    def test_without_any_change_a_patch_stays_what_it_was(self):
        images, masks = volumes()
        changed, moved = apply(images, masks, draw(AugmentConfig(), 4, 2, (0,), 3), AugmentConfig(), SIZE)
        assert torch.equal(changed, images)
        assert torch.equal(moved, masks)
        assert margin(AugmentConfig(intensity=0.2), SIZE) == (0, 0, 0)

    @FEW
    @given(seed=st.integers(0, 500))
    def test_a_mask_stays_on_what_it_marks(self, seed):
        config = AugmentConfig(rotate_degrees=30, log_scale=0.2, shift=0.1, flip=True, elastic=0.5)
        images, masks = volumes()
        changed, moved = apply(images, masks, draw(config, 4, 2, (seed,), 3), config)
        assert ((changed[:, :1] > 0.55) == moved.bool()).float().mean() > 0.95

    @FEW
    @given(workers=st.integers(1, 4), step=st.integers(0, 50))
    def test_workers_make_together_what_one_makes_alone(self, workers, step):
        images, masks = volumes()
        drawn = draw(STRONG, 4, 2, (0, 1, step), 3)
        alone = apply(images, masks, drawn, STRONG)
        for rank in range(workers):
            mine = np.arange(rank, 4, workers)
            part = apply(images[mine], masks[mine], drawn.rows(mine), STRONG)
            assert torch.allclose(part[0], alone[0][mine], atol=1e-5)

    def test_a_flip_mirrors_left_and_right_alone(self):
        config = AugmentConfig(flip=True)
        images, masks = volumes(samples=12)
        changed, _ = apply(images, masks, draw(config, 12, 2, (5, 0, 0), 3), config)
        as_was = [torch.allclose(a, b, atol=1e-4) for a, b in zip(changed, images, strict=True)]
        as_mirrored = [torch.allclose(a, b.flip(3), atol=1e-4) for a, b in zip(changed, images, strict=True)]
        assert 0 < sum(as_mirrored) < 12
        assert all(a != b for a, b in zip(as_was, as_mirrored, strict=True))

    @pytest.mark.parametrize("plane", [(0, 1), (0, 2), (1, 2)])
    def test_a_turn_is_one_of_voxels_however_long_the_sides_are(self, plane):
        """A ball stays a ball where the field of view is no cube."""
        d, h, w = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in SIZE), indexing="ij")
        ball = torch.exp(-(d**2 + h**2 + w**2) / 8)[None, None]
        config, drawn = AugmentConfig(rotate_degrees=90), draw(AugmentConfig(), 1, 1, (0,), 3)
        turn = np.eye(3, 4, dtype=np.float32)
        turn[np.ix_(plane, plane)] = [[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]
        drawn.matrix[0] = turn
        turned, _ = apply(ball, ball, drawn, config)
        assert (turned - ball).abs().max() < 0.08

    def test_zooms_and_turns_are_rigid_but_for_the_zoom(self):
        matrix = draw(AugmentConfig(rotate_degrees=40, log_scale=0.3, flip=True), 50, 1, (3,), 3).matrix[:, :, :3]
        product = matrix @ matrix.transpose(0, 2, 1)
        zoom = np.trace(product, axis1=1, axis2=2)[:, None, None] / 3
        assert np.allclose(product, zoom * np.eye(3), atol=1e-5)
        assert (np.abs(np.log(zoom)) <= 0.6 + 1e-5).all()
        assert 10 < (np.linalg.det(matrix) < 0).sum() < 40

    def test_turning_brings_in_from_the_margin_what_really_lies_there(self):
        """A patch turned with its margin is the middle of the larger patch turned alike."""
        config = AugmentConfig(rotate_degrees=30)
        wide = margin(config, SIZE)
        assert wide == tuple(round(MARGIN * n) for n in SIZE)
        images, masks = volumes(shape=tuple(n + 2 * m for n, m in zip(SIZE, wide, strict=True)))
        drawn = draw(config, 4, 2, (1,), 3)
        inner, marked = apply(images, masks, drawn, config, SIZE)
        assert inner.shape[2:] == marked.shape[2:] == SIZE
        whole, _ = apply(images, masks, drawn, config)
        d, h, w = wide
        assert torch.allclose(inner, whole[:, :, d:-d, h:-h, w:-w], atol=1e-4)
