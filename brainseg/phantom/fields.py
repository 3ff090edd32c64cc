"""Fields: the shapes and the smooth randomness a phantom is made of, all in millimetres.

Points are `(3, D, H, W)` float32 in the order (z, y, x): z towards the crown, y towards the back of the head, x towards
the patient's left, as an LPS volume is displayed. The origin lies in the middle of the brain. Every shape is a signed
distance in mm, positive inside. Random fields are drawn on a lattice in mm, never on the voxels: the same draw sampled
on another grid is the same head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array: TypeAlias = NDArray[np.float32]
Real: TypeAlias = NDArray[np.floating[Any]]
Point: TypeAlias = tuple[float, float, float]

KNOTS = 24
"""Knots along each axis of a random field, two to a bump; beyond them it repeats, after twelve times its scale."""

_SPLINE_STD = 0.55**1.5
"""Deviation of a quadratic B-spline with unit normal coefficients, averaged over positions, in three dimensions."""


@dataclass(frozen=True)
class Frame:
    """Where the voxels of one scan lie, in mm: along the scan's own axes, and within the turned and shifted head."""

    axes: tuple[Array, Array, Array]  # centres along D, H and W, the middle of the scan at 0
    points: Array  # (3, D, H, W), in the head


def field_on(rng: np.random.Generator, axes: Sequence[Array], scale_mm: float) -> Array:
    """Return a random field (D, H, W) of mean 0 and deviation 1, bumps about `scale_mm` wide, along a scan's own axes."""
    return _spline(rng, *(axis * np.float32(2 / scale_mm) for axis in axes))


def field_at(rng: np.random.Generator, points: Array, scale_mm: float) -> Array:
    """The same field at any points (3, D, H, W), interpolated between half knots; costs several times as much."""
    half = np.arange(-KNOTS, KNOTS, dtype=np.float32) * np.float32(0.5)
    where = points * np.float32(4 / scale_mm) + np.float32(KNOTS)
    return ndimage.map_coordinates(_spline(rng, half, half, half), where, order=1, mode="grid-wrap")


def _spline(rng: np.random.Generator, *where: Array) -> Array:
    """A periodic random quadratic spline on the grid of three axes, given in knots."""
    values = rng.standard_normal((KNOTS, KNOTS, KNOTS), dtype=np.float32) / np.float32(_SPLINE_STD)
    for axis, positions in enumerate(where):
        values = _along(values, axis, positions)
    return values


def _along(knots: Array, axis: int, where: Array) -> Array:
    """Replace one axis of knots by its spline at `where`: each position weighs the three nearest knots."""
    nearest = np.floor(where + np.float32(0.5))
    shape = tuple(-1 if a == axis else 1 for a in range(3))
    t, index = (where - nearest).reshape(shape), nearest.astype(np.intp)
    weights = (0.5 * (0.5 - t) ** 2, 0.75 - t**2, 0.5 * (0.5 + t) ** 2)
    taken = (np.take(knots, (index + step) % KNOTS, axis) * weight for step, weight in zip((-1, 0, 1), weights, strict=True))
    return np.asarray(sum(taken), np.float32)


def ellipsoid(points: Array, centre: Point, radii: Point) -> Array:
    """Signed distance (to first order) to an ellipsoid's surface, (D, H, W)."""
    level, slope = np.full(points.shape[1:], 1e-6, np.float32), np.full(points.shape[1:], 1e-8, np.float32)
    for axis in range(3):
        square = ((points[axis] - np.float32(centre[axis])) / np.float32(radii[axis])) ** 2
        level += square
        slope += square / np.float32(radii[axis] ** 2)
    return np.asarray((np.sqrt(level) - level) / np.sqrt(slope), np.float32)


def tube(points: Array, start: Point, end: Point, radii: tuple[float, float]) -> Array:
    """Signed distance to a rounded cone from `start` to `end`, (D, H, W)."""
    axis = np.array(end, np.float32) - np.array(start, np.float32)
    offset = [points[a] - np.float32(start[a]) for a in range(3)]
    along = sum(offset[a] * axis[a] for a in range(3)) / np.float32(axis @ axis)
    t = np.clip(along, 0, 1).astype(np.float32)
    gap = sum((offset[a] - t * axis[a]) ** 2 for a in range(3))
    return np.asarray(radii[0] + (radii[1] - radii[0]) * t - np.sqrt(gap), np.float32)


def coverage(distance: Real, edge_mm: float) -> Array:
    """Share of a voxel inside a surface, from its signed distance and the width over which the edge is blurred."""
    return np.asarray(np.clip(distance / np.float32(edge_mm) + np.float32(0.5), 0, 1), np.float32)
