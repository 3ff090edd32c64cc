"""Groups: the same figures within each site, scanner, tumour type or fold, where a mean over all may hide who is served badly.

A column is shown where its scans have from 2 to 12 values: `dataset`, `fold`, `run` (where several are pooled) and whatever
attributes the manifest brought. With so many comparisons some differ by chance; the intervals say how much that may be.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import Rule, aggregate, bootstrap_interval
from brainseg.report.columns import attribute, attribute_names
from brainseg.report.facts import Cohort
from brainseg.report.rows import count, plain, ruled_dice

FEWEST_VALUES, MOST_VALUES, MOST_COLUMNS = 2, 12, 24
DRAWS = 2_000
"""Bootstrap draws of an interval here, where there are dozens; the headline's have 10,000."""

NEEDED = [
    *("row", "region", "state", "dice", "hd95_mm", "hd95_px", "volume_error_relative"),
    *("prediction_volume_mm3", "prediction_voxels", "mean_probability", "mean_entropy"),
]
FIRST = ("site", "scanner", "tumour_type", "tumor_type", "fold", "dataset", "run")
"""Columns that a reader looks for come first."""


def grouping_columns(cohort: Cohort, split: str | None) -> dict[str, list[str | None]]:
    """Column -> each scan's value as text, for the columns that divide the scans of a split (None: all that are ok)."""
    chosen = _chosen(cohort, split)
    found = {}
    for name, column in _candidates(cohort).items():
        values = pc.unique(column.filter(pa.array(chosen))).drop_null()
        if FEWEST_VALUES <= len(values) <= MOST_VALUES:
            found[name] = column.to_pylist()
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
    chosen = _chosen(cohort, split)
    known = cohort.regions.select(NEEDED).filter(pa.array(chosen[cohort.regions["row"].to_numpy()]))
    patients = cohort.scans["patient_id"].take(known["row"])
    known = known.append_column("patient_id", patients)
    found = []
    for name, values in grouping_columns(cohort, split).items():
        whose = np.array(values, dtype=object)
        entries = []
        for value in sorted({v for v, inside in zip(values, chosen, strict=True) if inside and v is not None}, key=_natural):
            inside = chosen & (whose == value)
            entries.append({"value": value, **_figures(cohort, inside, known, rule, labelled=split is not None)})
        found.append(
            {"column": name, "unknown": int(sum(values[i] is None for i in np.flatnonzero(chosen))), "values": entries}
        )
    return list(plain(found))


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers in order of size before texts in order of the alphabet."""
    return (0, float(value), value) if value.lstrip("-").replace(".", "", 1).isdecimal() else (1, 0.0, value)


def _figures(cohort: Cohort, inside: NDArray[np.bool_], known: pa.Table, rule: Rule, *, labelled: bool) -> dict[str, Any]:
    scans = cohort.scans.filter(pa.array(inside))
    rows = known.filter(pa.array(inside[known["row"].to_numpy()]))
    return {
        "scans": scans.num_rows,
        "patients": pc.count_distinct(scans["patient_id"]).as_py(),
        "failed": count(pc.equal(scans["status"], "failed")),
        "regions": _scored(rows, rule) if labelled else _unscored(rows),
    }


def _scored(rows: pa.Table, rule: Rule) -> list[dict[str, Any]]:
    rows = rows.filter(pc.not_equal(rows["state"], "no_label"))
    found = []
    for region, s in aggregate(rows, rule=rule).items():
        part = rows.filter(pc.equal(rows["region"], region))
        interval = bootstrap_interval(ruled_dice(part, rule), part["patient_id"].to_numpy(), draws=DRAWS)
        distance = s.hd95_mm if s.hd95_mm.num else s.hd95_px
        found.append(
            {
                "region": region,
                "scored": s.num_scored,
                "dice": {"mean": s.dice.mean, "median": s.dice.median, "q1": s.dice.q1, "q3": s.dice.q3},
                "dice_interval": list(interval),
                "hd95_median": distance.median,
                "volume_error_relative": s.volume_error_relative.median,
                **{state: s.states[state] for state in ("missed", "spurious", "both_empty")},
            }
        )
    return found


def _unscored(rows: pa.Table) -> list[dict[str, Any]]:
    """What can be said of a group without labels."""
    found = []
    for region in pc.unique(rows["region"]).to_pylist():
        part = rows.filter(pc.equal(rows["region"], region))
        entry: dict[str, Any] = {"region": region, "scans": part.num_rows}
        for name in ("prediction_volume_mm3", "prediction_voxels", "mean_probability", "mean_entropy"):
            entry[f"median_{name}"] = _median(part[name])
        found.append({**entry, "found_nothing": count(pc.equal(part["prediction_voxels"], 0))})
    return found


def _median(column: Any) -> float | None:
    values = column.drop_null().to_numpy()
    return float(np.median(values)) if values.size else None
