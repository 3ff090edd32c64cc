"""Bulk segmentation beside the bare network and beside what people use today, all in one run on one machine.

    python tests/bench/bulk.py --scans 24 --size 128 --peer plain --peer monai=/path/to/its/python

makes phantoms in the BraTS layout at full size, trains nothing (the network's weights are those of a model folder, or drawn),
and prints one table: CPU seconds a scan of each, and brainseg's pace as a share of the bare forward pass of the same network,
precision and batch on the same cores, while all actors have work. A peer runs in its own environment.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from brainseg.environment import FOR_WORKERS  # noqa: E402

SLICES_TIMED_S = 20.0
EVERY_S = 2.0
"""Looking takes several milliseconds of one of the cores that are measured."""
AFTER_SCANS = 20
"""Memory is looked at after so many scans, and at the end: what it has grown by in between, it would go on growing by."""


@dataclass(frozen=True)
class Paces:
    """Of one size and precision: the bare forward pass in slices/s and seconds a slice of CPU, and a run over an archive."""

    bare_slices_per_s: float
    run_slices_per_s: float
    startup_s: float
    cpu_s_per_scan: float
    forward_cpu_s_per_scan: float
    peak_mb: float
    early_peak_mb: float

    @property
    def share(self) -> float:
        return self.run_slices_per_s / self.bare_slices_per_s


def copied_archive(root: Path, scans: int, distinct: int) -> Path:
    """`scans` cases of 240x240x155, of which `distinct` are different; the others are the same files under other names."""
    from brainseg.phantom import write_archive

    archive = root / f"archive-{scans}"
    made = root / "made"
    if not made.exists():
        write_archive(made, "brats", scans=distinct, shape=(155, 240, 240), seed=5)
    cases = sorted(path for path in made.iterdir() if path.is_dir())
    for number in range(1, scans + 1):
        name, source = f"BraTS20_Training_{number:03d}", cases[(number - 1) % len(cases)]
        (archive / name).mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            target = archive / name / path.name.replace(source.name, name)
            if not target.exists():
                os.link(path, target)
    return archive


def bare_forward(model: str, precision: str) -> tuple[int, float, float]:
    """In a process of its own: slices, wall and CPU seconds of the network alone, one thread, batches as in a run."""
    import torch

    from brainseg.config import SegmentConfig
    from brainseg.model import load_model

    torch.set_num_threads(1)
    loaded = load_model(model, SegmentConfig(precision=precision), torch.device("cpu"))
    network, size = loaded.card.network, loaded.card.prepare.size
    step = max(1, loaded.pixels_per_forward // size**2)
    channels = len(loaded.card.modalities) * (2 * network.context_slices + 1)
    batch = torch.randn(step, channels, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        loaded._forward(batch)
        done, wall, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < SLICES_TIMED_S:
            loaded._forward(batch)
            done += step
    return done, time.perf_counter() - wall, time.process_time() - cpu


def bare_pace(model: str, precision: str, processes: int) -> tuple[float, float]:
    """Slices a second of all processes together, and CPU seconds a slice."""
    os.environ.update(FOR_WORKERS)  # read when a process starts: what the network gains by them is no gain of the pipeline's
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(bare_forward, [model] * processes, [precision] * processes))
    return sum(done / wall for done, wall, _ in found), sum(f[2] for f in found) / sum(f[0] for f in found)


def _peak_mb(pid: int) -> float:
    """The most memory that a process ever held: a longer run is not looked at more often at the right moment."""
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return 0.0
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 / 1e6 if found else 0.0


class Watch:
    """CPU seconds and memory of a process and all its descendants, sampled, also of those that are gone by the end."""

    def __init__(self, pid: int) -> None:
        self.pid, self.seconds, self.peak_mb, self.samples = pid, {}, 0.0, []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._look()
            self.samples.append((time.time(), sum(self.seconds.values()), self.peak_mb))

    def _look(self) -> None:
        parents, used = {}, {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(path.parent.name)
            parents[pid], used[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for pid in used:
            if self._is_ours(pid, parents):
                self.seconds[pid] = used[pid]
                self.peak_mb = max(self.peak_mb, _peak_mb(pid))

    def _is_ours(self, pid: int, parents: dict[int, int]) -> bool:
        while pid and pid != self.pid:
            pid = parents.get(pid, 0)
        return pid == self.pid

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def cpu_between(self, start: float, end: float) -> float:
        inside = [seconds for at, seconds, _ in self.samples if start <= at <= end]
        return inside[-1] - inside[0]

    def peak_mb_at(self, moment: float) -> float:
        return max((peak for at, _, peak in self.samples if at <= moment), default=0.0)


def run(archive: Path, model: str, out: Path, precision: str, actors: int, extra: list[str]) -> tuple[Watch, float]:
    """`brainseg segment` as a person starts it; returns what was watched, and when it began."""
    words = [str(archive), "--model", model, "--out", str(out), "--set", f"precision={precision}", "--quiet", *extra]
    command = [sys.executable, "-m", "brainseg.cli", "segment", *words, "--actors", str(actors)]
    began = time.time()
    with tempfile.TemporaryDirectory() as cwd:
        started = subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)})
        watch = Watch(started.pid)
        code = started.wait()
    watch.stop()
    if code:
        raise SystemExit(f"brainseg segment ended with {code}")
    return watch, began


def paces(archive: Path, model: str, out: Path, precision: str, actors: int, extra: list[str]) -> Paces:
    """The bare pace before and after the run, the better one, and the run's while all of its actors had work."""
    import pyarrow.dataset

    before = bare_pace(model, precision, actors)
    shutil.rmtree(out, ignore_errors=True)
    watch, began = run(archive, model, out, precision, actors, extra)
    after = bare_pace(model, precision, actors)
    columns = ["finished_at", "__filename"]
    rows = pyarrow.dataset.dataset(out / "scans").to_table(columns=columns).to_pylist()
    ends = sorted(row["finished_at"].timestamp() for row in rows)
    part_ends = sorted(
        {row["__filename"]: row["finished_at"].timestamp() for row in sorted(rows, key=itemgetter("finished_at"))}.values()
    )
    start, end = ends[min(actors * 4, len(ends) - 2)], part_ends[-actors]  # from then on one of them had nothing left to do
    inside = [at for at in ends if start < at <= end]
    span = end - start
    slices = len(inside) * slices_of(archive)
    bare, forward_cpu = max(before[0], after[0]), min(before[1], after[1])
    cpu = watch.cpu_between(start, end) / len(inside)
    early = watch.peak_mb_at(ends[min(AFTER_SCANS, len(ends)) - 1])
    return Paces(bare, slices / span, ends[0] - began, cpu, forward_cpu * slices_of(archive), watch.peak_mb, early)


