"""Train: from a manifest to a model, on Ray Train. What a step is stands in `learn.py`, what a worker does in `course.py`.

The way: split by patient -> decode once into a cache (Ray Data) -> N workers learn from it (Ray Train), validating on
whole scans after each epoch -> the best weights are measured once on the held-out fold -> the model folder.
`OUT.work/` holds cache and checkpoints while it goes on; the same command takes a broken-off training up again from there.
"""

import io
import json
import threading
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

from brainseg import cache, manifest, storage
from brainseg.audit import Audit, audit_split
from brainseg.config import TrainConfig
from brainseg.course import BASELINES_FILE, FAILED_FILE, HELD_OUT_FILE, worker_loop
from brainseg.curves import draw_curves
from brainseg.errors import BrainsegError, PreflightError, ScanError, StorageError, UsageError
from brainseg.model import CARD, ModelCard, Split, load_card, save_model
from brainseg.prepare import select_modalities
from brainseg.regions import label_map
from brainseg.scans import Scan, load_scan
from brainseg.session import Cluster, connect, require
from brainseg.split import split_rows
from brainseg.unet import UNet
from brainseg.versions import versions
from brainseg.weights import blueprint, check_fit, tensors_of

SCANS_PER_SHARD = 16
MAX_WORKER_FAILURES = 2
LINES_LEFT_OUT = 10
"""Training scans that cannot be read are named one by one up to this many."""
Row = Mapping[str, Any]
Say = Callable[[str], None]


def train_model(
    manifest_uri: str, out: str, config: TrainConfig, *, workers: int | None = None, say: Say = lambda _: None
) -> ModelCard:
    """Train on a manifest and leave a model folder at `out`; returns its card.

    Raises UsageError before anything is written where manifest, config, `out` or cluster cannot serve.
    """
    table = manifest.read_manifest(manifest_uri)
    card, parts = draft(table, config)
    config = card.train
    finished = finished_before(out, card)
    if finished:
        say(f"{out} holds this very model already; nothing to do")
        return finished
    card = _audited(card, audit_split(parts, recorded=manifest.recorded_audit(manifest_uri)), say)
    cluster = connect()
    count = workers or max(1, int(cluster.gpus))
    if count > config.batch_size:
        raise PreflightError(f"{count} workers cannot share batches of {config.batch_size}; ask for fewer workers")
    per_worker = max(1, cluster.cores // count)
    require(cluster, cpus=count * per_worker + 1, gpus=count if cluster.gpus else 0, what=f"training with {count} workers")
    work = f"{out}.work"
    if not claimed_before(work, card):
        storage.write_json(storage.join(work, "training.json"), _claim(card))
    sizes = ", ".join(f"{len(p)} {name}" for name, p in parts.items())
    say(f"scans: {sizes}; {count} worker(s) of {per_worker} CPU(s){' and a GPU' if cluster.gpus else ''}")
    entries = _decode_once(work, table, {str(r["scan_id"]) for r in parts["train"]}, config, say)
    for part in ("validation", "test"):
        manifest.write_manifest(storage.join(work, f"{part}.parquet"), _subset(table, parts[part]))
    manifest.write_manifest(storage.join(work, "train.parquet"), _subset(table, parts["train"]))
    storage.write_json(storage.join(work, "index.json"), [e.to_json() for e in entries])
    _fit(work, card, count, per_worker, cluster, say)
    return _keep(out, work, card)


def draft(table: pa.Table, config: TrainConfig) -> tuple[ModelCard, dict[str, list[Row]]]:
    """The card of a model before anything is measured, and the rows of each part of its split. Writes nothing.

    Raises UsageError where manifest and config cannot serve.
    """
    rows = table.to_pylist()
    config = resolve(config, rows)
    split, parts = split_rows(rows, config)
    return _draft_card(config, rows, split, manifest.fingerprint(table)), parts


def _audited(card: ModelCard, audit: Audit, say: Say) -> ModelCard:
    """The card with the verdict of the leakage audit on its split, which is said aloud. Only shared patients are refused."""
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
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        weights_sha256="",
    )


