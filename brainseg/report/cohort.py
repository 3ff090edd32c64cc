"""Cohort: the fact tables of runs become the numbers of a report, and nothing else is looked at.

`summary` returns plain data (dicts, lists, numbers, strings). The page and `--format json` both show that data, so they
cannot disagree. Scans are kept apart by what the model had seen of their patients: held-out test patients are the
headline, training patients never are while there is anybody else. An infinite distance is the string `inf`, because JSON
knows no infinity.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainseg.aggregate import RegionSummary, Rule, aggregate, bootstrap_interval
from brainseg.report.alerts import alerts
from brainseg.report.baselines import baseline_figures, mean_dice
from brainseg.report.facts import SPLITS, Cohort, Run, load

STAGES = ("decode", "predict", "finish")
BEFORE_READABLE = ("list", "decode")
MAX_LINES = 100
"""Quarantine lines kept per code; the counts are always whole."""

MOSTLY_OUTSIDE = 0.1
"""A mask with more than this share outside the head deserves a look."""

MAX_ROWS = 1000
"""Scans in the page's table: those with the lowest Dice. The whole table is `RUN/metrics.parquet`."""


def summary(run_uris: Sequence[str], *, rule: Rule = "exclude") -> dict[str, Any]:
    """Every number of the report on these runs, as plain data that JSON can hold.

    Raises UsageError where a place is not a run folder.
    """
    return summarise(load(run_uris), rule=rule)


def summarise(cohort: Cohort, *, rule: Rule = "exclude") -> dict[str, Any]:
    """The same for a cohort that has been read already."""
    counts = _counts(cohort)
    groups = [_group(cohort, split, rule) for split in SPLITS]
    groups = [group for group in groups if group["scans"]]
    leading = headline(groups)
    lead = next((group for group in groups if group["split"] == leading), None)
    baselines = baseline_figures(cohort, leading, rule)
    return {
        "runs": [_run(run) for run in cohort.runs],
        "rule": rule,
        "counts": counts,
        "alerts": alerts(cohort, counts, lead, baselines),
        "headline": leading,
        "groups": groups,
        "baselines": baselines,
        "scans": _scan_rows(cohort),
        "quarantine": _quarantine(cohort),
        "remarks": _remarks(cohort),
        "trust": _trust(cohort),
        "timings": _timings(cohort),
    }


