"""Sliding: a volume answered by a network that takes no more than a patch at a time.

Patches overlap by half, and their answers are averaged, the middle of each counting most, where the network sees the most
around it (Isensee et al. 2021).
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

Patch = tuple[int, int, int]
SIGMA = 1 / 8
"""Of the weights, as share of the patch."""


def slide(volume: Tensor, patch: Patch, num_regions: int, forward: Callable[[Tensor], Tensor], together: int) -> Tensor:
    """Return region probabilities `(D, R, H, W)` of a volume `(D, C, H, W)`.

    `forward` maps patches `(n, C, d, h, w)` to probabilities `(n, R, d, h, w)`; it gets `together` at once at most. A volume of
    fewer slices than the patch stands in its middle, its ends repeated.
    """
    depth, before = len(volume), max(0, patch[0] - len(volume)) // 2
    slices = torch.arange(max(depth, patch[0]), device=volume.device) - before
    image = volume[slices.clamp(0, depth - 1)].transpose(0, 1)  # (C, D, H, W)
    windows = [
        (slice(None), *(slice(a, a + side) for a, side in zip(corner, patch, strict=True)))
        for corner in product(*(starts(n, side) for n, side in zip(image.shape[1:], patch, strict=True)))
    ]
    weight = importance(patch).to(volume.device)
    total = torch.zeros((num_regions, *image.shape[1:]), device=volume.device)
    weights = torch.zeros(image.shape[1:], device=volume.device)
    for first in range(0, len(windows), together):
        group = windows[first : first + together]
        answers = forward(torch.stack([image[window] for window in group]))  # (n, R, d, h, w)
        for window, answer in zip(group, answers, strict=True):
            total[window] += answer * weight
            weights[window[1:]] += weight
    return total.div_(weights)[:, before : before + depth].transpose(0, 1)


def starts(length: int, side: int) -> list[int]:
    """Where patches begin along an axis: evenly spread, overlapping by half or more, the last one ending at the end."""
    count = 1 + -(-(length - side) // (side // 2))
    return [round(n * (length - side) / max(1, count - 1)) for n in range(count)]


def importance(patch: Patch) -> Tensor:
    """The weight of each voxel `(d, h, w)` of a patch: a Gaussian around its middle, 1 there."""
    weight = torch.ones(())
    for side in patch:
        distance = (torch.arange(side) - (side - 1) / 2) / (SIGMA * side)
        weight = weight[..., None] * torch.exp(-(distance**2) / 2)
    return weight / weight.max()
