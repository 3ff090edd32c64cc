"""How far away an object store may be: the same archive segmented out of one that answers at once, and late.

    python tests/bench/latency.py --model MODEL [--scans 48] [--delay-ms 0 5 50]

Scans are phantoms of 240x240x155 in the BraTS layout, moto is the store, and a proxy before it holds every answer back. Prints
scans a second from the first finished ones to the last, and requests a scan; the table, masks and all go to the store as well.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import fault_proxy  # noqa: E402
import pyarrow.dataset  # noqa: E402
from bulk import ROOT, copied_archive  # noqa: E402
from object_stores import BUCKET, upload  # noqa: E402

from brainseg import storage  # noqa: E402

SCANS_PER_PART = 8
"""Fewer than a large archive has: each part costs a few round trips that nothing hides."""


def segment(archive: str, model: str, run: str, actors: int) -> float:
    """Segment as a person does; scans a second while all actors are at work."""
    how = ["--quiet", "--actors", str(actors), "--scans-per-part", str(SCANS_PER_PART)]
    words = ["segment", archive, "--model", model, "--out", run, *how]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as cwd:
        subprocess.run([sys.executable, "-m", "brainseg.cli", *words], cwd=cwd, env=environment, check=True)
    names = storage.list_files(storage.join(run, "scans"))
    with tempfile.TemporaryDirectory() as folder:
        for number, entry in enumerate(names):
            (Path(folder) / f"{number}.parquet").write_bytes(storage.read_bytes(entry.uri))
        rows = pyarrow.dataset.dataset(folder).to_table(columns=["finished_at"])
    ends = sorted(at.timestamp() for at in rows["finished_at"].to_pylist())
    first, last = 2 * actors, len(ends) - actors
    return (last - first) / (ends[last] - ends[first])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", required=True, help="a model folder with four modalities, WT, TC and ET")
    words.add_argument("--scans", type=int, default=48)
    words.add_argument("--delay-ms", type=float, nargs="+", default=[0, 5, 50])
    words.add_argument("--actors", type=int, default=os.cpu_count())
    words.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "brainseg-bench")
    chosen = words.parse_args()
    archive = copied_archive(chosen.work, chosen.scans, 6)
    pace: dict[float, float] = {}
    with fault_proxy.faulty_store() as proxy:
        home = f"s3://{BUCKET}/latency"
        upload(archive, f"{home}/archive")
        print(f"{'delay ms':>9}{'scans/s':>9}{'share':>7}{'requests a scan':>17}{'seconds':>9}")
        for delay_ms in chosen.delay_ms:
            fault_proxy.DELAY_S = delay_ms / 1000
            proxy.choose = (lambda number, request: "delay") if delay_ms else (lambda number, request: None)
            proxy.count, started = fault_proxy.Count(), time.perf_counter()
            pace[delay_ms] = segment(f"{home}/archive", chosen.model, f"{home}/run-{delay_ms:g}", chosen.actors)
            requests, seconds = proxy.count.requests / chosen.scans, time.perf_counter() - started
            share = pace[delay_ms] / next(iter(pace.values()))
            print(f"{delay_ms:9g}{pace[delay_ms]:9.3f}{share:7.2f}{requests:17.1f}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
