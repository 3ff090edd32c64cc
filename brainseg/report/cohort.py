"""Cohort: the fact tables of runs become the numbers of a report, and nothing else is looked at.

`summary` returns plain data (dicts, lists, numbers, strings). The page and `--format json|csv|md` all show that data, so they
cannot disagree. Scans are kept apart by what the model had seen of their patients: held-out test patients are the
headline, training patients never are while there is anybody else. An infinite distance is the string `inf`, because JSON
knows no infinity.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import RegionSummary, Rule, aggregate, bootstrap_interval
from brainseg.report.advice import what_to_do
from brainseg.report.agreement import surprise, trust_against_dice, volume_agreement
from brainseg.report.alerts import alerts
from brainseg.report.baselines import baseline_figures, mean_dice
from brainseg.report.columns import only
from brainseg.report.drift import drift
from brainseg.report.facts import SPLITS, Cohort, Run, load
from brainseg.report.groups import subgroups
from brainseg.report.pace import throughput, timings
from brainseg.report.rows import Scored, count, labelled_rows, mean_dice_of_scans, ruled_dice
from brainseg.report.rows import plain as plain
from brainseg.report.versus import versus

BEFORE_READABLE = ("list", "decode")
MAX_LINES = 100
"""Quarantine lines kept per code; the counts are always whole."""

MOSTLY_OUTSIDE = 0.1
"""A mask with more than this share outside the head deserves a look."""

MAX_ROWS, LOWEST = 5000, 1000
"""Scans that the page carries one by one. Of a larger cohort: the `LOWEST` by Dice, and a seeded sample of all of it."""


def summary(
    run_uris: Sequence[str],
    *,
    rule: Rule = "exclude",
    where: str | None = None,
    compare: str | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """Every number of the report on these runs, as plain data that JSON can hold.

    Raises UsageError where a place is not a run folder, or `where` is no condition on the columns there are.
    """
    return summarise(*gather(run_uris, where, compare, reference), rule=rule)


def gather(
    run_uris: Sequence[str], where: str | None, compare: str | None, reference: str | None
) -> tuple[Cohort, Cohort | None, Cohort | None]:
    """The cohort, the one it is compared with and the one it is held against; each as far as the condition picks it."""
    cohort = load(run_uris)
    cohort = only(cohort, where) if where else cohort
    return cohort, load([compare]) if compare else None, load([reference]) if reference else None


def summarise(
    cohort: Cohort, other: Cohort | None = None, reference: Cohort | None = None, *, rule: Rule = "exclude"
) -> dict[str, Any]:
    """The same for cohorts that have been read already. `other` is compared with; `reference` is where drift is seen from."""
    counts = _counts(cohort)
    groups = [_group(cohort, split, rule) for split in SPLITS]
    groups = [group for group in groups if group["scans"]]
    leading = headline(groups)
    lead = next((group for group in groups if group["split"] == leading), None)
    baselines = baseline_figures(cohort, leading, rule)
    return {
        "runs": [_run(run) for run in cohort.runs],
        "rule": rule,
        "where": cohort.where,
        "counts": counts,
        "alerts": alerts(cohort, counts, lead, baselines),
        "headline": leading,
        "groups": groups,
        "baselines": baselines,
        **(_agreement(cohort, lead) if lead else {"volume_agreement": [], "trust_against_dice": []}),
        "subgroups": subgroups(cohort, leading, rule),
        "scans": _scan_rows(cohort),
        "quarantine": _quarantine(cohort),
        "remarks": _remarks(cohort),
        "trust": _trust(cohort),
        "timings": timings(cohort),
        "throughput": throughput(cohort),
        "comparison": versus(cohort, other) if other else None,
        "drift": drift(cohort, reference) if reference else None,
    }


def _agreement(cohort: Cohort, lead: Mapping[str, Any]) -> dict[str, Any]:
    """What volumes and trust figures of the leading split say."""
    split, regions = lead["split"], [r["region"] for r in lead["regions"]]
    return {
        "volume_agreement": volume_agreement(cohort, split, regions),
        "trust_against_dice": trust_against_dice(cohort, split, regions),
    }


def headline(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The split whose figures lead: the most telling one in which anything was evaluated; None without labels."""
    return next((group["split"] for group in groups if group["evaluated"]), None)


