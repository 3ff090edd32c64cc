"""Baselines: what a scan scores without a network. A model that does not beat both has learnt nothing.

They stand beside every evaluation: predicting nothing, and copying the mask of the most similar training slice. On
near-duplicate slices of one patient the copy scores like a good network, which is how a split by slice gives itself away.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError, UsageError
from brainseg.geometry import Grid
from brainseg.metrics import score_region, score_scan
from brainseg.regions import LabelMap

THUMBNAIL_SIDE = 32
"""Rows and columns to which a slice is averaged before slices are compared."""

MASK_SIDE = 128
"""Most rows and columns of a mask that is kept; larger ones are reduced by majority."""

SLICES_AT_ONCE = 8192
"""Training slices compared in one matrix product."""


def predict_nothing(label: NDArray[np.uint8], label_map: LabelMap, regions: Sequence[str], grid: Grid) -> list[dict[str, Any]]:
    """Score an empty prediction against a label (D, H, W): one entry a region, as `metrics.score_scan`."""
    return score_scan(label, np.zeros_like(label), label_map, regions, grid)


class NearestMask:
    """Copy the nearest training mask, slice by slice, for the named regions.

    Add training scans only, and keep all scans, added and asked for, in one orientation: nothing here knows left from right.
    Holds 2 KB a slice and modality, and up to 2 KB a region for a slice that has a mask: `size_bytes` in all.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        self.regions = tuple(regions)
        self._thumbnails: list[NDArray[np.float16]] = []
        self._masks: list[_PackedMask | None] = []
        self.size_bytes = 0

    def add(self, image: NDArray[Any], label_masks: NDArray[np.bool_]) -> None:
        """Learn one training scan by heart: image (C, D, H, W) of any dtype, masks (R, D, H, W) in the order of `regions`.

        Raises ScanError SHAPE_MISMATCH where masks, image and earlier scans do not fit each other.
        """
        expected = (len(self.regions), *image.shape[1:])
        if label_masks.shape != expected:
            raise ScanError(Code.SHAPE_MISMATCH, f"training masks are {label_masks.shape}, expected {expected}")
        thumbnails = _thumbnails(image)
        self._check_modalities(thumbnails)
        self._thumbnails.append(thumbnails)
        packed = [_PackedMask.of(label_masks[:, d]) for d in range(label_masks.shape[1])]
        self._masks += packed
        self.size_bytes += thumbnails.nbytes + sum(mask.bits.nbytes for mask in packed if mask is not None)

    def predict(self, image: NDArray[Any]) -> NDArray[np.bool_]:
        """Return masks (R, D, H, W) for an image (C, D, H, W): each slice gets its nearest training slice's, resized.

        Raises UsageError where nothing was added, ScanError SHAPE_MISMATCH for another number of modalities.
        """
        if not self._masks:
            raise UsageError("nearest mask: no training slice was added, expected at least one")
        query = _thumbnails(image)
        self._check_modalities(query)
        out = np.zeros((len(self.regions), *image.shape[1:]), np.bool_)
        for d, nearest in enumerate(self._nearest(query)):
            mask = self._masks[nearest]
            if mask is not None:
                out[:, d] = mask.resized(*image.shape[2:])
        return out

    def score(self, image: NDArray[Any], label: NDArray[np.uint8], label_map: LabelMap, grid: Grid) -> list[dict[str, Any]]:
        """Predict a scan and score it against its label (D, H, W): one entry a region, as `metrics.score_region`."""
        pairs = zip(self.regions, label_map.masks(label, self.regions), self.predict(image), strict=True)
        return [score_region(region, truth, mask, grid.spacing_mm) for region, truth, mask in pairs]

    def _check_modalities(self, thumbnails: NDArray[np.float16]) -> None:
        if self._thumbnails and self._thumbnails[0].shape[1] != thumbnails.shape[1]:
            found, expected = (rows.shape[1] // THUMBNAIL_SIDE**2 for rows in (thumbnails, self._thumbnails[0]))
            raise ScanError(Code.SHAPE_MISMATCH, f"image has {found} modalities, expected {expected} as the training scans")

    def _nearest(self, query: NDArray[np.float16], slices_at_once: int = SLICES_AT_ONCE) -> NDArray[np.int64]:
        """Index of the training slice at the least L2 distance from each query; the first of equals."""
        if len(self._thumbnails) > 1:
            self._thumbnails = [np.concatenate(self._thumbnails)]
        queries, known = query.astype(np.float32), self._thumbnails[0]
        best = np.full(len(queries), np.inf, np.float32)
        index = np.zeros(len(queries), np.int64)
        for start in range(0, len(known), slices_at_once):
            chunk = known[start : start + slices_at_once].astype(np.float32)
            # |q - t|^2 without |q|^2, which is the same for every t.
            distances = np.einsum("td,td->t", chunk, chunk) - 2 * (queries @ chunk.T)
            nearest = distances.argmin(axis=1)
            least = distances[np.arange(len(queries)), nearest]
            index = np.where(least < best, nearest + start, index)
            best = np.minimum(least, best)
        return index


class _PackedMask:
    """The masks (R, H, W) of one slice as bits, at most `MASK_SIDE` high and wide."""

    __slots__ = ("bits", "shape")

    def __init__(self, bits: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
        self.bits = bits
        self.shape = shape

    @classmethod
    def of(cls, masks: NDArray[np.bool_]) -> "_PackedMask | None":
        """Pack masks (R, H, W); None for masks of nothing, which most slices have."""
        if not masks.any():
            return None
        height, width = (min(n, MASK_SIDE) for n in masks.shape[1:])
        small = _resize_masks(masks, height, width)
        return cls(np.packbits(small), small.shape)

    def resized(self, height: int, width: int) -> NDArray[np.bool_]:
        """Unpack to (R, height, width)."""
        flat = np.unpackbits(self.bits, count=int(np.prod(self.shape)))
        return _resize_masks(flat.reshape(self.shape).astype(np.bool_), height, width)


def _thumbnails(image: NDArray[Any]) -> NDArray[np.float16]:
    """Reduce an image (C, D, H, W) to one row a slice: 32 x 32 area means of every modality, each z-scored, (D, C*32*32).

    Each modality of a slice has mean 0 and deviation 1, whatever its scale, or is 0 where it is constant.
    """
    channels, depth = image.shape[:2]
    small = np.empty((depth, channels, THUMBNAIL_SIDE * THUMBNAIL_SIDE), np.float32)
    for c, modality in enumerate(image):
        small[:, c] = _area_mean(modality, THUMBNAIL_SIDE, THUMBNAIL_SIDE).reshape(depth, -1)
    flat_below = 1e-6 * np.abs(small).max(axis=-1, keepdims=True)
    small -= small.mean(axis=-1, keepdims=True)
    deviation = small.std(axis=-1, keepdims=True)
    flat = deviation <= flat_below
    z = np.where(flat, 0, small / np.where(flat, 1, deviation))
    return z.reshape(depth, -1).astype(np.float16)


def _resize_masks(masks: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Resize masks (R, H, W): a voxel is set where at least half of its area was."""
    if masks.shape[1:] == (height, width):
        return masks
    # The slack keeps a voxel that is covered exactly by half on the inside after rounding.
    return _area_mean(masks, height, width) >= 0.5 - 1e-5


def _area_mean(stack: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Resize planes (N, H, W) so that each new pixel is the mean of the area that it covers; NaN and infinity count 0."""
    finite: NDArray[np.float32] = np.nan_to_num(stack.astype(np.float32), copy=False, posinf=0, neginf=0)
    narrow = _along_the_last(finite, _shares(stack.shape[2], width))
    return _along_the_last(narrow.swapaxes(1, 2), _shares(stack.shape[1], height)).swapaxes(1, 2)


def _along_the_last(planes: NDArray[np.float32], shares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply shares (new, old) to the last axis of (N, M, old), as one matrix product rather than one a plane."""
    product: NDArray[np.float32] = planes.reshape(-1, planes.shape[2]) @ shares.T
    return product.reshape(*planes.shape[:2], len(shares))


def _shares(old: int, new: int) -> NDArray[np.float32]:
    """Weights (new, old): which share of each new pixel every old pixel covers. Rows sum to 1."""
    starts = np.arange(new)[:, None] * (old / new)
    cells = np.arange(old)[None, :]
    overlap: NDArray[np.float64] = np.minimum(starts + old / new, cells + 1) - np.maximum(starts, cells)
    return (np.clip(overlap, 0, None) * (new / old)).astype(np.float32)
