"""Archive: write phantoms exactly as the published sets are laid out, a few of them broken.

A scan is first a set of files in memory, name to bytes; `breakage` may spoil it; only then is it written. Names follow
the published patterns and say at a glance that no patient stands behind them (site `PH`, year 2000).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.errors import UsageError
from brainseg.phantom import breakage
from brainseg.phantom.files import Files, encode_csv, encode_hdf5, encode_nifti, encode_picture
from brainseg.phantom.head import MODALITIES, Head, Tumour, make_head

Shape = tuple[int, int, int]

DEFAULT_SHAPE: Shape = (16, 96, 96)

FIGSHARE_FOLDS = 5
FIGSHARE_SLICES = 3
"""Neighbouring slices that one head gives to the figshare layout, numbered one after the other as published."""


def write_archive(
    out: str | Path,
    layout: str,
    *,
    scans: int,
    broken: int = 0,
    shape: Shape = DEFAULT_SHAPE,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """Write `scans` synthetic scans under `out`; return (scan name, what is broken about it) for the `broken` ones.

    `shape` is (D, H, W). The same arguments write the same bytes. Raises UsageError for an unknown layout or counts
    that cannot be met.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout '{layout}'; known: {', '.join(LAYOUTS)}")
    if not 0 <= broken <= scans or scans < 1:
        raise UsageError(f"{scans} scans of which {broken} broken: expected at least 1 scan and no more broken than scans")
    root = Path(out)
    kinds = _choose(layout, scans, broken, seed)
    spoilt: list[tuple[str, str]] = []
    tables: dict[str, list[dict[str, str]]] = {}
    for index, (name, files, rows) in enumerate(LAYOUTS[layout](scans, shape, seed)):
        if index in kinds:
            files = kinds[index].spoil(files, np.random.default_rng((seed, index)))
            spoilt.append((name, kinds[index].says))
        _write(root, files)
        for table, row in rows.items():
            tables.setdefault(table, []).append(row)
    _write(root, {table: encode_csv(rows) for table, rows in tables.items()})
    return spoilt


def _choose(layout: str, scans: int, broken: int, seed: int) -> dict[int, breakage.Breakage]:
    """Which scans to break, and how: anywhere in the archive, the kinds in turn."""
    kinds = breakage.BREAKAGES[layout]
    victims = sorted(np.random.default_rng((seed, scans)).choice(scans, broken, replace=False).tolist())
    return {victim: kinds[i % len(kinds)] for i, victim in enumerate(victims)}


Scan = tuple[str, Files, Mapping[str, dict[str, str]]]
"""Name, files, and the rows that the scan adds to the archive's tables."""


def _heads(shape: Shape, seed: int, count: int | None = None, **how: Any) -> Iterator[Head]:
    index = 0
    while count is None or index < count:
        yield make_head(seed * 100_003 + index, shape, **how)
        index += 1


def _lgg(scans: int, shape: Shape, seed: int) -> Iterator[Scan]:
    """A folder a patient; slices (t1, flair, t1c) as colour TIFF, counted from 1; FLAIR stands in for a missing t1c."""
    for index, head in enumerate(_heads(shape, seed, scans), start=1):
        patient = f"TCGA_PH_{index:04d}"
        name = f"{patient}_2000{1 + index % 12:02d}{1 + index % 28:02d}"
        flair, t1, t1c = (_bytes_of(head.image[MODALITIES.index(m)]) for m in ("flair", "t1", "t1c"))
        stack = np.stack([t1, flair, flair if index % 11 == 0 else t1c], axis=-1)
        files: Files = {}
        for number, (plane, label) in enumerate(zip(stack, head.label, strict=True), start=1):
            files[f"{name}/{name}_{number}.tif"] = encode_picture(plane, "TIFF")
            files[f"{name}/{name}_{number}_mask.tif"] = encode_picture(np.where(label > 0, 255, 0).astype(np.uint8), "TIFF")
        kind = {"diffuse": ("1", "1"), "rim": ("2", "2"), "solid": ("3", "1"), "none": ("", "")}[head.tumour]
        row = {"Patient": patient, "histological_type": kind[0], "neoplasm_histologic_grade": kind[1]}
        yield name, files, {"data.csv": row}


