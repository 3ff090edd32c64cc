"""What a GPU does and what it waits for: the network alone, a scan step by step, a bulk run, a training.

    python tests/bench/on_gpu.py [--model MODEL] [--scans 64] [--part network --part steps --part run --part train]

Scans are phantoms of 240x240x155 with four modalities. Without a model folder weights are drawn: times are alike, answers mean
nothing, and in bf16 nothing is in doubt. `run` wants Ray, the other parts do without. With `--device cpu` it runs too.
Times of the GPU itself are taken with it waited for before and after.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

from bulk import copied_archive, run  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from brainseg import learn, stages  # noqa: E402
from brainseg.cache import SampleSet, write_shard  # noqa: E402
from brainseg.card import ModelCard, Split, load_card  # noqa: E402
from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig  # noqa: E402
from brainseg.manifest import index_archive  # noqa: E402
from brainseg.model import Model, load_model, save_model  # noqa: E402
from brainseg.plan import BLOCKS_AT_ONCE  # noqa: E402
from brainseg.prepare import native_probabilities, uncrop  # noqa: E402
from brainseg.presets import FULL_WIDTHS, PRESETS  # noqa: E402
from brainseg.scans import load_scan  # noqa: E402
from brainseg.unet import UNet, num_parameters  # noqa: E402

SECONDS = 5.0
PARTS = ("network", "steps", "run", "train")


class Waited:
    """A device, and a clock that waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def pace(self, call: Callable[[], Any], seconds: float) -> float:
        """How often a second something can be done."""
        call()
        began, done = self.now(), 0
        while self.now() - began < seconds:
            call()
            done += 1
        return done / (self.now() - began)


class Utilisation:
    """What share of the time the driver calls the GPU busy; None where `nvidia-smi` is not there to ask."""

    share: float | None = None

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator["Utilisation"]:
        found, seen = cls(), []
        if shutil.which("nvidia-smi") is None:
            yield found
            return
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert asked.stdout is not None
        reader = threading.Thread(target=lambda: seen.extend(line.strip() for line in asked.stdout or ()))
        reader.start()
        try:
            yield found
        finally:
            asked.terminate()
            reader.join()
            told = [int(word) for word in seen if word.isdecimal()]
            found.share = statistics.mean(told) / 100 if told else None

    def __str__(self) -> str:
        return "not known (no nvidia-smi)" if self.share is None else f"{self.share:.2f}"


# --- the network alone ------------------------------------------------------------------------------------------------------


