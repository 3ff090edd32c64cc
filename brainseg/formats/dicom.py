"""DICOM: the files of one series -> a volume and its grid: MR, a slice a file or several frames a file.

Slices are put in order by where they lie, never by name or number, and must fill a straight stack of equal steps. Numbers of
geometry are all that ever leaves the files: no name, no text, no private element. DICOM places voxels in LPS, a Grid in RAS+.
Meaning of position, orientation and spacing: DICOM PS3.3 C.7.6.2.1.1; of frames: C.7.6.16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code
from brainseg.formats import MAX_VOXELS, Decoded, Notes
from brainseg.formats import dicom_elements as tags
from brainseg.formats.dicom_elements import Elements, File, read_elements
from brainseg.formats.dicom_pixels import Plan, judge_pixels, read_frame
from brainseg.formats.nifti_grid import USUAL_SPACING_MM
from brainseg.geometry import Grid

COSINE_TOLERANCE = 1e-3
"""How far row and column directions may be from unit length, from square, and from those of the other slices."""
SPACING_TOLERANCE = 1e-3
"""Relative difference between the pixel spacings of two slices of a series."""
STEP_TOLERANCE = 0.05
"""How far, in steps between slices, a slice may lie from its place in a straight and even stack."""
SAME_PLACE_MM = 1e-2
GAP = 1.5
"""A step longer than this many usual ones is a missing slice."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class _Source:
    """One file whose header was judged."""

    file: File
    plan: Plan
    notes: Notes


@dataclass(frozen=True)
class _Frame:
    """One slice: where it is stored, where its first voxel's centre lies (mm, LPS), what its values are multiplied by."""

    source: _Source
    index: int
    position: Vector
    axes: Vector
    spacing: tuple[float, float]
    slope: float
    inter: float


def read_series(files: Sequence[tuple[str, bytes]], name: str) -> Decoded:
    """Decode the files (name, bytes) of one series, in any order; `name` is what messages call it.

    The array is `(D, H, W)`: slices along the normal of the image plane, rows, columns; the stored integer type where slope
    and intercept are 1 and 0 throughout, else float32. Raises ScanError with the reason.
    """
    notes = Notes(name)
    if not files:
        raise notes.error(Code.MISSING_FILE, "found no file, expected the slices of a series")
    sources = [_source(data, Notes(file)) for file, data in files]
    _require_one_series(sources, notes)
    frames = [frame for source in sources for frame in _frames(source)]
    _require_one_plane(frames, notes)
    ordered = _in_order(frames, notes)
    grid = _grid(ordered, notes)
    array = _stacked(ordered, grid)
    return Decoded(array, grid, tuple(line for n in (*(s.notes for s in sources), notes) for line in n.warnings))


def _source(data: bytes, notes: Notes) -> _Source:
    file = read_elements(data, notes)
    if file.elements.text(tags.MODALITY) not in ("", "MR") and tags.PIXELS in file.elements:
        raise notes.error(Code.UNSUPPORTED, "found a Modality that is not MR, expected MR images alone")
    if tags.LOOKUP in file.elements:
        raise notes.error(Code.UNSUPPORTED, "found values that a lookup table must translate, expected slope and intercept")
    plan = judge_pixels(file, notes)
    _warn_of_identity(file, notes)
    return _Source(file, plan, notes)


def _warn_of_identity(file: File, notes: Notes) -> None:
    """Say that there is something that may name a person, and how much; never what."""
    elements = file.elements
    found = [f"private elements ({file.num_private})"] if file.num_private else []
    found += [f"names, addresses or free text ({file.num_telling})"] if file.num_telling else []
    found += ["a picture marked as having text burned in"] if elements.text(tags.BURNED_IN) == "YES" else []
    found += ["a patient marked as not de-identified"] if elements.text(tags.IDENTITY_REMOVED) == "NO" else []
    if found:
        notes.warn(Code.PHI, f"found {', '.join(found)}: the file may identify a person; none of that text was read")


def _require_one_series(sources: Sequence[_Source], notes: Notes) -> None:
    num_series = len({source.file.elements.text(tags.SERIES_UID) for source in sources})
    if num_series > 1:
        found = f"files of {num_series} series in one place"
        raise notes.error(Code.MIXED_SERIES, f"found {found}, expected one; give each series a folder of its own")
    first = sources[0]
    for source in sources:
        if (source.plan.rows, source.plan.columns) != (first.plan.rows, first.plan.columns):
            found = f"{source.plan.rows}x{source.plan.columns} pixels where {first.notes.name} has"
            size = f"{first.plan.rows}x{first.plan.columns}"
            raise source.notes.error(Code.SHAPE_MISMATCH, f"found {found} {size}, expected all slices of one size")
        if source.plan.dtype != first.plan.dtype:
            found = f"{source.plan.dtype} pixels where {first.notes.name} has {first.plan.dtype}"
            raise source.notes.error(Code.BAD_DATATYPE, f"found {found}, expected all slices of one type")
    voxels = sum(source.plan.voxels for source in sources)
    if voxels > MAX_VOXELS:
        raise notes.error(Code.TOO_LARGE, f"found a claim of {voxels:,} voxels, expected at most {MAX_VOXELS:,}")


