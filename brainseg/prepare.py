"""Prepare: from a checked scan to what the network eats, and from its answer back to the scan's voxels.

Training and inference both go through here, so they cannot drift apart. A `Plan` is drawn up once per scan (intensity
shift and scale, frame); slices are then prepared by torch on whatever device the network is on.

Coordinates: *crop* is the scan's box viewed in canonical orientation, `(C, D, h, w)`; *frame* is the square of the plane
that the network sees, in crop pixels, and may reach beyond it; *model grid* is `size x size`.
"""

import functools
import math
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
VOXELS_IN_CACHE = 1 << 19
"""So many floats are passed over again and again at no more than a cache's speed."""
SUMMED_AT_ONCE = 1 << 17
"""So many voxels are widened to float64 at a time: a megabyte, which a cache holds."""
TILE = 32
LANES = 16
"""Columns are worked out by so many: a plane then comes out the same to the last bit whatever it is put together with. Where a
rest is left, a matrix product rounds it by where in memory the plane begins."""
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
        moments = _moments(volume, empty) if kind == "zscore" else None
        if moments:
            shifts.append(moments[0])
            scales.append(max(moments[1], 1e-6))
        else:
            shifts.append(empty)
            scales.append(max(float(volume.max()) - empty, 1e-6) if kind == "volume_max" else 1.0)
    return tuple(shifts), tuple(scales)


def _moments(volume: NDArray[Any], empty: float) -> tuple[float, float] | None:
    """Mean and standard deviation of the voxels that are not `empty`, taken in float64; None where there are none.

    Integers of up to 16 bits are summed as distances from `empty`, a cache's worth at a time: the sums are whole numbers, and
    exact up to 2^53.
    """
    if volume.dtype.kind == "f" or volume.dtype.itemsize > 2:
        inside = volume[volume != empty]
        return (float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))) if inside.size else None
    count = int(np.count_nonzero(volume != empty))
    if not count:
        return None
    voxels, total, squares = volume.reshape(-1), 0.0, 0.0
    for start in range(0, voxels.size, SUMMED_AT_ONCE):
        away = voxels[start : start + SUMMED_AT_ONCE].astype(np.float64)
        if empty:
            away -= empty
        total += float(away.sum())
        squares += float(np.einsum("i,i", away, away))  # a dot product would wake a thread a core
    mean = total / count
    return empty + mean, math.sqrt(max(0.0, squares / count - mean * mean))


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


def gather_context(crop: NDArray[Any], indices: Sequence[int], context: int) -> NDArray[Any]:
    """Stack slices with their neighbours: `(N, (2*context+1)*C, h, w)`, stored type; the ends repeat their slice."""
    stacked = crop[:, _neighbours(indices, context, crop.shape[1])]  # (C, N, K, h, w)
    stacked = stacked.transpose(1, 2, 0, 3, 4)  # (N, K, C, h, w)
    return stacked.reshape(len(indices), -1, *crop.shape[2:])


def stack_context(slices: Tensor, indices: Sequence[int], context: int) -> Tensor:
    """The same on the model grid: of a whole scan's `(D, C, S, S)` the slices `(N, K*C, S, S)` with their neighbours.

    A slice is prepared by itself, so preparing before stacking gives what stacking before preparing gives, in 1/K of the time.
    """
    if not context and len(indices) == len(slices):
        return slices
    wanted = torch.from_numpy(_neighbours(indices, context, len(slices))).to(slices.device)
    return slices[wanted].flatten(1, 2)


def _neighbours(indices: Sequence[int], context: int, depth: int) -> NDArray[np.int64]:
    """`(N, K)` numbers of slices around each index, kept inside the scan."""
    return np.clip(np.asarray(indices)[:, None] + np.arange(-context, context + 1)[None, :], 0, depth - 1)


