"""Lease: of all drivers that want a run, one has it; a dead one is succeeded, a sleeping one notices."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from brainseg import lease, storage
from brainseg.errors import RunError, StorageError
from brainseg.lease import Lease, refuse_if_held, refuse_overtaken

ROOT = str(Path(lease.__file__).parents[1])
HOLD = """
import sys, time
from brainseg.errors import RunError
from brainseg.lease import Lease
for line in sys.stdin:
    run, start = line.split()
    while time.time() < float(start):
        pass
    try:
        with Lease(run) as held:
            print("held", held.generation, flush=True)
            sys.stdin.readline()
            held.check()
    except RunError as error:
        print("refused:", error, flush=True)
"""
"""A driver that takes the lease it is told to take, when it is told to, and holds it until it is told again."""


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def driver():
    return subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True, bufsize=1
    )


def holder(run):
    other = driver()
    other.stdin.write(f"{run} 0\n")
    return other


def body(run):
    return storage.read_json(f"{run}/lease.json")


def elsewhere(run, age_s=0.0, generation=1):
    """What a driver on another machine has written."""
    known = {"host": "elsewhere", "where": "another boot", "pid": 1, "born": "1", "token": "t", "generation": generation}
    storage.write_json(f"{run}/lease.json", {**known, "released": False, "heartbeat": time.time() - age_s})


def test_a_living_driver_is_respected_and_a_dead_one_succeeded_at_once(run):
    other = holder(run)
    try:
        assert other.stdout.readline() == "held 1\n"
        with pytest.raises(RunError, match=f"process {other.pid} on"), Lease(run):
            pass
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            refuse_if_held(run)
        assert body(run)["pid"] == other.pid
    finally:
        other.kill()
        other.communicate()
    refuse_if_held(run)
    started = time.monotonic()
    with Lease(run) as held:
        assert (held.generation, body(run)["pid"]) == (2, os.getpid())
    assert time.monotonic() - started < 5


def test_a_run_that_nobody_ever_held_is_free(run):
    refuse_if_held(run)
    refuse_overtaken(run, 0)
    assert not Path(run).exists()


def test_it_is_given_back_at_the_end_even_after_an_error(run):
    def fail():
        with Lease(run):
            assert not body(run)["released"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert body(run)["released"]


def test_generations_grow_and_old_claims_go(run):
    for n in range(1, 4):
        with Lease(run) as held:
            assert held.generation == n
    assert [p.name for p in sorted(Path(run).glob("lease-*"))] == ["lease-000003.json"]


def test_of_two_drivers_that_start_at_once_one_goes_on(run):
    both = [driver() for _ in range(2)]
    try:
        for n in range(20):
            for p in both:
                p.stdin.write(f"{run}-{n} {time.time() + 0.05}\n")
            said = [p.stdout.readline() for p in both]
            winner = next(p for p, words in zip(both, said, strict=True) if words == "held 1\n")
            assert sorted(said)[1].startswith("refused: another driver"), said
            winner.stdin.write("\n")
    finally:
        for p in both:
            p.kill()
            p.communicate()


def test_a_claim_that_comes_just_after_it_was_looked_for_is_read(run, monkeypatch):
    elsewhere(run)
    found, read, exists = f"{run}/lease.json", storage.read_json, storage.exists
    hidden = Path(found).rename(f"{found}.hidden")

    def appears(place):
        if hidden.exists():
            hidden.rename(found)
        return exists(place)

    monkeypatch.setattr(storage, "exists", appears)
    assert lease._read(found) == read(found)
    Path(found).write_text("{")
    with pytest.raises(StorageError, match="JSON"):
        lease._read(found)


@pytest.mark.parametrize("takers", [2, 6])
def test_of_many_that_want_to_succeed_a_dead_driver_one_does(run, takers):
    elsewhere(run, age_s=2000)
    outcomes: list[str] = []
    ready, done = threading.Barrier(takers), threading.Barrier(takers)

    def take() -> None:
        mine = Lease(run, heartbeat_s=0.1, patience_s=3.0)
        mine.me = {**mine.me, "where": f"machine of {threading.get_ident()}"}
        ready.wait()
        try:
            with mine as held:
                outcomes.append(f"held {held.generation}")
                done.wait()
        except RunError:
            outcomes.append("refused")
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(takers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(outcomes) == ["held 2"] + ["refused"] * (takers - 1)


class TestElsewhere:
    def test_a_heartbeat_that_moves_is_respected(self, run):
        elsewhere(run)
        stop = threading.Event()

        def beat():
            while not stop.wait(0.3):
                elsewhere(run)

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            with pytest.raises(RunError, match="process 1 on elsewhere"), Lease(run, patience_s=10):
                pass
        finally:
            stop.set()
            beating.join()

    def test_a_heartbeat_that_stands_still_while_we_watch_is_succeeded(self, run):
        elsewhere(run)
        started = time.monotonic()
        with Lease(run, patience_s=2.0) as held:
            assert held.generation == 2
        assert 1.5 < time.monotonic() - started < 10

    def test_the_wait_for_a_dead_driver_is_shorter_than_a_minute(self):
        assert lease.HEARTBEAT_S * 3 < lease.PATIENCE_S < 55

    @pytest.mark.parametrize("skew_s", [-600, 600])
    def test_a_clock_that_goes_wrong_does_not_make_a_living_driver_dead(self, run, skew_s):
        elsewhere(run, age_s=skew_s)
        stop = threading.Event()

        def beat():
            while not stop.wait(0.3):
                elsewhere(run, age_s=skew_s)

        beating = threading.Thread(target=beat)
        beating.start()
        try:
            with pytest.raises(RunError), Lease(run, patience_s=10):
                pass
        finally:
            stop.set()
            beating.join()

    def test_one_that_was_not_heard_of_for_long_needs_no_watching(self, run):
        elsewhere(run, age_s=1000)
        started = time.monotonic()
        with Lease(run):
            assert time.monotonic() - started < 5

    def test_its_process_id_means_nothing_here(self, run):
        elsewhere(run, age_s=1000)
        storage.write_json(f"{run}/lease.json", {**body(run), "pid": os.getppid(), "host": os.uname().nodename})
        with Lease(run) as held:
            assert held.generation == 2


def test_a_reused_process_id_is_not_mistaken_for_the_driver(run):
    with Lease(run):
        mine = body(run)
    storage.write_json(f"{run}/lease.json", {**mine, "released": False, "pid": 1, "born": "not when process 1 was born"})
    with Lease(run) as held:
        assert held.generation == 2


def test_a_driver_that_died_between_claim_and_lease_is_passed_over(run):
    elsewhere(run, age_s=2000)
    claim = {**body(run), "generation": 2, "token": "u"}
    storage.write_json(f"{run}/lease-000002.json", claim)
    with Lease(run) as held:
        assert held.generation == 3
    assert not Path(run, "lease-000002.json").exists()


def test_a_driver_that_slept_while_another_took_over_stops_before_it_writes_again(run):
    sleeper = holder(run)
    try:
        assert sleeper.stdout.readline() == "held 1\n"
        sleeper.send_signal(signal.SIGSTOP)
        storage.write_json(f"{run}/lease.json", {**body(run), "where": "another machine, as its successor sees it"})
        with Lease(run, patience_s=1.0) as held:
            assert held.generation == 2
            refuse_overtaken(run, 2)
            with pytest.raises(RunError, match="has taken over this run"):
                refuse_overtaken(run, 1)
            sleeper.send_signal(signal.SIGCONT)
            out, _ = sleeper.communicate("\n", timeout=30)
            assert out.startswith("refused: another driver")
            assert body(run)["generation"] == 2
            assert not body(run)["released"]
    finally:
        sleeper.kill()
        sleeper.communicate()


def test_a_heartbeat_goes_on_and_comes_from_the_owner_alone(run):
    with Lease(run, heartbeat_s=0.05) as held:
        first = body(run)["heartbeat"]
        deadline = time.monotonic() + 10
        while body(run)["heartbeat"] == first:
            assert time.monotonic() < deadline
        elsewhere(run, generation=held.generation + 1)
        time.sleep(0.5)
        assert body(run)["host"] == "elsewhere"
        with pytest.raises(RunError, match="process 1 on elsewhere"):
            held.check()
    assert not body(run)["released"]


def test_what_it_writes_is_json_that_a_person_can_read(run):
    with Lease(run):
        said = json.loads(Path(run, "lease.json").read_text())
    assert {"host", "pid", "heartbeat", "generation", "released"} <= said.keys()
