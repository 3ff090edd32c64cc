"""Segment: stream an archive through the network into Parquet, on Ray Data.

    manifest rows -> [ decode -> predict -> finish -> write the part ] -> receipts -> driver

Where the network runs on CPUs one actor does the bracket for a block of scans, since passing voxels between processes
would cost more than it gains. Where it runs on GPUs decode and finish are CPU tasks around the GPU actors, so that cores
anywhere can feed them. The stage functions are the same (`stages.py`), the rows are the same. One block is one part.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from brainseg import inflight, manifest, runs, storage
from brainseg.config import How, SegmentConfig
from brainseg.ensemble import Members, find_members, refuse_unanswered
from brainseg.errors import FailureLimitError, PreflightError, StorageError, UsageError
from brainseg.lease import Lease, refuse_if_held
from brainseg.model import CHOICES, ModelCard, resolved
from brainseg.session import Cluster, await_room, connect, lifeline, plain_words, require, require_room
from brainseg.stages import Job
from brainseg.verify import verify_run as verify_run
from brainseg.versions import versions
from brainseg.workers import Forward, WholeWay, decode_block, finish_block

MOST_SCANS_PER_PART = 32
STANDSTILL_S = 600.0
"""Beyond what a whole part may take, a job in which nothing moves for this long is ended: Ray would wait in silence."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How the cluster's resources are used."""

    mode: Literal["fused", "apart"]
    actors: int
    actor_cpus: float
    actor_gpus: float
    scans_per_part: int

    def describe(self) -> str:
        what = (
            "one process each for decode, network and metrics"
            if self.mode == "fused"
            else "decode and metrics in CPU tasks around them"
        )
        return f"plan: {self.actors} {'GPU' if self.actor_gpus else 'CPU'} actor(s), {what}; {self.scans_per_part} scans a part"


@dataclass
class Progress:
    """What the receipts have told so far."""

    total: int
    before: int = 0
    failed_before: int = 0
    ok: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "predict": 0.0, "finish": 0.0})
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.before + self.ok + self.failed

    @property
    def all_failed(self) -> int:
        return self.failed_before + self.failed

    def line(self) -> str:
        """Scans done, failed and to come, the pace, and how long it will take."""
        elapsed = time.monotonic() - self.started
        pace = (self.ok + self.failed) / elapsed if elapsed else 0.0
        left = f", {(self.total - self.done) / pace:.0f} s left" if pace and self.done < self.total else ""
        return f"{self.done}/{self.total} scans, {self.all_failed} failed, {pace:.2f} scans/s{left}"


@dataclass(frozen=True)
class Ear:
    """Who listens: `say` gets lines for a person, `tick` gets the progress after every part."""

    say: Say = lambda _: None
    tick: Callable[[Progress], None] = lambda _: None


def segment_archive(
    source: str,
    models: str | Sequence[str],
    out: str,
    settings: SegmentConfig,
    how: How | None = None,
    ear: Ear | None = None,
) -> dict[str, int]:
    """Segment every scan of an archive or manifest into the run folder `out`; returns the counts of run.json.

    Several models, or the folds of a cross-validation, answer as an ensemble. Resumes what is there. Raises UsageError or
    RunError before anything is written where source, models or `out` cannot serve, and FailureLimitError once more scans
    failed than `how.max_failures` allows.
    """
    how, ear = how or How(), ear or Ear()
    started = time.monotonic()
    table = load_source(source)
    members = find_members([models] if isinstance(models, str) else models, settings)
    card = members.card
    asked, settings = settings, resolved(settings, card)
    check_modalities(table, card)
    refuse_unanswered(table, members, settings)
    limit = failure_limit(how.max_failures, table.num_rows)
    identity = runs.Identity(manifest.fingerprint(table), members.fingerprint, settings.fingerprint())
    if how.dry_run:
        size = sum(table["size_bytes"].to_pylist()) / 1e6
        ear.say(f"would segment {table.num_rows} scans ({size:.0f} MB) with model '{card.name}' into {out}")
        return {"found": table.num_rows}
    refuse_if_held(out)
    cluster = None if runs.is_finished(out, identity) else connect()
    if cluster is not None:
        make_plan(cluster, table.num_rows, how)
    with Lease(out) as lease:
        body = runs.open_run(out, identity, _description(source, members, settings) | _choices(asked, settings, card, ear.say))
        manifest.write_manifest(storage.join(out, runs.MANIFEST_FILE), table)
        storage.delete(storage.join(out, runs.SUCCESS_FILE))
        expected = runs.expected_tags(table)
        job = Job(
            out,
            members.uris[0],
            settings,
            body["run_id"],
            body["attempt"],
            identity.model_fingerprint,
            identity.config_fingerprint,
            card,
            lease.generation,
            how.scan_seconds,
            inflight.left_behind(out),
            members.uris[1:],
        )
        progress, counts = _to_the_end(table, expected, job, Drive(how, limit, ear, cluster), body, lease)
        timings = {"total_s": time.monotonic() - started, **{f"{k}_s": v for k, v in progress.seconds.items()}}
        inflight.clear(out)
        lease.check()
        runs.finish_run(out, body, counts, {k: round(v, 3) for k, v in timings.items()})
    return counts


