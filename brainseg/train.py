"""Train: from a manifest to a model, on Ray Train. What a step is stands in `learn.py`, what a worker does in `course.py`.

The way: split by patient -> decode once into a cache (Ray Data) -> N workers learn from it (Ray Train), validating on
whole scans after each epoch -> the best weights are measured once on the held-out fold -> the model folder.
`OUT.work/` holds cache and checkpoints while it goes on; the same command takes a broken-off training up again from there.
"""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch

from brainseg import cache, manifest, overlays, pretrained, storage
from brainseg.audit import Audit, audit_split
from brainseg.autoscaler import Room, grown
from brainseg.card import CARD, ModelCard, Split, load_card
from brainseg.config import Crew, TrainConfig, read_crew
from brainseg.course import (
    BASELINES_FILE,
    FAILED_FILE,
    HARDWARE_FILE,
    HELD_OUT_CHOSEN_FILE,
    HELD_OUT_FILE,
    PRETRAINED_FILE,
    worker_loop,
)
from brainseg.curves import draw_curves
from brainseg.errors import BrainsegError, PreflightError, ScanError, StorageError, UsageError
from brainseg.heartbeat import leaving_word
from brainseg.loggers import Loggers, flat
from brainseg.model import save_model
from brainseg.prepare import select_modalities
from brainseg.regions import label_map
from brainseg.report.training import write_training_page
from brainseg.scans import Scan, load_scan
from brainseg.session import Cluster, connect, require, require_room
from brainseg.split import split_rows
from brainseg.storage.arrow import ray_storage
from brainseg.telemetry import TrainingMeters
from brainseg.unet import UNet
from brainseg.versions import versions
from brainseg.watch import LOG, Price, Watcher, watching
from brainseg.weights import blueprint, check_fit, tensors_of

CLAIM_FILE = "training.json"
"""In a work folder: which training it belongs to."""
SCANS_PER_SHARD = 16
MAX_WORKER_FAILURES = 2
RESIZE_EVERY_S = 60.0
"""How often a training of 2..8 workers looks whether the cluster has room for more."""
LINES_LEFT_OUT = 10
"""Training scans that cannot be read are named one by one up to this many."""
Row = Mapping[str, Any]
Say = Callable[[str], None]
NOBODY = Watcher()


