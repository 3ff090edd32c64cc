"""Losses: equal to their formulas in value and gradient, one sample or many, one worker or several.

Two real workers are tested in test_learn.py.
"""

import numpy as np
import pytest
import torch
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.config import LossConfig
from brainseg.losses import SMOOTH_VOXELS, Share, loss_of, loss_over_levels

ALL = [LossConfig(kind=kind, dice_over=over) for kind in ("dice", "bce", "bce_dice") for over in ("batch", "sample")]
PER_SAMPLE = [c for c in ALL if c.kind == "bce" or c.dice_over == "sample"]


def case(seed, samples=3, regions=2, size=4):
    rng = np.random.default_rng(seed)
    logits, masks = rng.normal(size=(samples, regions, size, size)) * 3, rng.random((samples, regions, size, size)) < 0.3
    masks[0] = False
    return logits, masks.astype(float)


def by_hand(config, logits, masks):
    """The loss as numpy loops over samples and regions, in float64."""
    p = 1 / (1 + np.exp(-logits))
    bce = -(masks * np.log(p) + (1 - masks) * np.log(1 - p)).mean()
    dices = []
    groups = [slice(None)] if config.dice_over == "batch" else [slice(b, b + 1) for b in range(len(p))]
    for group in groups:
        for r in range(p.shape[1]):
            both, sizes = (p[group, r] * masks[group, r]).sum(), p[group, r].sum() + masks[group, r].sum()
            dices.append((2 * both + SMOOTH_VOXELS) / (sizes + SMOOTH_VOXELS))
    return {"bce": bce, "dice": 1 - np.mean(dices), "bce_dice": bce + 1 - np.mean(dices)}[config.kind]


def value_and_gradient(config, logits, masks, share=None):
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = loss_of(config, x, torch.tensor(masks, dtype=torch.float32), share)
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
@FEW
@given(seed=st.integers(0, 10_000))
def test_the_loss_is_its_formula(config, seed):
    logits, masks = case(seed)
    assert value_and_gradient(config, logits, masks)[0] == pytest.approx(by_hand(config, logits, masks), rel=1e-5)


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
def test_the_gradient_is_the_slope_of_the_formula(config):
    logits, masks = case(seed=5, samples=2, size=3)
    _, gradient = value_and_gradient(config, logits, masks)
    step = 1e-5
    for place in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[place] += step
        down[place] -= step
        slope = (by_hand(config, up, masks) - by_hand(config, down, masks)) / (2 * step)
        assert gradient[place] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("config", PER_SAMPLE, ids=lambda c: f"{c.kind} {c.dice_over}")
@FEW
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 4))
def test_the_workers_mean_is_the_loss_of_the_whole_batch_however_uneven_the_shares(config, seed, cut):
    """DDP averages gradients over the workers: half the sum of two shares must be the whole."""
    logits, masks = case(seed, samples=5)
    whole, slope = value_and_gradient(config, logits, masks)
    shares = [value_and_gradient(config, logits[part], masks[part], Share(5, 2)) for part in (slice(cut), slice(cut, None))]
    assert sum(value for value, _ in shares) / 2 == pytest.approx(whole, rel=1e-5)
    assert np.concatenate([g for _, g in shares]) / 2 == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
def test_a_perfect_answer_costs_nothing_and_an_empty_batch_is_defined(config):
    for masks in (np.zeros((2, 1, 4, 4)), np.eye(4)[None, None].repeat(2, axis=0)):
        loss, gradient = value_and_gradient(config, 80 * (2 * masks - 1), masks)
        assert loss == pytest.approx(0, abs=1e-6)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
def test_half_precision_logits_are_summed_in_float32(config):
    """A sum over 300,000 pixels in bf16 or fp16 would lose or overflow."""
    logits, masks = torch.full((1, 1, 600, 500), 1.0), torch.ones(1, 1, 600, 500)
    assert loss_of(config, logits.bfloat16(), masks).item() == pytest.approx(loss_of(config, logits, masks).item(), rel=1e-6)


class TestOverLevels:
    """Deep supervision: 4 x 4 answers with coarser ones of 2 x 2 and 1 x 1."""

    def perfect(self, masks):
        """Logits that say of every pixel of every level whether it holds any tumour."""
        out = [masks]
        for _ in range(2):
            b, r, h, w = out[-1].shape
            out.append(out[-1].reshape(b, r, h // 2, 2, w // 2, 2).any(axis=(3, 5)).astype(float))
        return [torch.tensor(80 * (2 * m - 1), dtype=torch.float32) for m in out]

    @pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
    @FEW
    @given(seed=st.integers(0, 10_000))
    def test_a_perfect_answer_costs_nothing_on_any_level(self, config, seed):
        _, masks = case(seed)
        target = torch.tensor(masks, dtype=torch.float32)
        assert loss_over_levels(config, self.perfect(masks), target).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
    def test_each_level_weighs_half_of_the_one_before(self, config):
        _, masks = case(1)
        target, levels = torch.tensor(masks, dtype=torch.float32), self.perfect(masks)
        plain = loss_of(config, -levels[0], target).item()
        spoilt = [loss_over_levels(config, [*levels[:n], -levels[n], *levels[n + 1 :]], target).item() for n in range(3)]
        assert spoilt[0] == pytest.approx(4 / 7 * plain)
        coarse = torch.tensor(self.perfect(masks)[1].numpy() > 0, dtype=torch.float32)
        assert spoilt[1] == pytest.approx(2 / 7 * loss_of(config, -levels[1], coarse).item())
        assert spoilt[2] > 0

    @pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
    def test_one_level_is_the_loss_itself_to_the_last_bit(self, config):
        logits, masks = (torch.tensor(x, dtype=torch.float32) for x in case(2))
        assert torch.equal(loss_over_levels(config, [logits], masks), loss_of(config, logits, masks))

    def test_the_smallest_tumour_is_still_there_on_the_coarsest_level(self):
        masks = np.zeros((1, 1, 4, 4))
        masks[0, 0, 1, 2] = 1
        levels = [torch.full((1, 1, n, n), -80.0) for n in (4, 2, 1)]
        missed = loss_over_levels(LossConfig(kind="bce"), levels, torch.tensor(masks, dtype=torch.float32))
        assert missed.item() == pytest.approx(80 * (4 / 16 + 2 / 4 + 1) / 7)


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.kind} {c.dice_over}")
def test_a_volume_costs_what_its_voxels_cost_laid_out_flat(config):
    logits, masks = (torch.tensor(x, dtype=torch.float32) for x in case(3, samples=2, size=8))
    deep_logits, deep_masks = (x.reshape(2, 2, 4, 4, 4) for x in (logits, masks))
    assert loss_of(config, deep_logits, deep_masks).item() == pytest.approx(loss_of(config, logits, masks).item(), rel=1e-6)


def test_a_coarser_level_of_a_volume_marks_every_voxel_that_holds_tumour():
    masks = torch.zeros(1, 1, 4, 4, 4)
    masks[0, 0, 3, 1, 2] = 1
    coarse = torch.full((1, 1, 2, 2, 2), -80.0)
    coarse[0, 0, 1, 0, 1] = 80
    levels = [80 * (2 * masks - 1), coarse]
    assert loss_over_levels(LossConfig(), levels, masks).item() == pytest.approx(0, abs=1e-6)
