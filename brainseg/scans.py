"""Scans: a manifest row -> a checked Scan: decode all modalities, one grid, crop, checks that quarantine.

The one way in for training, inference and evaluation alike. Voxels keep their stored integer type; what is cut away is
only what lies outside the smallest box that holds everything but background. The label stays on the whole native grid.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.contrasts import suspicion
from brainseg.errors import Code, ScanError
from brainseg.formats import MAX_BYTES, warning
from brainseg.formats.nifti import MAX_SIDE
from brainseg.geometry import Grid
from brainseg.readers import read_files, read_label
from brainseg.regions import LabelMap, label_map

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

LABEL_EXACT, LABEL_NEAR = 1e-6, 1e-3
"""A label stored as float may be off whole numbers by the first without a word, by the second with a warning."""
BLOCK_VOXELS = 1 << 20
OUTLIER_VALUE = 1e18
"""A float beyond this has a square that float32 cannot hold."""
KEPT_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.float32)
"""Types an image keeps; wider ones become float32, which is what a network is given in the end."""


@dataclass(frozen=True)
class Scan:
    """One scan, ready to prepare: the crop of its image in stored type, the grid it came on, its label if it has one.

    `image` is `(C, D, H, W)` cropped to `box` (start, stop along D, H, W of `grid`); `background` is, per modality, the
    value that means "nothing here"; `label` is `(D, H, W)` on the whole grid in the values of the row's label map.
    `duplicated` are modalities equal to an earlier one to the last bit; `warnings` are `CODE: one line` each.
    """

    scan_id: str
    modalities: tuple[str, ...]
    image: NDArray[Any]
    background: tuple[float, ...]
    grid: Grid
    box: Box
    label: NDArray[np.uint8] | None
    duplicated: tuple[str, ...]
    warnings: tuple[str, ...]


def load_scan(row: Mapping[str, Any], *, with_label: bool = True) -> Scan:
    """Read, decode and check the scan of one manifest row. Raises ScanError with the reason it cannot be used."""
    if row.get("problem_code"):
        raise ScanError(Code(row["problem_code"]), str(row.get("problem") or "found unusable while listing"))
    found = read_files(row, with_label=with_label)
    modalities, warnings = tuple(row["modalities"]), list(found.warnings)
    _check_size(found.volumes, found.grid, row["scan_id"])
    background = [_background(volume) for volume in found.volumes]
    box = _extent(found.volumes, background) or _whole(found.grid)
    image = _stacked([volume[_slices(box)] for volume in found.volumes])
    for place, modality in enumerate(modalities):
        volume, empty = found.volumes[place], background[place]
        _check_values(volume, _range(volume, image[place], empty), f"{row['scan_id']}: found", modality, warnings)
    duplicated = _duplicated(image, modalities)
    separate = row["reader"] in ("volumes", "dicom")
    if duplicated and separate:
        text = f"found {', '.join(duplicated)} equal to an earlier modality in every voxel, expected an image of its own"
        raise ScanError(Code.DUPLICATE_CONTENT, f"{row['scan_id']}: {text}; was a file copied under two names?")
    suspect = suspicion(image, modalities, background)
    if suspect:
        warnings.append(warning(Code.MODALITY_SUSPECT, f"{row['scan_id']}: {suspect}"))
    label = None
    if found.label is not None:
        label = _checked_label(found.label, label_map(row["label_map"]), found.label_names, warnings)
        highest = round(float(found.label.max()))
        if separate and highest > label.max():
            text = f"found label value {highest}, which was read as {label.max()}"
            warnings.append(warning(Code.BAD_LABELS, f"{found.label_names[0]}: {text}"))
    return Scan(
        scan_id=row["scan_id"],
        modalities=modalities,
        image=image,
        background=tuple(float(image.dtype.type(value)) for value in background),
        grid=found.grid,
        box=box,
        label=label,
        duplicated=duplicated,
        warnings=_condensed(warnings),
    )


def load_label(row: Mapping[str, Any]) -> tuple[NDArray[np.uint8], Grid] | None:
    """Read and check a row's label alone: `(D, H, W)` in its map's values, and its grid. None where the row lists none.

    For whoever has a prediction already: the image is not read. Raises ScanError with the reason it cannot be used.
    """
    if row.get("problem_code"):
        raise ScanError(Code(row["problem_code"]), str(row.get("problem") or "found unusable while listing"))
    found = read_label(row)
    if found is None:
        return None
    stored, grid, names = found
    return _checked_label(stored, label_map(row["label_map"]), names, []), grid


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_size(volumes: Sequence[NDArray[Any]], grid: Grid, scan_id: str) -> None:
    """Refuse what could not be held as one image, or answered with one mask."""
    size_bytes = sum(volume.size for volume in volumes) * _common_type(volumes).itemsize
    if size_bytes > MAX_BYTES or max(grid.shape) > MAX_SIDE:
        found = f"{len(volumes)} modalities of {grid.describe()}, {size_bytes:,} bytes together"
        most = f"at most {MAX_BYTES:,} bytes and {MAX_SIDE:,} voxels along an axis"
        raise ScanError(Code.TOO_LARGE, f"{scan_id}: found {found}, expected {most}")


def _range(volume: NDArray[Any], crop: NDArray[Any], empty: Any) -> tuple[Any, Any]:
    """Lowest and highest value of a volume that is `empty` outside its crop: a crop that kept its type is sooner gone over."""
    if crop.dtype != volume.dtype:
        return volume.min(), volume.max()
    low, high = crop.min(), crop.max()
    return (low, high) if crop.size == volume.size else (min(low, empty), max(high, empty))


def _check_values(volume: NDArray[Any], values: tuple[Any, Any], found: str, modality: str, warnings: list[str]) -> None:
    """Refuse what no network can use: values that are no numbers, a modality that shows nothing."""
    low, high = values
    if not (np.isfinite(low) and np.isfinite(high)):
        count = volume.size - int(np.isfinite(volume).sum())
        raise ScanError(Code.NON_FINITE, f"{found} {count} voxels of {modality} that are NaN or infinite, expected numbers")
    peak = max(abs(float(low)), abs(float(high)))
    if peak > float(np.finfo(np.float32).max):
        raise ScanError(Code.NON_FINITE, f"{found} {peak:g} in {modality}, expected values that float32 can hold")
    if float(np.float32(high)) - float(np.float32(low)) < float(np.finfo(np.float32).tiny):
        what = "the one value" if low == high else "values that float32 cannot tell apart, up to"
        raise ScanError(Code.EMPTY_VOLUME, f"{found} {what} {high:g} in all of {modality}, expected an image")
    if peak > OUTLIER_VALUE:
        warnings.append(warning(Code.OUTLIER, f"{found} {peak:g} in {modality}; it will dominate any normalisation"))


def _background(volume: NDArray[Any]) -> Any:
    """The value that means "nothing here": 0, unless most of the volume's corners share another (z-scored images)."""
    if volume.dtype.kind == "u":
        return volume.dtype.type(0)
    corners = volume[tuple(slice(None, None, max(size - 1, 1)) for size in volume.shape)]
    values, counts = np.unique(corners, return_counts=True)
    return values[counts.argmax()] if counts.max() * 2 > corners.size else volume.dtype.type(0)


