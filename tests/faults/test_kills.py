"""Kills: whatever process of a bulk run dies, and whenever, nothing is lost, doubled or torn, and the answer is the same.

    pytest -n 0 -m slow -s tests/faults/test_kills.py     a hundred kills at random moments, with a table of what came of them

The processes are real: `brainseg segment` on a local Ray of its own, SIGKILL from outside.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faults import victims
from faults.cohort import Cohort, make_cohort
from faults.victims import Driver

from brainseg import runs, segment, storage
from brainseg.errors import ExitCode

KINDS = ("actor", "decode", "writer", "raylet", "driver")
ENDS_THE_DRIVER = ("raylet", "driver")
LONG_PLANS = {
    "apart": {"actor": 12, "decode": 16, "writer": 12, "raylet": 7, "driver": 7},
    "fused": {"actor": 16, "writer": 18, "raylet": 8, "driver": 8},
}
"""How many of each are killed: 104 in all. Where one process does all, it is the decoder as well."""
CHANCES = (0.2, 0.25, 0.8)
MOST_STILLBORN = 3
START_S = 180.0
"""A driver that has not come up by then never will; generous, because tests share a machine."""


@dataclass
class Tally:
    """What the kills of one kind did."""

    kills: int = 0
    kept: int = 0
    redone: int = 0
    lost: int = 0
    doubled: int = 0


@dataclass
class Campaign:
    """Runs over one cohort, driver after driver, until every planned victim is dead and the last run is finished."""

    cohort: Cohort
    folder: Path
    rng: random.Random
    plan: str
    chances: tuple[float, float, float] = (0, 0, 0)
    """Shares of the drivers killed while they start and while they close the run, and of the kills before which at least one
    more part is let through; the others follow on the heels of the last."""
    tallies: dict[str, Tally] = field(default_factory=lambda: {kind: Tally() for kind in KINDS})
    num_runs: int = 0
    num_drivers: int = 0
    num_stillborn: int = 0
    """Drivers whose Ray gave itself up while it started, as it does on a machine that is too busy; they killed nobody."""
    strays: set[int] = field(default_factory=set)

    def go(self, planned: list[str]) -> None:
        while planned:
            self.num_runs += 1
            self._one_run(str(self.folder / f"run-{self.num_runs}"), planned)

    def _one_run(self, run: str, planned: list[str]) -> None:
        """Drive one run to its end, killing as planned on the way; then compare it with the undisturbed one."""
        promised: list[tuple[str, dict[str, object]]] = []
        while not storage.exists(storage.join(run, runs.SUCCESS_FILE)):
            driver = victims.start(
                self.cohort.manifest, self.cohort.model, run, self.folder, "--plan", self.plan, "--actors", "1"
            )
            self.num_drivers += 1
            died_by = self._disturb(driver, run, planned, promised)
            code = driver.process.wait(timeout=START_S)
            if died_by is None and any("did not come up" in line for line in driver.lines()):
                self.num_stillborn += 1
                assert self.num_stillborn <= MOST_STILLBORN, driver.said_last()
            else:
                _check_end(driver, code, died_by)
        self._compare(run, promised)

    def _disturb(
        self, driver: Driver, run: str, planned: list[str], promised: list[tuple[str, dict[str, object]]]
    ) -> str | None:
        """Kill one victim after the other until the driver ends; returns what ended it, None for the end of its work."""
        if planned[:1] == ["driver"] and self.rng.random() < self.chances[0]:
            time.sleep(self.rng.uniform(0, 10))
        else:
            _wait_for_work(driver, run)
        while planned and driver.lives():
            kind = planned[0]
            self.strays.update(victims.processes_below(driver.pid))
            if kind == "driver" and self.rng.random() < self.chances[1]:
                self._wait_until(driver, run, len(self.cohort.undisturbed))
            elif self.rng.random() < self.chances[2] and promised:
                self._wait_until(driver, run, len(promised[-1][1]) + 1)
            if not victims.kill_one(driver, kind, run, self.rng):
                continue
            planned.pop(0)
            done = {scan: rows[0][3] for scan, rows in victims.rows_of(run).items()}
            promised.append((kind, done))
            self.tallies[kind].kills += 1
            self.tallies[kind].kept += len(done)
            print(f"{time.strftime('%X')} {run[-7:]}: killed {kind}, {len(done)} scans done, {len(planned)} kills to come")
            if kind in ENDS_THE_DRIVER:
                return kind
        return None

    def _wait_until(self, driver: Driver, run: str, num_done: int) -> None:
        """Until so many scans are done. With all of them, the driver is about to settle, derive and close the run."""
        while driver.lives() and len(victims.rows_of(run)) < num_done:
            time.sleep(0.05)

    def _compare(self, run: str, promised: list[tuple[str, dict[str, object]]]) -> None:
        """Every scan exactly once, as in the undisturbed run; what was done when somebody was killed is still that row."""
        rows = victims.rows_of(run)
        for kind, done in promised:
            tally = self.tallies[kind]
            tally.redone += sum(rows.get(scan, [(0, 0, 0, None)])[0][3] != when for scan, when in done.items())
            tally.lost += len(self.cohort.undisturbed.keys() - rows.keys())
            tally.doubled += sum(len(same) > 1 for same in rows.values())
        assert {scan: row[:3] for scan, (row, *_) in rows.items()} == self.cohort.undisturbed
        assert segment.verify_run(run) == []
        assert not storage.is_dir(storage.join(run, "inflight"))

    def table(self) -> str:
        lines = ["victim   kills  scans kept  redone  lost  doubled"]
        lines += [f"{k:8} {t.kills:5} {t.kept:11} {t.redone:7} {t.lost:5} {t.doubled:8}" for k, t in self.tallies.items()]
        return "\n".join(
            [*lines, f"{self.num_runs} runs, {self.num_drivers} drivers, {self.num_stillborn} of them not come up"]
        )


def _wait_for_work(driver: Driver, run: str) -> None:
    """Until the driver has opened the run: a kill before that finds nothing that could be lost."""
    deadline = time.monotonic() + START_S
    while driver.lives() and not victims.find(driver, "actor"):
        assert time.monotonic() < deadline, driver.lines()
        time.sleep(0.05)


def _check_end(driver: Driver, code: int, died_by: str | None) -> None:
    """A driver ends as it should: its work done, killed, or with one clear line when its Ray died."""
    if died_by == "driver":
        assert code == -9
    elif died_by == "raylet" and code != ExitCode.SOME_FAILED:  # which means that all was done before
        assert code == ExitCode.CRASH, driver.said_last()
        assert sum(line.startswith("brainseg: ") for line in driver.lines()) == 1, driver.said_last()
    else:
        assert code == ExitCode.SOME_FAILED, driver.said_last()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place with a short name: Ray's sockets lie below it."""
    place = Path(tempfile.mkdtemp(prefix="k"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def assert_all_gone(pids: set[int]) -> None:
    """No process that a driver started outlives it for long."""
    deadline = time.monotonic() + 120
    while left := {pid for pid in pids if victims.processes_below(1).get(pid, "").startswith("ray::")}:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_run_survives_the_death_of_each_of_its_processes(folder: Path) -> None:
    campaign = Campaign(make_cohort(folder, 60), folder, random.Random(0), "apart")
    campaign.go(["actor", "decode", "writer", "raylet", "driver"])
    print(campaign.table())
    assert [t.kills for t in campaign.tallies.values()] == [1] * len(KINDS)
    assert [(t.redone, t.lost, t.doubled) for t in campaign.tallies.values()] == [(0, 0, 0)] * len(KINDS)
    assert_all_gone(campaign.strays)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("plan", LONG_PLANS)
def test_a_hundred_kills_lose_nothing(folder: Path, plan: str) -> None:
    planned = [kind for kind, number in LONG_PLANS[plan].items() for _ in range(number)]
    rng = random.Random(plan)
    rng.shuffle(planned)
    place = folder / plan
    place.mkdir()
    campaign = Campaign(make_cohort(place, 600), place, rng, plan, CHANCES)
    campaign.go(planned)
    print(f"\nplan {plan}\n{campaign.table()}")
    assert {kind: t.kills for kind, t in campaign.tallies.items() if t.kills} == LONG_PLANS[plan]
    assert all((t.redone, t.lost, t.doubled) == (0, 0, 0) for t in campaign.tallies.values())
    assert_all_gone(campaign.strays)
