"""Groups: the same figures within each site, scanner, tumour type or fold, where a mean over all may hide who is served badly.

A column is shown where its scans have from 2 to 12 values: `dataset`, `fold`, `run` (where several are pooled) and whatever
attributes the manifest brought. With so many comparisons some differ by chance; the intervals say how much that may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import BRATS_INFINITE_MM, Rule, bootstrap_interval, float_column, patient_codes
from brainseg.report.columns import attribute, attribute_names
from brainseg.report.facts import Cohort
from brainseg.report.rows import five_numbers, plain

FEWEST_VALUES, MOST_VALUES, MOST_COLUMNS = 2, 12, 24
FEWEST_PATIENTS = 5
"""A bootstrap of two or three patients is their range and no interval."""

DRAWS = 2_000
"""Bootstrap draws of an interval here, where there are dozens; the headline's have 10,000."""

SCORED = ("dice", "hd95_mm", "hd95_px", "volume_error_relative")
UNSCORED = ("prediction_volume_mm3", "prediction_voxels", "mean_probability", "mean_entropy")
"""Figures that tell groups apart, with labels and without."""

FIRST = ("site", "scanner", "tumour_type", "tumor_type", "fold", "dataset", "run")
"""Columns that a reader looks for come first."""


@dataclass(frozen=True)
class Grouping:
    """A column that divides scans: its values in natural order, and for each scan the place of its own (-1: it has none)."""

    values: list[str]
    place: NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.Array) -> "Grouping":
        values = sorted(pc.unique(column).drop_null().to_pylist(), key=_natural)
        return cls(values, pc.fill_null(pc.index_in(column, value_set=pa.array(values, pa.string())), -1).to_numpy())


def grouping_columns(cohort: Cohort, split: str | None) -> dict[str, Grouping]:
    """The columns that divide the scans of a split (None: all that are ok), with the values of all scans."""
    chosen = _chosen(cohort, split)
    found = {}
    for name, column in _candidates(cohort).items():
        values = pc.unique(column.filter(pa.array(chosen))).drop_null()
        if FEWEST_VALUES <= len(values) <= MOST_VALUES:
            found[name] = Grouping.of(column)
    order = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return {name: found[name] for name in order[:MOST_COLUMNS]}


def _chosen(cohort: Cohort, split: str | None) -> NDArray[np.bool_]:
    wanted = pc.equal(cohort.scans["status"], "ok") if split is None else pc.equal(cohort.scans["split"], split)
    chosen: NDArray[np.bool_] = wanted.to_numpy()
    return chosen


def _candidates(cohort: Cohort) -> dict[str, pa.Array]:
    """Everything that could divide the scans, as text."""
    scans = cohort.scans
    own = {"dataset": scans["dataset"], "fold": scans["fold"].cast(pa.string())}
    if len(cohort.runs) > 1:
        names = pa.array([str(run.info.get("run_id") or run.uri) for run in cohort.runs], pa.string())
        own["run"] = names.take(scans["run"].combine_chunks())
    plain_ = {name: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for name, column in own.items()}
    return plain_ | {name: attribute(scans, name) for name in attribute_names(scans) if name not in plain_}