def _extent(volumes: Sequence[NDArray[Any]], background: Sequence[Any]) -> Box | None:
    """Smallest box of voxels in which any volume differs from its background, or None where none does.

    Slice by slice: what a slice needs stays in the cache, and nothing of the volume's size is allocated.
    """
    found = [_shown(volume, empty) for volume, empty in zip(volumes, background, strict=True)]
    seen, plane = (np.logical_or.reduce(each) for each in zip(*found, strict=True))
    return (_span(seen), _span(plane.any(axis=1)), _span(plane.any(axis=0))) if seen.any() else None


def _shown(volume: NDArray[Any], empty: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Slices `(D,)` and lines of sight along them `(H, W)` with a voxel that differs from `empty`.

    What a box needs: of integers, slices between the first and the last such one are taken for such ones unseen.
    """
    seen, plane = np.zeros(len(volume), np.bool_), np.zeros(volume.shape[1:], np.bool_)
    if volume.dtype.kind in "iu" and not empty:
        first = next((index for index, part in enumerate(volume) if part.any()), None)
        if first is None:
            return seen, plane
        last = next(index for index in reversed(range(len(volume))) if volume[index].any())
        seen[first : last + 1] = True
        return seen, np.bitwise_or.reduce(volume[first : last + 1], axis=0) != 0
    differs = np.empty_like(plane)
    for index, part in enumerate(volume):
        np.not_equal(part, empty, out=differs)
        if differs.any():
            seen[index] = True
            np.logical_or(plane, differs, out=plane)
    return seen, plane


def _span(used: NDArray[np.bool_]) -> tuple[int, int]:
    places = np.flatnonzero(used)
    return int(places[0]), int(places[-1]) + 1


def _whole(grid: Grid) -> Box:
    depth, height, width = grid.shape
    return (0, depth), (0, height), (0, width)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _common_type(volumes: Sequence[NDArray[Any]]) -> np.dtype[Any]:
    """One stored type is kept; mixed and wide ones become float32."""
    kinds = {volume.dtype for volume in volumes}
    return volumes[0].dtype if len(kinds) == 1 and volumes[0].dtype in KEPT_TYPES else np.dtype(np.float32)


def _stacked(volumes: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Copy the crops into one contiguous `(C, D, H, W)`."""
    image = np.empty((len(volumes), *volumes[0].shape), _common_type(volumes))
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is refused by name
        for place, volume in zip(image, volumes, strict=True):
            place[...] = volume
    return image


def _duplicated(image: NDArray[Any], modalities: Sequence[str]) -> tuple[str, ...]:
    """Modalities equal to an earlier one in every voxel. The middle slice settles nearly all pairs."""
    middle = image.shape[1] // 2
    return tuple(
        name
        for later, name in enumerate(modalities)
        if any(
            np.array_equal(image[e, middle], image[later, middle]) and np.array_equal(image[e], image[later])
            for e in range(later)
        )
    )


def _checked_label(stored: NDArray[Any], known: LabelMap, names: Sequence[str], warnings: list[str]) -> NDArray[np.uint8]:
    """A label as uint8 in the map's values. Only the box that is not 0 is looked at, since 0 is background in every map."""
    label = np.zeros(stored.shape, np.uint8)
    box = _extent([stored], [stored.dtype.type(0)])
    if box is None:
        if len(stored) > 1:
            warnings.append(warning(Code.EMPTY_MASK, f"{names[0]}: found a label without a single tumour voxel"))
        return label
    try:
        label[_slices(box)] = _in_values(stored[_slices(box)], known, names[0], warnings)
    except ScanError:
        if len(names) == len(stored):
            for plane, name in zip(stored, names, strict=True):
                _in_values(plane, known, name, [])  # a file a slice: raises at the one that is at fault
        raise
    if label.all():
        raise ScanError(Code.BAD_LABELS, f"{names[0]}: found tumour in every voxel, expected background around it")
    return label


def _in_values(part: NDArray[Any], known: LabelMap, name: str, warnings: list[str]) -> NDArray[np.uint8]:
    """A label's part, of any shape, in the map's values. Block by block: nothing wider than a byte a voxel is allocated."""
    label, seen, off = np.empty(part.shape, np.uint8), np.zeros(256, np.bool_), 0.0
    for block in _blocks(part.shape):
        whole, block_off = _whole_numbers(part[block], name)
        low, high = int(whole.min()), int(whole.max())
        if low < 0 or high > 255:
            known.check(np.array([low if low < 0 else high]), name)  # raises: no map knows values beyond a byte
        label[block] = whole
        seen |= np.bincount(label[block].reshape(-1), minlength=256) > 0
        off = max(off, block_off)
    if off > LABEL_EXACT:
        text = f"{name}: found label values {off:.3g} off a whole number; they were rounded"
        warnings.append(warning(Code.MASK_NOT_INTEGER, text))
    values = np.flatnonzero(seen)
    meant = np.arange(256, dtype=np.uint8)
    meant[values] = known.check(values, name)
    return label if (meant[values] == values).all() else meant[label]


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices that cut an array into blocks of about BLOCK_VOXELS, along its last axis but one."""
    rows = max(1, BLOCK_VOXELS // shape[-1])
    for lead in np.ndindex(*shape[:-2]):
        for start in range(0, shape[-2], rows):
            yield (*lead, slice(start, start + rows))


def _whole_numbers(part: NDArray[Any], name: str) -> tuple[NDArray[Any], float]:
    """Whole numbers, and how far they were from being so. Raises ScanError NON_FINITE or MASK_NOT_INTEGER."""
    if part.dtype.kind != "f":
        return part, 0.0
    if not np.isfinite(part).all():
        raise ScanError(Code.NON_FINITE, f"{name}: found NaN or infinite values in a label, expected whole numbers")
    rounded = np.rint(part)
    off = float(np.abs(part - rounded).max())
    if off > LABEL_NEAR:
        raise ScanError(Code.MASK_NOT_INTEGER, f"{name}: found label values {off:.3g} off a whole number; was it interpolated?")
    return np.clip(rounded, -(2.0**31), 2.0**31), off


def _condensed(warnings: Sequence[str]) -> tuple[str, ...]:
    """Say each code once: the first line of it, and how many more there were (a stack repeats itself file by file)."""
    lines: dict[str, list[str]] = {}
    for line in warnings:
        lines.setdefault(line.split(":")[0], []).append(line)
    return tuple(same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "") for same in lines.values())
