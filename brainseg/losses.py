"""What a network is taught: soft Dice, binary cross-entropy, or their sum, each per region.

A batch may be split over several workers. The value returned on each worker is scaled so that the *average* of the
workers' gradients, which is what DDP takes, is the gradient of the loss over the whole batch, however uneven the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brainseg.config import LossConfig

SMOOTH_VOXELS = 1.0
"""Keeps Dice defined on an empty batch. It exists in the loss alone, never in a reported figure."""


@dataclass(frozen=True)
class Share:
    """This worker's part in the global batch: how many samples the whole batch has, over how many workers."""

    global_samples: int
    workers: int = 1

    def total(self, x: Tensor) -> Tensor:
        """Sum a tensor over the workers; differentiable: each worker receives the sum of all gradients."""
        if self.workers == 1:
            return x
        summed: Tensor = _SumOverWorkers.apply(x)  # type: ignore[no-untyped-call]
        return summed


class _SumOverWorkers(torch.autograd.Function):
    """A sum over the workers whose gradient is summed over them too."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def loss_of(config: LossConfig, logits: Tensor, target: Tensor, share: Share | None = None) -> Tensor:
    """Return the scalar loss of logits `(B, R, H, W)` or `(B, R, D, H, W)` against masks in {0, 1} of the same shape."""
    share = share or Share(global_samples=logits.shape[0])
    logits = logits.float()
    parts: list[Tensor] = []
    if config.kind in ("bce", "bce_dice"):
        parts.append(_cross_entropy(logits, target, share))
    if config.kind in ("dice", "bce_dice"):
        dice = _dice_over_batch if config.dice_over == "batch" else _dice_over_samples
        parts.append(dice(logits, target, share))
    return torch.stack(parts).sum()


def sums_over_batch(config: LossConfig) -> bool:
    """Whether the loss of a batch is more than the sum of what its samples cost alone."""
    return config.kind != "bce" and config.dice_over == "batch"


def loss_over_levels(config: LossConfig, levels: Sequence[Tensor], target: Tensor, share: Share | None = None) -> Tensor:
    """The weighted mean of each level's loss, finest first; each level has half the size and half the weight of the one before.

    The target of a coarser level marks the pixels that hold any tumour. Averaging it instead would let small tumours fade
    below every threshold, and set a target between 0 and 1 that no answer brings Dice to 1 on; this way a perfect answer
    costs nothing on any level.
    """
    weights = [0.5**level for level in range(len(levels))]
    pool = F.max_pool2d if target.dim() == 4 else F.max_pool3d
    losses: list[Tensor] = []
    for number, logits in enumerate(levels):
        target = pool(target, 2) if number else target
        losses.append(loss_of(config, logits, target, share))
    return torch.stack([w / sum(weights) * loss for w, loss in zip(weights, losses, strict=True)]).sum()


def _cross_entropy(logits: Tensor, target: Tensor, share: Share) -> Tensor:
    per_pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    per_sample = per_pixel.mean(dim=tuple(range(1, logits.dim())))
    return per_sample.sum() * share.workers / share.global_samples


def _inner(x: Tensor) -> tuple[int, ...]:
    """The axes of `(B, R, ...)` that lie in space."""
    return tuple(range(2, x.dim()))


def _overlap(logits: Tensor, target: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    probability = torch.sigmoid(logits)
    return (probability * target).sum(dim=dims), probability.sum(dim=dims) + target.sum(dim=dims)


def _dice_over_samples(logits: Tensor, target: Tensor, share: Share) -> Tensor:
    both, sizes = _overlap(logits, target, _inner(logits))  # (B, R)
    dice = (2 * both + SMOOTH_VOXELS) / (sizes + SMOOTH_VOXELS)
    return (1 - dice).mean(dim=1).sum() * share.workers / share.global_samples


def _dice_over_batch(logits: Tensor, target: Tensor, share: Share) -> Tensor:
    both, sizes = _overlap(logits, target, (0, *_inner(logits)))  # (R,)
    both, sizes = share.total(torch.stack([both, sizes]))
    dice: Tensor = (2 * both + SMOOTH_VOXELS) / (sizes + SMOOTH_VOXELS)
    return (1 - dice).mean()
