"""Trust: label-free figures of how sure a network was, and the label that it is sure of, region by region.

Twice: where probabilities are on a CPU most of a volume is background, and what pays is to look at the rest alone. Where they
are on a GPU all of it is gone over in a few passes, nothing is waited for before the end, and next to nothing comes home.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainseg.geometry import Slices
from brainseg.regions import LabelMap

ENTROPIES_TOGETHER = 1 << 15
"""Voxels whose entropies a CPU works out at once, in its cache."""
ALMOST_SURE = 1e-6
"""Probabilities nearer to 0 or 1 count as this far from it where a logarithm is taken."""

Figures = dict[str, float | None]
"""Of one region: `mean_probability` inside its mask, `mean_entropy` in bits over the head, `outside_head_fraction`, how much of
the mask lies outside of it; None where there is no mask, or no head."""


def head_of(crop: NDArray[np.generic], background: Sequence[float]) -> NDArray[np.bool_]:
    """Voxels `(D, h, w)` of a crop `(C, D, h, w)` where any modality shows something."""
    head = np.zeros(crop.shape[1:], np.bool_)
    if crop.dtype.kind in "iu" and not any(background):
        return np.not_equal(np.bitwise_or.reduce(crop, axis=0), 0, out=head)
    for volume, empty in zip(crop, background, strict=True):
        head |= volume != empty
    return head


def figures(probability: Tensor, masks: Tensor, head: Tensor, box: Slices) -> tuple[Figures, ...]:
    """The figures of each region, of probabilities `(R, D, h, w)`, a head `(D, h, w)`, and masks of the only box with any."""
    entropies = [_mean_entropy(_under(head, volume)) for volume in probability] if head.any() else [None] * len(probability)
    inside = zip(probability[:, *box], masks, entropies, strict=True)
    return tuple(_of_region(p, mask, head[box], entropy) for p, mask, entropy in inside)


def _of_region(probability: Tensor, mask: Tensor, head: Tensor, entropy: float | None) -> Figures:
    inside = int(torch.count_nonzero(mask))
    return {
        "mean_probability": float(probability[mask].mean()) if inside else None,
        "mean_entropy": entropy,
        "outside_head_fraction": int(torch.count_nonzero(mask & ~head)) / inside if inside else None,
    }


def _under(mask: Tensor, volume: Tensor) -> Tensor:
    """Values `(n,)` of a volume where a mask is; numpy takes a fifth of torch's time."""
    return torch.from_numpy(volume.numpy()[mask.numpy()])


def _mean_entropy(probability: Tensor) -> float:
    parts = torch.split(probability, ENTROPIES_TOGETHER)
    return sum(float(_entropy(p).sum(dtype=torch.float64)) for p in parts) / len(probability)


def _entropy(probability: Tensor) -> Tensor:
    """Of probabilities of any shape, read off a table: two logarithms of each take twice as long.

    A float16 of 11 bits is near enough for how far a probability is from 0 or 1, whichever is nearer.
    """
    doubt = torch.minimum(probability, 1 - probability).clamp_(0).half()
    places = doubt.view(torch.int16).int()
    return _entropies(probability.device).index_select(0, places.flatten()).view_as(probability)


@functools.cache
def _entropies(device: torch.device) -> Tensor:
    """Binary entropy in bits of each float16 from 0 to 1/2, in the order of their bit patterns."""
    p = torch.arange(torch.tensor(0.5, dtype=torch.float16).view(torch.int16).item() + 1, dtype=torch.int16)
    p = p.view(torch.float16).double().clamp_(ALMOST_SURE)
    return -(p * p.log2() + (1 - p) * (1 - p).log2()).float().to(device)


# --- where the probabilities are ------------------------------------------------------------------------------------------


def painted_there(over: Tensor, meaning: LabelMap, names: Sequence[str]) -> Tensor:
    """What `LabelMap.paint_label` makes of masks `(R, ...)`: read off a table of what it makes of every combination."""
    combination = torch.zeros(over.shape[1:], dtype=torch.int32, device=over.device)
    for bit, mask in enumerate(over):
        combination += mask.int() << bit
    combinations = np.arange(1 << len(names))[None] >> np.arange(len(names))[:, None] & 1
    return torch.from_numpy(meaning.paint_label(combinations.astype(bool), names)).to(over.device)[combination]


def masks_there(label: Tensor, meaning: LabelMap, names: Sequence[str]) -> Tensor:
    """What `LabelMap.masks` makes of a label of bytes: read off a table of what it makes of every byte."""
    table = torch.from_numpy(meaning.masks(np.arange(256, dtype=np.uint8), names)).to(label.device)
    return table[:, label.int()]


def head_there(crop: Tensor, background: Sequence[float]) -> Tensor:
    """What `head_of` finds."""
    head = torch.zeros(crop.shape[1:], dtype=torch.bool, device=crop.device)
    for volume, empty in zip(crop, background, strict=True):
        head |= volume != (int(empty) if float(empty).is_integer() else empty)
    return head


def figures_there(probability: Tensor, masks: Tensor, head: Tensor) -> tuple[Figures, ...] | None:
    """What `figures` finds, of masks of the whole crop; None where some probability is no number.

    Everything is counted before anything is asked for: a GPU is waited for once.
    """
    sums = [
        probability,
        masks,
        probability.where(masks, 0),
        masks & ~head,
        _entropy(probability.nan_to_num()).where(head, 0),  # the table has no place for it, and a GPU would not survive that
        head.expand_as(masks),
    ]
    found = torch.stack([each.flatten(1).sum(dim=1, dtype=torch.float64) for each in sums], dim=1)
    rows = found.tolist()
    if not all(math.isfinite(total) for total, *_ in rows):
        return None
    return tuple(
        {
            "mean_probability": sure / inside if inside else None,
            "mean_entropy": entropy / under if under else None,
            "outside_head_fraction": outside / inside if inside else None,
        }
        for _, inside, sure, outside, entropy, under in rows
    )
