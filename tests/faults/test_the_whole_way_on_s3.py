"""The whole way of a scan with everything in an object store that commits faults: the commands as a person calls them.

    pytest -n 0 -m slow -s tests/faults/test_the_whole_way_on_s3.py  5 % and 20 % of all requests go wrong, on moto and on Swift

Nothing is told of the store but where it is: workers of Ray find endpoint and credentials as boto3 finds them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, faulty_store, some
from faults import victims
from faults.cohort import Cohort, make_cohort
from object_stores import BUCKET, SWIFT_KEYS, upload

from brainseg import manifest, runs, storage
from brainseg.errors import ExitCode
from brainseg.verify import verify_run

HOME = f"s3://{BUCKET}/way"
Brainseg = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def brainseg(tmp_path: Path) -> Brainseg:
    """The command in a process of its own, with a local Ray of its own and the environment of now."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_worker_niceness": "0"}
        command = [sys.executable, "-m", "brainseg.cli", *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)

    return call


def say(title: str, proxy: FaultProxy, seconds: float) -> None:
    seen = proxy.count
    print(f"{title}: {seen.requests} requests, {seen.faults.total()} faults of {len(seen.faults)} kinds, {seconds:.0f} s")


def segmented(brainseg: Brainseg, cohort: Cohort, run: str) -> None:
    """Segment the archive in the store into a run there; every scan is once there, as in the undisturbed run."""
    done = brainseg("segment", f"{HOME}/manifest.parquet", "--model", f"{HOME}/model", "--out", run)
    assert done.returncode == ExitCode.SOME_FAILED, done.stderr
    rows = victims.rows_of(run)
    assert {scan: [row[:3] for row in same] for scan, same in rows.items()} == {
        scan: [outcome] for scan, outcome in cohort.undisturbed.items()
    }
    assert storage.exists(storage.join(run, runs.SUCCESS_FILE))
    assert verify_run(run) == []


def prepared(folder: Path, scans: int) -> Cohort:
    """An archive, its manifest and a model, all in the store."""
    cohort = make_cohort(folder, scans)
    upload(folder / "archive", f"{HOME}/archive")
    upload(Path(cohort.model), f"{HOME}/model")
    manifest.write_manifest(f"{HOME}/manifest.parquet", manifest.index_archive(f"{HOME}/archive")[0])
    return cohort


def test_an_archive_in_a_faulty_store_is_segmented_as_one_on_disk(brainseg: Brainseg, tmp_path: Path) -> None:
    with faulty_store() as proxy:
        proxy.choose = some(0.05, seed=5)
        cohort = prepared(tmp_path, 12)
        segmented(brainseg, cohort, f"{HOME}/run")
        assert proxy.count.faults.total() > proxy.count.requests * 0.02


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("kind", ["moto", "swift"])
def test_train_segment_evaluate_export_and_report_in_a_faulty_store(
    request: pytest.FixtureRequest, brainseg: Brainseg, tmp_path: Path, kind: str, share: float
) -> None:
    upstream, keys = (request.getfixturevalue("swift"), SWIFT_KEYS) if kind == "swift" else (None, {})
    with faulty_store(upstream, **keys) as proxy:
        storage.delete_tree(HOME)
        cohort = prepared(tmp_path, 60)
        pace = {}
        for title, faults in (("no faults", 0.0), (f"{share:.0%} faults", share)):
            proxy.choose, proxy.count = some(faults, seed=int(share * 100)), type(proxy.count)()
            started = time.monotonic()
            segmented(brainseg, cohort, f"{HOME}/run-{faults}")
            pace[title] = time.monotonic() - started
            say(f"\n{kind}, segment, {title}", proxy, pace[title])
        model, run, scans = f"{HOME}/trained", f"{HOME}/run-trained", f"{HOME}/manifest.parquet"
        small = ("--set", "epochs=2", "--set", "samples_per_epoch=64")
        for words in (
            ("train", scans, "--preset", "demo", "--out", model, *small),
            ("segment", scans, "--model", model, "--out", run),
            ("evaluate", run),
            ("verify", run),
            ("report", run, "--out", f"{HOME}/report"),
            ("export", run, "--out", f"{HOME}/masks"),
            ("clean", run),
        ):
            started = time.monotonic()
            done = brainseg(*words)
            assert done.returncode == (ExitCode.SOME_FAILED if words[0] == "segment" else ExitCode.OK), (words, done.stderr)
            say(f"{kind}, {words[0]}, {share:.0%} faults", proxy, time.monotonic() - started)
        assert brainseg("verify", run).returncode == ExitCode.OK
        masks = {e.uri.rsplit("/", 1)[1].split(".")[0] for e in storage.list_files(f"{HOME}/masks")}
        good = {scan for scan, outcome in cohort.undisturbed.items() if outcome[0] == "ok"}
        assert len(masks) >= len(good)
        assert proxy.count.faults.total() > proxy.count.requests * share / 2