def finished_before(out: str, card: ModelCard) -> ModelCard | None:
    """The card at `out` if it is the one asked for; UsageError if it is another."""
    if not storage.exists(storage.join(out, CARD)):
        return None
    there = load_card(out)
    if there.train == card.train and there.manifest_fingerprint == card.manifest_fingerprint:
        return there
    raise UsageError(f"{out} holds another model ('{there.name}', made {there.created_at}); choose another --out or remove it")


def claimed_before(work: str, card: ModelCard) -> bool:
    """Whether the work folder holds this very training, unfinished; UsageError if it holds another's."""
    place = storage.join(work, "training.json")
    there = storage.exists(place)
    if there and storage.read_json(place) != _claim(card):
        raise UsageError(
            f"{work} holds an unfinished training with another config or manifest; remove it or choose another --out"
        )
    return there


def _claim(card: ModelCard) -> dict[str, str]:
    return {"config": card.train.fingerprint(), "manifest": card.manifest_fingerprint}


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
        ray.data.from_arrow(chosen)
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


def _fit(work: str, card: ModelCard, count: int, per_worker: int, cluster: Cluster, say: Say) -> None:
    """Run the workers to the end, saying a line an epoch."""
    trainer = ray.train.torch.TorchTrainer(
        worker_loop,
        train_loop_config={"work": work, "card": card.model_dump(mode="json"), "threads": per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=count,
            use_gpu=cluster.gpus > 0,
            resources_per_worker={"CPU": per_worker, **({"GPU": 1} if cluster.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=card.train.fingerprint()[:16],
            storage_path=storage.join(work, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(storage.join(work, "metrics.jsonl"), done, say), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise BrainsegError(f"training failed: {_root_cause(error)}") from error
    finally:
        done.set()
        watcher.join()


def _root_cause(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__


def _watch(log: str, done: threading.Event, say: Say) -> None:
    """Say each line that the first worker appends to the log, until the training is over."""
    said, last = 0, False
    while not last:
        last = done.wait(1.0)
        lines = storage.read_text(log).splitlines() if storage.exists(log) else []
        for line in lines[said:]:
            say(epoch_line(json.loads(line)))
        said = len(lines)


def epoch_line(m: Mapping[str, Any]) -> str:
    """One epoch as a person reads it."""
    dice = "" if m["validation_dice"] is None else f"  validation Dice {m['validation_dice']:.4f}{' *' if m['best'] else ''}"
    pace = f"{m['samples_per_s']:.1f} slices/s  {m['elapsed_s']:.0f} s"
    return f"epoch {m['epoch'] + 1:>3}/{m['epochs']}  loss {m['loss']:.4f}{dice}  {pace}"


def _keep(out: str, work: str, card: ModelCard) -> ModelCard:
    """Make the model folder from what the workers left, then clear the work folder away."""
    result = storage.read_json(storage.join(work, "result.json"))
    state = result["state"]
    card = card.model_copy(
        update={
            "metrics": {
                "validation_dice": state["best_dice"],
                "held_out": result["held_out"],
                "held_out_scans": result["held_out_scans"],
            },
            "baselines": result["baselines"],
            "training": {"epochs": state["epoch"], "best_epoch": state["best_epoch"], "seconds": round(state["elapsed_s"], 1)},
        }
    )
    for name in (HELD_OUT_FILE, BASELINES_FILE, FAILED_FILE):
        storage.write_bytes(storage.join(out, name), storage.read_bytes(storage.join(work, name)))
    log = storage.read_bytes(storage.join(work, "metrics.jsonl"))
    storage.write_bytes(storage.join(out, "metrics.jsonl"), log)
    storage.write_bytes(storage.join(out, "curves.png"), draw_curves([json.loads(x) for x in io.BytesIO(log)]))
    best = storage.join(work, "best.safetensors")
    weights = tensors_of(storage.read_bytes(best), best)
    check_fit(weights, blueprint(lambda: UNet(card.network, len(card.modalities), len(card.regions)), best), best)
    card = save_model(out, card, weights)
    storage.delete_tree(work)
    return card
