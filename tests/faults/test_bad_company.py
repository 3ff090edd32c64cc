"""Bad company: a scan that kills, stops or starves the process that reads it costs itself a place and nobody else.

The processes are real, and the fault comes from below: see `hooks/sitecustomize.py`.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import victims
from faults.cohort import Cohort, make_cohort

from brainseg import segment, storage
from brainseg.errors import ExitCode

HOOKS = str(Path(__file__).parent / "hooks")
SCANS = 12


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="b"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def cohort(folder: Path) -> Cohort:
    return make_cohort(folder, SCANS, broken=1)


def drive(cohort: Cohort, folder: Path, run: str, faults: dict[str, str], *words: str) -> victims.Driver:
    """Segment with these scans doing that to whoever opens one of their files; returns the finished driver."""
    rules = ",".join(f"{what}:/{scan}/" for scan, what in faults.items())
    extra = {"BRAINSEG_FAULTS": rules, "PYTHONPATH": os.pathsep.join([HOOKS, os.environ.get("PYTHONPATH", "")])}
    driver = victims.start(cohort.manifest, cohort.model, run, folder, *words, extra=extra)
    driver.process.wait(timeout=500)
    return driver


def good_scans(cohort: Cohort) -> list[str]:
    return sorted(scan for scan, (status, *_) in cohort.undisturbed.items() if status == "ok")


@pytest.mark.parametrize("plan", ["fused", pytest.param("apart", marks=pytest.mark.slow)])
def test_bad_scans_become_rows_and_the_others_are_as_ever(cohort: Cohort, folder: Path, plan: str) -> None:
    run = str(folder / plan)
    deadly, stuck, greedy = good_scans(cohort)[1::3][:3]
    faults = {deadly: "die", stuck: "hang", greedy: "memory"}
    driver = drive(cohort, folder, run, faults, "--plan", plan, "--actors", "1", "--scan-seconds", "4")
    assert driver.process.returncode == ExitCode.SOME_FAILED, driver.lines()
    expected = {deadly: "WORKER_DIED", stuck: "TIMEOUT", greedy: "OUT_OF_MEMORY"}
    outcome = {scan: row[:3] for scan, (row,) in victims.rows_of(run).items()}
    assert outcome == {**cohort.undisturbed, **{scan: ("failed", code, None) for scan, code in expected.items()}}
    assert segment.verify_run(run) == []
    assert not storage.is_dir(storage.join(run, "inflight"))
    done = {scan: row[3] for scan, (row,) in victims.rows_of(run).items() if scan not in expected}
    again = drive(cohort, folder, run, {}, "--plan", plan, "--actors", "1")
    assert again.process.returncode == ExitCode.SOME_FAILED, again.lines()
    rows = victims.rows_of(run)
    assert {scan: row[:3] for scan, (row,) in rows.items()} == cohort.undisturbed
    assert all(rows[scan][0][3] == when for scan, when in done.items())


@pytest.mark.slow
def test_a_decoder_that_hangs_with_pythons_lock_held_is_ended_with_its_process(cohort: Cohort, folder: Path) -> None:
    run, frozen = str(folder / "frozen"), good_scans(cohort)[4]
    driver = drive(cohort, folder, run, {frozen: "freeze"}, "--plan", "fused", "--actors", "1", "--scan-seconds", "2")
    assert driver.process.returncode == ExitCode.SOME_FAILED, driver.lines()
    outcome = {scan: row[:3] for scan, (row,) in victims.rows_of(run).items()}
    assert outcome == {**cohort.undisturbed, frozen: ("failed", "WORKER_DIED", None)}


@pytest.mark.slow
def test_a_whole_mount_that_hangs_ends_as_timeouts_and_wears_out_processes(cohort: Cohort, folder: Path) -> None:
    run, stuck = str(folder / "mount"), good_scans(cohort)[:8]
    driver = drive(cohort, folder, run, dict.fromkeys(stuck, "hang"), "--actors", "1", "--scan-seconds", "1")
    assert driver.process.returncode == ExitCode.SOME_FAILED, driver.lines()
    outcome = {scan: row[:3] for scan, (row,) in victims.rows_of(run).items()}
    assert outcome == {**cohort.undisturbed, **dict.fromkeys(stuck, ("failed", "TIMEOUT", None))}


@pytest.mark.slow
def test_a_model_that_kills_whoever_loads_it_ends_the_job_with_one_line(cohort: Cohort, folder: Path) -> None:
    run = str(folder / "model-kills")
    rules = {"BRAINSEG_FAULTS": "die:model/weights.safetensors", "PYTHONPATH": HOOKS}
    driver = victims.start(cohort.manifest, cohort.model, run, folder, "--actors", "1", extra=rules)
    assert driver.process.wait(timeout=400) == ExitCode.CRASH, driver.lines()
    (line,) = [line for line in driver.lines() if line.startswith("brainseg: ")]
    assert "died 5 times while it loaded the model" in line
