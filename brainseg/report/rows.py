"""Rows: the scan x region rows behind each figure, and what is made of them scan by scan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import Columns, Rule
from brainseg.report.facts import Cohort
from brainseg.report.measured import Measured

Floats = NDArray[np.float64]


def labelled_rows(cohort: Cohort, split: str, region: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Scan x region rows of one split's scans that have a label, of one region or all; all of their columns or some."""
    names = cohort.regions.column_names if columns is None else columns
    return cohort.regions.where(_is_labelled(cohort, split, region), names)


def _is_labelled(cohort: Cohort, split: str, region: str | None) -> pa.ChunkedArray:
    known = pc.not_equal(cohort.regions["state"], "no_label")
    known = pc.and_(known, pc.take(pc.equal(cohort.scans["split"], split), cohort.regions["row"]))
    return known if region is None else pc.and_(known, pc.equal(cohort.regions["region"], region))


@dataclass(frozen=True)
class Scored:
    """The rows of one region and one split that have a label, for `aggregate`: each column is made when it is asked for."""

    cohort: Cohort
    keep: pa.ChunkedArray

    @classmethod
    def of(cls, cohort: Cohort, split: str, region: str) -> "Scored":
        """The same rows as those of `labelled_rows`."""
        return cls(cohort, _is_labelled(cohort, split, region))

    @property
    def column_names(self) -> Sequence[str]:
        return (*self.cohort.regions.column_names, "patient_id")

    def column(self, name: str) -> pa.ChunkedArray:
        """A figure, or the patient of each row as a number."""
        if name == "patient_id":
            return pa.chunked_array([patients_of(self.cohort, self.column("row"))])
        return self.cohort.regions[name].filter(self.keep)


def patients_of(cohort: Cohort, rows: pa.ChunkedArray) -> pa.Array:
    """For the position of each scan its patient as a number, null for one who is not named: a tenth of the names' memory."""
    named = cohort.scans["patient_id"].combine_chunks().dictionary_encode().indices
    return named.take(rows.combine_chunks())


def with_names(cohort: Cohort, regions: pa.Table) -> pa.Table:
    """The rows with `scan_id` and `patient_id` of their scan."""
    whose = cohort.scans.select(["scan_id", "patient_id"]).take(regions["row"])
    return regions.append_column("scan_id", whose["scan_id"]).append_column("patient_id", whose["patient_id"])


def of_region(table: pa.Table, region: str) -> pa.Table:
    """The rows of one region."""
    return table.filter(pc.equal(table["region"], region))


def ruled_dice(part: Columns, rule: Rule) -> Floats:
    """Dice per row with NaN for null, as the rule has it: `brats` counts both-empty scans 1."""
    empty = pc.equal(part.column("state"), "both_empty").to_numpy()
    return np.where(empty, 1.0 if rule == "brats" else np.nan, part.column("dice").to_numpy())


def mean_dice_of_scans(cohort: Cohort) -> Floats:
    """For each scan the mean Dice over its regions, float64; NaN where no region has one."""
    return mean_per_scan(cohort, "dice")


def mean_per_scan(cohort: Cohort, name: str) -> Floats:
    """For each scan the mean of a figure over its regions; NaN where no region has it."""
    values = cohort.regions[name].to_numpy(zero_copy_only=False)
    known = ~np.isnan(values)
    rows = cohort.regions["row"].to_numpy()[known]
    total = np.bincount(rows, values[known], minlength=cohort.scans.num_rows)
    number = np.bincount(rows, minlength=cohort.scans.num_rows)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def largest_per_scan(cohort: Cohort, name: str) -> Floats:
    """For each scan the largest of its regions' sizes, 0 where unknown."""
    size = np.zeros(cohort.scans.num_rows)
    np.maximum.at(size, cohort.regions["row"].to_numpy(), np.nan_to_num(cohort.regions[name].cast(pa.float64()).to_numpy()))
    return size


def volume_columns(unit: str) -> tuple[str, str]:
    """The columns behind `volumes` of the label and of the prediction."""
    kind = "volume_mm3" if unit == "mL" else "voxels"
    return f"label_{kind}", f"prediction_{kind}"


def volume_unit(rows: pa.Table | Measured) -> tuple[str, float]:
    """Unit and divisor of volumes: mL of mm3 where every scan has a spacing, voxels otherwise."""
    return ("mL", 1000.0) if rows["prediction_volume_mm3"].null_count == 0 else ("voxels", 1.0)


def volumes(rows: pa.Table | Measured, side: str, unit: str, divisor: float) -> Floats:
    """Volumes of `label` or `prediction` in the unit that `volume_unit` gave; NaN for null."""
    column = f"{side}_volume_mm3" if unit == "mL" else f"{side}_voxels"
    values: Floats = rows[column].cast(pa.float64()).to_numpy() / divisor
    return values


def distance_unit(rows: pa.Table | Measured) -> str:
    """`mm` where every scan has a spacing, `px` otherwise."""
    return "mm" if volume_unit(rows)[0] == "mL" else "px"


def count(column: Any) -> int:
    """How many are true."""
    return int(pc.sum(column).as_py() or 0)


def five_numbers(values: Floats) -> dict[str, float | int | None]:
    """How many values are known, and their quartiles, 5th and 95th percentile; infinite values are kept."""
    known = np.sort(values[~np.isnan(values)])
    if not known.size:
        return {"n": 0, "p5": None, "q1": None, "median": None, "q3": None, "p95": None}
    found = np.quantile(known, (0.05, 0.25, 0.5, 0.75, 0.95), method="linear" if np.isfinite(known).all() else "lower")
    return {"n": int(known.size), **dict(zip(("p5", "q1", "median", "q3", "p95"), map(float, found), strict=True))}


def plain(value: Any) -> Any:
    """A figure, or a nest of them, as JSON can hold it: NaN is null, infinity the string `inf`."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        return "inf" if value > 0 else "-inf"
    return value
