"""Readers: the files of a manifest row -> one array a modality on one grid, and the label as stored.

How files become an image is the row's `reader`: `volumes` (a NIfTI a modality), `stack` (a picture a slice) or `h5slices`
(an HDF5 file a slice, image and label together). What the values mean is for `scans` to check.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg import storage
from brainseg.errors import Code, ScanError, StorageError
from brainseg.formats.hdf5 import read_keys
from brainseg.formats.images import read_image
from brainseg.formats.nifti import read_nifti
from brainseg.geometry import Grid
from brainseg.regions import label_map

REMOTE_READS = 8
"""Files of one scan that are fetched from an object store at the same time."""

Row = Mapping[str, Any]
Source = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What a reader brings home: one `(D, H, W)` array per modality and the label as stored, on one grid."""

    volumes: Sequence[NDArray[Any]]
    grid: Grid
    label: NDArray[Any] | None = None
    label_name: str = ""
    warnings: list[str] = field(default_factory=list)


def read_files(row: Row, *, with_label: bool) -> Found:
    """Read and decode every file of a row, the label's only on request. Raises ScanError with the reason."""
    return _READERS[row["reader"]](row, with_label)


def _read_volumes(row: Row, with_label: bool) -> Found:
    """One NIfTI a modality, all on one grid, the label too."""
    by_modality = {source["modality"]: source for source in _sources(row, "image")}
    absent = [m for m in row["modalities"] if m not in by_modality]
    if absent:
        raise ScanError(
            Code.MISSING_MODALITY, f"{row['scan_id']}: found no file for {', '.join(absent)}, expected one a modality"
        )
    labels = _sources(row, "label")[:1] if with_label else []
    sources = [*(by_modality[m] for m in row["modalities"]), *labels]
    decoded = [read_nifti(data, _name(s)) for s, data in zip(sources, _fetch(sources), strict=True)]
    grids = dict(zip([*row["modalities"], *("label" for _ in labels)], [d.grid for d in decoded], strict=True))
    _require_one_grid(grids, row["scan_id"])
    return Found(
        volumes=[d.array for d in decoded[: len(row["modalities"])]],
        grid=decoded[0].grid,
        label=decoded[-1].array if labels else None,
        label_name=_name(labels[0]) if labels else "",
        warnings=[line for d in decoded for line in d.warnings],
    )


def _read_stack(row: Row, with_label: bool) -> Found:
    """One picture a slice, its channels the modalities; label slices likewise, one channel. Positions are unknown."""
    warnings: list[str] = []
    image = _read_slices(row, "image", len(row["modalities"]), warnings)
    labels = _sources(row, "label") if with_label else []
    label = _read_slices(row, "label", 1, warnings)[0] if labels else None
    if label is not None and label.shape != image.shape[1:]:
        found = f"image slices {image.shape[1:]} and label slices {label.shape}"
        raise ScanError(Code.SHAPE_MISMATCH, f"{row['scan_id']}: found {found} (slices, rows, columns), expected the same")
    return Found(list(image), Grid.of(image.shape[1:]), label, _name(labels[0]) if labels else "", warnings)


def _read_slices(row: Row, role: str, channels: int, warnings: list[str]) -> NDArray[Any]:
    """Return `(C, D, H, W)` of all slices in one role."""
    planes: list[NDArray[Any]] = []
    sources = _ordered(row, role)
    for source, data in zip(sources, _fetch(sources), strict=True):
        pixels, odd = read_image(data, _name(source))
        planes.append(_as_channels(pixels, channels, _name(source)))
        warnings.extend(odd)
    return _joined(planes, [_name(source) for source in sources])


def _as_channels(pixels: NDArray[Any], channels: int, name: str) -> NDArray[Any]:
    """View `(H, W)` or `(H, W, C)` pixels as `(C, H, W)`; grey stored as three equal channels is grey."""
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if len(planes) == channels:
        return planes
    if channels > 1:
        raise ScanError(Code.SHAPE_MISMATCH, f"{name}: found {len(planes)} channels, expected {channels}, one a modality")
    if (planes[1:] != planes[0]).any():
        raise ScanError(
            Code.NOT_GREY, f"{name}: found {len(planes)} channels that differ (a colour picture), expected grey values"
        )
    return planes[:1]


def _read_h5slices(row: Row, with_label: bool) -> Found:
    """One HDF5 file a slice: `image` (i, j, modality), `mask` (i, j, label value) one-hot, both indexed as the NIfTI is."""
    wanted = with_label and row["has_label"]
    values = [v for v in sorted(label_map(row["label_map"]).values) if v]
    planes: list[NDArray[Any]] = []
    masks: list[NDArray[Any]] = []
    warnings: list[str] = []
    sources = _ordered(row, "both")
    for source, data in zip(sources, _fetch(sources), strict=True):
        name = _name(source)
        arrays, odd = read_keys(data, ["image", "mask"] if wanted else ["image"], name)
        warnings.extend(odd)
        planes.append(_transposed(arrays["image"], len(row["modalities"]), "image", name))
        if wanted:
            masks.append(_from_one_hot(_transposed(arrays["mask"], len(values), "mask", name), values, name)[None])
    names = [_name(source) for source in sources]
    image = _joined(planes, names)
    label = _joined(masks, names)[0] if wanted else None
    if label is not None and label.shape != image.shape[1:]:
        found = f"image slices {image.shape[1:]} and mask slices {label.shape}"
        raise ScanError(Code.SHAPE_MISMATCH, f"{row['scan_id']}: found {found} (slices, rows, columns), expected the same")
    return Found(list(image), Grid.of(image.shape[1:]), label, names[0], warnings)