def model_slices(raw: Tensor, plan: Plan) -> Tensor:
    """Normalise raw slices `(N, K*C, h, w)` and resample them onto the model grid: `(N, K*C, size, size)` float32.

    Clipping is done in the scan's own units and the rest of the arithmetic, which is linear, on the smaller model grid.
    """
    repeats = raw.shape[1] // len(plan.shift)
    rows, columns = _onto_grid(plan, raw.shape[2], raw.shape[3], raw.device)
    out = torch.empty((*raw.shape[:2], plan.size, plan.size), device=raw.device)
    shift, empty = (_per_channel(values, repeats, out) for values in (plan.shift, plan.background))
    step = slices_together(raw.transpose(0, 1))
    for part, target in zip(torch.split(raw, step), torch.split(out, step), strict=True):
        scale = _per_channel(plan.scale, repeats, out)
        if plan.per_slice_max:
            scale = scale * ((part.amax(dim=(2, 3), keepdim=True) - shift) / scale).clamp_min(1e-6)
        low, high = shift + CLIP[0] * scale, shift + CLIP[1] * scale
        base = torch.minimum(torch.maximum(empty, low), high)
        nothing = (base - shift) / scale
        target.copy_(nothing.expand_as(target))
        shown = _resampled(_above(part, base, low, high), rows, columns).div_(scale).add_(nothing)
        target[..., rows.outputs, columns.outputs] = shown
    return out


