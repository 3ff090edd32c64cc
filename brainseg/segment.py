"""Segment: stream an archive through the network into Parquet, on Ray Data.

    manifest rows -> [ decode -> predict -> finish -> write the part ] -> receipts -> driver

Where the network runs on CPUs one actor does the bracket for a block of scans, since passing voxels between processes
would cost more than it gains. Where it runs on GPUs decode and finish are CPU tasks around the GPU actors, so that cores
anywhere can feed them. The stage functions are the same (`stages.py`), the rows are the same. One block is one part.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from brainseg import inflight, manifest, runs, storage
from brainseg.autoscaler import Room, grown
from brainseg.calibrate import measure, sample
from brainseg.card import CHOICES, ModelCard, refuse_unaccepted, resolved
from brainseg.config import How, SegmentConfig
from brainseg.ensemble import Members, find_members, refuse_unanswered
from brainseg.errors import FailureLimitError, PreflightError, StorageError, UsageError
from brainseg.lease import Lease, refuse_if_held
from brainseg.observe import Ear, Onlookers
from brainseg.plan import BLOCKS_AT_ONCE, DECODE_CPUS, FINISH_CPUS, Costs, Plan, describe_forecast, forecast, make_plan, mode_of
from brainseg.progress import Progress
from brainseg.session import Cluster, await_room, connect, joins_cluster, lifeline, plain_words, this_machine
from brainseg.stages import Job
from brainseg.verify import verify_run as verify_run
from brainseg.versions import versions
from brainseg.workers import Forward, WholeWay, decode_block, finish_block

STANDSTILL_S = 600.0
"""Beyond what a whole part may take, a job in which nothing moves for this long is ended: Ray would wait in silence."""
WORTH_MEASURING = 64
"""Of fewer scans the measuring would take longer than what it saves."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be segmented, by what and how: checked, and nothing of it begun."""

    table: pa.Table
    members: Members
    asked: SegmentConfig
    settings: SegmentConfig
    limit: int | None
    identity: runs.Identity

    def job(self, out: str, how: How) -> Job:
        """What workers must know, but for what a run of its own adds."""
        first, *others = self.members.uris
        marks = self.identity.model_fingerprint, self.identity.config_fingerprint
        job = Job(out, first, self.settings, "", 0, *marks, self.members.card, scan_seconds=how.scan_seconds)
        return replace(job, other_models=tuple(others))

    def description(self, source: str, say: Say) -> dict[str, Any]:
        """What run.json says of it."""
        choices = _choices(self.asked, self.settings, self.members.card, say)
        return _description(source, self.members, self.settings) | choices


def take_order(source: str, models: str | Sequence[str], settings: SegmentConfig, how: How) -> Order:
    """Check what can be checked before anything is begun. Raises UsageError, RunError or PreflightError."""
    table = load_source(source)
    members = find_members([models] if isinstance(models, str) else models, settings)
    for card in members.cards:
        refuse_unaccepted(card, accepted=how.accept_noncommercial)
    used = resolved(settings, members.card)
    check_modalities(table, members.card)
    refuse_unanswered(table, members, used)
    identity = runs.Identity(manifest.fingerprint(table), members.fingerprint, used.fingerprint())
    return Order(table, members, settings, used, failure_limit(how.max_failures, table.num_rows), identity)


def rehearse(order: Order, out: str, how: How, ear: Ear) -> dict[str, Any]:
    """Say what would run, on what, and from a few scans how long it would take and cost; write nothing."""
    scans, size = order.table.num_rows, sum(order.table["size_bytes"].to_pylist())
    ear.say(f"would segment {scans} scans ({size / 1e6:.0f} MB) with model '{order.members.card.name}' into {out}")
    rows, job = sample(order.table), order.job(out, how)
    if joins_cluster():
        cluster = connect(ear.say)
        with lifeline(), plain_words():
            costs = measure_there(rows, job, gpus=_gpus(cluster, how))
    else:
        cluster, costs = this_machine(), measure(rows, job)
    plan = make_plan(cluster, scans, how, costs)
    body = forecast(plan, scans, size, how.price_per_hour, how.currency)
    for line in (costs and costs.describe(), plan.describe(), describe_forecast(body)):
        if line:
            ear.say(line)
    return body


def measure_there(rows: Sequence[Mapping[str, Any]], job: Job, *, gpus: float) -> Costs | None:
    """What a few scans cost in a process of the cluster that has what an actor will have."""
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(measure)
    found: Costs | None = ray.get(task.remote(rows, job))
    return found


def _gpus(cluster: Cluster, how: How) -> float:
    """GPUs of an actor."""
    return 1.0 if cluster.gpus and mode_of(cluster, how) == "apart" else 0.0