def _transposed(array: NDArray[Any], channels: int, key: str, name: str) -> NDArray[Any]:
    """`(i, j, C)` as stored -> `(C, H, W)` with H = j, W = i; doubles become float32."""
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ScanError(
            Code.SHAPE_MISMATCH, f"{name}: found '{key}' of shape {array.shape}, expected (rows, columns, {channels})"
        )
    planes = array.transpose(2, 1, 0)
    if array.dtype != np.float64:
        return planes
    with np.errstate(over="ignore"):
        return planes.astype(np.float32)


def _from_one_hot(planes: NDArray[Any], values: Sequence[int], name: str) -> NDArray[np.uint8]:
    """`(V, H, W)` of 0 and 1, at most one 1 a pixel -> `(H, W)` of the label values the planes stand for."""
    hot = planes == 1
    if ((planes != 0) & ~hot).any() or (hot.sum(axis=0) > 1).any():
        raise ScanError(Code.BAD_LABELS, f"{name}: found a mask that is not one-hot, expected 0 and 1, one class a pixel")
    label = np.zeros(planes.shape[1:], np.uint8)
    for value, plane in zip(values, hot, strict=True):
        label[plane] = value
    return label


_READERS: Mapping[str, Callable[[Row, bool], Found]] = {
    "volumes": _read_volumes,
    "stack": _read_stack,
    "h5slices": _read_h5slices,
}


def _sources(row: Row, role: str) -> list[Source]:
    return [source for source in row["sources"] if source["role"] == role]


def _ordered(row: Row, role: str) -> list[Source]:
    """The slices of a role in order; every position from 0 must be there once."""
    sources = sorted(_sources(row, role), key=lambda source: source["index"])
    found, expected = [source["index"] for source in sources], list(range(len(_slice_positions(row))))
    if found != expected or not found:
        raise ScanError(
            Code.MISSING_SLICE, f"{row['scan_id']}: found {len(found)} {role} slices, expected {len(expected)}, one a position"
        )
    return sources


def _slice_positions(row: Row) -> set[int]:
    return {source["index"] for source in row["sources"]}


def _name(source: Source) -> str:
    return storage.name_of(source["uri"])


def _fetch(sources: Sequence[Source]) -> list[bytes]:
    """Read all files, several at a time where each costs a round trip."""
    if len(sources) > 1 and storage.is_remote(sources[0]["uri"]):
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            return list(pool.map(_read, sources))
    return [_read(source) for source in sources]


def _read(source: Source) -> bytes:
    uri, name = source["uri"], _name(source)
    try:
        return storage.read_bytes(uri)
    except StorageError as error:
        reason = str(error).replace(uri, name)
        raise ScanError(_why_unreadable(uri), f"{name}: {reason}") from error


def _why_unreadable(uri: str) -> Code:
    try:
        if storage.exists(uri):
            return Code.UNREADABLE
        return Code.NOT_A_FILE if storage.is_dir(uri) else Code.MISSING_FILE
    except StorageError:
        return Code.UNREADABLE


def _joined(planes: Sequence[NDArray[Any]], names: Sequence[str]) -> NDArray[Any]:
    """Stack `(C, H, W)` slices to `(C, D, H, W)`; all must agree in size and type."""
    for plane, name in zip(planes, names, strict=True):
        if plane.shape != planes[0].shape:
            found = f"{plane.shape[1:]} pixels where {names[0]} has {planes[0].shape[1:]}"
            raise ScanError(Code.SHAPE_MISMATCH, f"{name}: found {found}, expected all slices of one size")
        if plane.dtype != planes[0].dtype:
            found = f"{plane.dtype} in {name} and {planes[0].dtype} in {names[0]}"
            raise ScanError(Code.BAD_DATATYPE, f"{name}: found {found}, expected all slices of one type")
    return np.ascontiguousarray(np.stack(planes, axis=1))


def _require_one_grid(grids: Mapping[str, Grid], scan_id: str) -> None:
    first = next(iter(grids.values()))
    if all(grid.same_as(first) for grid in grids.values()):
        return
    shapes_differ = any(grid.shape != first.shape for grid in grids.values())
    found = "; ".join(f"{name} is {_placed(grid)}" for name, grid in grids.items())
    code = Code.SHAPE_MISMATCH if shapes_differ else Code.AFFINE_MISMATCH
    raise ScanError(code, f"{scan_id}: found {found}; expected modalities and label on one grid; resample them to one first")


def _placed(grid: Grid) -> str:
    if grid.affine is None:
        return grid.describe()
    return f"{grid.describe()} from ({', '.join(f'{grid.affine[i]:.6g}' for i in (3, 7, 11))})"
