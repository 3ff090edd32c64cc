"""Lease: one driver at a time works on a run, and one that was overtaken while it slept finds out before it writes again.

RUN/lease.json                who holds the run, or held it last: owner, generation, heartbeat, whether it was given back
RUN/lease-<generation>.json   a claim: whoever creates it becomes the owner of that generation

Generations only grow. A claim is created atomically, so of several drivers that find the run free one alone goes on; a claim
is removed only after `lease.json` shows a later generation, so that no number is ever won twice. A process on this machine
is looked up; of one elsewhere only the heartbeat is known, and since two clocks may differ it is watched, not compared.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from brainseg import storage
from brainseg.errors import RunError, StorageError

LEASE_FILE = "lease.json"
HEARTBEAT_S = 10.0
PATIENCE_S = 45.0
"""A driver elsewhere whose heartbeat stands still for this long, while we watch, is taken to be dead."""
LONG_GONE_S = 900.0
"""A heartbeat older than this needs no watching: clocks that differ by a quarter of an hour cannot use S3 either."""
LOOK_EVERY_S = 1.0
Holder = Mapping[str, Any]


class Lease:
    """The right to work on a run. Held as a context; a heartbeat keeps it while this process lives."""

    def __init__(self, run: str, *, heartbeat_s: float = HEARTBEAT_S, patience_s: float = PATIENCE_S) -> None:
        self.run = run
        self.place = storage.join(run, LEASE_FILE)
        self.generation = 0
        self.heartbeat_s, self.patience_s = heartbeat_s, patience_s
        me = {"host": socket.gethostname(), "where": _here(), "pid": os.getpid(), "born": _born(os.getpid())}
        self.me = {**me, "token": uuid4().hex}
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        """Take the lease; RunError while another driver lives."""
        while not self._take():
            pass
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._beat.join()
        if _generation(_read(self.place)) == self.generation:
            self._write(released=True)

    def check(self) -> None:
        """RunError where another driver has taken the run over. To be called before whatever cannot be taken back."""
        refuse_overtaken(self.run, self.generation)

    def _take(self) -> bool:
        """Try once to become the owner of the next generation; False where the ground moved meanwhile."""
        holder = _read(self.place)
        self._refuse_living(holder, self.place)
        before = generation = _generation(holder)
        while True:
            generation += 1
            claim = _claim(self.run, generation)
            if storage.create_bytes(claim, self._body(generation)):
                break
            rival = _read(claim)
            if rival is None:
                return False
            if rival["token"] == self.me["token"]:  # the store did create it, and its answer was lost
                break
            self._refuse_living(rival, claim)
        if _generation(_read(self.place)) != before:
            storage.delete(claim)
            return False
        self.generation = generation
        self._write()
        self.check()
        for old in range(before, generation):
            storage.delete(_claim(self.run, old))
        return True

    def _refuse_living(self, holder: Holder | None, place: str) -> None:
        if holder and _is_alive(holder, place, self.patience_s):
            raise RunError(f"another driver (process {holder['pid']} on {holder['host']}) is working on this run")

    def _keep(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            with suppress(StorageError):  # a store that is away for a beat must not end the beating
                if _generation(_read(self.place)) > self.generation:
                    return
                self._write()

    def _write(self, *, released: bool = False) -> None:
        storage.write_bytes(self.place, self._body(self.generation, released=released))

    def _body(self, generation: int, *, released: bool = False) -> bytes:
        known = {**self.me, "generation": generation, "released": released, "heartbeat": time.time()}
        return (json.dumps(known, indent=2) + "\n").encode()


def refuse_overtaken(run: str, generation: int) -> None:
    """RunError where the run's lease shows a later generation than this one: its owner was taken for dead."""
    holder = _read(storage.join(run, LEASE_FILE))
    if holder and _generation(holder) > generation:
        who = f"process {holder['pid']} on {holder['host']}"
        raise RunError(f"another driver ({who}) has taken over this run while this one was not heard of; this one stops")


def refuse_if_held(run: str) -> None:
    """RunError where a driver on this machine works on the run. A quick look before anything is started; the lease decides."""
    place = storage.join(run, LEASE_FILE)
    holder = _read(place)
    if holder and holder.get("where") == _here() and _is_alive(holder, place, 0):
        raise RunError(f"another driver (process {holder['pid']} on {holder['host']}) is working on this run")


def held_generation(run: str) -> int:
    """The generation of the run's last owner; 0 where it never had one."""
    return _generation(_read(storage.join(run, LEASE_FILE)))


def _claim(run: str, generation: int) -> str:
    return storage.join(run, f"lease-{generation:06d}.json")


def _generation(holder: Holder | None) -> int:
    return int(holder.get("generation", 0)) if holder else 0


def _read(place: str) -> dict[str, Any] | None:
    """What a lease or claim says; None where there is none. It may come, or go, between the two questions."""
    body: dict[str, Any]
    for _ in range(3):
        with suppress(StorageError):
            body = storage.read_json(place)
            return body
        if not storage.exists(place):
            return None
    body = storage.read_json(place)
    return body


def _is_alive(holder: Holder, place: str, patience_s: float) -> bool:
    """On this machine: whether that very process runs. Elsewhere: whether its heartbeat moves while we watch."""
    if holder.get("released"):
        return False
    if holder.get("where") == _here():
        born = _born(int(holder["pid"]))
        return holder["pid"] != os.getpid() and born is not None and born == holder["born"]
    if time.time() - float(holder["heartbeat"]) > LONG_GONE_S:
        return False
    watched_until = time.monotonic() + patience_s
    while time.monotonic() < watched_until:
        time.sleep(min(LOOK_EVERY_S, patience_s))
        now = _read(place)
        if now is None or now.get("released"):
            return False
        if now["heartbeat"] != holder["heartbeat"]:
            return True
    return False


def _here() -> str:
    """This machine, this boot, this namespace of process ids: where a process id means something to us."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process started, in clock ticks, so that a reused pid is not mistaken for it; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]
