"""Scans: a manifest row -> a checked Scan: decode all modalities, one grid, crop, checks that quarantine.

The one way in for training, inference and evaluation alike. Voxels keep their stored integer type; what is cut away is
only what lies outside the smallest box that holds everything but background. The label stays on the whole native grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats import warning
from brainseg.geometry import Grid
from brainseg.readers import read_files
from brainseg.regions import LabelMap, label_map

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

LABEL_EXACT, LABEL_NEAR = 1e-6, 1e-3
"""A label stored as float may be off whole numbers by the first without a word, by the second with a warning."""
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
    _check_values(found.volumes, modalities, row["scan_id"], warnings)
    background = [_background(volume) for volume in found.volumes]
    box = _extent(found.volumes, background) or _whole(found.grid)
    image = _stacked([volume[_slices(box)] for volume in found.volumes])
    duplicated = _duplicated(image, modalities)
    if duplicated and row["reader"] == "volumes":
        text = f"{row['scan_id']}: found {', '.join(duplicated)} equal to an earlier modality in every voxel"
        warnings.append(warning(Code.DUPLICATE_CONTENT, text))
    label = None
    if found.label is not None:
        label = _checked_label(found.label, label_map(row["label_map"]), found.label_name, warnings)
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


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_values(volumes: Sequence[NDArray[Any]], modalities: Sequence[str], scan_id: str, warnings: list[str]) -> None:
    """Refuse what no network can use: values that are no numbers, a modality that shows nothing."""
    for volume, modality in zip(volumes, modalities, strict=True):
        low, high = volume.min(), volume.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            count = volume.size - int(np.isfinite(volume).sum())
            raise ScanError(
                Code.NON_FINITE, f"{scan_id}: found {count} voxels of {modality} that are NaN or infinite, expected numbers"
            )
        if low == high:
            raise ScanError(
                Code.EMPTY_VOLUME, f"{scan_id}: found the one value {low:g} in all of {modality}, expected an image"
            )
        peak = max(abs(float(low)), abs(float(high)))
        if peak > float(np.finfo(np.float32).max):
            raise ScanError(Code.NON_FINITE, f"{scan_id}: found {peak:g} in {modality}, expected values that float32 can hold")
        if peak > OUTLIER_VALUE:
            warnings.append(
                warning(Code.OUTLIER, f"{scan_id}: found {peak:g} in {modality}; it will dominate any normalisation")
            )


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
    depth, height, width = volumes[0].shape
    seen, plane, differs = np.zeros(depth, np.bool_), np.zeros((height, width), np.bool_), np.empty((height, width), np.bool_)
    for volume, empty in zip(volumes, background, strict=True):
        for index, part in enumerate(volume):
            np.not_equal(part, empty, out=differs)
            if differs.any():
                seen[index] = True
                np.logical_or(plane, differs, out=plane)
    if not seen.any():
        return None
    return _span(seen), _span(np.any(plane, axis=1)), _span(np.any(plane, axis=0))


def _span(used: NDArray[np.bool_]) -> tuple[int, int]:
    places = np.flatnonzero(used)
    return int(places[0]), int(places[-1]) + 1


def _whole(grid: Grid) -> Box:
    depth, height, width = grid.shape
    return (0, depth), (0, height), (0, width)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _stacked(volumes: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Copy the crops into one contiguous `(C, D, H, W)`; one stored type is kept, mixed and wide ones become float32."""
    kinds = {volume.dtype for volume in volumes}
    dtype = volumes[0].dtype if len(kinds) == 1 and volumes[0].dtype in KEPT_TYPES else np.dtype(np.float32)
    image = np.empty((len(volumes), *volumes[0].shape), dtype)
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


def _checked_label(stored: NDArray[Any], known: LabelMap, name: str, warnings: list[str]) -> NDArray[np.uint8]:
    """A label as uint8 in the map's values. Only the box that is not 0 is looked at, since 0 is background in every map."""
    label = np.zeros(stored.shape, np.uint8)
    box = _extent([stored], [stored.dtype.type(0)])
    if box is not None:
        part = stored[_slices(box)]
        label[_slices(box)] = known.check(_whole_numbers(part, name, warnings) if part.dtype.kind == "f" else part, name)
    elif len(stored) > 1:
        warnings.append(warning(Code.EMPTY_MASK, f"{name}: found a label without a single tumour voxel"))
    return label


def _whole_numbers(part: NDArray[Any], name: str, warnings: list[str]) -> NDArray[np.int64]:
    if not np.isfinite(part).all():
        raise ScanError(Code.NON_FINITE, f"{name}: found NaN or infinite values in a label, expected whole numbers")
    rounded = np.rint(part)
    off = float(np.abs(part - rounded).max())
    if off > LABEL_NEAR:
        raise ScanError(Code.MASK_NOT_INTEGER, f"{name}: found label values {off:.3g} off a whole number; was it interpolated?")
    if off > LABEL_EXACT:
        warnings.append(
            warning(Code.MASK_NOT_INTEGER, f"{name}: found label values {off:.3g} off a whole number; they were rounded")
        )
    whole: NDArray[np.int64] = np.clip(rounded, -(2.0**31), 2.0**31).astype(np.int64)
    return whole


def _condensed(warnings: Sequence[str]) -> tuple[str, ...]:
    """Say each code once: the first line of it, and how many more there were (a stack repeats itself file by file)."""
    lines: dict[str, list[str]] = {}
    for line in warnings:
        lines.setdefault(line.split(":")[0], []).append(line)
    return tuple(same[0] + (f" (and {len(same) - 1} more like it)" if len(same) > 1 else "") for same in lines.values())