def _above(part: Tensor, base: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far raw slices `(N, C, h, w)`, clipped, are over their base; what would change nothing is left out on a CPU.

    Looking for the extremes of integers takes a third of the time that clipping them as floats does; a GPU would be waited for.
    """
    floats = torch.empty(part.shape, device=part.device).copy_(part)  # slice by slice, however the scan lay
    if not part.is_cpu or _any_beyond(part, low, high):
        return torch.clamp(floats, low, high, out=floats).sub_(base)
    return floats.sub_(base) if base.any() else floats


def _any_beyond(part: Tensor, low: Tensor, high: Tensor) -> bool:
    lowest, highest = (extreme(dim=(2, 3), keepdim=True) for extreme in (part.amin, part.amax))
    return bool((lowest < low).any() or (highest > high).any())


def model_masks(masks: Tensor, plan: Plan) -> Tensor:
    """Resample float masks `(N, R, h, w)` onto the model grid; values between 0 and 1 say how much of a pixel is covered."""
    rows, columns = _onto_grid(plan, masks.shape[2], masks.shape[3], masks.device)
    out = torch.zeros((*masks.shape[:2], plan.size, plan.size), device=masks.device)
    out[..., rows.outputs, columns.outputs] = _resampled(masks, rows, columns)
    return out


def native_probabilities(probability: Tensor, plan: Plan, height: int, width: int) -> Tensor:
    """Undo frame and resampling: `(..., size, size)` on the model grid -> `(..., height, width)` on the crop.

    Pixels of the crop outside the frame get 0: the network has not seen them.
    """
    rows, columns = _off_grid(plan, height, width, probability.device)
    covered = (rows.outputs, columns.outputs) == (slice(0, height), slice(0, width))
    make = torch.empty if covered else torch.zeros
    out = make((*probability.shape[:-2], height, width), device=probability.device)
    slices, targets = probability.flatten(0, -3), out.view(-1, height, width)
    step = slices_together(targets[None])
    for part, target in zip(torch.split(slices, step), torch.split(targets, step), strict=True):
        target[..., rows.outputs, columns.outputs] = _resampled(part, rows, columns)
    return out


def slices_together(volumes: Tensor) -> int:
    """How many slices of `(C, D, ...)` are worked on at once, so that a CPU's caches hold them; on a GPU all."""
    return max(1, VOXELS_IN_CACHE * volumes.shape[1] // max(1, volumes.numel())) if volumes.is_cpu else volumes.shape[1]


@dataclass(frozen=True)
class _Tile:
    """A few outputs along an axis: the inputs they depend on, and weights `(outputs, inputs)`; None where they are these."""

    inputs: slice
    weights: Tensor | None

    def across(self, x: Tensor) -> Tensor:
        """Planes `(N, h, w)` -> `(N, h, outputs)`."""
        part = x[..., self.inputs]
        return part if self.weights is None else torch.bmm(part, self.weights.T.expand(len(x), -1, -1))

    def down(self, x: Tensor) -> Tensor:
        """Planes `(N, h, w)` -> `(N, outputs, w)`."""
        part = x[..., self.inputs, :]
        return part if self.weights is None else torch.bmm(self.weights.expand(len(x), -1, -1), part)


@dataclass(frozen=True)
class _Axis:
    """One axis of a resampling: the outputs that depend on any input, and how; the others get 0, and are not worked out.

    The tiles may give a few more than these.
    """

    outputs: slice
    tiles: Sequence[_Tile]


def _onto_grid(plan: Plan, height: int, width: int, device: torch.device) -> tuple[_Axis, _Axis]:
    """What resamples a crop's rows and columns onto the model grid; what the frame has beyond the crop counts 0."""
    rows = _shifted(_weights(plan.height, plan.size), plan.top, 1, height)
    columns = _shifted(_weights(plan.width, plan.size), plan.left, 1, width)
    return _axis(rows, device), _axis(columns, device, LANES)


def _off_grid(plan: Plan, height: int, width: int, device: torch.device) -> tuple[_Axis, _Axis]:
    """What undoes it; rows and columns of the crop that the frame has not get 0."""
    rows = _shifted(_weights(plan.size, plan.height), plan.top, 0, height)
    columns = _shifted(_weights(plan.size, plan.width), plan.left, 0, width)
    return _axis(rows, device), _axis(columns, device, LANES)


@functools.lru_cache(maxsize=256)
def _weights(source: int, target: int) -> Tensor:
    """Weights `(target, source)` of bilinear resampling with antialiasing; pixel areas, not pixel centres, are aligned.

    They are read off `F.interpolate`; a matrix product with them takes two thirds of its time on a CPU.
    """
    if source == target:
        return torch.eye(source)
    line = torch.eye(source)[None, None]
    return F.interpolate(line, size=(target, source), mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _shifted(weights: Tensor, before: int, axis: int, length: int) -> Tensor:
    """Move the frame's axis of the weights to `before` on the crop's, which is `length` long: cut, and zero-padded."""
    pads = (before, length - before - weights.shape[axis])
    return F.pad(weights, pads if axis == 1 else (0, 0, *pads))


def _axis(weights: Tensor, device: torch.device, multiple: int = 1) -> _Axis:
    """Cut a band matrix into blocks that leave most of its zeros out, of a multiple of outputs; a GPU takes it in one."""
    if torch.equal(weights, torch.eye(len(weights))):
        return _Axis(slice(0, len(weights)), [_Tile(slice(None), None)])
    outputs = _used(weights.any(dim=1))
    wanted = F.pad(weights[outputs], (0, 0, 0, -(outputs.stop - outputs.start) % multiple))
    blocks = torch.split(wanted, TILE if device.type == "cpu" else len(wanted))
    return _Axis(outputs, [_tile(block, device) for block in blocks])


def _tile(block: Tensor, device: torch.device) -> _Tile:
    inputs = _used(block.any(dim=0))
    return _Tile(inputs, block[:, inputs].contiguous().to(device))


def _used(wanted: Tensor) -> slice:
    """From the first to the last place that is wanted; the first where none is."""
    places = torch.nonzero(wanted).flatten().tolist() or [0]
    return slice(places[0], places[-1] + 1)


def _resampled(x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """Planes `(..., h, w)` -> the outputs of both axes `(..., H, W)`."""
    planes = x.reshape(-1, *x.shape[-2:])
    planes = torch.cat([tile.across(planes) for tile in columns.tiles], dim=-1)
    planes = torch.cat([tile.down(planes) for tile in rows.tiles], dim=-2)
    return planes.view(*x.shape[:-2], *planes.shape[-2:])[..., : columns.outputs.stop - columns.outputs.start]


def _per_channel(values: Sequence[float], repeats: int, like: Tensor) -> Tensor:
    return torch.tensor(list(values) * repeats, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


def uncrop(crop: NDArray[Any], grid: Grid, box: Box) -> NDArray[Any]:
    """Put a canonical crop `(..., d, h, w)` back where it came from: `(..., D, H, W)` on the native grid, zero elsewhere."""
    native = from_canonical(crop, grid)
    full = np.zeros((*crop.shape[:-3], *grid.shape), crop.dtype)
    (a, b), (c, d), (e, f) = box
    full[..., a:b, c:d, e:f] = native
    return full
