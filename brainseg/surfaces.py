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

REACH = 4
"""Voxels, in the direction of the finest spacing, up to which neighbours are tried one by one."""


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
        return max(map(percentile_95, self.distances))

    def nsd(self, tolerance: float) -> float:
        """Surface Dice: the share of both surfaces' voxels within a tolerance, in the unit of the spacing, of the other."""
        near = [int((distances <= tolerance + TOLERANCE_SLACK).sum()) for distances in self.distances]
        return sum(near) / (self.label.index.size + self.prediction.index.size)

    @cached_property
    def distances(self) -> tuple[Floats, Floats]:
        """From each voxel of the label's surface to the prediction's, and back, in no order.

        A shared voxel is at distance 0 and is not looked up, but keeps its place among the values.
        """
        forth, back = ((a, b.index) for a, b in ((self.label, self.prediction), (self.prediction, self.label)))
        return self._directed(*forth), self._directed(*back)

    def _directed(self, source: Surface, target: Indices) -> Floats:
        distances = np.zeros(source.index.size, np.float64)
        own = source.index[~source.shared]
        if own.size:
            distances[: own.size] = nearest(own, target, self.shape, self.spacing)
        return distances


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
    place = 0.95 * (distances.size - 1)
    low, high = math.floor(place), math.ceil(place)
    ranked = np.partition(distances, (low, high))
    return float(ranked[low] + (place - low) * (ranked[high] - ranked[low]))


def nearest(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Distance from each voxel of `own` (N,) to the nearest of `target` (M,), flat indices into one shape; M is at least 1.

    Most voxels of two surfaces that resemble each other are found within a few steps; only the others are searched for.
    """
    if own.size < FEW:
        return (_by_matrix if own.size * target.size < MATRIX_LIMIT else _by_tree)(own, target, shape, spacing)
    distances = _by_steps(own, target, shape, spacing)
    far = np.flatnonzero(np.isinf(distances))
    if far.size:
        limit = min(TREE_LIMIT, math.prod(shape) // 10)
        crowded = far.size + target.size > limit and min(far.size, target.size) > FEW
        distances[far] = (_by_transform if crowded else _by_tree)(own[far], target, shape, spacing)
    return distances


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


def _by_tree(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """By a search tree: the time goes by the number of voxels."""
    tree = KDTree(_places(target, shape, spacing), balanced_tree=False, compact_nodes=False)
    return np.atleast_1d(tree.query(_places(own, shape, spacing))[0])


def _places(index: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """Where voxels lie, (N, axes), in the unit of the spacing."""
    return np.stack(np.unravel_index(index, shape), axis=-1).astype(np.float64) * np.asarray(spacing, np.float64)


def _by_transform(own: Indices, target: Indices, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """By a transform of the whole crop: the time goes by the crop's size alone."""
    outside = np.ones(shape, np.bool_)
    outside.ravel()[target] = False
    found: Floats = distance_transform_edt(outside, sampling=spacing).ravel()[own]
    return found
