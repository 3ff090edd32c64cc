"""Gallery: which scans are worth a look, and their pictures, from the thumbnails in the rows.

Only the parts that hold a chosen scan are opened, one at a time, so that the page of a large cohort costs no more than
that of a small one.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from brainseg import storage
from brainseg.errors import ScanError
from brainseg.formats.images import read_image
from brainseg.regions import LABEL_MAPS
from brainseg.report import figures
from brainseg.report.cohort import mean_dice_of_scans
from brainseg.report.facts import Cohort

PER_SHELF = 4
Shelf = tuple[str, list[int]]


@dataclass(frozen=True)
class Picture:
    """One scan of the gallery: panels side by side with a caption each, and the figures below them."""

    scan_id: str
    slice_index: int
    modality: str
    regions: Sequence[Mapping[str, Any]]
    panels: Sequence[tuple[str, Markup]]


def gallery(cohort: Cohort, split: str | None) -> list[tuple[str, list[Picture]]]:
    """Shelves of pictures: worst, median, best of a split; without labels (`split` None) the least to the most certain."""
    shelves = choose(cohort, split)
    pictures = _pictures(cohort, sorted({row for _, rows in shelves for row in rows}))
    filled = [(title, [pictures[row] for row in rows if row in pictures]) for title, rows in shelves]
    return [(title, shelf) for title, shelf in filled if shelf]


def choose(cohort: Cohort, split: str | None) -> list[Shelf]:
    """Titles and, under each, rows of `cohort.scans`: lowest, middle and highest. Deterministic, no scan twice.

    Of scans that are equally bad the one with the largest tumour comes first: it is the one that should not be missed.
    """
    ranking = _mean_per_scan(cohort, "mean_probability") if split is None else _within(cohort, split)
    titles = ("Least certain", "In the middle", "Most certain") if split is None else ("Worst", "Median", "Best")
    size = _largest(cohort, "prediction_voxels" if split is None else "label_voxels")
    known = np.flatnonzero(~np.isnan(ranking))
    order = [int(row) for row in known[np.lexsort((known, -size[known], ranking[known]))]]
    number = min(PER_SHELF, -(-len(order) // 3))
    lowest, rest = order[:number], order[number:]
    highest, rest = rest[len(rest) - min(number, len(rest)) :][::-1], rest[: max(len(rest) - number, 0)]
    start = max((len(rest) - number) // 2, 0)
    return list(zip(titles, (lowest, rest[start : start + number], highest), strict=True))


def _within(cohort: Cohort, split: str) -> NDArray[np.float64]:
    inside = pc.equal(cohort.scans["split"], split).to_numpy()
    ranking: NDArray[np.float64] = np.where(inside, mean_dice_of_scans(cohort), np.nan)
    return ranking


def _mean_per_scan(cohort: Cohort, name: str) -> NDArray[np.float64]:
    values = cohort.regions[name].to_numpy()
    known = ~np.isnan(values)
    rows = cohort.regions["row"].to_numpy()[known]
    out = np.full(cohort.scans.num_rows, np.nan)
    number = np.bincount(rows, minlength=len(out))
    total = np.bincount(rows, values[known], minlength=len(out))
    out[number > 0] = total[number > 0] / number[number > 0]
    return out


def _largest(cohort: Cohort, name: str) -> NDArray[np.float64]:
    """For each scan the largest of its regions' sizes, 0 where unknown."""
    size = np.zeros(cohort.scans.num_rows)
    np.maximum.at(size, cohort.regions["row"].to_numpy(), np.nan_to_num(cohort.regions[name].cast(pa.float64()).to_numpy()))
    return size


def _pictures(cohort: Cohort, rows: Sequence[int]) -> dict[int, Picture]:
    """Draw the pictures of some rows; those without a thumbnail that can be read are left out."""
    chosen = cohort.scans.select(["run", "part", "scan_id", "label_map"]).take(pa.array(rows, pa.int64())).to_pylist()
    by_part: dict[tuple[int, int], dict[str, tuple[int, str]]] = defaultdict(dict)
    for row, scan in zip(rows, chosen, strict=True):
        by_part[scan["run"], scan["part"]][scan["scan_id"]] = (row, scan["label_map"])
    entries = _entries(cohort, rows)
    found = {}
    for (run, part), scans in by_part.items():
        written_in = cohort.runs[run].model.get("label_map")
        for scan_id, thumbnail in _thumbnails(cohort.runs[run].parts[part], list(scans)).items():
            row, own = scans[scan_id]
            with contextlib.suppress(ScanError):
                found[row] = _draw(scan_id, thumbnail, (own, written_in or own), entries[row], f"slice-{row}")
    return found


def _entries(cohort: Cohort, rows: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """The region entries of some rows."""
    grouped = defaultdict(list)
    for entry in cohort.regions.filter(pc.is_in(cohort.regions["row"], value_set=pa.array(rows, pa.int64()))).to_pylist():
        grouped[entry["row"]].append(entry)
    return grouped


def _thumbnails(part: str, scan_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    table = storage.read_table(part, ["scan_id", "thumbnail"])
    table = table.filter(pc.and_(pc.is_in(table["scan_id"], value_set=pa.array(scan_ids)), pc.is_valid(table["thumbnail"])))
    return dict(zip(table["scan_id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True))


def _draw(
    scan_id: str, thumbnail: Mapping[str, Any], maps: tuple[str, str], regions: list[dict[str, Any]], picture: str
) -> Picture:
    """Panels: the slice, the slice under the label's border, the slice under both. `maps`: label maps of label, prediction."""
    names = [entry["region"] for entry in regions]
    prediction = _masks(thumbnail["prediction"], maps[1], names)
    shape = (prediction.shape[1], prediction.shape[2])
    answers = [figures.outline(mask) for mask in prediction]
    where = f"slice {thumbnail['slice_index']} of {scan_id}"
    panels = [(str(thumbnail["modality"]), figures.slice_picture(picture, shape, thumbnail["image"], where))]
    truths: list[str] = []
    if thumbnail["label"] is not None:
        truths = [figures.outline(mask) for mask in _masks(thumbnail["label"], maps[0], names)]
        panels.append(("label", figures.panel(picture, shape, truths, (), f"label, {where}")))
    panels.append(("prediction", figures.panel(picture, shape, truths, answers, f"prediction, {where}")))
    return Picture(scan_id, thumbnail["slice_index"], thumbnail["modality"], regions, panels)


def _masks(png: bytes, meaning: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Region masks (R, H, W) of a thumbnail's label values; one mask of all that is not background for an unknown map."""
    values = read_image(png, "thumbnail")[0].astype(np.uint8)
    known = LABEL_MAPS.get(meaning)
    if known is None or not all(name in known.regions for name in names):
        return values[None] > 0
    return known.masks(values, names)