def _derive(out: str, card: ModelCard, body: Mapping[str, Any], progress: Progress) -> dict[str, int]:
    """Write metrics.parquet; returns the counts of labels. Where nothing was segmented now, a later evaluation stays."""
    counted = body.get("counts") or {}
    if (
        progress.ok + progress.failed == 0
        and "evaluated" in counted
        and storage.exists(storage.join(out, runs.EVALUATION_FILE))
    ):
        return {name: int(counted[name]) for name in ("labelled", "evaluated")}
    runs.forget_evaluation(out)
    return runs.write_metrics(out, card.split)


@dataclass(frozen=True)
class Drive:
    """What the driver of a run goes by. `cluster` is None where all is done already."""

    how: How
    limit: int | None
    ear: Ear
    cluster: Cluster | None


def _to_the_end(
    table: pa.Table, expected: Mapping[str, str], job: Job, drive: Drive, body: Mapping[str, Any], lease: Lease
) -> tuple[Progress, dict[str, int]]:
    """Segment, settle and derive. Parts of an earlier attempt that turn out damaged are set aside, their scans done again."""
    while True:
        progress = _drive(table, expected, job, drive)
        lease.check()
        counts = runs.settle(job.run, expected)
        try:
            return progress, counts | _derive(job.run, job.card, body, progress)
        except StorageError:
            lost = runs.set_damaged_aside(job.run)
            if not lost:
                raise
            drive.ear.say(f"{lost} part(s) of this run are damaged and were set aside; their scans are done again")


def _drive(table: pa.Table, expected: Mapping[str, str], job: Job, drive: Drive) -> Progress:
    """Segment what no earlier attempt has finished; returns what the receipts told."""
    kept = runs.finished_rows(job.run, expected)
    failed_before = sum(1 for row in kept.values() if row.status == "failed")
    todo = table.filter(pa.array([s not in kept for s in table["scan_id"].to_pylist()], pa.bool_()))
    progress, ear, limit = Progress(table.num_rows, len(kept), failed_before), drive.ear, drive.limit
    if kept:
        ear.say(f"resuming: {len(kept)} of {table.num_rows} scans are done already")
    if not todo.num_rows:
        return progress
    cluster = drive.cluster or connect()
    plan = make_plan(cluster, todo.num_rows, drive.how)
    ear.say(plan.describe())
    if cluster.free_cpus is not None and cluster.free_cpus < plan.actors * plan.actor_cpus + 1:
        ear.say(f"only {cluster.free_cpus:g} of the cluster's {cluster.cpus:g} CPUs are free now; waiting for other jobs")
    with lifeline(), plain_words():
        await_room(STANDSTILL_S)
        with closing(_receipts(todo, job, plan)) as receipts:  # whatever ends it, the actors' CPUs are free again
            for receipt in receipts:
                _take(progress, receipt)
                ear.tick(progress)
                _enforce(limit, progress)
    return progress


def _enforce(limit: int | None, progress: Progress) -> None:
    if limit is not None and progress.all_failed > limit:
        kept = "what is done is kept, and the same command goes on from there"
        raise FailureLimitError(f"{progress.all_failed} scans failed, the limit is {limit}; {kept}")


def load_source(source: str) -> pa.Table:
    """A manifest as it is, or an archive indexed on the spot."""
    if source.endswith(".parquet"):
        return manifest.read_manifest(source)
    return manifest.index_archive(source)[0]


def check_modalities(table: pa.Table, card: ModelCard) -> None:
    """PreflightError where no scan has what the model needs: a mistake better seen before the first GPU second."""
    wanted = set(card.modalities)
    found = {tuple(m) for m in table["modalities"].to_pylist()}
    if found and not any(wanted <= set(m) for m in found):
        most = max(found, key=len)
        needs, has = ", ".join(card.modalities), ", ".join(most) or "none"
        raise PreflightError(f"model '{card.name}' needs {needs}; no scan of the archive has them all (found {has})")


