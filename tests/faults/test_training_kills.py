"""A training that is killed at a random moment and taken up again ends with the weights of one that was left alone.

    pytest -n 0 -m slow -s tests/faults/test_training_kills.py      twelve kills of worker, raylet and driver; a few minutes

Weights are compared by their bytes. The recipe has everything with a state of its own: a schedule with warm-up, averaged
weights, dropout, augmentation, early stopping.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import victims
from heads import free_ports, ray_head, ray_node

from brainseg import manifest, storage
from brainseg.card import CARD, load_card
from brainseg.errors import ExitCode
from brainseg.phantom import write_archive

SETTINGS = (
    "epochs=6 samples_per_epoch=384 batch_size=8 ema_decay=0.9 network.widths=[8,16] network.dropout=0.2 network.norm=group "
    "prepare.size=48 optimiser.warmup_steps=5 patience=6 augment.elastic=0 overlays_every=null"
)
START_S = 180.0
WORKER = "RayTrainWorker"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place with a short name, for Ray's sockets, and in it a manifest and the model of a training left alone."""
    place = Path(tempfile.mkdtemp(prefix="t"))
    write_archive(place / "archive", "lgg", scans=12, broken=0, shape=(6, 48, 48), seed=11)
    manifest.write_manifest(str(place / "manifest.parquet"), manifest.index_archive(str(place / "archive"))[0])
    assert start(place, "alone").process.wait(timeout=START_S * 2) == ExitCode.OK
    yield place
    shutil.rmtree(place, ignore_errors=True)


def start(folder: Path, name: str, *, workers: str = "1", address: str | None = None, more: str = "") -> victims.Driver:
    """`brainseg train` in a process of its own: on a local Ray whose files lie below `folder`, or on a cluster."""
    if address:
        environment = {**os.environ, "RAY_ADDRESS": address}
    else:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment = {**plain, "RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0"}
    words = [sys.executable, "-m", "brainseg.cli", "train", str(folder / "manifest.parquet"), "--preset", "demo"]
    words += ["--out", str(folder / name), "--workers", workers]
    for one in [*SETTINGS.split(), *more.split()]:
        words += ["--set", one]
    return victims.Driver(words, folder / "said.txt", environment)


def weights_of(folder: Path, name: str) -> str:
    return load_card(str(folder / name)).weights_sha256


def kill(driver: victims.Driver, kind: str) -> bool:
    """SIGKILL to one process of this kind below the driver, or to the driver; False where there is none now."""
    if kind == "driver":
        return victims.kill(driver.pid)
    title = {"worker": WORKER, "raylet": "/raylet/raylet "}[kind]
    found = [pid for pid, words in victims.processes_below(driver.pid).items() if title in words]
    return bool(found) and victims.kill(random.choice(found))


def survives(folder: Path, name: str, kinds: list[str], rng: random.Random) -> None:
    """Train with a kill of each kind in turn, at a random moment of the epochs, and start again whenever the driver ended."""
    while not storage.exists(str(folder / name / CARD)):
        driver = start(folder, name)
        while kinds and driver.lives():
            _wait_for_an_epoch(driver, folder / f"{name}.work")
            time.sleep(rng.uniform(0, 2))
            if driver.lives() and kill(driver, kinds[0]):
                print(f"{time.strftime('%X')} {name}: killed {kinds[0]} after {_epochs(folder / f'{name}.work')} epochs")
                if kinds.pop(0) != "worker":
                    break
        code = driver.process.wait(timeout=START_S * 2)
        assert code in (ExitCode.OK, ExitCode.CRASH, -9), driver.said_last()
    assert not kinds


def _epochs(work: Path) -> int:
    try:
        return len((work / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def _wait_for_an_epoch(driver: victims.Driver, work: Path) -> None:
    """Until a worker is up and one more epoch than now is done: before that there is nothing to lose."""
    before, deadline = _epochs(work), time.monotonic() + START_S
    while driver.lives() and _epochs(work) <= before:
        assert time.monotonic() < deadline, driver.said_last()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_change_no_weight(folder: Path) -> None:
    survives(folder, "disturbed", ["worker", "driver"], random.Random(0))
    assert weights_of(folder, "disturbed") == weights_of(folder, "alone")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_dozen_kills_change_no_weight(folder: Path) -> None:
    rng = random.Random(1)
    for number in range(4):
        kinds = ["worker", "raylet", "driver"]
        rng.shuffle(kinds)
        survives(folder, f"disturbed-{number}", kinds, rng)
        assert weights_of(folder, f"disturbed-{number}") == weights_of(folder, "alone")


def _workers(model: Path) -> list[int]:
    return [json.loads(line)["workers"] for line in (model / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_elastic_training_grows_with_the_cluster_shrinks_with_it_and_learns_the_same(folder: Path) -> None:
    """A node joins in mid-training and is killed later; no epoch is lost or done twice, and what is learnt stays the same.

    With group norm the answer does not depend on how many train, but to rounding, which hundreds of steps make much of: epochs
    agree closely at first and loosely in the end. The head alone has room for one worker or two, as Ray still keeps a CPU
    for the decoding before it or not; never for three.
    """
    (port,) = free_ports(1)
    work, gcs, longer = folder / "elastic.work", f"127.0.0.1:{port}", "epochs=60 patience=60"
    assert start(folder, "one", more=longer).process.wait(timeout=900) == ExitCode.OK
    with ray_head(cpus=2, gcs_port=port):
        driver = start(folder, "elastic", workers="1..3", address=gcs, more=longer)
        _wait_for_an_epoch(driver, work)
        with ray_node(f"--address={gcs}", "--num-cpus=2") as joined:
            while driver.lives() and (not work.exists() or 3 not in _workers(work)):
                assert joined.poll() is None, "the node that was to join has ended; Ray gives it 30 s to start"
                time.sleep(0.5)
            os.killpg(joined.pid, signal.SIGKILL)
            assert driver.process.wait(timeout=900) == ExitCode.OK, driver.said_last()
    counts = _workers(folder / "elastic")
    print(f"workers of each epoch: {counts}")
    assert counts[0] < 3
    assert 3 in counts
    assert counts[-1] < 3
    one, elastic = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "elastic")
    )
    assert [epoch["epoch"] for epoch in elastic] == list(range(60))
    assert elastic[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
    lasts = [statistics.mean(epoch["loss"] for epoch in epochs[-10:]) for epochs in (one, elastic)]
    assert lasts[1] == pytest.approx(lasts[0], rel=0.1)