# --- where the slices lie -------------------------------------------------------------------------------------------


def _frames(source: _Source) -> Iterator[_Frame]:
    """The slices of one file, each with its own geometry (per-frame before shared before the file's own attributes)."""
    elements = source.file.elements
    per_frame = elements[tags.PER_FRAME].items if tags.PER_FRAME in elements else ()
    shared = elements[tags.SHARED].items[:1] if tags.SHARED in elements else ()
    if per_frame and len(per_frame) != source.plan.frames:
        found = f"the geometry of {len(per_frame)} frames and pixels of {source.plan.frames}"
        raise source.notes.error(Code.BAD_HEADER, f"found {found}, expected as many of both")
    for index in range(source.plan.frames):
        yield _frame(source, index, [*per_frame[index : index + 1], *shared])


def _frame(source: _Source, index: int, groups: Sequence[Elements]) -> _Frame:
    position = _numbers(source, groups, tags.PLANE_POSITION, tags.POSITION, 3)
    axes = _numbers(source, groups, tags.PLANE_ORIENTATION, tags.ORIENTATION, 6)
    spacing = _numbers(source, groups, tags.PIXEL_MEASURES, tags.SPACING, 2)
    missing = [
        word
        for word, found in (("ImagePositionPatient", position), ("ImageOrientationPatient", axes), ("PixelSpacing", spacing))
        if found is None
    ]
    if position is None or axes is None or spacing is None:
        text = f"found no usable {' nor '.join(missing)}, expected them: without, nothing tells where the slice lies"
        raise source.notes.error(Code.NO_GEOMETRY, text)
    slope = _scale(source, groups, tags.SLOPE, 1.0)
    inter = _scale(source, groups, tags.INTERCEPT, 0.0)
    return _Frame(
        source, index, np.array(position), np.array(axes).reshape(2, 3), (spacing[0], spacing[1]), slope or 1.0, inter
    )


def _stored(source: _Source, groups: Sequence[Elements], group: int, tag: int) -> Elements | None:
    """Whichever set of attributes holds one: a functional group's item, or the file itself."""
    items = [item for g in groups if group in g for item in g[group].items[:1]]
    return next((found for found in (*items, source.file.elements) if tag in found), None)


def _numbers(source: _Source, groups: Sequence[Elements], group: int, tag: int, count: int) -> tuple[float, ...] | None:
    holder = _stored(source, groups, group, tag)
    found = None if holder is None else holder.numbers(tag)
    return found if found is not None and len(found) == count and np.isfinite(found).all() else None


def _scale(source: _Source, groups: Sequence[Elements], tag: int, default: float) -> float:
    """Slope or intercept; what is declared must be a number that float32 can apply, and no slope may be 0."""
    holder = _stored(source, groups, tags.PIXEL_VALUES, tag)
    if holder is None or not len(holder[tag].value):
        return default
    found = holder.numbers(tag)
    if found is None or len(found) != 1 or abs(found[0]) > 1e30 or (tag == tags.SLOPE and abs(found[0]) < 1e-30):
        raise source.notes.error(Code.BAD_SCALE, "found a rescale slope or intercept that is no usable number")
    return found[0]


def _require_one_plane(frames: Sequence[_Frame], notes: Notes) -> None:
    """Axes of unit length and square to each other, positive spacing, and both the same in every slice."""
    first = frames[0]
    for frame in frames:
        own = frame.source.notes
        if np.abs(frame.axes @ frame.axes.T - np.eye(2)).max() > COSINE_TOLERANCE:
            raise own.error(Code.BAD_AFFINE, "found row and column directions that are not two unit vectors at right angles")
        if min(frame.spacing) <= 0 or max(frame.spacing) > 1e4:
            found = f"{frame.spacing[0]:g}x{frame.spacing[1]:g} mm"
            raise own.error(Code.BAD_SPACING, f"found a pixel spacing of {found}, expected positive numbers")
        if np.abs(frame.axes - first.axes).max() > COSINE_TOLERANCE:
            raise notes.error(Code.AFFINE_MISMATCH, "found slices in different orientations (a localiser?), expected one")
        if np.abs(np.subtract(frame.spacing, first.spacing) / first.spacing).max() > SPACING_TOLERANCE:
            raise notes.error(Code.AFFINE_MISMATCH, "found slices of different pixel spacing, expected one")


def _normal(frame: _Frame) -> Vector:
    across = np.cross(frame.axes[0], frame.axes[1])
    return np.asarray(across / np.linalg.norm(across), np.float64)


