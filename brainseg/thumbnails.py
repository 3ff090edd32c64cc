"""Thumbnails: one small picture of a finished scan, kept in its row so that a report never needs the raw archive.

The slice shown is the one with the most tumour, in display orientation (`geometry.to_canonical`), cropped to the head,
true to the scan's proportions, at most `LONG_SIDE_PX` on the long side. Label and prediction come along as label
values, not as painted pixels: whoever draws the page chooses colours and outlines.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from brainseg.geometry import Grid, canonical_axes, to_canonical

LONG_SIDE_PX = 192
MARGIN_PX = 4
PREFERRED = ("flair", "t1c")
"""Oedema and core together show best on FLAIR; where a set has none, enhancement does."""

PERCENTILE_VOXELS = 50_000
"""The window is taken from about so many voxels, evenly spaced: a percentile needs no more."""

COMPRESS_LEVEL = 6
"""Level 9 takes three times as long for a hundredth fewer bytes."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def make_thumbnail(
    image: NDArray[Any],
    box: Box,
    grid: Grid,
    label: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    modalities: Sequence[str],
    background: Sequence[float] | None = None,
    *,
    index: int | None = None,
) -> dict[str, Any]:
    """Return the struct `tables.THUMBNAIL` of one scan, of slice `index` in display order or of the one with the most tumour.

    `image` is (C, D, H, W) cropped to `box` inside `grid`; `label` and `prediction` are (D, H, W) on the whole grid, in
    label values. `background` holds the value that means "nothing here" per modality; without it the darkest value does.
    """
    channel = preferred_modality(modalities)
    view = _View.of(grid, box)
    label_view = None if label is None else to_canonical(label, grid)
    prediction_view = to_canonical(prediction, grid)
    index = _slice_with_most(label_view, prediction_view, middle=view.middle) if index is None else index

    low, high = _window(image[channel], None if background is None else background[channel])
    plane = view.place(_to_bytes(view.cut(to_canonical(image[channel], grid), index), low, high))
    overlays = [volume[index] for volume in (label_view, prediction_view) if volume is not None]
    rows, columns = _frame(view.head_in_plane, overlays)
    size = _display_size(rows, columns, view.spacing)
    return {
        "slice_index": index,
        "modality": modalities[channel],
        "image": _png(_shrink_image(plane[rows, columns], size)),
        "label": None if label_view is None else _png(_shrink_label(label_view[index][rows, columns], size)),
        "prediction": _png(_shrink_label(prediction_view[index][rows, columns], size)),
    }


def preferred_modality(modalities: Sequence[str]) -> int:
    """Which modality to show: FLAIR, else post-contrast T1, else the first."""
    return next((list(modalities).index(name) for name in PREFERRED if name in modalities), 0)


@dataclass(frozen=True)
class _View:
    """A crop inside a grid, as seen in display order: slices from feet to head, rows front to back."""

    shape: tuple[int, int, int]
    box: Box
    spacing: tuple[float, float]

    @classmethod
    def of(cls, grid: Grid, box: Box) -> "_View":
        order, flips = canonical_axes(grid)
        shape = tuple(grid.shape[axis] for axis in order)
        ends = tuple(_turned(box[axis], grid.shape[axis], flip) for axis, flip in zip(order, flips, strict=True))
        spacing = grid.spacing_mm or (1.0, 1.0, 1.0)
        return cls(
            (shape[0], shape[1], shape[2]), (ends[0], ends[1], ends[2]), (spacing[order[1]] or 1.0, spacing[order[2]] or 1.0)
        )

    @property
    def middle(self) -> int:
        return sum(self.box[0]) // 2

    @property
    def head_in_plane(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.box[1], self.box[2]

    def cut(self, cropped: NDArray[Any], index: int) -> NDArray[Any] | None:
        """The crop's slice (h, w) at `index` of the whole grid, or None where the crop does not reach."""
        start, stop = self.box[0]
        return cropped[index - start] if start <= index < stop else None

    def place(self, inside: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """Put a slice of the crop into a black slice (H, W) of the whole grid."""
        plane = np.zeros(self.shape[1:], np.uint8)
        if inside is not None:
            plane[slice(*self.box[1]), slice(*self.box[2])] = inside
        return plane


def _turned(ends: tuple[int, int], length: int, flip: bool) -> tuple[int, int]:
    return (length - ends[1], length - ends[0]) if flip else ends


def _slice_with_most(label: NDArray[np.uint8] | None, prediction: NDArray[np.uint8], middle: int) -> int:
    """Index of the slice with the most label, else the most prediction, else the middle of the head."""
    for volume in (label, prediction):
        counts = [] if volume is None else [np.count_nonzero(plane) for plane in volume]  # a quarter of the time of all at once
        if any(counts):
            return int(np.argmax(counts))
    return middle


def _window(volume: NDArray[Any], background: float | None) -> tuple[float, float]:
    """The 1st and 99th percentile of the head's intensities: a few bright vessels must not darken the brain."""
    sample = volume.reshape(-1)[:: max(1, volume.size // PERCENTILE_VOXELS)]
    nothing = sample.min() if background is None else background
    head = sample[sample != nothing]
    low, high = np.percentile(head if head.size else sample, (1, 99))
    return float(low), float(max(high, low + 1e-6))


def _to_bytes(plane: NDArray[Any] | None, low: float, high: float) -> NDArray[np.uint8] | None:
    if plane is None:
        return None
    scaled = (plane.astype(np.float32) - low) * (255.0 / (high - low))
    shown: NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return shown


def _frame(head: tuple[tuple[int, int], tuple[int, int]], overlays: Sequence[NDArray[np.uint8]]) -> tuple[slice, slice]:
    """Rows and columns that hold the head and every voxel of the overlays, with a small margin."""
    shape = overlays[0].shape
    ends = []
    for axis, (start, stop) in enumerate(head):
        for overlay in overlays:
            used = np.flatnonzero(overlay.any(axis=1 - axis))
            if used.size:
                start, stop = min(start, int(used[0])), max(stop, int(used[-1]) + 1)
        ends.append(slice(max(start - MARGIN_PX, 0), min(stop + MARGIN_PX, shape[axis])))
    return ends[0], ends[1]


def _display_size(rows: slice, columns: slice, spacing: tuple[float, float]) -> tuple[int, int]:
    """Height and width in pixels: square pixels, none finer than the finest voxel, the long side within the limit."""
    height, width = (rows.stop - rows.start) * spacing[0], (columns.stop - columns.start) * spacing[1]
    scale = min(LONG_SIDE_PX / max(height, width), 1 / min(spacing))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrink_image(plane: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Average over areas, so that nothing between the kept pixels is lost."""
    resized = Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(resized, np.uint8)


def _shrink_label(plane: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Take the nearest value: label values have no averages."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(size, plane.shape, strict=True))
    return plane[np.ix_(rows, columns)]


def _png(plane: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(plane)).save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
    return buffer.getvalue()
