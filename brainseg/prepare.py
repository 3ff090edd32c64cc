"""Prepare: from a checked scan to what the network eats, and from its answer back to the scan's voxels.

Training and inference both go through here, so they cannot drift apart. A `Plan` is drawn up once per scan (intensity
shift and scale, frame); slices are then prepared by torch on whatever device the network is on.

Coordinates: *crop* is the scan's box viewed in canonical orientation, `(C, D, h, w)`; *frame* is the square of the plane
that the network sees, in crop pixels, and may reach beyond it; *model grid* is `size x size`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from brainseg.config import PrepareConfig
from brainseg.errors import Code, ScanError
from brainseg.geometry import Grid, canonical_axes, from_canonical, to_canonical
from brainseg.scans import Scan

CLIP = (-6.0, 12.0)
"""Range of z-scores passed on: a hot voxel must not drown the rest, an enhancing tumour must survive."""
HEAD_MARGIN = 1.05
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """How one scan's crop becomes model slices. Plain numbers, so that it can be stored beside a cached scan."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    background: tuple[float, ...]
    top: int
    left: int
    height: int
    width: int
    size: int
    context: int
    per_slice_max: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
        return cls(**fields)


def select_modalities(scan: Scan, wanted: Sequence[str]) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Return the canonical crop `(C, D, h, w)` and background of the wanted modalities, in that order.

    Raises ScanError MISSING_MODALITY naming what is there.
    """
    missing = [m for m in wanted if m not in scan.modalities]
    if missing:
        found = ", ".join(scan.modalities)
        raise ScanError(Code.MISSING_MODALITY, f"{scan.scan_id}: lacks {', '.join(missing)}; found {found}")
    order = [scan.modalities.index(m) for m in wanted]
    image = scan.image if order == list(range(len(scan.modalities))) else scan.image[order]
    return to_canonical(image, scan.grid), tuple(scan.background[i] for i in order)


def plan_scan(scan: Scan, modalities: Sequence[str], config: PrepareConfig, context: int) -> Plan:
    """Draw up how this scan is normalised and framed."""
    crop, background = select_modalities(scan, modalities)
    shift, scale = _intensity(crop, background, config.normalise)
    box, shape = canonical_box(scan.grid, scan.box)
    aspect = _pixel_aspect(scan.grid)
    rows, columns = (0, shape[1]), (0, shape[2])
    if config.frame == "head":
        rows, columns = _head_extent(crop, background, box)
    top, left, height, width = _square(rows, columns, aspect, HEAD_MARGIN if config.frame == "head" else 1.0)
    return Plan(
        shift=shift,
        scale=scale,
        background=background,
        top=top - box[1][0],
        left=left - box[2][0],
        height=height,
        width=width,
        size=config.size,
        context=context,
        per_slice_max=config.normalise == "slice_max",
    )


def _intensity(crop: NDArray[Any], background: Sequence[float], kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-modality (shift, scale): a voxel becomes (x - shift) / scale. Sums are taken in float64."""
    shifts: list[float] = []
    scales: list[float] = []
    for volume, empty in zip(crop, background, strict=True):
        inside = volume[volume != empty]
        if kind == "zscore" and inside.size:
            shifts.append(float(inside.mean(dtype=np.float64)))
            scales.append(max(float(inside.std(dtype=np.float64)), 1e-6))
        else:
            shifts.append(empty)
            scales.append(max(float(volume.max()) - empty, 1e-6) if kind == "volume_max" else 1.0)
    return tuple(shifts), tuple(scales)


def canonical_box(grid: Grid, box: Box) -> tuple[Box, tuple[int, int, int]]:
    """A native crop box and the native shape, both along the canonical axes."""
    order, flips = canonical_axes(grid)
    shape = tuple(grid.shape[a] for a in order)
    turned = [(n - box[a][1], n - box[a][0]) if flip else box[a] for a, n, flip in zip(order, shape, flips, strict=True)]
    return (turned[0], turned[1], turned[2]), (shape[0], shape[1], shape[2])


def _pixel_aspect(grid: Grid) -> float:
    """Width of a pixel over its height in the canonical plane; 1 where spacing is unknown."""
    spacing = grid.spacing_mm
    if spacing is None:
        return 1.0
    _, row_axis, column_axis = canonical_axes(grid)[0]
    return spacing[column_axis] / spacing[row_axis]


