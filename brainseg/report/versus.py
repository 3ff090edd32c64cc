"""Versus: this run against another one on the same scans, pair by pair, and by name the scans that got worse or better.

Only scans that neither model was trained on are paired. Differences are this run minus the other.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.comparison import compare_runs
from brainseg.errors import UsageError
from brainseg.report.facts import Cohort
from brainseg.report.rows import distance_unit, of_region, plain, with_names

MOST_NAMED = 50
"""Regressions, and improvements, that are listed by name in each region; counts are whole."""

COLUMNS = ["scan_id", "patient_id", "region", "state", "dice", "hd95_mm", "hd95_px"]


def versus(cohort: Cohort, other: Cohort) -> dict[str, Any]:
    """Per region the paired comparison of Dice and HD95 and the scans that changed most, and how many pairs there are.

    Raises UsageError where the two share no scan that both scored, or a scan stands twice on one side.
    """
    here, there = _unseen(cohort), _unseen(other)
    unit = distance_unit(cohort.regions)
    if unit != distance_unit(other.regions):
        unit = "px"
    try:
        dice = compare_runs(here, there, "dice")
        distance = compare_runs(here, there, f"hd95_{unit}")
    except ValueError as error:
        raise UsageError(f"--compare: {error}; neither model may have been trained on it") from error
    if not any(c.num_pairs for c in dice.values()):
        raise UsageError("--compare: the runs share no evaluated scan that neither model was trained on")
    paired = pairs(here, there)
    return {
        "with": [run.uri for run in other.runs],
        "model": [run.model.get("name") for run in other.runs],
        "run_id": [run.info.get("run_id") for run in other.runs],
        "distance_unit": unit,
        "regions": [
            {
                "region": region,
                "dice": plain(asdict(found)),
                "hd95": plain(asdict(distance[region])),
                **_changes(of_region(paired, region)),
            }
            for region, found in dice.items()
        ],
    }


def _unseen(cohort: Cohort) -> pa.Table:
    figures = [name for name in COLUMNS if name in cohort.regions.column_names]
    rows = with_names(cohort, cohort.regions.select([*figures, "row"]))
    seen = pc.take(pc.equal(cohort.scans["split"], "train"), cohort.regions["row"])
    return rows.filter(pc.and_(pc.invert(seen), pc.not_equal(rows["state"], "no_label"))).select(COLUMNS)


def pairs(here: pa.Table, there: pa.Table) -> pa.Table:
    """scan_id, region, state, `dice` here, `other` there and `difference` of each pair, in order of the scans.

    As in `comparison.py`: who rightly found nothing where the other marked something counts 1; where both rightly found
    nothing, nothing is compared. So a new mark where there is no tumour is a regression by name, too.
    """
    known = _ruled(there).select(["scan_id", "region", "dice", "state"])
    joined = _ruled(here).join(
        known.rename_columns(["scan_id", "region", "other", "there"]), ["scan_id", "region"], join_type="inner"
    )
    empty = pc.and_(pc.equal(joined["state"], "both_empty"), pc.equal(joined["there"], "both_empty"))
    joined = joined.filter(pc.invert(empty))
    joined = joined.append_column("difference", pc.subtract(joined["dice"], joined["other"]))
    return joined.select(["scan_id", "region", "state", "dice", "other", "difference"]).sort_by("scan_id")


def _ruled(rows: pa.Table) -> pa.Table:
    """Rows with `dice`, where a scan in which there was nothing to find and nothing was found counts 1."""
    dice = pc.if_else(pc.equal(rows["state"], "both_empty"), 1.0, rows["dice"])
    return rows.set_column(rows.schema.get_field_index("dice"), "dice", dice)


def paired(cohort: Cohort, other: Cohort) -> pa.Table:
    """The pairs of two cohorts, for a chart."""
    return pairs(_unseen(cohort), _unseen(other))


def _changes(part: pa.Table) -> dict[str, Any]:
    worse = part.filter(pc.less(part["difference"], 0)).sort_by([("difference", "ascending"), ("scan_id", "ascending")])
    better = part.filter(pc.greater(part["difference"], 0)).sort_by([("difference", "descending"), ("scan_id", "ascending")])
    return {
        "worse": worse.num_rows,
        "better": better.num_rows,
        "equal": part.num_rows - worse.num_rows - better.num_rows,
        "regressions": _named(worse),
        "improvements": _named(better),
    }


def _named(part: pa.Table) -> Sequence[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        part.slice(0, MOST_NAMED).select(["scan_id", "state", "dice", "other", "difference"]).to_pylist()
    )
    return rows
