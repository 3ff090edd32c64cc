"""Course: one worker's way through a training, from its first (or last checkpointed) epoch to the measured result.

Runs inside Ray Train. What is learnt, and how, is `learn.py`; here stand the epochs, the validations on whole scans, the
early stop, the checkpoints that a broken-off training goes on from, and the one measurement on the held-out fold.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import ray.train
import ray.train.torch
import torch
from pydantic import Field, ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor

from brainseg import cache, hardware, learn, manifest, overlays, storage, sweep
from brainseg.card import CHOICES, ModelCard
from brainseg.config import Config, LesionPreset, SegmentConfig
from brainseg.errors import BrainsegError, Code, PreflightError, ScanError, StorageError, one_line
from brainseg.heartbeat import Heartbeat
from brainseg.held_out import baselines_table, figures, metrics_table, summaries
from brainseg.model import Model
from brainseg.prepare import select_modalities
from brainseg.scans import Scan, load_scan
from brainseg.scoring import mean_dice, segment_and_score
from brainseg.unet import UNet
from brainseg.weights import MOST_BYTES, read_json, read_limited, tensors_of

HELD_OUT_FILE = "held_out.parquet"
HELD_OUT_CHOSEN_FILE = "held_out_chosen.parquet"
BASELINES_FILE = "baselines.parquet"
FAILED_FILE = "held_out_failed.json"
HARDWARE_FILE = "hardware.json"
PRETRAINED_FILE = "pretrained.safetensors"
SCANS_PER_PREDICT = 8
SHELF_BYTES = 2 << 30
"""Validation scans are kept decoded in a worker's memory up to this much."""
Row = Mapping[str, Any]


