"""View: one scan of a run becomes a page of its own: every slice, with image, label and prediction to switch on and off.

The mask comes from the run's Parquet. Image and label are read from the archive as the manifest lists them; where that cannot
be done the page says so and shows the mask alone. Slices run from feet to head, the patient's right is on the left, as far
as the files record it.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from brainseg import storage
from brainseg.errors import ScanError, StorageError, UsageError
from brainseg.geometry import Grid, canonical_axes, to_canonical
from brainseg.masks import check_mask, decode_mask, mask_grid
from brainseg.regions import LABEL_MAPS
from brainseg.report import figures
from brainseg.report.advice import what_to_do
from brainseg.report.facts import SPLITS
from brainseg.report.page import template
from brainseg.report.rows import plain
from brainseg.scans import Scan, load_label, load_scan
from brainseg.thumbnails import preferred_modality

LONG_SIDE_PX = 320
BUDGET_BYTES = 12_000_000
"""What the pictures of a page may weigh: 155 slices of four modalities fit."""

QUALITIES = (80, 60, 40, 25)
MARGIN = 6
Row = Mapping[str, Any]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class ViewSummary:
    """What was written, and what the page could not show."""

    uri: str
    size_bytes: int
    remarks: Sequence[str]


@dataclass(frozen=True)
class Seen:
    """One scan as the page shows it, all in display order: intensities (C, D, H, W) or None, region masks (R, D, H, W)."""

    modalities: Sequence[str]
    image: NDArray[np.uint8] | None
    label: Masks | None
    prediction: Masks
    pixel: tuple[float, float]
    """Height and width of a pixel, in mm where that is known."""


def build_view(run: str, scan_id: str, out: str) -> ViewSummary:
    """Write the page of one scan to `out`. UsageError where the run does not hold the scan; RunError for a damaged mask."""
    info, row = _row_of(run, scan_id)
    remarks: list[str] = []
    regions = list((info.get("model") or {}).get("regions") or [e["region"] for e in row["regions"] or ()])
    data = None
    if row["status"] == "ok":
        seen = _seen(run, row, info, regions, remarks)
        data = _data(seen, regions)
    page = template("view.html.j2").render(
        row=plain({key: value for key, value in row.items() if key not in ("mask", "thumbnail")}),
        run=info,
        uri=run,
        split=_split(info, row),
        remarks=remarks,
        advice=what_to_do(row["error_code"]) if row["status"] != "ok" else None,
        data=data,
        regions=regions,
    )
    target = storage.absolute(out)
    storage.write_bytes(target, page.encode("utf-8"))
    return ViewSummary(target, len(page.encode("utf-8")), tuple(remarks))


def _row_of(run: str, scan_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and the scan's row, the one written last; its figures are those of a later evaluation where there was one."""
    place = storage.join(run, "run.json")
    if not storage.exists(place):
        raise UsageError(f"{run} is not a run: it has no run.json; expected a folder that `brainseg segment` wrote")
    found: list[tuple[Any, str]] = []
    for entry in storage.list_files(storage.join(run, "scans")):
        if entry.uri.endswith(".parquet"):
            keys = storage.read_table(entry.uri, ["scan_id", "attempt", "finished_at"])
            chosen = keys.filter(pc.equal(keys["scan_id"], scan_id)).to_pylist()
            found += [((row["attempt"], row["finished_at"]), entry.uri) for row in chosen]
    if not found:
        raise UsageError(f"{run} has no scan '{scan_id}'; metrics.parquet lists those it has")
    part = max(found)[1]
    table = storage.read_table(part)
    row: dict[str, Any] = table.filter(pc.equal(table["scan_id"], scan_id)).to_pylist()[-1]
    if row["status"] == "ok":
        check_mask(row, part)
    return dict(storage.read_json(place)), {**row, "regions": _entries(run, row)}


def _entries(run: str, row: Row) -> list[dict[str, Any]]:
    """The figures that count: those of `metrics.parquet` where the run was evaluated anew."""
    stored: list[dict[str, Any]] = list(row["regions"] or ())
    if not storage.exists(storage.join(run, "evaluation.json")):
        return stored
    table = storage.read_table(storage.join(run, "metrics.parquet"))
    anew: list[dict[str, Any]] = table.filter(pc.equal(table["scan_id"], row["scan_id"])).to_pylist()
    return anew or stored


def _split(info: Row, row: Row) -> str:
    split = (info.get("model") or {}).get("split") or {}
    who = row["scan_id"] if split.get("unit") == "scan" else row["patient_id"]
    return next((side for side in SPLITS if who in (split.get(side) or ())), "outside")


# --- what can be seen -----------------------------------------------------------------------------------------------


def _seen(run: str, row: Row, info: Row, regions: Sequence[str], remarks: list[str]) -> Seen:
    grid, written_in = mask_grid(row), (info.get("model") or {}).get("label_map")
    scan, label = _from_archive(run, row, grid, remarks)
    prediction = _masks(to_canonical(decode_mask(row), grid), written_in or row["label_map"], regions)
    truth = None if label is None else _masks(to_canonical(label, grid), row["label_map"], regions)
    image = None if scan is None else _bytes(scan)
    order, _ = canonical_axes(grid)
    spacing = grid.spacing_mm or (1.0, 1.0, 1.0)
    return _framed(
        Seen(
            () if scan is None else scan.modalities,
            image,
            truth,
            prediction,
            (spacing[order[1]] or 1.0, spacing[order[2]] or 1.0),
        )
    )