def subgroups(cohort: Cohort, split: str | None, rule: Rule) -> list[dict[str, Any]]:
    """One entry a column: its values in order, each with its scans, patients, failures and the figures of every region."""
    chosen, rows = _chosen(cohort, split), _Rows.of(cohort, UNSCORED if split is None else SCORED)
    failed = pc.equal(cohort.scans["status"], "failed").to_numpy()
    patients = rows.patient
    named = pc.is_valid(cohort.scans["patient_id"]).to_numpy()
    found = []
    for name, grouping in grouping_columns(cohort, split).items():
        entries = []
        for place, value in enumerate(grouping.values):
            inside = chosen & (grouping.place == place)
            if inside.any():
                entry = {
                    "value": value,
                    "scans": int(inside.sum()),
                    "patients": int(np.unique(patients[inside & named]).size),
                    "failed": int(failed[inside].sum()),
                }
                entries.append({**entry, "regions": rows.figures(inside, rule, labelled=split is not None)})
        found.append({"column": name, "unknown": int(np.count_nonzero(chosen & (grouping.place < 0))), "values": entries})
    return list(plain(found))


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers in order of size before texts in order of the alphabet."""
    return (0, float(value), value) if value.lstrip("-").replace(".", "", 1).isdecimal() else (1, 0.0, value)


@dataclass(frozen=True)
class _Rows:
    """Scan x region rows as plain arrays, so that a large cohort is cut into dozens of groups without copying its tables."""

    names: list[str]
    region: NDArray[np.int16]
    states: NDArray[Any]
    """The words for `state`, of which the last stands for null."""
    state: NDArray[np.int16]
    scan: NDArray[np.int64]
    patient: NDArray[np.int64]
    """Of each scan."""
    figure: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(cls, cohort: Cohort, needed: Sequence[str]) -> "_Rows":
        rows = cohort.regions
        region, state = (rows[name].combine_chunks().dictionary_encode() for name in ("region", "state"))
        return cls(
            region.dictionary.to_pylist(),
            region.indices.to_numpy().astype(np.int16),
            np.array([*state.dictionary.to_pylist(), ""], dtype=object),
            pc.fill_null(state.indices, -1).to_numpy().astype(np.int16),
            rows["row"].to_numpy(),
            patient_codes(cohort.scans["patient_id"]),
            {name: float_column(rows, name) for name in needed},
        )

    def figures(self, inside: NDArray[np.bool_], rule: Rule, *, labelled: bool) -> list[dict[str, Any]]:
        """The figures of every region that any of these scans has, with labels or without."""
        taken = inside[self.scan]
        if labelled:
            taken &= (self.states != "no_label")[self.state]
        found = []
        for number, region in enumerate(self.names):
            rows = np.flatnonzero(taken & (self.region == number))
            if rows.size:
                part = {name: column[rows] for name, column in self.figure.items()}
                whose = self.patient[self.scan[rows]]
                measured = _scored(part, self.states[self.state[rows]], whose, rule) if labelled else _unscored(part)
                found.append({"region": region, **measured})
        return found


def _scored(
    part: Mapping[str, NDArray[np.float64]], states: NDArray[Any], patients: NDArray[np.int64], rule: Rule
) -> dict[str, Any]:
    dice = np.where(states == "both_empty", 1.0 if rule == "brats" else np.nan, part["dice"])
    spread = five_numbers(dice)
    distance = part["hd95_mm"] if not np.isnan(part["hd95_mm"]).all() else part["hd95_px"]
    if rule == "brats":
        distance = np.where(states == "both_empty", 0.0, np.where(np.isinf(distance), BRATS_INFINITE_MM, distance))
    mean = float(np.nanmean(dice)) if spread["n"] else None
    return {
        "scored": spread["n"],
        "dice": {"mean": mean, "median": spread["median"], "q1": spread["q1"], "q3": spread["q3"]},
        "dice_interval": _interval(dice, patients),
        "hd95_median": five_numbers(distance)["median"],
        "volume_error_relative": five_numbers(part["volume_error_relative"])["median"],
        **{state: int(np.count_nonzero(states == state)) for state in ("missed", "spurious", "both_empty")},
    }


def _interval(dice: NDArray[np.float64], patients: NDArray[np.int64]) -> list[float]:
    """The interval of a mean; NaN where too few patients are behind it for one to mean anything."""
    enough = np.unique(patients[~np.isnan(dice)]).size >= FEWEST_PATIENTS
    return list(bootstrap_interval(dice, patients, draws=DRAWS)) if enough else [float("nan"), float("nan")]


def _unscored(part: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """What can be said of a group without labels."""
    medians = {f"median_{name}": five_numbers(part[name])["median"] for name in UNSCORED}
    voxels = part["prediction_voxels"]
    return {"scans": voxels.size, **medians, "found_nothing": int(np.count_nonzero(voxels == 0))}