def matmul_peak(clock: Waited, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a large matrix product: what the device really has of its peak."""
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    return 2 * side**3 * clock.pace(lambda: a @ b, SECONDS / 2)


def slice_flops(model: Model) -> float:
    """Multiplications and additions of one model slice; of a multiply-add both count."""
    size, card = model.card.prepare.size, model.card
    network = UNet(card.network, len(card.modalities), len(card.regions)).eval()
    slices = torch.zeros(1, len(card.modalities) * (2 * card.network.context_slices + 1), size, size)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network(slices)
    return float(counted.get_total_flops())


def network_alone(uri: str, clock: Waited, side: int) -> None:
    """Slices a second, and of what the device can do in that precision."""
    print("\nnetwork alone         slices/s   TFLOP/s   of a matrix product's")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = load_model(uri, SegmentConfig(precision=precision), clock.device)
        size, network = model.card.prepare.size, model.card.network
        step = max(1, model.pixels_per_forward // size**2)
        channels = len(model.card.modalities) * (2 * network.context_slices + 1)
        batch = torch.randn(step, channels, size, size, device=clock.device)
        with torch.inference_mode():
            slices = step * clock.pace(lambda m=model, b=batch: m._forward(b), SECONDS)
        done, peak = slices * slice_flops(model), matmul_peak(clock, dtype, side)
        share = f"{done / peak:.3f} of {peak / 1e12:.1f}"
        print(f"{precision} at {size}², {step:4} together {slices:10.0f} {done / 1e12:9.2f}   {share}")


# --- a scan step by step ----------------------------------------------------------------------------------------------------


def steps_of(model: Model, scan: Any, clock: Waited) -> dict[str, float]:
    """Milliseconds of each step of a scan, the device waited for after each."""
    taken: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = clock.now()
        answer = call()
        taken[name] = (clock.now() - began) * 1000
        return answer

    with torch.inference_mode():
        (one,) = timed("normalise, frame, send", lambda: model.load([scan]))
        slices = timed("onto the model grid", lambda: model._slices(one))
        answer = timed("network", lambda: model._forward(slices))
        answer = timed("network again, where in doubt", lambda: model._decided(slices, answer))
        regions, plan, shape = answer.transpose(0, 1), one.plans[model.shown], one.crop.array.shape[2:]
        back = timed("back to the scan's grid", lambda: native_probabilities(regions, plan, *shape))
        label, _ = timed("label and trust, brought home", lambda: model._drawn(one, back))
        timed("into the whole volume", lambda: uncrop(label, scan.grid, scan.box))
    return taken


def steps(uri: str, precision: str, scans: Sequence[Any], clock: Waited) -> None:
    model = load_model(uri, SegmentConfig(precision=precision), clock.device)
    found = [steps_of(model, scan, clock) for scan in (*scans, *scans)][2:]
    print(f"\none scan, {precision}: milliseconds, the median of {len(found)}; the first and the last are the host's")
    for name in found[0]:
        print(f"{name:32}{statistics.median(each[name] for each in found):9.2f}")


# --- a bulk run -------------------------------------------------------------------------------------------------------------


def one_actor(uri: str, precision: str, rows: Sequence[Any], clock: Waited) -> None:
    """An actor of the split plan without Ray around it: blocks are decoded already, and nobody waits for what it answers."""
    import pyarrow as pa
    from slow_network import actor

    from brainseg.telemetry import BusyShare

    works = [stages.decode(row, with_label=False) for row in rows]
    table = pa.table({name: [row[name] for row in rows] for name in ("scan_id", "patient_id")})
    block = table.append_column("work", stages.column(map(stages.pack, works)))
    print("\none actor, blocks at hand: blocks at once, scans/s, share of the time in which one of them has the network")
    for blocks_at_once in (1, 2, BLOCKS_AT_ONCE):
        with tempfile.TemporaryDirectory() as notes, ThreadPoolExecutor(blocks_at_once) as threads:
            forward, busy = actor(notes, 0.0), BusyShare()
            forward.model = load_model(uri, SegmentConfig(precision=precision), clock.device)
            forward(block)
            forward.busy = SimpleNamespace(inside=busy.inside, look=lambda: 0.0)  # looked at by us alone
            blocks = [block] * (2 * BLOCKS_AT_ONCE)
            busy.look()
            with Utilisation.watched() as used:
                began = clock.now()
                list(threads.map(forward, blocks))
                pace = len(blocks) * len(rows) / (clock.now() - began)
        print(f"{blocks_at_once:8}{pace:10.2f}{busy.look():8.2f}   GPU busy by its driver: {used}")


def bulk_run(archive: Path, uri: str, precision: str, out: Path, actors: int, extra: list[str]) -> None:
    """`brainseg segment`, everything included."""
    import pyarrow.dataset

    shutil.rmtree(out, ignore_errors=True)
    with Utilisation.watched() as used:
        watch, began = run(archive, uri, out, precision, actors, extra)
    columns = ["finished_at", "seconds_decode", "seconds_predict", "seconds_finish"]
    rows = pyarrow.dataset.dataset(out / "scans").to_table(columns=columns).to_pylist()
    ends = sorted(row["finished_at"].timestamp() for row in rows)
    first = ends[len(ends) // 4]
    late = [row for row in rows if row["finished_at"].timestamp() > first]
    pace = len(late) / (ends[-1] - first)
    print(f"\nbrainseg segment, {len(rows)} scans, {os.cpu_count()} cores: {pace:.2f} scans/s once a quarter is done")
    print(f"first scan after {ends[0] - began:.1f} s; largest process {watch.peak_mb:.0f} MB")
    print(f"GPU busy by its driver, from start to end: {used}")
    for stage in ("decode", "predict", "finish"):
        print(f"{stage:10}{statistics.mean(row[f'seconds_{stage}'] for row in late):8.3f} s a scan")


# --- a training -------------------------------------------------------------------------------------------------------------


def train(preset: str, scans: Sequence[Any], clock: Waited) -> None:
    """Steps with everything a training does to its slices, beside the same steps on one batch that is there already."""
    config = PRESETS[preset]
    with tempfile.TemporaryDirectory() as folder:
        entries = write_shard([(scan, "brats2020") for scan in scans], str(Path(folder) / "s.bin"), config)
        samples = SampleSet(entries, len(config.regions), device=clock.device)
    learner = learn.make_learner(config, len(samples), clock.device, learn.Worker())
    learner.network.train()
    images, masks = next(learn.batches(learner, samples, 0))
    bare = clock.pace(lambda: learn.train_step(learner, images, masks, 0), SECONDS) * config.batch_size
    began, done, epoch = clock.now(), 0, 0
    with Utilisation.watched() as used:
        while clock.now() - began < 2 * SECONDS:
            for x, y in learn.batches(learner, samples, epoch):
                learn.train_step(learner, x, y, done)
                done += 1
                if done % 16 == 0 and clock.now() - began > 2 * SECONDS:
                    break
            epoch += 1
    pace = done * config.batch_size / (clock.now() - began)
    where = "on the GPU" if samples._images is not None and not samples._images.is_cpu else "in memory"
    print(f"\ntraining, {preset}, {len(samples)} slices {where}: {pace:.1f} slices/s, on one batch again and again {bare:.1f}")
    print(f"ratio {pace / bare:.3f}; GPU busy by its driver: {used}")


def seconds_to(dice: float, folder: Path) -> str:
    """After how long a training's validation was that good, as its log says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if (row["validation_dice"] or 0) >= dice]
    return f"{found[0]['elapsed_s']:.0f} s, in epoch {found[0]['epoch'] + 1}" if found else "never"


# --- all of it --------------------------------------------------------------------------------------------------------------


def drawn_model(folder: Path, size: int) -> str:
    """A model folder with the weights of a seed."""
    config = PRESETS["brats2020-128"].model_copy(
        update={"network": NetworkConfig(widths=FULL_WIDTHS), "prepare": PrepareConfig(size=size)}
    )
    torch.manual_seed(0)
    network = UNet(config.network, len(config.modalities), len(config.regions))
    card = ModelCard(
        name="drawn",
        network=config.network,
        prepare=config.prepare,
        modalities=config.modalities,
        regions=config.regions,
        label_map="brats2020",
        dataset="none",
        manifest_fingerprint="none",
        split=Split(train=(), validation=(), test=()),
        selection_biased=False,
        accept_leakage=False,
        metrics={},
        train=config,
        versions={},
        created_at="2026-01-01T00:00:00+00:00",
        weights_sha256="",
    )
    save_model(str(folder), card, network.state_dict())
    return str(folder)


def machine(device: torch.device) -> str:
    if device.type != "cuda":
        return f"no GPU, {os.cpu_count()} cores, torch {torch.__version__}"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", help="a model folder with four modalities, WT, TC and ET; drawn where none is named")
    words.add_argument("--size", type=int, default=256, help="pixels a side of a drawn model")
    words.add_argument("--precision", default="bf16")
    words.add_argument("--scans", type=int, default=64, help="of the bulk run; six are different")
    words.add_argument("--actors", type=int, default=1)
    words.add_argument("--preset", default="brats2020-128", help="of the training")
    words.add_argument("--part", action="append", choices=PARTS, help="all by default")
    words.add_argument("--matmul", type=int, default=8192, help="side of the matrices that the network is compared with")
    words.add_argument("--device", default="cuda")
    words.add_argument("--trained", type=Path, help="a model folder whose training's time to Dice 0.80 is told")
    words.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "brainseg-bench")
    chosen, extra = words.parse_known_args()
    clock, parts = Waited(torch.device(chosen.device)), chosen.part or PARTS
    uri = chosen.model or drawn_model(chosen.work / f"drawn-{chosen.size}", chosen.size)
    card = load_card(uri)
    millions = num_parameters(UNet(card.network, len(card.modalities), len(card.regions))) / 1e6
    print(f"{machine(clock.device)}; {millions:.2f} million parameters, {card.prepare.size}²")
    if "network" in parts:
        network_alone(uri, clock, chosen.matmul)
    archive = copied_archive(chosen.work, chosen.scans, 6)
    rows = index_archive(str(archive))[0].to_pylist()[:6]
    scans = [load_scan(row) for row in rows] if {"steps", "train"} & set(parts) else []
    if "steps" in parts:
        steps(uri, chosen.precision, scans, clock)
    if "run" in parts and importlib.util.find_spec("ray"):
        one_actor(uri, chosen.precision, rows, clock)
        bulk_run(archive, uri, chosen.precision, chosen.work / "run", chosen.actors, extra)
    if "train" in parts:
        train(chosen.preset, scans, clock)
    if chosen.trained:
        print(f"\nvalidation Dice 0.80 after {seconds_to(0.8, chosen.trained)}")


if __name__ == "__main__":
    main()
