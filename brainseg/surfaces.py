"""Surfaces: how far the border of one mask lies from that of another. HD95 and surface Dice (NSD) are made here.

It stands below `lesions.py` and `metrics.py`, which ask for one lesion or for a whole region. Masks go in, distances in
the unit of the spacing come out. A mask is a volume (D, H, W) or an image (H, W). Conventions that other packages set
differently:

- *Surface*: the voxels of a mask that its erosion by face neighbours removes (6 in a volume, 4 in an image). Outside the
  grid is background, so a mask that is cut by the border has surface there. As MONAI's `get_mask_edges`.
- *HD95*: distances between voxel centres, linear percentile of each direction, then the larger of the two. As MONAI;
  medpy pools both directions first, surface-distance weighs surface elements: other numbers.
- *NSD*: voxels of both surfaces within the tolerance of the other surface, over all voxels of both. As MONAI's
  `compute_surface_dice` without subvoxels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

TOLERANCE_SLACK = 1e-4
"""Added to an NSD tolerance: a spacing read from float32 is 1.0000001 mm as often as 1, and both are 1 mm."""

FEW = 1_000
"""Below this many voxels a search tree answers before anything cleverer has begun,"""

MATRIX_LIMIT = 50_000
"""and below this many pairs of voxels all their distances are there before the tree is built."""

TREE_LIMIT = 150_000
"""With more surface voxels than this, or than a tenth of the crop, a distance transform overtakes the KD-tree."""

REACH = 3
"""Voxels, in the direction of the finest spacing, up to which neighbours are tried one by one."""

CELL = 6
"""Voxels, in the same direction, of the side of a cell whose voxels one search is made for, until one of them matters."""

PERCENTILE = 0.95
ROUNDING = 1e-6
"""Of the finest spacing: more than what a distance may be off by."""


@dataclass(frozen=True)
class Surface:
    """The surface voxels of one mask of a pair: flat `index` into the mask, and which are surface of the other too."""

    index: Indices
    shared: Mask

    def part(self, chosen: Mask) -> "Surface":
        """The voxels chosen by a mask (N,)."""
        return Surface(self.index[chosen], self.shared[chosen])


@dataclass(frozen=True)
class Pair:
    """The surfaces of label and prediction on one grid; neither is empty."""

    label: Surface
    prediction: Surface
    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def hd95(self) -> float:
        """The larger of the two directed 95th percentiles, in the unit of the spacing."""
        return max(distances.percentile_95() for distances in self.distances)

    def nsd(self, tolerance: float) -> float:
        """Surface Dice: the share of both surfaces' voxels within a tolerance, in the unit of the spacing, of the other."""
        near = [distances.within(tolerance + TOLERANCE_SLACK) for distances in self.distances]
        return sum(near) / (self.label.index.size + self.prediction.index.size)

    @cached_property
    def distances(self) -> "tuple[Distances, Distances]":
        """From each voxel of the label's surface to the prediction's, and back."""
        forth, back = ((a, b.index) for a, b in ((self.label, self.prediction), (self.prediction, self.label)))
        return Distances(*forth, self.shape, self.spacing), Distances(*back, self.shape, self.spacing)