def failure_limit(text: str | None, total: int) -> int | None:
    """How many scans may fail: `50`, or `5%` of all."""
    if text is None:
        return None
    number = text.removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--max-failures {text}: expected a number such as 50, or a share such as 5%")
    return int(value * total / 100) if text.endswith("%") else int(value)


def _description(source: str, members: Members, settings: SegmentConfig) -> dict[str, Any]:
    kept = (
        "name",
        "regions",
        "modalities",
        "label_map",
        "dataset",
        "metrics",
        "baselines",
        "audit",
        "selection_biased",
        "accept_leakage",
    )
    body, several = members.card.model_dump(mode="json"), len(members.uris) > 1
    model = {"uri": None if several else members.uris[0], "fingerprint": members.fingerprint, "split": body["split"]}
    return {
        "source": source,
        "brainseg_version": versions()["brainseg"],
        "model": {**model, **({"members": members.describe()} if several else {}), **{k: body[k] for k in kept}},
        "config": settings.model_dump(mode="json"),
        "versions": versions(),
    }


def _choices(asked: SegmentConfig, used: SegmentConfig, card: ModelCard, say: Say) -> dict[str, Any]:
    """Which threshold and component rule a run uses, and who chose them; says so where they were chosen for other answers."""
    taken = [name for name in CHOICES if getattr(asked, name) == "chosen"]
    flip = (card.chosen.get("settings") or {}).get("flip", used.flip)
    if taken and flip != used.flip:
        say(f"note: {' and '.join(taken)} chosen with flip={str(flip).lower()}; this run has flip={str(used.flip).lower()}")
    chosen_on = {name: card.chosen.get("chosen_on") if name in taken else None for name in CHOICES}
    return {name: {"value": getattr(used, name), "chosen_on": chosen_on[name]} for name in CHOICES}


def make_plan(cluster: Cluster, scans: int, how: How) -> Plan:
    """Choose actors and part size. PreflightError where Ray would wait for ever."""
    chosen: Literal["fused", "apart"] = "apart" if how.mode == "apart" or (how.mode is None and cluster.gpus) else "fused"
    gpus = 1.0 if cluster.gpus and chosen == "apart" else 0.0
    wanted = how.actors or int(cluster.gpus if gpus else cluster.cores if chosen == "fused" else max(1, cluster.cores // 2))
    wanted = max(1, min(wanted, scans))
    plan = Plan(chosen, wanted, 1.0, gpus, max(1, min(MOST_SCANS_PER_PART, -(-scans // (4 * wanted)))))
    what = f"segmenting with {wanted} actors"
    require(cluster, cpus=wanted * plan.actor_cpus + 1, gpus=wanted * gpus, what=what)
    require_room(cluster, wanted, cpus=plan.actor_cpus, gpus=gpus, what=what)
    return plan


def pipeline(todo: pa.Table, job: Job, plan: Plan) -> Dataset:
    """The whole way of a scan. Different num_cpus keep the stages from being fused into one process."""
    blocks = ray.data.from_arrow(todo).repartition(target_num_rows_per_block=plan.scans_per_part)
    pool = ActorPoolStrategy(size=plan.actors)
    arguments: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    if plan.mode == "fused":
        return blocks.map_batches(WholeWay, fn_constructor_args=(job,), compute=pool, num_cpus=plan.actor_cpus, **arguments)
    decoded = blocks.map_batches(partial(decode_block, job=job), num_cpus=0.5, **arguments)
    predicted = decoded.map_batches(
        Forward, fn_constructor_args=(job,), compute=pool, num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus, **arguments
    )
    return predicted.map_batches(partial(finish_block, job=job), num_cpus=0.25, **arguments)


def _receipts(todo: pa.Table, job: Job, plan: Plan) -> Generator[Mapping[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = STANDSTILL_S + plan.scans_per_part * job.scan_seconds
    yield from pipeline(todo, job, plan).iter_rows()


def _take(progress: Progress, receipt: Mapping[str, Any]) -> None:
    progress.ok += int(receipt["ok"])
    progress.failed += len(receipt["failed"])
    for stage in progress.seconds:
        progress.seconds[stage] += float(receipt[f"seconds_{stage}"])