def _in_order(frames: Sequence[_Frame], notes: Notes) -> list[_Frame]:
    """Sort slices along the normal; they must lie at distinct places, in even steps, in a straight stack square to it."""
    normal = _normal(frames[0])
    ordered = sorted(frames, key=lambda frame: float(frame.position @ normal))
    places = np.array([frame.position for frame in ordered])
    steps = np.diff(places @ normal)
    if not len(steps):
        return ordered
    if steps.min() < SAME_PLACE_MM:
        num_twice = int((steps < SAME_PLACE_MM).sum())
        found = f"{len(ordered)} slices of which {num_twice} lie where another does (echoes, repetitions or copies)"
        raise notes.error(Code.DUPLICATE_SLICE, f"found {found}, expected one slice a place")
    usual = float(np.median(steps))
    if steps.max() > GAP * usual:
        found = f"{len(ordered)} slices {usual:.4g} mm apart, but {steps.max():.4g} mm between two of them"
        raise notes.error(Code.MISSING_SLICE, f"found {found}; a slice is missing")
    even = places[0] + np.arange(len(ordered))[:, None] * (places[-1] - places[0]) / len(steps)
    drift = (places[-1] - places[0]) / len(steps) - normal * usual
    if np.abs(steps - usual).max() > STEP_TOLERANCE * usual or np.abs(places - even).max() > STEP_TOLERANCE * usual:
        found = f"slices from {steps.min():.4g} to {steps.max():.4g} mm apart, or out of line"
        raise notes.error(Code.BAD_SPACING, f"found {found}, expected a straight stack of equal steps")
    if np.abs(drift).max() > STEP_TOLERANCE * usual:
        raise notes.error(Code.BAD_AFFINE, "found slices stacked aslant (a tilted gantry), expected them square to the stack")
    return ordered


def _grid(ordered: Sequence[_Frame], notes: Notes) -> Grid:
    first, last, plan = ordered[0], ordered[-1], ordered[0].source.plan
    step = _lone_step(first, notes) if len(ordered) == 1 else (last.position - first.position) / (len(ordered) - 1)
    lps = np.eye(4)
    lps[:3, 0] = first.axes[0] * first.spacing[1]
    lps[:3, 1] = first.axes[1] * first.spacing[0]
    lps[:3, 2] = step
    lps[:3, 3] = first.position
    _warn_of_spacing(ordered, float(np.linalg.norm(step)), notes)
    return Grid.of((len(ordered), plan.rows, plan.columns), np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)


def _lone_step(frame: _Frame, notes: Notes) -> Vector:
    """The extent of a slice without neighbours: the spacing that is declared, or the thickness, or 1 mm with a warning."""
    declared = _declared_step(frame) or _positive(frame.source.file.elements.numbers(tags.THICKNESS))
    if declared is None:
        notes.warn(Code.SPACING, "found a single slice of unknown thickness; it was taken as 1 mm")
    return _normal(frame) * (declared or 1.0)


def _declared_step(frame: _Frame) -> float | None:
    return _positive(frame.source.file.elements.numbers(tags.STEP))


def _positive(found: tuple[float, ...] | None) -> float | None:
    return found[0] if found is not None and 0 < found[0] < 1e4 else None


def _warn_of_spacing(ordered: Sequence[_Frame], step: float, notes: Notes) -> None:
    """Warn of voxels that no brain scan has, and of a stack twice as coarse as it says: every other slice may be gone."""
    sizes, (low, high) = (step, *ordered[0].spacing), USUAL_SPACING_MM
    if min(sizes) < low or max(sizes) > high:
        found = "x".join(f"{size:.3g}" for size in sizes)
        notes.warn(Code.SPACING, f"found voxels of {found} mm, expected {low:g} to {high:g} mm along each axis")
    declared = _declared_step(ordered[0])
    if len(ordered) > 1 and declared is not None and step > GAP * declared:
        found = f"slices {step:.4g} mm apart where the header says {declared:.4g} mm"
        notes.warn(Code.MISSING_SLICE, f"found {found}; slices may be missing throughout")


# --- what is in them ------------------------------------------------------------------------------------------------


def _stacked(ordered: Sequence[_Frame], grid: Grid) -> NDArray[np.generic]:
    scaled = any((frame.slope, frame.inter) != (1.0, 0.0) for frame in ordered)
    array = np.empty(grid.shape, np.float32 if scaled else ordered[0].source.plan.dtype)
    for place, frame in zip(array, ordered, strict=True):
        stored = read_frame(frame.source.file, frame.source.plan, frame.index, frame.source.notes)
        if scaled:
            wide = np.result_type(stored.dtype, np.float32).type
            place[...] = stored * wide(frame.slope) + wide(frame.inter)
        else:
            place[...] = stored
    return array
