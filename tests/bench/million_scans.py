"""What the driver of a bulk run does, for archives of any size, with a stand-in for the network: seconds and memory a step.

    python tests/bench/million_scans.py FOLDER 1000 10000 100000

Each command has a process of its own, as it has in life, and Linux counts the peak of each step anew (of the whole process,
with what earlier steps have left). A step is linear where its time a scan stays as it is.
"""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from million_rows import PNG, REGIONS, SCANS_A_PART, _info, _rows

from brainseg import manifest, report, runs, storage, verify
from brainseg.card import Split
from brainseg.config import How
from brainseg.plan import Costs, make_plan
from brainseg.progress import Progress
from brainseg.session import Cluster
from brainseg.tables import MANIFEST, SCANS

CLUSTER = Cluster(200, 8, 199, 13, False, 200, ((16, 1),) * 12 + ((8, 0),))
COSTS = Costs(3, 0.2, 0.02, 0.2, 3e7)


def manifest_of(scans: int) -> pa.Table:
    """A manifest of scans that are nowhere."""
    names = [f"scan-{i:08d}" for i in range(scans)]
    source = [{"uri": "/gone", "role": "both", "modality": None, "index": None, "size_bytes": 1, "tag": "t", "sha256": None}]
    given = {
        "scan_id": names,
        "patient_id": [f"p{i // 2:07d}" for i in range(scans)],
        "modalities": [["flair"]] * scans,
        "sources": [source] * scans,
        "has_label": [True] * scans,
        "size_bytes": [1] * scans,
        "fold": [i % 5 for i in range(scans)],
        "attributes": [[("site", "ABCDEFGH"[i % 8])] for i in range(scans)],
    }
    given |= {name: [word] * scans for name, word in (("dataset", "synthetic"), ("layout", "brats"), ("reader", "volumes"))}
    given["label_map"] = ["brats2020"] * scans
    return pa.table([pa.array(given.get(f.name, [None] * scans), f.type) for f in MANIFEST], schema=MANIFEST)


def write_parts(run: str, table: pa.Table, body: dict, first: int, last: int) -> None:
    """What the workers would have written: parts of rows `first` to `last`."""
    rng = np.random.default_rng(first)
    tags = runs.expected_tags(table.slice(first, last - first))
    for start in range(first, last, 8192):
        number = min(8192, last - start)
        _, columns = _rows(rng, start, number)
        given = {name: [body[name]] * number for name in ("run_id", "model_fingerprint", "config_fingerprint")}
        given |= {"mask": [PNG] * number, "mask_sha256": [hashlib.sha256(PNG).hexdigest()] * number}
        given |= {"mask_encoding": ["png"] * number, "content_tag": [tags[s] for s in columns["scan_id"].to_pylist()]}
        for name, values in given.items():
            field = SCANS.field(name)
            columns = columns.set_column(SCANS.get_field_index(name), field, pa.array(values, field.type))
        for at in range(0, number, SCANS_A_PART):
            part = columns.slice(at, SCANS_A_PART).cast(SCANS)
            storage.write_table(runs.part_uri(run, part["scan_id"].to_pylist()), part)


def forget_peak() -> None:
    """Let Linux count this process's peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The most memory this process has held since."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@contextmanager
def step(scans: int, name: str) -> Iterator[None]:
    """Print what a step takes: seconds, and the most memory that this process has held meanwhile."""
    forget_peak()
    started, worked = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    each = f"{cpu / scans * 1e6:8.1f} us/scan"
    print(f"{scans:>9,}  {name:26}{seconds:9.2f} s {cpu:9.2f} CPU s {each}   peak {peak_mb():6.0f} MB", flush=True)


def index(folder: Path, scans: int) -> None:
    """What `brainseg index` leaves."""
    table = manifest_of(scans)
    with step(scans, "write the manifest"):
        manifest.write_manifest(str(folder / "manifest.parquet"), table)


def drive(folder: Path, scans: int) -> None:
    """Every step of the driver of a run that is killed half-way and taken up again."""
    run = str(folder / "run")
    with step(scans, "read, fingerprint, tags"):
        table = manifest.read_manifest(str(folder / "manifest.parquet"))
        identity = runs.Identity(manifest.fingerprint(table), "m" * 64, "c" * 64)
        expected = runs.expected_tags(table)
    with step(scans, "plan"):
        make_plan(CLUSTER, scans, How(), COSTS)
    info = _info(scans)
    body = runs.open_run(run, identity, {name: info[name] for name in ("brainseg_version", "source", "model")})
    manifest.write_manifest(storage.join(run, runs.MANIFEST_FILE), table)
    begin("write", folder, 0, scans // 2)
    with step(scans, "resume: what is to be done"):
        kept = runs.finished_rows(run, expected)
        todo = table.filter(pa.array([s not in kept for s in table["scan_id"].to_pylist()], pa.bool_()))
        assert todo.num_rows == scans - len(kept) == scans - scans // 2
        del kept, todo
    begin("write", folder, scans // 2, scans)
    with step(scans, "receipts"):
        progress = Progress(scans)
        seconds = {f"seconds_{stage}": 1.0 for stage in ("decode", "predict", "finish")}
        for _ in range(scans // SCANS_A_PART):
            progress.take({"part": "p", "ok": SCANS_A_PART, "failed": [], **seconds})
            progress.line()
    with step(scans, "settle"):
        counts = runs.settle(run, expected)
    with step(scans, "metrics.parquet"):
        counts |= runs.write_metrics(run, Split())
    with step(scans, "seals and _SUCCESS.json"):
        runs.finish_run(run, body, counts, {})


def write(folder: Path, first: int, last: int) -> None:
    """What the workers do."""
    run, table = str(folder / "run"), manifest.read_manifest(str(folder / "manifest.parquet"))
    write_parts(run, table, storage.read_json(storage.join(run, runs.RUN_FILE)), first, last)


def prove(folder: Path, scans: int) -> None:
    """What `brainseg verify` does."""
    with step(scans, "verify"):
        problems = verify.verify_run(str(folder / "run"))
        assert not problems, problems[:3]


def tell(folder: Path, scans: int) -> None:
    """What `brainseg report` does."""
    with step(scans, "report"):
        report.build_report([str(folder / "run")], str(folder / "report.html"))


COMMANDS = {command.__name__: command for command in (index, drive, write, prove, tell)}


def begin(command: str, folder: Path, *numbers: int) -> None:
    """Run a command in a process of its own, so that its memory is its own."""
    subprocess.run([sys.executable, __file__, command, str(folder), *map(str, numbers)], check=True)


if __name__ == "__main__":
    if sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        print(f"regions a scan: {', '.join(REGIONS)}; {SCANS_A_PART} scans a part")
        for size in map(int, sys.argv[2:]):
            where = Path(sys.argv[1]).resolve() / str(size)
            where.mkdir(parents=True)
            for command in ("index", "drive", "prove", "tell"):
                begin(command, where, size)