def segment_archive(
    source: str,
    models: str | Sequence[str],
    out: str,
    settings: SegmentConfig,
    how: How | None = None,
    ear: Ear | None = None,
) -> dict[str, Any]:
    """Segment every scan of an archive or manifest into the run folder `out`; returns the counts of run.json.

    A dry run checks everything, takes a few scans the whole way, writes nothing, and returns a forecast (`plan.forecast`).

    Several models, or the folds of a cross-validation, answer as an ensemble. Resumes what is there. Raises UsageError or
    RunError before anything is written where source, models or `out` cannot serve, and FailureLimitError once more scans
    failed than `how.max_failures` allows.
    """
    how, ear = how or How(), ear or Ear()
    started = time.monotonic()
    order = take_order(source, models, settings, how)
    table, identity = order.table, order.identity
    if how.dry_run:
        return rehearse(order, out, how, ear)
    refuse_if_held(out)
    cluster = None if runs.is_finished(out, identity) else connect(ear.say)
    if cluster is not None:
        cluster = grown(cluster, _room(cluster, table.num_rows, how), ear.say)
        make_plan(cluster, table.num_rows, how)
    with Lease(out) as lease:
        body = runs.open_run(out, identity, order.description(source, ear.say))
        manifest.write_manifest(storage.join(out, runs.MANIFEST_FILE), table)
        storage.delete(storage.join(out, runs.SUCCESS_FILE))
        expected = runs.expected_tags(table)
        job = replace(
            order.job(out, how),
            run_id=body["run_id"],
            attempt=body["attempt"],
            lease=lease.generation,
            suspects=inflight.left_behind(out),
        )
        with Onlookers(out, body, table.num_rows, ear, lease.check) as onlookers:
            drive = Drive(how, order.limit, ear, cluster, onlookers)
            progress, counts = _to_the_end(table, expected, job, drive, body, lease)
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
    onlookers: Onlookers


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
    codes = Counter(str(row.error_code) for row in kept.values() if row.status == "failed")
    todo = table.filter(pa.array([s not in kept for s in table["scan_id"].to_pylist()], pa.bool_()))
    progress, ear = Progress(table.num_rows, len(kept), codes.total(), codes=codes), drive.ear
    drive.onlookers.see(progress)
    if kept:
        ear.say(f"resuming: {len(kept)} of {table.num_rows} scans are done already")
    if not todo.num_rows:
        return progress
    cluster = drive.cluster or connect(ear.say)
    plan = make_plan(cluster, todo.num_rows, drive.how, _costs(todo, job, cluster, drive.how))
    ear.say(plan.describe())
    crowded = cluster.free_cpus is not None and cluster.free_cpus < plan.actors * plan.actor_cpus + 1
    if crowded:
        ear.say(f"only {cluster.free_cpus:g} of the cluster's {cluster.cpus:g} CPUs are free now; waiting for other jobs")
    with lifeline(), plain_words():
        if crowded or cluster.free_cpus is None:
            await_room(STANDSTILL_S)
        with closing(_receipts(todo, job, plan)) as receipts:  # whatever ends it, the actors' CPUs are free again
            for receipt in receipts:
                drive.onlookers.part(receipt)
                _enforce(drive.limit, progress)
    return progress


def _costs(todo: pa.Table, job: Job, cluster: Cluster, how: How) -> Costs | None:
    """Measured where a GPU has to be fed and the archive is worth it; an actor that does everything needs no balance."""
    gpus = _gpus(cluster, how)
    if not gpus or todo.num_rows < WORTH_MEASURING:
        return None
    with lifeline(), plain_words():
        return measure_there(sample(todo), job, gpus=gpus)


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
        "manifest_fingerprint",
        "metrics",
        "baselines",
        "audit",
        "selection_biased",
        "accept_leakage",
        "terms",
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


def _room(cluster: Cluster, scans: int, how: How) -> Room:
    """What a cluster that grows is asked for: the actors that somebody wants, else one; with GPUs where they decode apart."""
    wants_gpus = how.mode != "fused" and bool(cluster.gpus or (how.actors and how.mode == "apart"))
    return Room(min(how.actors or 1, max(1, scans)), 1.0, 1.0 if wants_gpus else 0.0)


def pipeline(todo: pa.Table, job: Job, plan: Plan) -> Dataset:
    """The whole way of a scan. Different num_cpus keep the stages from being fused into one process."""
    blocks = _blocks(todo, plan)
    arguments: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    if plan.mode == "fused":
        pool = ActorPoolStrategy(size=plan.actors)
        return blocks.map_batches(WholeWay, fn_constructor_args=(job,), compute=pool, num_cpus=plan.actor_cpus, **arguments)
    threads: dict[str, Any] = {"max_concurrent_calls_per_actor": BLOCKS_AT_ONCE, "enable_true_multi_threading": True}
    pool, tasks = ActorPoolStrategy(size=plan.actors, **threads), TaskPoolStrategy(plan.decode_tasks)
    decoded = blocks.map_batches(partial(decode_block, job=job), num_cpus=DECODE_CPUS, compute=tasks, **arguments)
    predicted = decoded.map_batches(
        Forward, fn_constructor_args=(job,), compute=pool, num_cpus=plan.actor_cpus, num_gpus=plan.actor_gpus, **arguments
    )
    return predicted.map_batches(partial(finish_block, job=job), num_cpus=FINISH_CPUS, **arguments)


def _blocks(todo: pa.Table, plan: Plan) -> Dataset:
    """The manifest rows, a block a part. `from_arrow` would start processes to look at each block's size."""
    sizes = plan.part_sizes(todo.num_rows)
    cut = [todo.slice(end - size, size) for end, size in zip(accumulate(sizes), sizes, strict=True)] if sizes else [todo]
    blocks: Dataset = ray.data.from_blocks(cut)
    return blocks if sizes else blocks.repartition(target_num_rows_per_block=plan.scans_per_part)


def _receipts(todo: pa.Table, job: Job, plan: Plan) -> Generator[Mapping[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = STANDSTILL_S + plan.scans_per_part * job.scan_seconds
    yield from pipeline(todo, job, plan).iter_rows()
