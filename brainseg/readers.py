"""Readers: the files of a manifest row -> one array a modality on one grid, and the label as stored.

How files become an image is the row's `reader`: `volumes` (a NIfTI a modality), `stack` (a picture a slice), `h5slices`
(an HDF5 file a slice, image and label together) or `dicom` (a series a modality, the label a NIfTI). What the values mean is
for `scans` to check.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg import ahead, storage
from brainseg.errors import Code, ScanError, StorageError, one_line
from brainseg.formats import MAX_BYTES, MODEST_BYTES, MOST_RATIO, Decoded
from brainseg.formats.dicom import read_series
from brainseg.formats.hdf5 import read_keys
from brainseg.formats.images import read_image
from brainseg.formats.nifti import read_nifti
from brainseg.geometry import Grid
from brainseg.regions import label_map

Row = Mapping[str, Any]
Source = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What a reader brings home: one `(D, H, W)` array per modality and the label as stored, on one grid.

    `label_names` are the label's files: one, or one a slice.
    """

    volumes: Sequence[NDArray[Any]]
    grid: Grid
    label: NDArray[Any] | None = None
    label_names: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)


class _Room:
    """How many bytes the arrays of one scan may still take: many files that are each modest are a bomb all the same."""

    def __init__(self, scan_id: str) -> None:
        self.scan_id = scan_id
        self.left = MAX_BYTES
        self.packed = 0

    def for_image(self, data: bytes) -> int:
        """The most that the next file, an image, may decode to."""
        self.packed += len(data)
        taken = MAX_BYTES - self.left
        return min(self.left, max(MODEST_BYTES, MOST_RATIO * self.packed) - taken)

    def take(self, array: NDArray[Any], at_most: int) -> None:
        """Count an array in. Raises ScanError TOO_LARGE where there is no room for it."""
        self.left -= array.nbytes
        if array.nbytes > at_most:
            found = f"found voxels of {MAX_BYTES - self.left:,} bytes in files of {self.packed:,} bytes"
            raise ScanError(Code.TOO_LARGE, f"{self.scan_id}: {found}, expected fewer than {MAX_BYTES:,}, or larger files")


def read_files(row: Row, *, with_label: bool) -> Found:
    """Read and decode every file of a row, the label's only on request. Raises ScanError with the reason."""
    listed = sum(source.get("size_bytes") or 0 for source in row["sources"])
    if listed > MAX_BYTES:
        raise ScanError(Code.TOO_LARGE, f"{row['scan_id']}: found files of {listed:,} bytes, expected at most {MAX_BYTES:,}")
    return _READERS[row["reader"]](row, with_label)


def read_label(row: Row) -> tuple[NDArray[Any], Grid, tuple[str, ...]] | None:
    """Read a row's label alone, as stored `(D, H, W)`, with its grid and file names; None where the row lists none.

    The image's files are not touched: they may be gone. Raises ScanError with the reason.
    """
    if not row["has_label"]:
        return None
    if row["reader"] == "h5slices":
        label, names = _h5_labels(row)
        return label, Grid.of(label.shape), names
    sources = _sources(row, "label")
    if row["reader"] in ("volumes", "dicom"):
        decoded = read_nifti(_read(sources[0]), _name(sources[0]))
        return decoded.array, decoded.grid, (_name(sources[0]),)
    stack = _read_slices(row, "label", 1, [])[0]
    return stack, Grid.of(stack.shape), _names(_ordered(row, "label"))


def _h5_labels(row: Row) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    values = [v for v in sorted(label_map(row["label_map"]).values) if v]
    sources = _ordered(row, "both")
    names = [_name(source) for source in sources]
    planes = []
    for name, data in zip(names, _fetch(sources), strict=True):
        hot = read_keys(data, ["mask"], name)[0]["mask"]
        planes.append(_from_one_hot(_transposed(hot, len(values), "mask", name), values, name)[None])
    return _joined(planes, names)[0], tuple(names)


def _read_volumes(row: Row, with_label: bool) -> Found:
    """One NIfTI a modality, all on one grid, the label too."""
    by_modality = {source["modality"]: source for source in _sources(row, "image")}
    _require_modalities(row, by_modality)
    labels = _sources(row, "label")[:1] if with_label else []
    sources = [*(by_modality[m] for m in row["modalities"]), *labels]
    decoded, room = [], _Room(row["scan_id"])
    for source, data in zip(sources, _fetch(sources), strict=True):
        at_most = room.left if source["role"] == "label" else room.for_image(data)
        decoded.append(read_nifti(data, _name(source), at_most))
        room.take(decoded[-1].array, at_most)
    return _on_one_grid(row, decoded, labels)


