"""Pace: seconds per stage, scans per hour, and how a run went along the clock, from the rows' own times."""

from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from brainseg.report.facts import Cohort
from brainseg.report.rows import count

STAGES = ("decode", "predict", "finish")
MOST_SPANS = 60
"""Spans that the clock is cut into."""

GAP_S = 1800.0
"""A longer pause between two finished scans is a break (another attempt, another run), not slow work."""


def timings(cohort: Cohort) -> list[dict[str, Any]]:
    """Wall seconds per stage over the scans that went through it."""
    rows = []
    for stage in STAGES:
        seconds = cohort.scans[f"seconds_{stage}"].drop_null().to_numpy()
        if seconds.size:
            middle, slow = (float(q) for q in np.percentile(seconds, (50, 95)))
            figures = {"total_s": float(seconds.sum()), "median_s": middle, "p95_s": slow}
            rows.append({"stage": stage, "scans": int(seconds.size), **figures})
    return rows


def throughput(cohort: Cohort) -> dict[str, Any] | None:
    """Scans per hour between the first and the last finished scan, breaks left out; None where that cannot be told."""
    seconds = np.sort(cohort.scans["finished_at"].drop_null().cast("int64").to_numpy()) / 1e6
    steps = np.diff(seconds)
    worked = float(steps[steps <= GAP_S].sum())
    if seconds.size < 2 or worked <= 0:
        return None
    nodes = cohort.scans["node"].drop_null()
    return {
        "first": _iso(pc.min(cohort.scans["finished_at"]).as_py()),
        "last": _iso(pc.max(cohort.scans["finished_at"]).as_py()),
        "worked_s": worked,
        "breaks": int(np.count_nonzero(steps > GAP_S)),
        "scans_per_hour": 3600.0 * (seconds.size - 1 - int(np.count_nonzero(steps > GAP_S))) / worked,
        "again": count(pc.greater(cohort.scans["attempt"], 1)),
        "nodes": int(pc.count_distinct(nodes).as_py()),
        "spans": _spans(seconds),
    }


def _iso(when: datetime) -> str:
    return when.isoformat(timespec="seconds")


def _spans(seconds: Any) -> dict[str, Any]:
    """Scans finished in each of up to `MOST_SPANS` equal spans of the clock."""
    whole = float(seconds[-1] - seconds[0])
    number = int(min(MOST_SPANS, max(1, seconds.size // 4)))
    counts = np.histogram(seconds, number, (seconds[0], seconds[-1]))[0]
    return {"seconds_each": whole / number, "scans": [int(n) for n in counts]}
