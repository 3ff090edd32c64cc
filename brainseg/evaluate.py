"""Evaluate: score a run's stored masks once more, against the run's own labels or another manifest's, beside the baselines.

    RUN/scans/*.parquet + labels -> RUN/metrics.parquet, RUN/baselines.parquet, RUN/evaluation.json

Masks are read from the parts and never changed; no network runs. Each part is one Ray Data task. A label that cannot be
read costs its scan the figures, not the evaluation, and is named in `evaluation.json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from brainseg import manifest, runs, storage
from brainseg.card import Split
from brainseg.comparison import compare_runs
from brainseg.errors import Code, PreflightError, RunError, ScanError, StorageError, UsageError
from brainseg.geometry import Grid
from brainseg.held_out import Memory, baseline_rows, remember
from brainseg.lease import Lease
from brainseg.masks import check_mask, decode_mask, mask_grid
from brainseg.metrics import TRUST_FROM_NETWORK
from brainseg.report.cohort import plain
from brainseg.scans import load_label
from brainseg.scoring import Answers, score_regions
from brainseg.session import connect
from brainseg.tables import BASELINES, METRICS, SCANS

CARRIED = [name for name in SCANS.names if name in METRICS.names]
"""Columns that a metrics row takes over from its scan."""
MODEL = "model"
"""Stands in the column `baseline` of a piece of work for the run's own masks."""
Row = Mapping[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Judge:
    """What every task must know: what the run answers, by which lesion rule it counts, whom the model has met."""

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    label_map: str
    lesion_preset: Any
    split: Split

    @classmethod
    def of(cls, info: Row) -> "Judge":
        """From a `run.json`."""
        model, config = info["model"], info.get("config") or {}
        return cls(
            tuple(model["modalities"]),
            tuple(model["regions"]),
            model["label_map"],
            config.get("lesion_preset", "glioma"),
            Split.model_validate(model.get("split") or {}),
        )


@dataclass(frozen=True)
class Job:
    """One evaluation as its tasks see it. The two references lead to the label manifest and to a `Memory` or None."""

    run: str
    judge: Judge
    labels: Any
    memory: Any


def evaluate_run(
    run: str, *, labels: str | None = None, training: str | None = None, baselines: bool = True, say: Say = lambda _: None
) -> dict[str, Any]:
    """Recompute a finished run's metrics from its stored masks; returns the body of `evaluation.json`.

    `labels`: a manifest whose labels count instead of the run's own, joined by scan_id. `training`: a manifest with the
    model's training patients, for the nearest-mask baseline; by default they are looked for in the run's own manifest.
    Raises UsageError where the run has not finished or the labels belong to other scans, RunError for a damaged mask.
    """
    info = _finished(run)
    own = manifest.read_manifest(storage.join(run, "manifest.parquet"))
    truth = manifest.read_manifest(labels) if labels else own
    matched = _check_overlap(own, truth, labels)
    judge = Judge.of(info)
    connect(say)
    memory = _memory(manifest.read_manifest(training) if training else own, judge, say) if baselines else None
    with Lease(run):
        job = Job(run, judge, ray.put(truth), ray.put(memory))
        problems = _score_parts(job, say)
        _collect(run)
        body = {
            "run_id": info["run_id"],
            "evaluated_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "labels": labels,
            "labels_fingerprint": manifest.fingerprint(truth) if labels else None,
            "scans_in_labels": matched,
            "problems": problems,
            "nearest_mask": None
            if memory is None
            else {"known_scans": memory.num_scans, "training_scans": memory.num_training},
            "files": runs.seals(run, [runs.METRICS_FILE, runs.BASELINES_FILE]),
        }
        storage.write_json(storage.join(run, runs.EVALUATION_FILE), body)
    return body


def _finished(run: str) -> dict[str, Any]:
    if not storage.exists(storage.join(run, runs.RUN_FILE)):
        raise PreflightError(f"{run} is not a run folder: it has no {runs.RUN_FILE}")
    if not storage.exists(storage.join(run, runs.SUCCESS_FILE)):
        raise UsageError(f"{run} has not finished; run the same `brainseg segment` again, then evaluate")
    info: dict[str, Any] = storage.read_json(storage.join(run, runs.RUN_FILE))
    return info


def _check_overlap(own: pa.Table, truth: pa.Table, labels: str | None) -> int:
    """How many of the run's scans the labels know; UsageError where it is none of them."""
    known = pc.sum(pc.is_in(own["scan_id"], value_set=truth["scan_id"].combine_chunks())).as_py() or 0
    if own.num_rows and not known:
        example = f"the run has {own['scan_id'][0].as_py()}" + (f", the labels {truth['scan_id'][0]}" if len(truth) else "")
        raise UsageError(f"{labels}: none of its scans stands in the run (by scan_id: {example})")
    return int(known)


def _memory(table: pa.Table, judge: Judge, say: Say) -> Memory:
    """The model's recorded training part, learnt by heart for the nearest-mask baseline."""
    rows = [
        row
        for row in table.to_pylist()
        if row["has_label"] and not row["problem_code"] and judge.split.part_of(row["patient_id"], row["scan_id"]) == "train"
    ]
    if not rows:
        say(
            f"baseline nearest training mask: none of the model's {len(judge.split.train)} training {judge.split.unit}s stands"
            " in this manifest; name theirs with --training"
        )
    memory = remember(rows, judge)
    if memory.num_scans < memory.num_training:
        say(f"baseline nearest training mask: knows {memory.num_scans} of {memory.num_training} training scans")
    return memory


# --- one part -------------------------------------------------------------------------------------------------------


def _score_parts(job: Job, say: Say) -> list[dict[str, str]]:
    """Score every part in a task of its own; returns what went wrong with single scans."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    storage.delete_tree(storage.join(job.run, runs.EVALUATION))
    uris = runs.parts(job.run)
    if not uris:
        return []
    blocks = ray.data.from_blocks([pa.table({"part": [uri]}) for uri in uris])
    receipts = blocks.map_batches(partial(_score_block, job=job), batch_size=None, batch_format="pyarrow", num_cpus=1)
    problems: list[dict[str, str]] = []
    for number, receipt in enumerate(receipts.iter_rows(), start=1):
        if receipt["damage"]:
            raise RunError(f"{receipt['damage']}; `brainseg verify` says what else is damaged")
        problems += json.loads(receipt["problems"])
        if number % max(1, len(uris) // 10) == 0:
            say(f"{number}/{len(uris)} parts evaluated")
    return sorted(problems, key=lambda p: p["scan_id"])


def _score_block(block: pa.Table, job: Job) -> pa.Table:
    """A Ray task: score parts, leave their rows under RUN/evaluation, and say what went wrong."""
    truth, memory = ray.get(job.labels), ray.get(job.memory)
    receipts: dict[str, list[str]] = {"problems": [], "damage": []}
    for uri in block["part"].to_pylist():
        problems, damage = [], ""
        try:
            problems = _leave(uri, score_part(uri, truth, job.judge, memory), job.run)
        except (RunError, StorageError) as error:
            damage = str(error)
        receipts["problems"].append(json.dumps(problems))
        receipts["damage"].append(damage)
    return pa.table(receipts)


def _leave(uri: str, scored: tuple[list[dict[str, Any]], list[dict[str, str]]], run: str) -> list[dict[str, str]]:
    rows, problems = scored
    place = storage.join(run, runs.EVALUATION, storage.name_of(uri))
    storage.write_table(place, pa.Table.from_pylist(rows, schema=BASELINES), row_group_rows=65536)
    return problems


def score_part(
    uri: str, truth: pa.Table, judge: Judge, memory: Memory | None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Score the masks of one part: rows of `tables.BASELINES`, and per scan that went wrong its id, code and line.

    The run's own rows carry `model` in the column `baseline`. Raises RunError where a mask is not the one that was hashed.
    """
    wanted = [*CARRIED, "affine", "status", "mask", "mask_encoding", "mask_sha256", "regions"]
    scans = [row for row in storage.read_table(uri, wanted).to_pylist() if row["status"] == "ok"]
    ids = pa.array([row["scan_id"] for row in scans], pa.string())
    listed = {r["scan_id"]: r for r in truth.filter(pc.is_in(truth["scan_id"], value_set=ids)).to_pylist()}
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []
    for scan in scans:
        check_mask(scan, uri)
        label_row = listed.get(scan["scan_id"])
        found, problem = _scored(scan, label_row, judge)
        carried = {name: scan[name] for name in CARRIED}
        carried["split"] = side = judge.split.part_of(scan["patient_id"], scan["scan_id"])
        rows += [{"baseline": MODEL, **carried, **entry} for entry in found]
        if problem:
            problems.append({"scan_id": scan["scan_id"], **problem})
        elif memory and label_row and side != "train" and any(e["state"] != "no_label" for e in found):
            for name, entries in baseline_rows(label_row, judge, memory).items():
                rows += [{"baseline": name, **entry, **carried} for entry in entries]
    return rows, problems


def _scored(scan: Row, label_row: Row | None, judge: Judge) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """REGION entries of one stored mask; without figures, and with the reason, where its label cannot be used."""
    mask, grid = decode_mask(scan), mask_grid(scan)
    problem: dict[str, str] = {}
    label: NDArray[np.uint8] | None = None
    try:
        label = None if label_row is None else _label_on(grid, label_row)
    except (ScanError, StorageError) as error:
        problem = {"code": str(getattr(error, "code", Code.UNREADABLE)), "message": str(error)}
    meaning = str(label_row["label_map"]) if label_row else judge.label_map
    entries = score_regions(label, meaning, mask, grid, _answers(judge), lesions=judge.lesion_preset)
    trust = {entry["region"]: {key: entry[key] for key in TRUST_FROM_NETWORK} for entry in scan["regions"]}
    return [{**entry, **trust.get(entry["region"], {})} for entry in entries], problem


def _answers(judge: Judge) -> Answers:
    return judge


def _label_on(grid: Grid, row: Row) -> NDArray[np.uint8] | None:
    """A row's label where it lies on the mask's grid; ScanError where it lies on another, None where there is none."""
    found = load_label(row)
    if found is None:
        return None
    label, there = found
    if not grid.same_as(there):
        code = Code.SHAPE_MISMATCH if grid.shape != there.shape else Code.AFFINE_MISMATCH
        words = f"found a label of {there.describe()}, expected the mask's {grid.describe()}"
        raise ScanError(code, f"{row['scan_id']}: {words}")
    return label


# --- all parts ------------------------------------------------------------------------------------------------------


def _collect(run: str) -> None:
    """Gather what the tasks left into RUN/metrics.parquet and RUN/baselines.parquet, then clear it away."""
    folder = storage.join(run, runs.EVALUATION)
    pieces = [storage.read_table(e.uri) for e in storage.list_files(folder)] if storage.is_dir(folder) else []
    table = pa.concat_tables(pieces) if pieces else BASELINES.empty_table()
    keys = [("scan_id", "ascending"), ("region", "ascending")]
    own = pc.equal(table["baseline"], MODEL)
    metrics = table.filter(own).drop_columns(["baseline"]).cast(METRICS).sort_by(keys)
    others = table.filter(pc.invert(own)).sort_by([("baseline", "ascending"), *keys])
    storage.write_table(storage.join(run, runs.METRICS_FILE), metrics, row_group_rows=65536)
    storage.write_table(storage.join(run, runs.BASELINES_FILE), others, row_group_rows=65536)
    storage.delete_tree(folder)


def compare_evaluations(run: str, other: str) -> dict[str, Any]:
    """Dice of a run minus another's on the same scans that neither model was trained on, by region.

    With the patient-clustered interval and the Wilcoxon test of `comparison.compare_runs`. Raises UsageError where the two
    share no such scan.
    """
    tables = [_unseen(place) for place in (run, other)]
    compared = compare_runs(tables[0], tables[1])
    if not any(c.num_pairs for c in compared.values()):
        raise UsageError(f"{run} and {other} share no evaluated scan that both models had not been trained on")
    found: dict[str, Any] = plain({region: asdict(comparison) for region, comparison in compared.items()})
    return found


def _unseen(run: str) -> pa.Table:
    place = storage.join(run, runs.METRICS_FILE)
    if not storage.exists(place):
        raise PreflightError(f"{run} has no {runs.METRICS_FILE}: it is not a finished run")
    table = storage.read_table(place)
    return table.filter(pc.not_equal(pc.fill_null(table["split"], "outside"), "train"))