def worker_loop(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    context = ray.train.get_context()
    worker = learn.Worker(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(job["threads"])
    card = ModelCard.model_validate(job["card"])
    body = storage.read_json(storage.join(job["work"], "index.json"))
    device = ray.train.torch.get_device()
    samples = cache.SampleSet([cache.Entry.from_json(e) for e in body], len(card.regions), device=device)
    learner = learn.make_learner(card.train, len(samples), device, worker)
    if card.pretrained:
        learn.begin_with(learner, _pretrained(job["work"]))
    Course(job["work"], card, learner, samples).run()


def _pretrained(work: str) -> dict[str, Tensor]:
    """The weights that this training begins with, as the driver left them."""
    return tensors_of(read_limited(storage.join(work, PRETRAINED_FILE), MOST_BYTES), PRETRAINED_FILE)


class Shelf:
    """Whole scans of one worker's part, decoded once and kept while they fit in memory.

    `failures` names each scan that could not be used, with code and message; `duplicated`, for each scan read that has some,
    the wanted modalities that equal an earlier one in every voxel.
    """

    def __init__(self, rows: Sequence[Row], modalities: Sequence[str]) -> None:
        self.rows, self.modalities = rows, modalities
        self.failures: dict[str, dict[str, str]] = {}
        self.duplicated: dict[str, list[str]] = {}
        self._kept: dict[int, Scan | None] = {}
        self._bytes = 0

    def scored(self, model: Model, *, lesions: LesionPreset | None = None) -> list[dict[str, Any]]:
        """Segment and score every readable scan, a few at a time; lesion by lesion only where a preset is named."""
        out: list[dict[str, Any]] = []
        for group in self.groups():
            out += segment_and_score(model, [s for s, _ in group], [r for _, r in group], lesions=lesions)
        return out

    def groups(self) -> Iterator[list[tuple[Scan, Row]]]:
        """The readable scans with their rows, a few at a time."""
        for start in range(0, len(self.rows), SCANS_PER_PREDICT):
            numbers = range(start, min(start + SCANS_PER_PREDICT, len(self.rows)))
            found = [(scan, self.rows[i]) for i in numbers if (scan := self.scan(i))]
            if found:
                yield found

    def scan(self, number: int) -> Scan | None:
        """The scan at this place; None where it cannot be used."""
        if number in self._kept:
            return self._kept[number]
        scan = self._read(self.rows[number])
        size = 0 if scan is None else scan.image.nbytes
        if self._bytes + size <= SHELF_BYTES:
            self._kept[number], self._bytes = scan, self._bytes + size
        return scan

    def _read(self, row: Row) -> Scan | None:
        try:
            scan = load_scan(row)
            select_modalities(scan, self.modalities)
        except (ScanError, StorageError) as error:
            code = error.code if isinstance(error, ScanError) else Code.UNREADABLE
            self.failures[row["scan_id"]] = {"scan_id": row["scan_id"], "code": str(code), "message": str(error)}
            return None
        equal = [name for name in scan.duplicated if name in self.modalities]
        if equal:
            self.duplicated[row["scan_id"]] = equal
        return scan


class TrainingState(Config):
    """What `state.json` of a checkpoint must hold."""

    epoch: Annotated[int, Field(ge=0)]
    best_dice: float
    best_epoch: Annotated[int, Field(ge=-1)]
    stale: Annotated[int, Field(ge=0)]
    log: list[dict[str, Annotated[float, Field(allow_inf_nan=True)] | Annotated[str, Field(max_length=200)] | None]]
    elapsed_s: Annotated[float, Field(ge=0)]


def restored(folder: str, learner: learn.Learner, work: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put a checkpoint's tensors back into the learner; returns the best weights and what `state.json` holds.

    BrainsegError, and nothing put back, where the checkpoint is damaged or was made for something else.
    """
    tensors, text = Path(folder) / "state.safetensors", Path(folder) / "state.json"
    try:
        state: dict[str, Any] = read_json(str(text), finite=False)
        TrainingState.model_validate(state)
        # A state holds the weights three times, and two moments of each
        best = learn.restore(learner, tensors_of(read_limited(str(tensors), 5 * MOST_BYTES), tensors.name))
    except (BrainsegError, ValidationError) as error:
        reason = one_line(str(error).replace(folder, ""))[:300]
        way = f"remove {work} (`brainseg clean {work} --older-than 0s`) and train anew"
        raise BrainsegError(f"the checkpoint cannot be used: {reason}; {way}") from error
    return best, state


class Course:
    """The state of one worker's training, and the steps that change it."""

    def __init__(self, work: str, card: ModelCard, learner: learn.Learner, samples: cache.SampleSet) -> None:
        self.work, self.card, self.learner, self.samples = work, card, learner, samples
        part = "validation" if card.split.validation else "test"
        rows = manifest.read_manifest(storage.join(work, f"{part}.parquet")).to_pylist()
        self.shelf = Shelf(rows[learner.worker.rank :: learner.worker.count], card.modalities)
        # The first worker draws from all of them, so that the pictures show the same slices however many workers there are
        whole = self.shelf if learner.worker.count == 1 else Shelf(rows, card.modalities)
        self.album = overlays.Album(work, card, [str(row["patient_id"] or row["scan_id"]) for row in rows], whole.scan)
        self.heartbeat = Heartbeat(work, card.train.epochs, learner.steps_per_epoch, writes=learner.worker.rank == 0)
        network = UNet(card.network, len(card.modalities), len(card.regions))
        self.validated = Model(card, network, "", learner.device, SegmentConfig())
        self.best: dict[str, Tensor] = {k: v.clone() for k, v in learner.best_guess().items()}
        self.state: dict[str, Any] = {"epoch": 0, "best_dice": -1.0, "best_epoch": -1, "stale": 0, "log": [], "elapsed_s": 0.0}

    def run(self) -> None:
        self._restore()
        self.learner.optimiser.register_step_post_hook(lambda *_: self.heartbeat.step())
        if self.learner.worker.rank == 0:
            storage.write_json(storage.join(self.work, HARDWARE_FILE), hardware.machine())
        with self.heartbeat:
            self._train()
            self.heartbeat.begin("measure", max(0, self.state["epoch"] - 1))
            self._measure()

    def _train(self) -> None:
        """Epoch after epoch, to the last one or to the early stop."""
        config, started = self.card.train, time.monotonic() - self.state["elapsed_s"]
        while not self._is_over():
            epoch = self.state["epoch"]
            self.heartbeat.begin("train", epoch)
            loss = self._mean(learn.train_epoch(self.learner, self.samples, epoch))
            if not math.isfinite(loss):
                raise BrainsegError(f"the loss became {loss} in epoch {epoch + 1}; try a lower learning rate")
            self.heartbeat.begin("validate", epoch)
            is_due = (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs
            dice = self._validate() if is_due else None
            self._note(loss, dice, time.monotonic() - started)
            if dice is not None:
                self._show(epoch, dice, is_last=self._is_over())
            self.heartbeat.begin("checkpoint", epoch)
            self._report()

    def _is_over(self) -> bool:
        """Whether the last epoch is done, or enough validations were no better."""
        config = self.card.train
        return self.state["epoch"] >= config.epochs or (config.patience is not None and self.state["stale"] >= config.patience)

    def _show(self, epoch: int, dice: float, *, is_last: bool = False) -> None:
        """A picture of some validation slices from the first worker, when one is due; `validated` holds the weights."""
        every = self.card.train.overlays_every
        if every is None or self.learner.worker.rank:
            return
        if is_last or (epoch + 1) % every == 0 or epoch < self.card.train.validate_every:
            mean = f"mean {'validation' if self.card.split.validation else 'held-out'} Dice {dice:.3f}"
            title = f"{self.card.name}, epoch {epoch + 1} of {self.card.train.epochs}, {mean}"
            self.album.add(self.validated, epoch, title)

    def _validate(self) -> float:
        """Mean Dice over whole validation scans, each counted once however many workers share them."""
        self.validated.network.load_state_dict(self.learner.best_guess())
        return mean_dice(self._gather(self.shelf.scored(self.validated)))

    def _note(self, loss: float, dice: float | None, elapsed: float) -> None:
        """Bring the training's state up to date with a finished epoch."""
        s, config = self.state, self.card.train
        better = dice is not None and dice > s["best_dice"]
        if better:
            s.update(best_dice=dice, best_epoch=s["epoch"], stale=0)
            self.best = {k: v.detach().clone() for k, v in self.learner.best_guess().items()}
        elif dice is not None:
            s["stale"] += 1
        seconds, norm = self.heartbeat.seconds("train"), self.learner.gradient_norm
        s["log"].append(
            {
                "epoch": s["epoch"],
                "epochs": config.epochs,
                "loss": loss,
                "validation_dice": dice,
                "best": better,
                "learning_rate": learn.learning_rate(
                    config.optimiser, (s["epoch"] + 1) * self.learner.steps_per_epoch - 1, self.learner.total_steps
                ),
                "samples_per_s": self.learner.steps_per_epoch * config.batch_size / seconds,
                "elapsed_s": elapsed,
                "gradient_norm": None if norm is None else float(norm),
                "train_s": seconds,
                "validate_s": self.heartbeat.seconds("validate"),
                "checkpoint_s": None,
                "workers": self.learner.worker.count,
                "device": hardware.device_name(self.learner.device),
                **hardware.peak_memory(self.learner.device),
            }
        )
        s["epoch"] += 1
        s["elapsed_s"] = elapsed

    def _report(self) -> None:
        """Hand Ray a checkpoint from the first worker, and the log to whoever watches."""
        last = self.state["log"][-1]
        metrics = {k: last[k] for k in ("epoch", "loss", "validation_dice")}
        if self.learner.worker.rank:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state.safetensors").write_bytes(save_tensors(learn.state_tensors(self.learner, self.best)))
            (Path(folder) / "state.json").write_text(json.dumps(self.state))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        last["checkpoint_s"] = self.heartbeat.seconds("checkpoint")
        storage.write_text(storage.join(self.work, "metrics.jsonl"), "".join(json.dumps(m) + "\n" for m in self.state["log"]))

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            best, self.state = restored(folder, self.learner, self.work)
        self.best = {k: v.to(self.learner.device) for k, v in best.items()}

    def _measure(self) -> None:
        """Measure the best weights on the held-out fold; the first worker leaves weights and result for the driver."""
        self.validated.network.load_state_dict(self.best)
        if self.state["best_epoch"] >= 0:
            self._show(self.state["best_epoch"], self.state["best_dice"], is_last=True)
        rows = manifest.read_manifest(storage.join(self.work, "test.parquet")).to_pylist()
        mine = Shelf(rows[self.learner.worker.rank :: self.learner.worker.count], self.card.modalities)
        scored = self._gather(mine.scored(self.validated, lesions=SegmentConfig().lesion_preset))
        chosen = self._choose() if self.card.train.choose else {}
        as_chosen = self._as_chosen(mine, chosen, scored) if chosen else []
        before = self._before(mine) if self.card.pretrained else []
        failed = self._gather(list(mine.failures.values()))
        duplicated = self._gather([{scan: names} for scan, names in mine.duplicated.items()])
        if self.learner.worker.rank == 0:
            storage.write_bytes(
                storage.join(self.work, "best.safetensors"),
                save_tensors({k: v.cpu().contiguous() for k, v in self.best.items()}),
            )
            train_rows = manifest.read_manifest(storage.join(self.work, "train.parquet")).to_pylist()
            metrics, baselines = metrics_table(scored), baselines_table(train_rows, rows, scored, self.card, before)
            storage.write_table(storage.join(self.work, HELD_OUT_FILE), metrics, row_group_rows=65536)
            storage.write_table(storage.join(self.work, BASELINES_FILE), baselines, row_group_rows=65536)
            storage.write_json(storage.join(self.work, FAILED_FILE), sorted(failed, key=lambda f: str(f["scan_id"])))
            scans = {"found": len(rows), "scored": len(set(metrics["scan_id"].to_pylist())), "failed": len(failed)}
            result = {"state": self.state, "held_out_scans": scans, **figures(metrics, baselines)}
            result["held_out_duplicated"] = dict(sorted(p for d in duplicated for p in d.items()))
            result |= self._leave_as_chosen(chosen, as_chosen) if chosen else {}
            storage.write_json(storage.join(self.work, "result.json"), result)
        ray.train.report({"done": True})

    def _choose(self) -> dict[str, Any]:
        """What the validation patients of all workers choose; the default, and why, where they cannot."""
        settings = SegmentConfig(flip=self.card.train.flip_answers)
        if not self.card.split.validation:
            return sweep.unchosen(settings, "no patient was kept for validation")
        model, candidates = self._answering(settings), sweep.Candidates.of()
        tried = [entry for group in self.shelf.groups() for entry in sweep.try_candidates(model, group, candidates)]
        tried, failed = self._gather(tried), self._gather(list(self.shelf.failures.values()))
        try:
            return sweep.choose(tried, settings) | {"num_failed": len(failed)}
        except PreflightError as error:
            return sweep.unchosen(settings, str(error))

    def _as_chosen(self, held_out: Shelf, chosen: Row, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The held-out scans of all workers scored with what was chosen; where that is the plain answer, it is at hand."""
        settings = SegmentConfig(flip=self.card.train.flip_answers, **{name: chosen[name] for name in CHOICES})
        if settings == SegmentConfig():
            return plain
        return self._gather(held_out.scored(self._answering(settings), lesions=settings.lesion_preset))

    def _before(self, held_out: Shelf) -> list[dict[str, Any]]:
        """What the held-out scans of all workers score by the weights that this training began with."""
        self.validated.network.load_state_dict(_pretrained(self.work))
        scored = held_out.scored(self.validated, lesions=SegmentConfig().lesion_preset)
        self.validated.network.load_state_dict(self.best)
        return self._gather(scored)

    def _leave_as_chosen(self, chosen: Row, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Leave the held-out rows as chosen for the driver; returns what the result says of them."""
        table = metrics_table(rows)
        storage.write_table(storage.join(self.work, HELD_OUT_CHOSEN_FILE), table, row_group_rows=65536)
        return {"chosen": chosen, "held_out_chosen": summaries(table)}

    def _answering(self, settings: SegmentConfig) -> Model:
        """The network as it is validated, answering by other settings."""
        return Model(self.card, self.validated.network, "", self.learner.device, settings)

    def _gather(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.learner.worker.count == 1:
            return rows
        shares: list[list[dict[str, Any]]] = [[] for _ in range(self.learner.worker.count)]
        torch.distributed.all_gather_object(shares, rows)
        return [row for share in shares for row in share]

    def _mean(self, value: float) -> float:
        rows = self._gather([{"value": value}])
        return float(sum(r["value"] for r in rows) / len(rows))