def _from_archive(run: str, row: Row, grid: Grid, remarks: list[str]) -> tuple[Scan | None, NDArray[np.uint8] | None]:
    """Scan and label as far as they can be reached and lie on the mask's grid; what cannot is said in `remarks`."""
    listed = _manifest_row(run, row["scan_id"])
    if listed is None:
        remarks.append("Image and label are not shown: the run keeps no manifest that names their files.")
        return None, None
    scan: Scan | None = None
    try:
        scan = load_scan(listed)
        label = scan.label
    except (ScanError, StorageError) as error:
        remarks.append(f"The image is not shown, because it cannot be read now: {error}")
        label = _label_alone(listed, grid, remarks)
    if scan is not None and not grid.same_as(scan.grid):
        remarks.append("Image and label are not shown: they lie on another grid than the mask, so the files have changed.")
        return None, None
    return scan, label


def _label_alone(listed: Row, grid: Grid, remarks: list[str]) -> NDArray[np.uint8] | None:
    try:
        found = load_label(listed)
    except (ScanError, StorageError) as error:
        remarks.append(f"The label is not shown, because it cannot be read now: {error}")
        return None
    return found[0] if found is not None and grid.same_as(found[1]) else None


def _manifest_row(run: str, scan_id: str) -> dict[str, Any] | None:
    place = storage.join(run, "manifest.parquet")
    if not storage.exists(place):
        return None
    table = storage.read_table(place)
    rows: list[dict[str, Any]] = table.filter(pc.equal(table["scan_id"], scan_id)).to_pylist()
    return rows[0] if rows else None


def _masks(volume: NDArray[np.uint8], meaning: str, regions: Sequence[str]) -> Masks:
    """Region masks (R, D, H, W); all that is not background, once, for an unknown map."""
    known = LABEL_MAPS.get(meaning)
    if known is None or not all(name in known.regions for name in regions):
        return volume[None] > 0
    return known.masks(volume, regions)


def _bytes(scan: Scan) -> NDArray[np.uint8]:
    """Every modality as 8-bit grey on the whole grid (C, D, H, W), from the 1st to the 99.5th percentile of the head."""
    whole = np.zeros((len(scan.modalities), *scan.grid.shape), np.uint8)
    inside = tuple(slice(*ends) for ends in scan.box)
    for channel, (volume, nothing) in enumerate(zip(scan.image, scan.background, strict=True)):
        head = volume[volume != nothing][::7]
        low, high = np.percentile(head if head.size else volume, (1, 99.5))
        scaled = (volume.astype(np.float32) - low) * (255.0 / max(high - low, 1e-6))
        whole[channel][inside] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return to_canonical(whole, scan.grid)


def _framed(seen: Seen) -> Seen:
    """Cut in the plane to what is not empty, with a small margin; without an image the whole plane stays."""
    if seen.image is None:
        return seen
    used: Masks = np.any(seen.image, axis=(0, 1)) | np.any(seen.prediction, axis=(0, 1))
    if seen.label is not None:
        used |= np.any(seen.label, axis=(0, 1))
    if not used.any():
        return seen
    rows, columns = (np.flatnonzero(np.any(used, axis=axis)) for axis in (1, 0))
    h = slice(max(int(rows[0]) - MARGIN, 0), int(rows[-1]) + MARGIN + 1)
    w = slice(max(int(columns[0]) - MARGIN, 0), int(columns[-1]) + MARGIN + 1)
    label = None if seen.label is None else seen.label[..., h, w]
    return Seen(seen.modalities, seen.image[..., h, w], label, seen.prediction[..., h, w], seen.pixel)


# --- as the page's script reads it ----------------------------------------------------------------------------------


def _data(seen: Seen, regions: Sequence[str]) -> dict[str, Any]:
    """Size, the first slice to show, areas, outlines and pictures, slice by slice."""
    _, depth, height, width = seen.prediction.shape
    areas = {"prediction": _areas(seen.prediction), "label": None if seen.label is None else _areas(seen.label)}
    most = areas["label"] if areas["label"] and any(areas["label"]) else areas["prediction"]
    return {
        "size": [height, width, seen.pixel[0] / seen.pixel[1]],
        "start": int(np.argmax(most)) if most and any(most) else depth // 2,
        "depth": depth,
        "regions": list(regions),
        "areas": areas,
        "label": None if seen.label is None else _outlines(seen.label),
        "prediction": _outlines(seen.prediction),
        "modalities": list(seen.modalities),
        "first": preferred_modality(seen.modalities),
        "images": [] if seen.image is None else _pictures(seen.image),
    }


def _areas(masks: Masks) -> list[int]:
    """Pixels of any region in each slice."""
    return [int(n) for n in np.count_nonzero(np.any(masks, axis=0), axis=(1, 2))]


def _outlines(masks: Masks) -> list[list[str]]:
    """A path a region for each slice; none for a slice without any."""
    return [[figures.outline(mask) for mask in masks[:, d]] if masks[:, d].any() else [] for d in range(masks.shape[1])]


def _pictures(image: NDArray[np.uint8]) -> list[list[str]]:
    """WebP as base64 of every slice of every modality, at the best quality that fits the budget."""
    for quality in QUALITIES:
        pictures = [[base64.b64encode(_webp(plane, quality)).decode() for plane in volume] for volume in image]
        if sum(len(picture) for volume in pictures for picture in volume) <= BUDGET_BYTES:
            break
    return pictures


def _webp(plane: NDArray[np.uint8], quality: int) -> bytes:
    height, width = plane.shape
    picture = Image.fromarray(np.ascontiguousarray(plane))
    scale = LONG_SIDE_PX / max(height, width)
    if scale < 1:
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()