def _counts(cohort: Cohort) -> dict[str, int]:
    """The denominators, from the archive's scans down to those that carry a figure."""
    scans = cohort.scans
    failed = pc.equal(scans["status"], "failed")
    unread = pc.and_(failed, pc.is_in(scans["error_stage"], value_set=pa.array(BEFORE_READABLE)))
    listed = [None if cohort.where else (run.info.get("counts") or {}).get("found") for run in cohort.runs]
    per_run = [count(pc.equal(scans["run"], number)) for number in range(len(cohort.runs))]
    found = sum(max(n or 0, rows) for n, rows in zip(listed, per_run, strict=True))
    return {
        "found": found,
        "eligible": found - count(unread),
        "segmented": count(pc.equal(scans["status"], "ok")),
        "labelled": count(scans["labelled"]),
        "evaluated": count(scans["evaluated"]),
        "failed": count(failed),
        "missing": found - scans.num_rows,
        "patients": pc.count_distinct(scans["patient_id"]).as_py(),
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
        "smallest_component": info.get("smallest_component") or {"value": 0, "chosen_on": None},
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
    inside = pc.equal(cohort.scans["split"], split)
    scans = cohort.scans.select(["patient_id", "status", "labelled", "evaluated"]).filter(inside)
    failed = count(pc.and_(pc.equal(scans["status"], "failed"), scans["labelled"]))
    return {
        "split": split,
        "scans": scans.num_rows,
        "patients": pc.count_distinct(scans["patient_id"]).as_py(),
        "evaluated": count(scans["evaluated"]),
        "failed_labelled": failed,
        "regions": _region_figures(cohort, split, failed, rule),
    }


def _region_figures(cohort: Cohort, split: str, num_failed: int, rule: Rule) -> list[dict[str, Any]]:
    """One entry a region: the fields of `aggregate.RegionSummary`, the interval of the mean Dice, the mean with failures."""
    found = []
    for region in pc.unique(labelled_rows(cohort, split, columns=["region"])["region"]).to_pylist():
        rows = Scored.of(cohort, split, region)
        interval = bootstrap_interval(ruled_dice(rows, rule), rows.column("patient_id"))
        figures = aggregate(rows, rule=rule)[region]
        found.append(plain({**_fields(figures, num_failed), "dice_interval": list(interval)}))
    return found


def _fields(figures: RegionSummary, num_failed: int) -> dict[str, Any]:
    return {**asdict(figures), "dice_mean_failed_as_zero": figures.mean_with_failures_zero(num_failed)}


def _mean_dice_per_region(recorded: Any) -> dict[str, float]:
    """Region -> mean Dice, from plain numbers or from the summaries that a model's card holds."""
    means = {region: mean_dice(s) for region, s in recorded.items()} if isinstance(recorded, Mapping) else {}
    return {region: mean for region, mean in means.items() if mean is not None}


def carried(cohort: Cohort) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the scans that the page shows one by one, the lowest Dice first; and those of them that are a fair sample of all.

    Up to `MAX_ROWS` scans both are all that were segmented.
    """
    ok = pc.equal(cohort.scans["status"], "ok").to_numpy(zero_copy_only=False)
    order = np.argsort(mean_dice_of_scans(cohort), kind="stable")
    order = order[ok[order]]
    if order.size <= MAX_ROWS:
        return order, order
    drawn = np.random.default_rng(0).permutation(order.size)[: MAX_ROWS - LOWEST]
    shown = np.union1d(np.arange(LOWEST), drawn)
    return order[shown], order[np.sort(drawn)]


def carried_pictures(cohort: Cohort) -> list[int]:
    """Rows of the scans whose pictures the page carries, as far as there is room: the worst and the fair sample by turns."""
    shown, sample = (rows.tolist() for rows in carried(cohort))
    if len(shown) == len(sample):
        return list(shown)
    by_turns = [row for pair in zip(shown, np.random.default_rng(1).permutation(sample).tolist(), strict=False) for row in pair]
    return list(dict.fromkeys(by_turns))


def _scan_rows(cohort: Cohort) -> dict[str, Any]:
    """The scans that the page shows one by one, with the figures of each region."""
    shown, _ = carried(cohort)
    regions = defaultdict(list)
    kept = cohort.regions.where(pa.array(np.isin(cohort.regions["row"].to_numpy(), shown)), [*TABLE_FIGURES, "row"])
    for entry in kept.to_pylist():
        regions[entry.pop("row")].append(plain(entry))
    columns = ["scan_id", "patient_id", "dataset", "split", "fold", "warnings"]
    rows = cohort.scans.select(columns).take(pa.array(shown, pa.int64())).to_pylist()
    surprises = [plain(float(value)) for value in surprise(cohort)[shown]]
    entries = [{**r, "surprise": s, "regions": regions[i]} for r, s, i in zip(rows, surprises, shown.tolist(), strict=True)]
    return {"of": count(pc.equal(cohort.scans["status"], "ok")), "lowest": LOWEST, "rows": entries}


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
    "mean_entropy",
)


def _quarantine(cohort: Cohort) -> list[dict[str, Any]]:
    """The failed scans by code, the commonest first: how many, and the first `MAX_LINES` lines."""
    columns = cohort.scans.select(["error_code", "scan_id", "error_stage", "error_message"])
    grouped = defaultdict(list)
    for row in columns.filter(pc.equal(cohort.scans["status"], "failed")).to_pylist():
        grouped[row["error_code"]].append(
            {"scan_id": row["scan_id"], "stage": row["error_stage"], "message": row["error_message"]}
        )
    ranked = sorted(grouped.items(), key=lambda item: (-len(item[1]), str(item[0])))
    return [
        {"code": code, "count": len(lines), "what_to_do": what_to_do(code), "lines": lines[:MAX_LINES]}
        for code, lines in ranked
    ]


def _remarks(cohort: Cohort) -> list[dict[str, Any]]:
    """Warnings on scans that were used all the same, by code: how many scans, and one of the lines."""
    warnings = cohort.scans["warnings"]
    examples: dict[str, str] = {}
    number: dict[str, set[int]] = defaultdict(set)
    for row, lines in enumerate(warnings.filter(pc.greater(pc.list_value_length(warnings), 0)).to_pylist()):
        for line in lines:
            code, _, words = line.partition(": ")
            examples.setdefault(code, words)
            number[code].add(row)
    ranked = sorted(number, key=lambda code: (-len(number[code]), code))
    return [{"code": code, "count": len(number[code]), "example": examples[code]} for code in ranked]


TRUST_FIGURES = (
    *("prediction_volume_mm3", "prediction_voxels", "lesions_prediction", "mean_probability", "mean_entropy"),
    *("touches_border", "outside_head_fraction"),
)


def _trust(cohort: Cohort) -> list[dict[str, Any]]:
    """What can be said per region without any label, over all segmented scans."""
    rows = []
    whose = cohort.regions["region"]
    for region in pc.unique(whose).to_pylist():
        part = cohort.regions.where(pc.equal(whose, region), TRUST_FIGURES)
        volume = part["prediction_volume_mm3"]
        rows.append(
            {
                "region": region,
                "scans": part.num_rows,
                "found_nothing": count(pc.equal(part["prediction_voxels"], 0)),
                "median_volume_mm3": _median(volume),
                "median_voxels": _median(part["prediction_voxels"]),
                "median_components": _median(part["lesions_prediction"]),
                "median_probability": _median(part["mean_probability"]),
                "median_entropy": _median(part["mean_entropy"]),
                "touches_border": count(part["touches_border"]),
                "outside_head": count(pc.greater(part["outside_head_fraction"], MOSTLY_OUTSIDE)),
            }
        )
    return rows


def _median(column: Any) -> float | None:
    values = column.drop_null().to_numpy()
    return float(np.median(values)) if values.size else None
