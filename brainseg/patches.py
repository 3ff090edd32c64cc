"""Patches: what a 3D network learns from: blocks out of cached volumes on the model grid.

A patch goes by the number of the slice through its middle, so that the order of samples, and the share of each batch that
holds tumour, are those of slices. Where in the slice it lies is drawn first and looked up after.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainseg.cache import SampleSet

PLACES = 1
"""Sets the random numbers for places apart from those for augmentation, which have the same seed."""


def draw_places(samples: int, seed: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers from 0 to 1, `(B, 2)`, for a whole global batch; each sample keeps its own whatever worker gets it."""
    return np.random.default_rng((*seed, PLACES)).random((samples, 2))


def cut(
    samples: SampleSet,
    numbers: NDArray[np.int64],
    places: NDArray[np.float64],
    patch: tuple[int, int, int],
    margin: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return images `(B, C, D, H, W)` and masks `(B, R, D, H, W)` (0..1) of patches with a margin on every side.

    The patch lies around a voxel of the slice: one with tumour where there is any. It never reaches beyond the volume, unless
    that is smaller; the margin may, and the volume's outermost voxels are repeated there.
    """
    pairs = [_cut_one(samples, int(n), (place[0], place[1]), patch, margin) for n, place in zip(numbers, places, strict=True)]
    return torch.stack([p[0] for p in pairs]).to(device).float(), torch.stack([p[1] for p in pairs]).to(device)


def _cut_one(
    samples: SampleSet, number: int, place: tuple[float, float], patch: tuple[int, int, int], margin: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    scan = int(samples.scan_of[number])
    middle = int(number - samples.first[scan])
    mask = samples.mask(scan, middle)
    row, column = middle_of(mask, place)
    lengths = (samples.entries[scan].shape[1], *mask.shape[1:])
    slices, rows, columns = map(span, (middle, row, column), patch, margin, lengths)
    images, masks = samples.block(scan, slices, rows, columns)
    return images.transpose(0, 1), masks.transpose(0, 1)


def middle_of(mask: Tensor, place: tuple[float, float]) -> tuple[int, int]:
    """Row and column in a slice's mask `(R, S, S)`: of one of its tumour pixels, or anywhere where it has none."""
    tumour = torch.nonzero(mask.amax(dim=0))
    if not len(tumour):
        return int(place[0] * mask.shape[1]), int(place[1] * mask.shape[2])
    row, column = tumour[int(place[0] * len(tumour))].tolist()
    return row, column


def span(middle: int, side: int, margin: int, length: int) -> NDArray[np.int64]:
    """Places along an axis of `length`: `side` of them around the middle, kept inside, and a margin on either end."""
    start = min(max(middle - side // 2, 0), length - side) if length >= side else (length - side) // 2
    return np.clip(np.arange(start - margin, start + side + margin), 0, length - 1)