def _figshare(scans: int, shape: Shape, seed: int) -> Iterator[Scan]:
    """Single grey t1c slices with a tumour, up to three of a head side by side; the mask is the tumour without oedema."""
    number = 0
    kinds: tuple[Tumour, ...] = ("rim", "solid")
    heads = (make_head(seed * 100_003 + index, shape, tumour=kinds[index % 2]) for index in range(20 * scans + 20))
    for patient, head in enumerate(heads):
        for plane, core in _best_slices(head):
            number += 1
            if number > scans:
                return
            kind = "meningioma" if head.tumour == "solid" else "glioma"
            fold = str(1 + patient % FIGSHARE_FOLDS)
            row = {"image": str(number), "patient": f"head-{patient}", "tumor_type": kind, "fold": fold}
            files = {f"images/{number}.png": encode_picture(plane, "PNG"), f"masks/{number}.png": encode_picture(core, "PNG")}
            yield str(number), files, {"folds.csv": row}
    raise UsageError(f"heads of shape {shape} show too little tumour for {scans} figshare slices; use a larger shape")


def _best_slices(head: Head) -> Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    core = np.isin(head.label, (1, 4))
    area = core.sum(axis=(1, 2))
    best = [d for d in np.argsort(-area, kind="stable")[:FIGSHARE_SLICES] if area[d] >= 4]
    grey = _bytes_of(head.image[MODALITIES.index("t1c")])
    return [(grey[d], np.where(core[d], 255, 0).astype(np.uint8)) for d in sorted(best)]


def _brats(scans: int, shape: Shape, seed: int) -> Iterator[Scan]:
    """A folder a patient; four skull-stripped int16 modalities and the label, LPS."""
    for index, head in enumerate(_heads(shape, seed, scans, skull=False), start=1):
        name = f"BraTS20_Training_{index:03d}"
        volumes = dict(zip(("flair", "t1", "t1ce", "t2"), head.image, strict=True)) | {"seg": head.label.astype(np.int16)}
        files = {f"{name}/{name}_{m}.nii.gz": encode_nifti(v, head.spacing_mm) for m, v in volumes.items()}
        yield name, files, {}


def _h5slices(scans: int, shape: Shape, seed: int) -> Iterator[Scan]:
    """An HDF5 file a slice, rows and columns being the NIfTI's first and second axis; z-scored over the volume."""
    for index, head in enumerate(_heads(shape, seed, scans, skull=False), start=1):
        values = head.image.astype(np.float64)
        mean, deviation = values.mean(axis=(1, 2, 3), keepdims=True), values.std(axis=(1, 2, 3), keepdims=True)
        image = ((values - mean) / deviation).transpose(1, 3, 2, 0)
        mask = np.stack([head.label == v for v in (1, 2, 4)], axis=-1).astype(np.uint8).swapaxes(1, 2)
        pairs = enumerate(zip(image, mask, strict=True))
        files = {f"data/volume_{index}_slice_{s}.h5": encode_hdf5({"image": i, "mask": m}) for s, (i, m) in pairs}
        yield f"volume_{index}", files, {}


LAYOUTS: Mapping[str, Callable[[int, Shape, int], Iterator[Scan]]] = {
    "lgg": _lgg,
    "figshare": _figshare,
    "brats": _brats,
    "h5slices": _h5slices,
}


def _bytes_of(volume: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Window a volume (D, H, W) to eight bits, the brightest thousandth of it saturated."""
    top = max(float(np.percentile(volume, 99.9)), 1.0)
    return np.asarray(np.clip(volume * (235 / top), 0, 255), np.uint8)


def _write(root: Path, files: Files) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
