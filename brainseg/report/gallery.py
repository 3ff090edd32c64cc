"""Gallery: which scans are worth a look, and their pictures, from the thumbnails in the rows.

Only the parts that hold a chosen scan are opened, so that the page of a large cohort costs no more than that of a small one.
Pictures are carried as WebP, as fine as the page's budget allows: 192 pixels for a hundred scans, 96 for a thousand.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from brainseg import storage
from brainseg.errors import ScanError, StorageError
from brainseg.formats.images import read_image
from brainseg.regions import LABEL_MAPS
from brainseg.report import figures
from brainseg.report.agreement import surprise
from brainseg.report.facts import Cohort
from brainseg.report.rows import largest_per_scan, mean_dice_of_scans, mean_per_scan

PER_SHELF = 4
Shelf = tuple[str, list[int]]

BUDGET_BYTES, PROBED = 1_750_000, 12
"""What all pictures of a page may weigh, and how many are tried at each size before it is chosen."""

SIZES = ((192, 80), (192, 60), (160, 50), (128, 50), (112, 45), (96, 40), (80, 35))
"""Long side in pixels and WebP quality, the finest first."""

MOST_PICTURES, MANY_SCANS, OF_MANY = 1000, 1500, 400
"""Pictures of a page; of a cohort of more than `MANY_SCANS` scans only `OF_MANY`, each from another part of the run."""

PARTS_AT_ONCE = 4
SURPRISING = 0.25
"""Ranks that lie nearer to each other surprise nobody."""


@dataclass(frozen=True)
class Thumbnail:
    """One scan's slice with the most tumour: grey pixels (H, W), and the masks (R, H, W) of label, or None, and prediction."""

    slice_index: int
    modality: str
    pixels: NDArray[np.uint8]
    label: NDArray[np.bool_] | None
    prediction: NDArray[np.bool_]


@dataclass(frozen=True)
class Picture:
    """A thumbnail as a page carries it: size, WebP, and a path a region of label (none without one) and prediction."""

    slice_index: int
    modality: str
    size: tuple[int, int]
    image: bytes
    label: Sequence[str] | None
    prediction: Sequence[str]

    def data(self) -> list[Any]:
        """As the page's script reads it: [width, height, slice, modality, image, label paths or null, prediction paths]."""
        height, width = self.size
        image = base64.b64encode(self.image).decode()
        return [width, height, self.slice_index, self.modality, image, self.label, list(self.prediction)]

    def panels(self, picture: str, scan_id: str) -> list[tuple[str, Markup]]:
        """Captions and drawings side by side: the slice, the slice under the label's border, the slice under both."""
        where = f"slice {self.slice_index + 1} of {scan_id}"
        drawn = [
            (f"{self.modality}, slice {self.slice_index + 1}", figures.slice_picture(picture, self.size, self.image, where))
        ]
        if self.label is not None:
            drawn.append(("label", figures.panel(picture, self.size, self.label, (), f"label, {where}")))
        both = "prediction" if self.label is None else "label and prediction"
        return [
            *drawn,
            (both, figures.panel(picture, self.size, self.label or (), self.prediction, f"{both}, {where}")),
        ]


# --- choice ---------------------------------------------------------------------------------------------------------


