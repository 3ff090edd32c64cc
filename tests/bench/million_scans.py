"""What the driver of a bulk run does, for archives of any size, with a stand-in for the network: seconds and memory a step.

    python tests/bench/million_scans.py FOLDER 1000 10000 100000

Each size has a process of its own, so that its peak memory is its own. A step is linear where its time a scan stays as it is.
"""

import hashlib
import resource
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


def measured(folder: Path, scans: int) -> None:
    """Every step of a run that is killed half-way and taken up again; prints seconds and the driver's peak after each."""
    run, place = str(folder / f"run-{scans}"), str(folder / f"manifest-{scans}.parquet")
    table = manifest_of(scans)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{scans:>9,}  {name:28}{seconds:9.2f} s {seconds / scans * 1e6:9.1f} us/scan   peak {peak:7.0f} MB", flush=True)

    with step("write the manifest"):
        manifest.write_manifest(place, table)
    del table
    with step("read, fingerprint, tags"):
        table = manifest.read_manifest(place)
        identity = runs.Identity(manifest.fingerprint(table), "m" * 64, "c" * 64)
        expected = runs.expected_tags(table)
    with step("plan"):
        make_plan(CLUSTER, scans, How(), COSTS)
    info = _info(scans)
    body = runs.open_run(run, identity, {name: info[name] for name in ("brainseg_version", "source", "model")})
    manifest.write_manifest(storage.join(run, runs.MANIFEST_FILE), table)
    with step("(stand-in writes half)"):
        write_parts(run, table, body, 0, scans // 2)
    with step("resume: what is to be done"):
        kept = runs.finished_rows(run, expected)
        todo = table.filter(pa.array([s not in kept for s in table["scan_id"].to_pylist()], pa.bool_()))
        assert todo.num_rows == scans - len(kept) == scans - scans // 2
        del kept, todo
    with step("(stand-in writes the rest)"):
        write_parts(run, table, body, scans // 2, scans)
    with step("receipts"):
        progress = Progress(scans)
        receipt = {
            "part": "p",
            "ok": SCANS_A_PART,
            "failed": [],
            **{f"seconds_{s}": 1.0 for s in ("decode", "predict", "finish")},
        }
        for _ in range(scans // SCANS_A_PART):
            progress.take(receipt)
            progress.line()
    with step("settle"):
        counts = runs.settle(run, expected)
    with step("metrics.parquet"):
        counts |= runs.write_metrics(run, Split())
    with step("seals and _SUCCESS.json"):
        runs.finish_run(run, body, counts, {})
    with step("verify"):
        problems = verify.verify_run(run)
        assert not problems, problems[:3]
    with step("report"):
        report.build_report([run], str(folder / "report.html"))


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    where.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 3:
        measured(where, int(sys.argv[2]))
    else:
        print(f"regions a scan: {', '.join(REGIONS)}; {SCANS_A_PART} scans a part")
        for size in sys.argv[2:]:
            subprocess.run([sys.executable, __file__, str(where), size], check=True)