def _head_extent(crop: NDArray[Any], background: Sequence[float], box: Box) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns (start, stop) of the head in full-slice pixels: where at least 1 % of a line is clearly bright."""
    bright = np.zeros(crop.shape[1:], np.bool_)
    for volume, empty in zip(crop, background, strict=True):
        top = float(np.percentile(volume[:: max(1, volume.shape[0] // 16)], 99.5))
        bright |= volume > empty + 0.1 * (top - empty)
    extents: list[tuple[int, int]] = []
    for axis in (1, 2):
        other = tuple(a for a in range(3) if a != axis)
        lines = np.flatnonzero(bright.mean(axis=other) > 0.01)
        start, stop = (int(lines[0]), int(lines[-1]) + 1) if lines.size else (0, bright.shape[axis])
        extents.append((start + box[axis][0], stop + box[axis][0]))
    return extents[0], extents[1]


def _square(rows: tuple[int, int], columns: tuple[int, int], aspect: float, margin: float) -> tuple[int, int, int, int]:
    """The smallest square (in mm) around a rectangle of pixels: top, left, height, width."""
    tall, wide = rows[1] - rows[0], (columns[1] - columns[0]) * aspect
    side = max(tall, wide) * margin
    height, width = round(side), round(side / aspect)
    top = round((rows[0] + rows[1] - height) / 2)
    left = round((columns[0] + columns[1] - width) / 2)
    return top, left, height, width


def to_tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """Move an array to the device in its stored type; it becomes float there."""
    if array.dtype in (np.uint16, np.uint32):
        array = array.astype(np.int64 if array.dtype == np.uint32 else np.int32)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def gather_context(crop: NDArray[Any], indices: Sequence[int], context: int) -> NDArray[Any]:
    """Stack slices with their neighbours: `(N, (2*context+1)*C, h, w)`, stored type; the ends repeat their slice."""
    depth = crop.shape[1]
    wanted = np.asarray(indices)[:, None] + np.arange(-context, context + 1)[None, :]
    stacked = crop[:, np.clip(wanted, 0, depth - 1)]  # (C, N, K, h, w)
    stacked = stacked.transpose(1, 2, 0, 3, 4)  # (N, K, C, h, w)
    return stacked.reshape(len(indices), -1, *crop.shape[2:])


def model_slices(raw: Tensor, plan: Plan) -> Tensor:
    """Normalise raw slices `(N, K*C, h, w)` and resample them onto the model grid: `(N, K*C, size, size)` float32."""
    repeats = raw.shape[1] // len(plan.shift)
    x = raw.float()
    x = (x - _per_channel(plan.shift, repeats, x)) / _per_channel(plan.scale, repeats, x)
    empty = [(b - s) / c for b, s, c in zip(plan.background, plan.shift, plan.scale, strict=True)]
    if plan.per_slice_max:
        x = x / x.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
    x = x.clamp_(*CLIP)
    offset = _per_channel([min(max(e, CLIP[0]), CLIP[1]) for e in empty], repeats, x)
    return _resample(_into_frame(x - offset, plan), plan.size) + offset


def model_masks(masks: Tensor, plan: Plan) -> Tensor:
    """Resample float masks `(N, R, h, w)` onto the model grid; values between 0 and 1 say how much of a pixel is covered."""
    return _resample(_into_frame(masks, plan), plan.size)


def native_probabilities(probability: Tensor, plan: Plan, height: int, width: int) -> Tensor:
    """Undo frame and resampling: `(N, R, size, size)` on the model grid -> `(N, R, height, width)` on the crop.

    Pixels of the crop outside the frame get 0: the network has not seen them.
    """
    framed = _resample(probability, (plan.height, plan.width))
    pads = (-plan.left, plan.left + plan.width - width, -plan.top, plan.top + plan.height - height)
    return F.pad(framed, (-pads[0], -pads[1], -pads[2], -pads[3]))


def _into_frame(x: Tensor, plan: Plan) -> Tensor:
    """Cut or zero-pad crop pixels to the frame."""
    h, w = x.shape[2:]
    return F.pad(x, (-plan.left, plan.left + plan.width - w, -plan.top, plan.top + plan.height - h))


def _resample(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing; pixel areas, not pixel centres, are what is aligned."""
    target = (size, size) if isinstance(size, int) else size
    if tuple(x.shape[2:]) == target:
        return x
    return F.interpolate(x, size=target, mode="bilinear", antialias=True, align_corners=False)


def _per_channel(values: Sequence[float], repeats: int, like: Tensor) -> Tensor:
    return torch.tensor(list(values) * repeats, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


def uncrop(crop: NDArray[Any], grid: Grid, box: Box) -> NDArray[Any]:
    """Put a canonical crop `(..., d, h, w)` back where it came from: `(..., D, H, W)` on the native grid, zero elsewhere."""
    native = from_canonical(crop, grid)
    full = np.zeros((*crop.shape[:-3], *grid.shape), crop.dtype)
    (a, b), (c, d), (e, f) = box
    full[..., a:b, c:d, e:f] = native
    return full