def train_model(
    manifest_uri: str,
    out: str,
    config: TrainConfig,
    *,
    workers: int | str | None = None,
    say: Say = lambda _: None,
    watcher: Watcher = NOBODY,
) -> ModelCard:
    """Train on a manifest and leave a model folder at `out`; returns its card. `watcher` is told how far it is.

    `workers` is a number, or a range such as `2..8`: then as many train as the cluster has room for at any time, and after
    each change they go on from the last finished epoch.

    Raises UsageError before anything is written where manifest, config, `out` or cluster cannot serve.
    """
    began = time.monotonic()
    table = manifest.read_manifest(manifest_uri)
    card, parts = draft(table, config)
    config = card.train
    finished = finished_before(out, card)
    if finished:
        say(f"{out} holds this very model already; nothing to do")
        return finished
    card = _audited(card, audit_split(parts, recorded=manifest.recorded_audit(manifest_uri)), say)
    cluster = connect(say)
    crew = read_crew(workers or max(1, int(cluster.gpus)))
    if crew.most > config.batch_size:
        raise PreflightError(f"{crew.most} workers cannot share batches of {config.batch_size}; ask for fewer workers")
    cluster = grown(cluster, Room(crew.fewest, 1.0, 1.0 if cluster.gpus else 0.0), say)
    largest = int(max((cpus for cpus, _ in cluster.shapes), default=cluster.cores))
    per_worker = max(1, min(cluster.cores // crew.most, largest))
    least = {"cpus": crew.fewest * per_worker + 1, "gpus": crew.fewest if cluster.gpus else 0}
    what = f"training with {crew.fewest} workers"
    require(cluster, **least, what=what)
    require_room(cluster, crew.fewest, cpus=per_worker, gpus=1 if cluster.gpus else 0, what=what)
    work = f"{out}.work"
    if not claimed_before(work, card):
        if config.pretrained:
            pretrained.bring(config, storage.join(work, PRETRAINED_FILE))
        storage.write_json(storage.join(work, CLAIM_FILE), claim(card))
    sizes = ", ".join(f"{len(p)} {name}" for name, p in parts.items())
    say(f"scans: {sizes}; {crew} worker(s) of {per_worker} CPU(s){' and a GPU' if cluster.gpus else ''}")
    entries = _decode_once(work, table, {str(r["scan_id"]) for r in parts["train"]}, config, say)
    for part in ("validation", "test"):
        manifest.write_manifest(storage.join(work, f"{part}.parquet"), _subset(table, parts[part]))
    manifest.write_manifest(storage.join(work, "train.parquet"), _subset(table, parts["train"]))
    storage.write_json(storage.join(work, "index.json"), [e.to_json() for e in entries])
    before_s = _epochs_s(work)
    meters = {"Prometheus": partial(TrainingMeters, storage.name_of(out.rstrip("/")))}
    with Loggers.of(watcher.log_to, out, config.model_dump(mode="json"), say, meters) as loggers:
        with leaving_word(work), watching(work, watcher, loggers, say):
            _fit(work, card, crew, per_worker, cluster)
        used = _used(work, crew.most, per_worker, cluster) | {"scans": _by_fold(parts)}
        used |= cost(before_s + time.monotonic() - began, used, watcher.price)
        card = _keep(out, work, card, used)
        loggers.finish(dict(flat({"held_out": card.metrics["held_out"]})))
    write_training_page(out)
    return card


def _epochs_s(work: str) -> float:
    """Seconds of the epochs that earlier attempts at this training have finished."""
    place = storage.join(work, LOG)
    lines = storage.read_text(place).splitlines() if storage.exists(place) else []
    return float(json.loads(lines[-1])["elapsed_s"]) if lines else 0.0


def _used(work: str, count: int, per_worker: int, cluster: Cluster) -> dict[str, Any]:
    """What the training ran on: the first worker's machine, and what was taken of the cluster; CPUs and GPUs on average."""
    log = [json.loads(line) for line in storage.read_text(storage.join(work, LOG)).splitlines()]
    mean = sum(m.get("workers") or count for m in log) / max(1, len(log))
    taken: dict[str, Any] = {"workers": count, "cpus_per_worker": per_worker, "nodes": cluster.nodes}
    taken |= {"cpus": mean * per_worker, "gpus": mean if cluster.gpus else 0}
    return taken | {"hardware": storage.read_json(storage.join(work, HARDWARE_FILE))}


def cost(seconds: float, used: Mapping[str, Any], price: Price | None) -> dict[str, Any]:
    """Core-hours and GPU-hours of a training of so many seconds, and its price where an hour's is known.

    Epochs of earlier attempts count; what those attempts did between their last epoch and their end does not.
    """
    hours = seconds / 3600
    body = {"wall_s": round(seconds, 1), "core_hours": hours * used["cpus"], "gpu_hours": hours * used["gpus"]}
    if price is not None:
        body |= {"price_per_hour": price.per_hour, "currency": price.currency, "price": hours * price.per_hour}
    return body


def _by_fold(parts: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Scans and named patients of each part of the split, fold by fold."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for part, rows in parts.items():
        for row in rows:
            groups.setdefault((part, row["fold"]), []).append(row)
    return [
        {"part": part, "fold": fold, "scans": len(rows), "patients": len({r["patient_id"] for r in rows} - {None})}
        for (part, fold), rows in sorted(groups.items(), key=lambda g: (list(parts).index(g[0][0]), str(g[0][1])))
    ]


def draft(table: pa.Table, config: TrainConfig) -> tuple[ModelCard, dict[str, list[Row]]]:
    """The card of a model before anything is measured, and the rows of each part of its split. Writes nothing.

    Raises UsageError where manifest and config cannot serve.
    """
    rows = table.to_pylist()
    config = resolve(config, rows)
    split, parts = split_rows(rows, config)
    card = _draft_card(config, rows, split, manifest.fingerprint(table))
    return (pretrained.descended(card, parts) if config.pretrained else card), parts


def _audited(card: ModelCard, audit: Audit, say: Say) -> ModelCard:
    """The card with the verdict of the leakage audit on its split, which is said aloud. Only shared patients are refused."""
    if card.pretrained:
        audit = pretrained.audited(audit, card.pretrained)
        say(pretrained.line(card, card.pretrained))
    for line in audit.lines():
        say(line)
    if audit.verdict == "leaks":
        say("WARNING: the split leaks; the held-out figures of this model are too good, and its card says so")
    return card.model_copy(update={"audit": audit.to_json()})


def resolve(config: TrainConfig, rows: Sequence[Row]) -> TrainConfig:
    """Fill in what the config leaves to the manifest: the modalities. PreflightError where they do not fit it."""
    if not rows:
        raise PreflightError("the manifest holds no scans")
    common = [m for m in rows[0]["modalities"] if all(m in r["modalities"] for r in rows)]
    wanted = config.modalities or tuple(common)
    able = sum(1 for r in rows if set(wanted) <= set(r["modalities"]))
    if not wanted or not able:
        asked, there = ", ".join(wanted) or "a common modality", ", ".join(common) or "none in common"
        raise PreflightError(f"the recipe wants {asked}; the manifest's scans have {there}")
    for name in {str(r["label_map"]) for r in rows}:
        label_map(name).masks(np.zeros((1,), np.uint8), config.regions)
    return config.model_copy(update={"modalities": wanted})


def _draft_card(config: TrainConfig, rows: Sequence[Row], split: Split, fingerprint: str) -> ModelCard:
    """The model's card before anything is measured."""
    maps = sorted({str(r["label_map"]) for r in rows})
    if len(maps) > 1:
        raise PreflightError(f"the manifest mixes the label maps {', '.join(maps)}; train on one of them")
    return ModelCard(
        name=config.name,
        network=config.network,
        prepare=config.prepare,
        modalities=config.modalities,
        regions=config.regions,
        label_map=maps[0],
        dataset=", ".join(sorted({str(r["dataset"]) for r in rows})),
        manifest_fingerprint=fingerprint,
        split=split,
        selection_biased=not split.validation,
        accept_leakage=config.accept_leakage,
        metrics={},
        train=config,
        versions=versions(),
        created_at=_now(),
        weights_sha256="",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def finished_before(out: str, card: ModelCard) -> ModelCard | None:
    """The card at `out` if it is the one asked for; UsageError if it is another."""
    if not storage.exists(storage.join(out, CARD)):
        return None
    there = load_card(out)
    if (there.train, there.manifest_fingerprint, there.pretrained) == (card.train, card.manifest_fingerprint, card.pretrained):
        return there
    raise UsageError(f"{out} holds another model ('{there.name}', made {there.created_at}); choose another --out or remove it")


def claimed_before(work: str, card: ModelCard) -> bool:
    """Whether the work folder holds this very training, unfinished; UsageError if it holds another's."""
    place = storage.join(work, CLAIM_FILE)
    there = storage.exists(place)
    if there and storage.read_json(place) != claim(card):
        raise UsageError(
            f"{work} holds an unfinished training with another config or manifest; remove it or choose another --out"
        )
    return there


def claim(card: ModelCard) -> dict[str, str]:
    """What a work folder says of the training that it belongs to."""
    asked = {"config": card.train.fingerprint(), "manifest": card.manifest_fingerprint}
    return asked | ({"pretrained": card.pretrained.model_fingerprint} if card.pretrained else {})


def _subset(table: pa.Table, rows: Sequence[Row]) -> pa.Table:
    wanted = {r["scan_id"] for r in rows}
    return table.filter(pa.array([s in wanted for s in table["scan_id"].to_pylist()]))


def _decode_once(work: str, table: pa.Table, wanted: set[str], config: TrainConfig, say: Say) -> list[cache.Entry]:
    """Decode the training scans into shards with Ray Data; scans that cannot be read are named and left out."""
    index = storage.join(work, "index.json")
    if storage.exists(index):
        return [cache.Entry.from_json(e) for e in storage.read_json(index)]
    started = time.monotonic()
    chosen = table.filter(pa.array([s in wanted for s in table["scan_id"].to_pylist()]))
    body, shards = config.model_dump(mode="json"), storage.join(work, "cache")
    ray.data.DataContext.get_current().enable_progress_bars = False
    receipts = (
        ray.data.from_blocks([chosen])
        .repartition(target_num_rows_per_block=SCANS_PER_SHARD)
        .map_batches(
            partial(_decode_batch, config_body=body, shards=shards), batch_size=None, batch_format="pyarrow", num_cpus=1
        )
        .take_all()
    )
    problems = [receipt["problem"] for receipt in receipts if receipt["problem"]]
    for line in problems[:LINES_LEFT_OUT]:
        say(f"left out: {line}")
    if len(problems) > LINES_LEFT_OUT:
        say(f"left out: {len(problems) - LINES_LEFT_OUT} more; `segment` would list each in the quarantine")
    entries = [cache.Entry.from_json(json.loads(r["entry"])) for r in receipts if r["entry"]]
    if not entries:
        raise PreflightError("none of the training scans could be read")
    say(f"decoded {len(entries)} training scans in {time.monotonic() - started:.0f} s")
    return sorted(entries, key=lambda e: e.scan_id)


def _decode_batch(batch: pa.Table, config_body: dict[str, Any], shards: str) -> pa.Table:
    """A Ray task: decode some manifest rows into one shard; a receipt per scan."""
    config = TrainConfig.model_validate(config_body)
    scans: list[tuple[Scan, str]] = []
    receipts: list[dict[str, str]] = []
    for row in batch.to_pylist():
        try:
            scan = load_scan(row)
            cache.region_bits(scan, config.regions, label_map(row["label_map"]))
            select_modalities(scan, config.modalities)
        except (ScanError, StorageError) as error:
            said = str(error)
            problem = said if said.startswith(row["scan_id"]) else f"{row['scan_id']}: {said}"
            receipts.append({"entry": "", "problem": problem})
        else:
            scans.append((scan, row["label_map"]))
    if scans:
        uri = storage.join(shards, f"{scans[0][0].scan_id}.bin")
        receipts += [{"entry": json.dumps(e.to_json()), "problem": ""} for e in cache.write_shard(scans, uri, config)]
    return pa.Table.from_pylist(receipts, schema=pa.schema([("entry", pa.string()), ("problem", pa.string())]))


def _fit(work: str, card: ModelCard, crew: Crew, per_worker: int, cluster: Cluster) -> None:
    """Run the workers to the end."""
    filesystem, place = ray_storage(storage.join(work, "ray"))
    trainer = ray.train.torch.TorchTrainer(
        worker_loop,
        train_loop_config={"work": work, "card": card.model_dump(mode="json"), "threads": per_worker},
        scaling_config=ray.train.ScalingConfig(**scaling(crew, per_worker, cluster)),
        run_config=ray.train.RunConfig(
            name=card.train.fingerprint()[:16],
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise BrainsegError(f"training failed: {_root_cause(error)}") from error


def scaling(crew: Crew, per_worker: int, cluster: Cluster) -> dict[str, Any]:
    """How many workers of which size, and where, as Ray's `ScalingConfig` takes it.

    GPUs of one machine exchange gradients fastest; on CPUs workers that share a machine share the bandwidth of its memory, and
    Ray left to itself fills one machine while others idle.
    """
    return {  # a mapping, because the types that Ray publishes are those of its older class
        "num_workers": (crew.fewest, crew.most) if crew.is_elastic else crew.most,
        "elastic_resize_monitor_interval_s": RESIZE_EVERY_S,
        "use_gpu": cluster.gpus > 0,
        "resources_per_worker": {"CPU": per_worker, **({"GPU": 1} if cluster.gpus else {})},
        "placement_strategy": "PACK" if cluster.gpus else "SPREAD",
    }


def _root_cause(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__


def _keep(out: str, work: str, card: ModelCard, used: Mapping[str, Any]) -> ModelCard:
    """Make the model folder from what the workers left, then clear the work folder away."""
    result = storage.read_json(storage.join(work, "result.json"))
    state = result["state"]
    card = card.model_copy(
        update={
            "metrics": {
                "validation_dice": state["best_dice"],
                "held_out": result["held_out"],
                "held_out_scans": result["held_out_scans"],
                "held_out_duplicated": result["held_out_duplicated"],
                **({"held_out_chosen": result["held_out_chosen"]} if card.train.choose else {}),
            },
            "baselines": result["baselines"],
            "chosen": result.get("chosen", {}),
            "created_at": _now(),
            "training": {
                "epochs": state["epoch"],
                "best_epoch": state["best_epoch"],
                "seconds": round(state["elapsed_s"], 1),
                **used,
            },
        }
    )
    rows_as_chosen = (HELD_OUT_CHOSEN_FILE,) if card.train.choose else ()
    for name in (HELD_OUT_FILE, BASELINES_FILE, FAILED_FILE, *rows_as_chosen):
        storage.write_bytes(storage.join(out, name), storage.read_bytes(storage.join(work, name)))
    pictures = [storage.name_of(entry.uri) for entry in storage.list_files(storage.join(work, overlays.FOLDER))]
    for name in overlays.kept(pictures, state["best_epoch"]):
        place = storage.join(overlays.FOLDER, name)
        storage.write_bytes(storage.join(out, place), storage.read_bytes(storage.join(work, place)))
    log = storage.read_bytes(storage.join(work, LOG))
    storage.write_bytes(storage.join(out, LOG), log)
    storage.write_bytes(storage.join(out, "curves.png"), draw_curves([json.loads(x) for x in io.BytesIO(log)]))
    best = storage.join(work, "best.safetensors")
    weights = tensors_of(storage.read_bytes(best), best)
    check_fit(weights, blueprint(lambda: UNet(card.network, len(card.modalities), len(card.regions)), best), best)
    card = save_model(out, card, weights)
    storage.delete_tree(work)
    return card