def choose(cohort: Cohort, split: str | None) -> list[Shelf]:
    """Titles and, under each, rows of `cohort.scans`: lowest, middle, highest, most surprising. Deterministic, no scan twice.

    With `split` None, without labels, the least to the most certain. Of scans that are equally bad the one with the largest
    tumour comes first: it is the one that should not be missed.
    """
    ranking = mean_per_scan(cohort, "mean_probability") if split is None else _within(cohort, split, mean_dice_of_scans(cohort))
    titles = ("Least certain", "In the middle", "Most certain") if split is None else ("Worst", "Median", "Best")
    size = largest_per_scan(cohort, "prediction_voxels" if split is None else "label_voxels")
    known = np.flatnonzero(~np.isnan(ranking))
    order = known[np.lexsort((known, -size[known], ranking[known]))]
    number = min(PER_SHELF, -(-len(order) // 3))
    lowest, rest = order[:number], order[number:]
    highest, rest = rest[len(rest) - min(number, len(rest)) :][::-1], rest[: max(len(rest) - number, 0)]
    start = max((len(rest) - number) // 2, 0)
    shelves = [(t, rows.tolist()) for t, rows in zip(titles, (lowest, rest[start : start + number], highest), strict=True)]
    return shelves if split is None else [*shelves, ("Most surprising", _surprising(cohort, split, shelves))]


def _surprising(cohort: Cohort, split: str, shelves: Sequence[Shelf]) -> list[int]:
    """The rows whose trust and Dice disagree most and that are on no other shelf."""
    found = _within(cohort, split, surprise(cohort))
    shown = {row for _, rows in shelves for row in rows}
    ranked = np.lexsort((np.arange(found.size), -np.abs(np.nan_to_num(found))))
    picked = (int(r) for r in ranked[: PER_SHELF + len(shown)] if abs(np.nan_to_num(found[r])) >= SURPRISING)
    return [row for row in picked if row not in shown][:PER_SHELF]


def _within(cohort: Cohort, split: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = pc.equal(cohort.scans["split"], split).to_numpy()
    return np.where(inside, values, np.nan)


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures(cohort: Cohort, rows: Sequence[int], regions: Sequence[str]) -> dict[int, Picture]:
    """Pictures of some rows, at the finest size at which all of them fit the budget; without those that have no thumbnail."""
    most = MOST_PICTURES if cohort.scans.num_rows <= MANY_SCANS else OF_MANY
    found = dict(_thumbnails(cohort, list(dict.fromkeys(rows))[:most], regions))
    side, quality = _affordable(list(found.values()))
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        drawn = pool.map(lambda thumbnail: shrunk(thumbnail, side, quality), found.values())
        return dict(zip(found, drawn, strict=True))


def _affordable(found: Sequence[Thumbnail]) -> tuple[int, int]:
    """The finest of `SIZES` at which the pictures, judged by some of them, fit the budget; the coarsest if none does."""
    probed = found[:: max(1, len(found) // PROBED)]
    for side, quality in SIZES:
        sizes = [_weight(shrunk(thumbnail, side, quality)) for thumbnail in probed]
        if sum(sizes) / max(1, len(sizes)) * len(found) <= BUDGET_BYTES:
            return side, quality
    return SIZES[-1]


def _weight(picture: Picture) -> int:
    return len(picture.image) * 4 // 3 + sum(len(path) for path in (*(picture.label or ()), *picture.prediction)) + 40


def shrunk(thumbnail: Thumbnail, side: int, quality: int) -> Picture:
    """A thumbnail at `side` pixels on the long side, or at its own size where that is smaller."""
    height, width = thumbnail.pixels.shape
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = Image.fromarray(thumbnail.pixels)
    if scale < 1:
        pixels = pixels.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, "WEBP", quality=quality, method=4)
    label = None if thumbnail.label is None else [figures.outline(_nearest(mask, size)) for mask in thumbnail.label]
    prediction = [figures.outline(_nearest(mask, size)) for mask in thumbnail.prediction]
    return Picture(thumbnail.slice_index, thumbnail.modality, size, buffer.getvalue(), label, prediction)


def _nearest(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(size, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]


def _thumbnails(cohort: Cohort, rows: Sequence[int], regions: Sequence[str]) -> Iterator[tuple[int, Thumbnail]]:
    """Row and thumbnail, in the order of `rows`; those that are missing or cannot be read are left out."""
    chosen = cohort.scans.select(["run", "part", "scan_id"]).take(pa.array(rows, pa.int64())).to_pylist()
    by_part: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for row, scan in zip(rows, chosen, strict=True):
        by_part[scan["run"], scan["part"]][scan["scan_id"]] = row

    def read(item: tuple[tuple[int, int], Mapping[str, int]]) -> dict[int, Thumbnail]:
        (run, part), scans = item
        written_in = cohort.runs[run].model.get("label_map")
        found = {}
        for scan_id, own, stored in _stored(cohort.runs[run].parts[part], list(scans)):
            if thumbnail := _decoded(stored, (own, written_in or own), regions):
                found[scans[scan_id]] = thumbnail
        return found

    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        found = {row: thumbnail for part in pool.map(read, by_part.items()) for row, thumbnail in part.items()}
    return ((row, found[row]) for row in rows if row in found)


def _stored(part: str, scan_ids: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """scan_id, label map and thumbnail of those scans of a part that have one; none where it cannot be read."""
    try:
        table = storage.read_table(part, ["scan_id", "label_map", "thumbnail"])
    except StorageError:
        return []
    table = table.filter(pc.and_(pc.is_in(table["scan_id"], value_set=pa.array(scan_ids)), pc.is_valid(table["thumbnail"])))
    return list(zip(*(table[name].to_pylist() for name in ("scan_id", "label_map", "thumbnail")), strict=True))


def _decoded(stored: Mapping[str, Any], maps: tuple[str, str], regions: Sequence[str]) -> Thumbnail | None:
    """`maps`: label maps of label and prediction. None where a picture cannot be read or they are not of one size."""
    try:
        pixels = read_image(stored["image"], "thumbnail")[0].astype(np.uint8)
        label = None if stored["label"] is None else _masks(stored["label"], maps[0], regions)
        prediction = _masks(stored["prediction"], maps[1], regions)
    except ScanError:
        return None
    if any(masks is not None and masks.shape[1:] != pixels.shape for masks in (label, prediction)):
        return None
    return Thumbnail(stored["slice_index"], str(stored["modality"]), pixels, label, prediction)


def _masks(png: bytes, meaning: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Region masks (R, H, W) of a thumbnail's label values; one mask of all that is not background for an unknown map."""
    values = read_image(png, "thumbnail")[0].astype(np.uint8)
    known = LABEL_MAPS.get(meaning)
    if known is None or not all(name in known.regions for name in names):
        return values[None] > 0
    return known.masks(values, names)