def slices_of(archive: Path) -> float:
    """Slices of a scan that hold something, in the mean: the others are never decoded into."""
    from brainseg import manifest
    from brainseg.scans import load_scan

    rows = manifest.index_archive(str(archive))[0].to_pylist()[:6]
    return sum(load_scan(row, with_label=False).image.shape[1] for row in rows) / len(rows)


def peer(name: str, python: str, archive: Path, model: str, out: Path, size: int, scans: int) -> dict[str, float]:
    """A peer's figures, from its own environment; one thread."""
    command = [python, str(HERE / "peers" / f"{name}.py"), str(archive), model, str(out / name), str(size), str(scans)]
    env = {k: v for k, v in os.environ.items() if k not in FOR_WORKERS} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout.strip().splitlines()[-1]))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scans", type=int, default=24)
    words.add_argument("--distinct", type=int, default=6, help="phantoms made; the other scans are copies of them")
    words.add_argument("--model", required=True, help="a model folder with four modalities, WT, TC and ET")
    words.add_argument("--precision", default="fp32")
    words.add_argument("--actors", type=int, default=os.cpu_count())
    words.add_argument(
        "--peer", action="append", default=[], help="plain, monai_way, nnunet_way or keras_way, and =PYTHON of its environment"
    )
    words.add_argument("--peer-scans", type=int, default=3)
    words.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "brainseg-bench")
    chosen, extra = words.parse_known_args()
    archive = copied_archive(chosen.work, chosen.scans, chosen.distinct)
    size = json.loads((Path(chosen.model) / "model.json").read_text())["prepare"]["size"]
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; {chosen.scans} scans of 240x240x155; {chosen.precision}, {size}²")
    ours = paces(archive, chosen.model, chosen.work / "run", chosen.precision, chosen.actors, extra)
    print(f"bare forward {ours.bare_slices_per_s:.1f} slices/s, brainseg {ours.run_slices_per_s:.1f}: share {ours.share:.3f}")
    print(f"start to first finished scan {ours.startup_s:.1f} s")
    print(f"largest process {ours.early_peak_mb:.0f} MB after {AFTER_SCANS} scans, {ours.peak_mb:.0f} MB in the end")
    print(f"{'':12}{'CPU s/scan':>12}{'ratio':>8}")
    print(f"{'forward':12}{ours.forward_cpu_s_per_scan:12.2f}{ours.forward_cpu_s_per_scan / ours.cpu_s_per_scan:8.2f}")
    print(f"{'brainseg':12}{ours.cpu_s_per_scan:12.2f}{1:8.2f}")
    for each in chosen.peer:
        name, _, python = each.partition("=")
        found = peer(name, python or sys.executable, archive, chosen.model, chosen.work / "peers", size, chosen.peer_scans)
        print(f"{name:12}{found['cpu_s']:12.2f}{found['cpu_s'] / ours.cpu_s_per_scan:8.2f}")


if __name__ == "__main__":
    main()