class Distances:
    """How far each surface voxel of one mask is from the surface of another, as closely as anybody needs to know it.

    `lower` and `upper` (N,), in no order, are the same where a distance is known. A percentile asks for the largest few; of
    all others it is enough that they are smaller. What bounds them: two voxels' distances differ by no more than the voxels
    are apart, so that a search from the middle of a few neighbours speaks for all of them.
    """

    def __init__(self, source: Surface, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
        """A shared voxel is at distance 0 and is not looked up, but keeps its place among the values."""
        self.own, self.target, self.shape, self.spacing = source.index[~source.shared], target, shape, spacing
        self.upper = np.zeros(source.index.size, np.float64)
        if self.own.size < FEW:
            self.lower = self.upper
            self._find(np.arange(self.own.size))
            return
        self.upper[: self.own.size] = _by_steps(self.own, target, shape, spacing)
        self.lower = np.where(np.isinf(self.upper), REACH * min(spacing), self.upper)

    def within(self, limit: float) -> int:
        """How many are no further than a limit, in the unit of the spacing."""
        if self._between(limit).size > FEW:
            self._narrow()
        self._find(self._between(limit))
        return int((self.upper <= limit).sum())

    def percentile_95(self) -> float:
        """The 95th percentile of all of them; there must be one."""
        count = self.upper.size - math.floor(PERCENTILE * (self.upper.size - 1))
        unknown = self._highest(count)
        if unknown.size > FEW:
            self._narrow()
            likely = self._highest(count)
            if likely.size > count:
                self._find(likely[np.argpartition(self.upper[likely], -count)[-count:]])
            unknown = self._highest(count)
        self._find(unknown)
        return percentile_95(self.upper)

    def _between(self, limit: float) -> Indices:
        """Those that may lie on either side of a limit."""
        return np.flatnonzero((self.lower <= limit) & (self.upper > limit))

    def _highest(self, count: int) -> Indices:
        """Those that are not known and may be among so many largest ones."""
        least = np.partition(self.lower, -count)[-count]
        return np.flatnonzero((self.upper >= least) & (self.upper > self.lower))

    def _narrow(self) -> None:
        """Bound those that are not known, by what is found from the middle of each few neighbours."""
        unknown = np.flatnonzero(np.isinf(self.upper))
        if not unknown.size:
            return
        places, finest = _places(self.own[unknown], self.shape, self.spacing), min(self.spacing)
        sides = [max(1, round(CELL * finest / spacing)) for spacing in self.spacing]
        cells = [i // side for i, side in zip(np.unravel_index(self.own[unknown], self.shape), sides, strict=True)]
        numbers = np.ravel_multi_index(cells, self.shape)
        _, cell, size = np.unique(numbers, return_inverse=True, return_counts=True)
        middles = np.stack([np.bincount(cell, weights=axis) / size for axis in places.T], axis=-1)
        found = np.atleast_1d(self._tree.query(middles)[0])[cell]
        away = np.linalg.norm(places - middles[cell], axis=1) + ROUNDING * finest
        self.lower[unknown] = np.maximum(self.lower[unknown], found - away)
        self.upper[unknown] = found + away

    def _find(self, which: Indices) -> None:
        """Search for the distances of some, numbered as `own` is."""
        if which.size:
            self.lower[which] = self.upper[which] = self._search(self.own[which])

    def _search(self, own: Indices) -> Floats:
        asked = own, self.target, self.shape, self.spacing
        if own.size * self.target.size < MATRIX_LIMIT:
            return _by_matrix(*asked)
        limit = min(TREE_LIMIT, math.prod(self.shape) // 10)
        if own.size + self.target.size > limit and min(own.size, self.target.size) > FEW:
            return _by_transform(*asked)
        return np.atleast_1d(self._tree.query(_places(own, self.shape, self.spacing))[0])

    @cached_property
    def _tree(self) -> KDTree:
        """Of the target's voxels."""
        return KDTree(_places(self.target, self.shape, self.spacing), balanced_tree=False, compact_nodes=False)


def surface_pair(label: Mask, prediction: Mask, spacing: tuple[float, ...]) -> Pair:
    """Find the surfaces of two masks of one shape that are not empty."""
    edges = surface(label), surface(prediction)
    index = [np.flatnonzero(edge) for edge in edges]
    sides = [Surface(mine, other.ravel()[mine]) for mine, other in zip(index, reversed(edges), strict=True)]
    return Pair(sides[0], sides[1], label.shape, spacing)


def surface(mask: Mask) -> Mask:
    """Voxels of a mask, 2-D or 3-D, with a face neighbour outside it; beyond the array is outside."""
    padded = np.pad(mask, 1)
    middle = (slice(1, -1),) * mask.ndim
    inner = mask.copy()
    for axis in range(mask.ndim):
        for shifted in (slice(None, -2), slice(2, None)):
            inner &= padded[(*middle[:axis], shifted, *middle[axis + 1 :])]
    return mask ^ inner


def percentile_95(distances: Floats) -> float:
    """The 95th percentile of at least one value, linear between ranks, as `numpy.percentile` at a tenth of its time."""
    place = PERCENTILE * (distances.size - 1)
    low, high = math.floor(place), math.ceil(place)
    ranked = np.partition(distances, (low, high))
    return float(ranked[low] + (place - low) * (ranked[high] - ranked[low]))


def _by_steps(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Try the neighbours of each voxel from the nearest to those REACH away; infinite where none is in `target`."""
    wide = tuple(size + 2 * REACH for size in shape)
    places, goals = (np.ravel_multi_index([n + REACH for n in np.unravel_index(i, shape)], wide) for i in (own, target))
    is_goal = np.zeros(math.prod(wide), np.bool_)
    is_goal[goals] = True
    distances, left = np.full(own.size, np.inf), np.arange(own.size)
    for length, steps in _shells(wide, spacing):
        met = is_goal[places + steps[0]]
        for step in steps[1:]:
            met |= is_goal[places + step]
        distances[left[met]] = length
        left, places = left[~met], places[~met]
    return distances


def _shells(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Iterator[tuple[float, list[int]]]:
    """All steps to voxels at most REACH of the finest spacing away, flat in a shape, by their length from the shortest."""
    steps = np.stack(np.meshgrid(*[np.arange(-REACH, REACH + 1)] * len(shape), indexing="ij"), axis=-1).reshape(-1, len(shape))
    lengths = np.linalg.norm(steps * spacing, axis=1)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for length in np.unique(lengths[(lengths > 0) & (lengths <= REACH * min(spacing))]):
        yield float(length), (steps[lengths == length] @ strides).tolist()


def _by_matrix(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """By the distance of every pair: the time goes by the product of the two numbers of voxels."""
    return np.asarray(cdist(_places(own, shape, spacing), _places(target, shape, spacing)).min(axis=1), np.float64)


def _places(index: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Where voxels lie, (N, axes), in the unit of the spacing."""
    return np.stack(np.unravel_index(index, shape), axis=-1).astype(np.float64) * np.asarray(spacing, np.float64)


def _by_transform(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """By a transform of the whole crop: the time goes by the crop's size alone."""
    outside = np.ones(shape, np.bool_)
    outside.ravel()[target] = False
    found: Floats = distance_transform_edt(outside, sampling=spacing).ravel()[own]
    return found