def _read_dicom(row: Row, with_label: bool) -> Found:
    """One DICOM series a modality, all on one grid, the label a NIfTI on the same."""
    by_modality: dict[str, list[Source]] = {}
    for source in sorted(_sources(row, "image"), key=lambda source: source["index"]):
        by_modality.setdefault(source["modality"], []).append(source)
    _require_modalities(row, by_modality)
    decoded, room = [], _Room(row["scan_id"])
    for modality in row["modalities"]:
        decoded.append(_read_series(row, modality, by_modality[modality]))
        room.take(decoded[-1].array, room.left)
    labels = _sources(row, "label")[:1] if with_label else []
    decoded += [read_nifti(_read(source), _name(source), room.left) for source in labels]
    return _on_one_grid(row, decoded, labels)


def _read_series(row: Row, modality: str, sources: Sequence[Source]) -> Decoded:
    files = [(_name(source), data) for source, data in zip(sources, _fetch(sources), strict=True)]
    return read_series(files, f"{row['scan_id']}: {modality}")


def _require_modalities(row: Row, there: Collection[str]) -> None:
    absent = [m for m in row["modalities"] if m not in there]
    if absent:
        raise ScanError(
            Code.MISSING_MODALITY, f"{row['scan_id']}: found no file for {', '.join(absent)}, expected one a modality"
        )


def _on_one_grid(row: Row, decoded: Sequence[Decoded], labels: Sequence[Source]) -> Found:
    """A volume a modality, then the label's where there is one; all must lie on one grid."""
    grids = dict(zip([*row["modalities"], *("label" for _ in labels)], [d.grid for d in decoded], strict=True))
    _require_one_grid(grids, row["scan_id"])
    return Found(
        volumes=[d.array for d in decoded[: len(row["modalities"])]],
        grid=decoded[0].grid,
        label=decoded[-1].array if labels else None,
        label_names=_names(labels),
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
    return Found(list(image), Grid.of(image.shape[1:]), label, _names(_ordered(row, "label") if labels else ()), warnings)


def _read_slices(row: Row, role: str, channels: int, warnings: list[str]) -> NDArray[Any]:
    """Return `(C, D, H, W)` of all slices in one role."""
    planes: list[NDArray[Any]] = []
    sources, room = _ordered(row, role), _Room(row["scan_id"])
    for source, data in zip(sources, _fetch(sources), strict=True):
        pixels, odd = read_image(data, _name(source))
        room.take(pixels, room.left if role == "label" else room.for_image(data))
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
    sources, room = _ordered(row, "both"), _Room(row["scan_id"])
    for source, data in zip(sources, _fetch(sources), strict=True):
        name = _name(source)
        arrays, odd = read_keys(data, ["image", "mask"] if wanted else ["image"], name)
        warnings.extend(odd)
        planes.append(_transposed(arrays["image"], len(row["modalities"]), "image", name))
        room.take(planes[-1], room.for_image(data))
        if wanted:
            masks.append(_from_one_hot(_transposed(arrays["mask"], len(values), "mask", name), values, name)[None])
    names = [_name(source) for source in sources]
    image = _joined(planes, names)
    label = _joined(masks, names)[0] if wanted else None
    if label is not None and label.shape != image.shape[1:]:
        found = f"image slices {image.shape[1:]} and mask slices {label.shape}"
        raise ScanError(Code.SHAPE_MISMATCH, f"{row['scan_id']}: found {found} (slices, rows, columns), expected the same")
    return Found(list(image), Grid.of(image.shape[1:]), label, tuple(names), warnings)


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
    "dicom": _read_dicom,
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


def _names(sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(_name(source) for source in sources)


def _fetch(sources: Sequence[Source]) -> list[bytes]:
    """Read all files, several at a time where each costs a round trip and nobody has asked for them yet."""
    if len(sources) > 1 and storage.is_remote(sources[0]["uri"]) and "fetched" not in sources[0]:
        with ThreadPoolExecutor(ahead.AT_ONCE) as pool:
            return list(pool.map(_read, sources))
    return [_read(source) for source in sources]


def _read(source: Source) -> bytes:
    uri, name = source["uri"], _name(source)
    try:
        return ahead.bytes_of(source)
    except StorageError as error:
        _, found, reason = str(error).rpartition(" ".join(name.split()))  # what stands before is the path
        raise ScanError(_why_unreadable(uri), f"{name}: could not be read{one_line(reason) if found else ''}") from error


def _why_unreadable(uri: str) -> Code:
    try:
        if storage.exists(uri):
            return Code.UNREADABLE
        return Code.NOT_A_FILE if storage.is_dir(uri) or _is_there(uri) else Code.MISSING_FILE
    except StorageError:
        return Code.UNREADABLE


def _is_there(uri: str) -> bool:
    """Whether something bears this name: a pipe, a socket, a device, a link to nothing."""
    return not storage.is_remote(uri) and os.path.lexists(uri)


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