def headline(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The split whose figures lead: the most telling one in which anything was evaluated; None without labels."""
    return next((group["split"] for group in groups if group["evaluated"]), None)


def _count(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)


def _counts(cohort: Cohort) -> dict[str, int]:
    """The denominators, from the archive's scans down to those that carry a figure."""
    scans = cohort.scans
    failed = pc.equal(scans["status"], "failed")
    unread = pc.and_(failed, pc.is_in(scans["error_stage"], value_set=pa.array(BEFORE_READABLE)))
    listed = [(run.info.get("counts") or {}).get("found") for run in cohort.runs]
    per_run = [_count(pc.equal(scans["run"], number)) for number in range(len(cohort.runs))]
    found = sum(max(n or 0, rows) for n, rows in zip(listed, per_run, strict=True))
    return {
        "found": found,
        "eligible": found - _count(unread),
        "segmented": _count(pc.equal(scans["status"], "ok")),
        "labelled": _count(scans["labelled"]),
        "evaluated": _count(scans["evaluated"]),
        "failed": _count(failed),
        "missing": found - scans.num_rows,
        "patients": len(set(scans["patient_id"].drop_null().to_pylist())),
    }


def _run(run: Run) -> dict[str, Any]:
    """What was run, as the first screen says it."""
    info, model = run.info, run.model
    split = model.get("split") or {}
    return {
        "uri": run.uri,
        "run_id": info.get("run_id"),
        "data": info.get("source") or info.get("archive") or info.get("manifest"),
        "version": info.get("brainseg_version"),
        "started": info.get("created_at"),
        "finished": info.get("finished_at"),
        "attempt": info.get("attempt"),
        "hosts": info.get("hosts"),
        "seconds": _seconds(info.get("timings") or {}),
        "versions": info.get("versions") or {},
        "config": info.get("config") or {},
        "threshold": info.get("threshold") or {"value": (info.get("config") or {}).get("threshold"), "chosen_on": None},
        "labels": (run.evaluation or {}).get("labels"),
        "model": {
            **{name: model.get(name) for name in ("name", "dataset", "label_map", "fingerprint", "threshold")},
            "regions": list(model.get("regions") or ()),
            "modalities": list(model.get("modalities") or ()),
            "held_out_dice": _mean_dice_per_region((model.get("metrics") or {}).get("held_out")),
            "split": {side: len(split.get(side) or ()) for side in ("train", "validation", "test")},
            "unit": split.get("unit") or "patient",
            "accept_leakage": bool(model.get("accept_leakage")),
            "audit": {name: (model.get("audit") or {}).get(name) for name in ("verdict", "reason")},
        },
    }


def _seconds(timings: Mapping[str, Any]) -> dict[str, float]:
    """The entries of `run.json`'s timings that are in seconds, without the unit in their names."""
    return {name.removesuffix("_s"): float(value) for name, value in timings.items() if name.endswith("_s")}


def _group(cohort: Cohort, split: str, rule: Rule) -> dict[str, Any]:
    """The figures of one side of the model's split."""
    scans = cohort.scans.filter(pc.equal(cohort.scans["split"], split))
    failed = _count(pc.and_(pc.equal(scans["status"], "failed"), scans["labelled"]))
    return {
        "split": split,
        "scans": scans.num_rows,
        "patients": len(set(scans["patient_id"].drop_null().to_pylist())),
        "evaluated": _count(scans["evaluated"]),
        "failed_labelled": failed,
        "regions": _region_figures(scored_rows(cohort, split), failed, rule),
    }


def scored_rows(cohort: Cohort, split: str) -> pa.Table:
    """Scan x region rows of one split's scans that have a label, with `scan_id` and `patient_id` in each."""
    inside = pc.take(pc.equal(cohort.scans["split"], split), cohort.regions["row"])
    regions = cohort.regions.filter(pc.and_(inside, pc.not_equal(cohort.regions["state"], "no_label")))
    whose = cohort.scans.select(["scan_id", "patient_id"]).take(regions["row"])
    return regions.append_column("scan_id", whose["scan_id"]).append_column("patient_id", whose["patient_id"])


def _region_figures(table: pa.Table, num_failed: int, rule: Rule) -> list[dict[str, Any]]:
    """One entry a region: the fields of `aggregate.RegionSummary`, the interval of the mean Dice, the mean with failures."""
    found = []
    for region, figures in aggregate(table, rule=rule).items():
        part = table.filter(pc.equal(table["region"], region))
        low, high = bootstrap_interval(_ruled_dice(part, rule), part["patient_id"].to_pylist())
        found.append(plain({**_fields(figures, num_failed), "dice_interval": [low, high]}))
    return found


def _fields(figures: RegionSummary, num_failed: int) -> dict[str, Any]:
    return {**asdict(figures), "dice_mean_failed_as_zero": figures.mean_with_failures_zero(num_failed)}


def _ruled_dice(part: pa.Table, rule: Rule) -> Any:
    """Dice per row with NaN for null, as the rule has it: `brats` counts both-empty scans 1."""
    dice = part["dice"].to_numpy()
    empty = pc.equal(part["state"], "both_empty").to_numpy()
    return np.where(empty, 1.0 if rule == "brats" else np.nan, dice)


def _mean_dice_per_region(recorded: Any) -> dict[str, float]:
    """Region -> mean Dice, from plain numbers or from the summaries that a model's card holds."""
    means = {region: mean_dice(s) for region, s in recorded.items()} if isinstance(recorded, Mapping) else {}
    return {region: mean for region, mean in means.items() if mean is not None}


def plain(value: Any) -> Any:
    """A figure, or a nest of them, as JSON can hold it: NaN is null, infinity the string `inf`."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def _scan_rows(cohort: Cohort) -> dict[str, Any]:
    """The scans of the page's table: at most `MAX_ROWS`, those with the lowest mean Dice first."""
    ranking = mean_dice_of_scans(cohort)
    ok = pc.equal(cohort.scans["status"], "ok").to_numpy(zero_copy_only=False)
    order = [int(row) for row in np.argsort(ranking, kind="stable") if ok[row]]
    shown = order[:MAX_ROWS]
    regions = defaultdict(list)
    kept = cohort.regions.filter(pc.is_in(cohort.regions["row"], value_set=pa.array(shown, pa.int64())))
    for entry in kept.to_pylist():
        regions[entry["row"]].append(plain({name: entry[name] for name in TABLE_FIGURES}))
    columns = ["scan_id", "patient_id", "dataset", "split", "fold", "warnings"]
    rows = cohort.scans.select(columns).take(pa.array(shown, pa.int64())).to_pylist()
    return {"of": len(order), "rows": [{**row, "regions": regions[i]} for row, i in zip(rows, shown, strict=True)]}


TABLE_FIGURES = (
    "region",
    "state",
    "dice",
    "precision",
    "recall",
    "hd95_mm",
    "hd95_px",
    "label_volume_mm3",
    "prediction_volume_mm3",
    "label_voxels",
    "prediction_voxels",
    "mean_probability",
)


def mean_dice_of_scans(cohort: Cohort) -> Any:
    """For each scan the mean Dice over its regions, float64; NaN where no region has one."""
    dice = cohort.regions["dice"].to_numpy(zero_copy_only=False)
    known = ~np.isnan(dice)
    rows = cohort.regions["row"].to_numpy()[known]
    total = np.bincount(rows, dice[known], minlength=cohort.scans.num_rows)
    number = np.bincount(rows, minlength=cohort.scans.num_rows)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _quarantine(cohort: Cohort) -> list[dict[str, Any]]:
    """The failed scans by code, the commonest first: how many, and the first `MAX_LINES` lines."""
    failed = cohort.scans.filter(pc.equal(cohort.scans["status"], "failed"))
    grouped = defaultdict(list)
    for row in failed.select(["error_code", "scan_id", "error_stage", "error_message"]).to_pylist():
        grouped[row["error_code"]].append(
            {"scan_id": row["scan_id"], "stage": row["error_stage"], "message": row["error_message"]}
        )
    ranked = sorted(grouped.items(), key=lambda item: (-len(item[1]), str(item[0])))
    return [{"code": code, "count": len(lines), "lines": lines[:MAX_LINES]} for code, lines in ranked]


def _remarks(cohort: Cohort) -> list[dict[str, Any]]:
    """Warnings on scans that were used all the same, by code: how many scans, and one of the lines."""
    scans = cohort.scans.filter(pc.greater(pc.list_value_length(cohort.scans["warnings"]), 0))
    examples: dict[str, str] = {}
    number: dict[str, set[int]] = defaultdict(set)
    for row, lines in enumerate(scans["warnings"].to_pylist()):
        for line in lines:
            code, _, words = line.partition(": ")
            examples.setdefault(code, words)
            number[code].add(row)
    ranked = sorted(number, key=lambda code: (-len(number[code]), code))
    return [{"code": code, "count": len(number[code]), "example": examples[code]} for code in ranked]


def _timings(cohort: Cohort) -> list[dict[str, Any]]:
    """Wall seconds per stage over the scans that went through it."""
    rows = []
    for stage in STAGES:
        seconds = cohort.scans[f"seconds_{stage}"].drop_null().to_numpy()
        if seconds.size:
            middle, slow = (float(q) for q in np.percentile(seconds, (50, 95)))
            figures = {"total_s": float(seconds.sum()), "median_s": middle, "p95_s": slow}
            rows.append({"stage": stage, "scans": int(seconds.size), **figures})
    return rows


def _trust(cohort: Cohort) -> list[dict[str, Any]]:
    """What can be said per region without any label, over all segmented scans."""
    rows = []
    for region in pc.unique(cohort.regions["region"]).to_pylist():
        part = cohort.regions.filter(pc.equal(cohort.regions["region"], region))
        volume = part["prediction_volume_mm3"]
        rows.append(
            {
                "region": region,
                "scans": part.num_rows,
                "found_nothing": _count(pc.equal(part["prediction_voxels"], 0)),
                "median_volume_mm3": _median(volume),
                "median_voxels": _median(part["prediction_voxels"]),
                "median_components": _median(part["lesions_prediction"]),
                "median_probability": _median(part["mean_probability"]),
                "median_entropy": _median(part["mean_entropy"]),
                "touches_border": _count(part["touches_border"]),
                "outside_head": _count(pc.greater(part["outside_head_fraction"], MOSTLY_OUTSIDE)),
            }
        )
    return rows


def _median(column: Any) -> float | None:
    values = column.drop_null().to_numpy()
    return float(np.median(values)) if values.size else None
