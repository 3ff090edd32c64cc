"""Grid: where a scan's voxels lie in the world. Two images compare only on one grid.

Axes. Arrays are `(D, H, W)`: slice, row, column. A NIfTI file stores `(i, j, k)` with `i` fastest, so its bytes viewed
without a copy are `(k, j, i)`: `D` is `k`, `H` is `j`, `W` is `i`. An `affine` is the file's own 4x4 matrix: it takes
voxel indices in the order `(i, j, k)` = `(w, h, d)` to millimetres in scanner space, RAS+ (x grows towards the patient's
right, y to the front, z to the head), as nibabel defines it.
"""

from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)
Slices = tuple[slice, slice, slice]

AFFINE_TOLERANCE_MM = 1e-2
"""Two affines are the same grid when no corner of the volume moves by more than this."""


@dataclass(frozen=True)
class Grid:
    """Shape `(D, H, W)` and, where the format carries one, the affine (row-major 16 floats). Hashable, comparable."""

    shape: tuple[int, int, int]
    affine: tuple[float, ...] | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: NDArray[np.float64] | None = None) -> Self:
        """Build from a (D, H, W) shape and a 4x4 matrix."""
        depth, height, width = (int(n) for n in shape)
        flat = None if affine is None else tuple(float(x) for x in np.asarray(affine, np.float64).reshape(16))
        return cls((depth, height, width), flat)

    @property
    def matrix(self) -> NDArray[np.float64] | None:
        """The affine as a 4x4 array, or None where positions are unknown."""
        return None if self.affine is None else np.array(self.affine, np.float64).reshape(4, 4)

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Voxel size in mm along (D, H, W), or None where unknown (PNG, TIFF, bare HDF5)."""
        matrix = self.matrix
        if matrix is None:
            return None
        i, j, k = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
        return float(k), float(j), float(i)

    @property
    def voxel_mm3(self) -> float | None:
        """Volume of one voxel in cubic millimetres, or None where unknown."""
        matrix = self.matrix
        return None if matrix is None else float(abs(np.linalg.det(matrix[:3, :3])))

    @property
    def orientation(self) -> str | None:
        """Anatomical codes of the axes in the file's order (i, j, k), such as `LPS`, or None where unknown."""
        axes = self._world_axes()
        return None if axes is None else "".join(("LR", "PA", "IS")[world][sign > 0] for world, sign in axes)

    def _world_axes(self) -> list[tuple[int, float]] | None:
        """For each of i, j, k: the world axis it runs along most (each used once) and the sign."""
        matrix = self.matrix
        if matrix is None:
            return None
        cosines = matrix[:3, :3] / np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
        axes: list[tuple[int, float]] = [(0, 0.0)] * 3
        free = np.abs(cosines)
        for _ in range(3):
            world, index = np.unravel_index(np.argmax(free), free.shape)
            axes[int(index)] = (int(world), float(np.sign(cosines[world, index])))
            free[world, :] = -1
            free[:, index] = -1
        return axes

    def same_as(self, other: "Grid") -> bool:
        """Whether both describe the same voxels: equal shape, and corners that agree to `AFFINE_TOLERANCE_MM`."""
        if self.shape != other.shape:
            return False
        mine, theirs = self.matrix, other.matrix
        if mine is None or theirs is None:
            return True
        d, h, w = self.shape
        corners = np.array([[i, j, k, 1.0] for i in (0, w - 1) for j in (0, h - 1) for k in (0, d - 1)]).T
        return bool(np.abs((mine - theirs) @ corners).max() <= AFFINE_TOLERANCE_MM)

    def describe(self) -> str:
        """One short phrase for an error line: `155x240x240 voxels, 1x1x1 mm, LPS`."""
        shape = "x".join(str(n) for n in self.shape)
        if self.spacing_mm is None:
            return f"{shape} voxels"
        return f"{shape} voxels, {'x'.join(f'{s:.3g}' for s in self.spacing_mm)} mm, {self.orientation}"


def occupied(*arrays: NDArray[np.uint8] | NDArray[np.bool_]) -> Slices:
    """The smallest box of `(D, H, W)` arrays of one shape around whatever is not zero in any; of no voxels where nothing is."""
    bits = [array.view(np.uint8) for array in arrays]
    slices = _span(np.logical_or.reduce([_slices_with_any(each) for each in bits]))
    plane = np.bitwise_or.reduce([np.bitwise_or.reduce(each[slices], axis=0) for each in bits])
    return slices, _span(plane.any(axis=1)), _span(plane.any(axis=0))


def _slices_with_any(bits: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which slices of `(D, H, W)` bytes hold anything but zeros; eight bytes at a time where they come in eights."""
    flat = bits.reshape(len(bits), bits.shape[1] * bits.shape[2])
    words = flat.view(np.uint64) if flat.flags.c_contiguous and flat.shape[1] % 8 == 0 else flat
    found: NDArray[np.bool_] = np.bitwise_or.reduce(words, axis=1) != 0
    return found


def _span(used: NDArray[np.bool_]) -> slice:
    found = np.flatnonzero(used)
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def canonical_axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How to view a `(D, H, W)` array as slices from feet to head, rows front to back, columns right to left (LPS+).

    Returns a permutation of the array's axes and, for each axis after it, whether to flip. The identity where the
    orientation is unknown. This is the standard display of axial slices, and what networks are given.
    """
    axes = grid._world_axes()
    if axes is None:
        return (0, 1, 2), (False, False, False)
    by_world = {world: (2 - index, sign) for index, (world, sign) in enumerate(axes)}
    wanted = ((2, 1.0), (1, -1.0), (0, -1.0))
    order = tuple(by_world[world][0] for world, _ in wanted)
    flips = tuple(by_world[world][1] != sign for world, sign in wanted)
    return (order[0], order[1], order[2]), (flips[0], flips[1], flips[2])


def to_canonical(array: NDArray[T], grid: Grid) -> NDArray[T]:
    """View the last three axes `(D, H, W)` of an array in canonical order. No copy."""
    order, flips = canonical_axes(grid)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + a for a in order))
    return moved[(..., *(slice(None, None, -1) if flip else slice(None) for flip in flips))]


def from_canonical(array: NDArray[T], grid: Grid) -> NDArray[T]:
    """Undo `to_canonical` on the last three axes. No copy."""
    order, flips = canonical_axes(grid)
    lead = array.ndim - 3
    unflipped = array[(..., *(slice(None, None, -1) if flip else slice(None) for flip in flips))]
    inverse = sorted(range(3), key=lambda axis: order[axis])
    return unflipped.transpose(*range(lead), *(lead + a for a in inverse))
