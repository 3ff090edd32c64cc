"""NIfTI grids: the two affines and the voxel sizes of a header -> one Grid in millimetres, or why there is none.

A header may place its volume twice (sform, qform) and sizes its voxels a third time (pixdim); readers differ in what they
believe. Here the sform goes before the qform before pixdim alone, as nifti1.h has it, and contradictions are told.
"""

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import Notes
from brainseg.geometry import Grid

USUAL_SPACING_MM = (0.1, 20.0)
POSSIBLE_SPACING_MM = (1e-4, 1e4)
FARTHEST_MM = 1e6
"""No scanner's origin is a kilometre away; beyond this float32 cannot place a voxel to a tenth of a millimetre."""
SPACING_TOLERANCE = 0.01
"""Relative difference between pixdim and the sform's columns that goes without a word."""

HALF_TURN = 3 * float(np.finfo(np.float32).eps)
"""What float32 leaves of 1 - (b²+c²+d²) in a half turn, where a is 0: its root would tilt the head by 0.1 mm."""

_UNITS_MM = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}

Matrix = NDArray[np.float64]


def read_grid(header: np.void, shape: tuple[int, int, int], notes: Notes) -> Grid:
    """Return the grid of a parsed header. Raises ScanError BAD_AFFINE, BAD_SPACING or AFFINE_MISMATCH.

    Where neither form is declared the voxel axes are taken as RAS (METHOD 1 of nifti1.h), with NO_ORIENTATION.
    """
    by_sform, by_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    spacing = _pixdim(header, by_sform, notes)
    qform = _qform(header, np.abs(spacing)) if by_qform else None
    if by_sform:
        matrix = np.vstack([header["srow"].astype(np.float64), [0, 0, 0, 1]])
    elif by_qform:
        matrix = np.full((4, 4), np.nan) if qform is None else qform
    else:
        matrix = np.diag([*np.abs(spacing), 1.0])
        notes.warn(Code.NO_ORIENTATION, "found neither qform nor sform: left and right are unknown; its axes were taken as RAS")
    if not _is_invertible(matrix):
        raise notes.error(
            Code.BAD_AFFINE, "found an affine that is not finite, no rotation, or flat, expected an invertible one"
        )
    if by_sform:
        _compare_spacing(matrix, spacing, notes)
        _compare_forms(matrix, qform, shape, notes)
    return Grid.of(shape, _in_mm(matrix, int(header["units"]) & 7, notes))


def _pixdim(header: np.void, unused: bool, notes: Notes) -> Matrix:
    """Voxel sizes along (i, j, k) as pixdim has them; where the sform supplies them, oddities only warn."""
    found: Matrix = header["pixdim"][1:4].astype(np.float64)
    if np.isfinite(found).all() and (found > 0).all():
        return found
    text = f"found voxel sizes {found.tolist()} in pixdim, expected three positive numbers"
    if not unused and not (np.isfinite(found).all() and (found != 0).all()):
        raise notes.error(Code.BAD_SPACING, text)
    notes.warn(Code.BAD_SPACING, f"{text}; {'the sform was used' if unused else 'their signs were dropped'}")
    return found


def _qform(header: np.void, spacing: Matrix) -> Matrix | None:
    """Rotation from the quaternion, columns times voxel size; None where (b, c, d) is no rotation (nifti1.h, METHOD 2)."""
    b, c, d = header["quatern"].astype(np.float64)
    norm = np.sqrt(b * b + c * c + d * d)
    if not norm <= 1.0 + 1e-3:
        return None
    rest = 1.0 - norm * norm
    a = np.sqrt(rest) if rest >= HALF_TURN else 0.0
    a, b, c, d = np.array([a, b, c, d]) / np.hypot(a, norm)  # of length 1 again after the rounding: a rotation does not shrink
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    handed = -1.0 if header["pixdim"][0] < 0 else 1.0
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * spacing * [1.0, 1.0, handed]
    matrix[:3, 3] = header["qoffset"]
    return matrix


def _sizes(matrix: Matrix) -> Matrix:
    with np.errstate(over="ignore"):
        sizes: Matrix = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
    return sizes


def _is_invertible(matrix: Matrix) -> bool:
    """Whether the three voxel axes have finite lengths and do not lie in one plane."""
    sizes = _sizes(matrix)
    if not (np.isfinite(matrix).all() and np.isfinite(sizes).all() and sizes.min() > 0):
        return False
    return bool(abs(np.linalg.det(matrix[:3, :3] / sizes)) > 1e-6)


def _compare_spacing(sform: Matrix, spacing: Matrix, notes: Notes) -> None:
    sizes = _sizes(sform)
    if (spacing > 0).all() and (np.abs(sizes - spacing) > SPACING_TOLERANCE * sizes).any():
        found = f"voxel sizes {spacing.round(4).tolist()} in pixdim and {sizes.round(4).tolist()} in the sform"
        notes.warn(Code.BAD_SPACING, f"found {found}; the sform was used")


def _compare_forms(sform: Matrix, qform: Matrix | None, shape: tuple[int, int, int], notes: Notes) -> None:
    """Refuse a file whose affines exchange left and right or mirror the head: readers would disagree about the side."""
    if qform is None or not _is_invertible(qform):
        return
    turn = sform[:3, :3] @ np.linalg.inv(qform[:3, :3])
    by_sform, by_qform = Grid.of(shape, sform), Grid.of(shape, qform)
    if np.linalg.det(turn) < 0 or turn[0, 0] < 0:
        found = f"a sform that says {by_sform.orientation} and a qform that says {by_qform.orientation}"
        raise notes.error(Code.AFFINE_MISMATCH, f"found {found}, expected them to agree on left and right; correct the header")
    if not by_sform.same_as(by_qform):
        notes.warn(Code.AFFINE_MISMATCH, "found a qform that places the volume elsewhere than the sform; the sform was used")


def _in_mm(matrix: Matrix, unit: int, notes: Notes) -> Matrix:
    """Convert from the header's unit of length, and warn of voxel sizes that no brain scan has."""
    if unit in _UNITS_MM:
        word, factor = _UNITS_MM[unit]
        matrix = np.diag([factor, factor, factor, 1.0]) @ matrix
        notes.warn(Code.SPACING, f"found lengths in {word}; they were converted to mm")
    sizes, (least, most), (low, high) = _sizes(matrix), POSSIBLE_SPACING_MM, USUAL_SPACING_MM
    if sizes.min() < least or sizes.max() > most:
        found = "x".join(f"{size:.3g}" for size in sizes)
        raise notes.error(Code.BAD_SPACING, f"found voxels of {found} mm, expected {low:g} to {high:g} mm along each axis")
    if np.abs(matrix[:3, 3]).max() > FARTHEST_MM:
        found = f"an origin {np.abs(matrix[:3, 3]).max():.3g} mm away"
        raise notes.error(Code.BAD_AFFINE, f"found {found}, expected one within {FARTHEST_MM:g} mm")
    if sizes.min() < low or sizes.max() > high:
        found = "x".join(f"{size:.3g}" for size in sizes)
        notes.warn(Code.SPACING, f"found voxels of {found} mm, expected {low:g} to {high:g} mm along each axis")
    return matrix
