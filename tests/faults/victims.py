"""Victims: find the processes of one driver, kill one of them at a moment of our choice, and look at what is left.

Only descendants of a driver that was started here are ever touched. A process of Ray names itself `ray::` and what it does.
"""

import ctypes
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from brainseg import runs, storage

TITLES = {
    "actor": ("MapWorker(MapBatches(Forward", "MapWorker(MapBatches(WholeWay"),
    "decode": ("ray::MapBatches(decode_block",),
    "raylet": ("/raylet/raylet ",),
}


@dataclass
class Driver:
    """`brainseg segment` in a process of its own, with its lines in a file."""

    words: list[str]
    said: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.said.open("wb") as file:
            self.process = subprocess.Popen(self.words, env=self.environment, stderr=file, stdout=file, start_new_session=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def lives(self) -> bool:
        return self.process.poll() is None

    def said_last(self) -> str:
        return "\n".join(self.lines()[-12:])

    def lines(self) -> list[str]:
        return [line for line in self.said.read_text().splitlines() if line.strip()]


def start(manifest: str, model: str, run: str, folder: Path, *words: str, extra: Mapping[str, str] | None = None) -> Driver:
    """Start a driver on the run, with a local Ray whose files lie below `folder`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = {**plain, "RAY_TMPDIR": str(folder), "RAY_worker_niceness": "0", **(extra or {})}
    command = [sys.executable, "-m", "brainseg.cli", "segment", manifest, "--model", model, "--out", run, *words]
    return Driver(command, folder / "said.txt", environment)


def processes_below(pid: int) -> dict[int, str]:
    """Every living descendant of a process: its id and its command line."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and stat[0] not in "ZX":
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return {one: _command(one) for one in found}


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def find(driver: Driver, kind: str) -> list[int]:
    """The driver's processes of one kind of `TITLES`."""
    return [pid for pid, command in processes_below(driver.pid).items() if any(t in command for t in TITLES[kind])]


def kill(pid: int) -> bool:
    """SIGKILL; whether there still was somebody to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_one(driver: Driver, kind: str, run: str, rng: random.Random, patience_s: float = 60.0) -> bool:
    """Kill the driver, or one of its processes, a random moment from now; False where the driver ended before."""
    if kind == "writer":
        return kill_writer(driver, run, patience_s)
    time.sleep(rng.uniform(0, 1.0))
    deadline = time.monotonic() + patience_s
    while driver.lives() and time.monotonic() < deadline:
        if kind == "driver":
            return kill(driver.pid) and driver.process.wait() == -signal.SIGKILL
        found = find(driver, kind)
        if found and kill(rng.choice(found)):
            return True
        time.sleep(0.02)
    return False


def kill_writer(driver: Driver, run: str, patience_s: float = 60.0) -> bool:
    """Kill a process that has a part half-written; False where none was caught in the act."""
    deadline = time.monotonic() + patience_s
    folder = Path(run, runs.PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    with new_files(folder) as wait:
        while driver.lives() and time.monotonic() < deadline:
            workers = [pid for pid, command in processes_below(driver.pid).items() if command.startswith("ray::")]
            name = wait(0.25)
            if name is None or not name.startswith(".tmp-"):
                continue
            with _standing_still(workers):
                writer = next((pid for pid in workers if _has_open(pid, folder / name)), None)
                if writer is not None and (folder / name).exists() and kill(writer):
                    return True
    return False


@contextmanager
def _standing_still(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _has_open(pid: int, path: Path) -> bool:
    with suppress(OSError):
        return any(os.path.realpath(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return False


@contextmanager
def new_files(folder: Path) -> Iterator[Callable[[float], str | None]]:
    """Listen for files that come into being in a folder: a function that waits so many seconds for the next name."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    in_create = 0x100
    if descriptor < 0 or libc.inotify_add_watch(descriptor, str(folder).encode(), in_create) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    names: list[str] = []

    def wait(seconds: float) -> str | None:
        names.clear()  # what came before is old
        with suppress(BlockingIOError):
            os.read(descriptor, 1 << 16)
        if select.select([descriptor], [], [], seconds)[0]:
            names.extend(_names(os.read(descriptor, 1 << 16)))
        return names[-1] if names else None

    try:
        yield wait
    finally:
        os.close(descriptor)


def _names(events: bytes) -> Iterator[str]:
    place = 0
    while place < len(events):
        *_, length = struct.unpack_from("iIII", events, place)
        place += 16
        yield events[place : place + length].rstrip(b"\0").decode(errors="replace")
        place += length


def rows_of(run: str) -> dict[str, list[tuple[str, str | None, str | None, object]]]:
    """What the parts hold, by scan: status, error code, hash of the mask, when it was finished. A torn part raises."""
    rows: dict[str, list[tuple[str, str | None, str | None, object]]] = {}
    for part in runs.parts(run):
        try:
            table = storage.read_table(part, ["scan_id", "status", "error_code", "mask_sha256", "finished_at"])
        except storage.StorageError:
            if storage.exists(part):
                raise
            continue  # `settle` replaced it between the two looks
        for r in table.to_pylist():
            rows.setdefault(r["scan_id"], []).append((r["status"], r["error_code"], r["mask_sha256"], r["finished_at"]))
    return rows
