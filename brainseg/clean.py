"""Clean: remove what interrupted jobs left in a run folder. What a run is made of is never touched.

In a run: temporary files, probes and uploads that nobody ended, if they are old enough; RUN/torn, the parts that a resume
set aside; RUN/evaluation, the pieces of an `evaluate` that was killed; and, once the run is complete, RUN/inflight: in an
unfinished run its notes tell which scans kill their processes.
A training's OUT.work, with which it could go on, goes only where it is named itself.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from brainseg import inflight, runs, storage
from brainseg.errors import PreflightError, RunError, UsageError
from brainseg.lease import Lease, held_generation, refuse_if_held
from brainseg.storage import Leftover

WORK = ".work"
WORK_FILE = "training.json"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Litter:
    """One thing that may go, and why. `leftover` is set where the store knows it as an unfinished write."""

    uri: str
    why: str
    size_bytes: int
    leftover: Leftover | None = None

    def line(self) -> str:
        """For a person."""
        return f"{self.uri} ({self.size_bytes:,} bytes): {self.why}"


def clean_run(run: str, *, older_than_s: float, dry_run: bool = False) -> list[Litter]:
    """Remove what interrupted jobs left in a run, or in the work folder of a training; returns what went, or would go.

    Raises RunError where a driver is at work there, PreflightError where the place is neither.
    """
    if storage.exists(storage.join(run, runs.RUN_FILE)):
        refuse_if_held(run)
        if dry_run:
            return list(litter_of_run(run, older_than_s))
        with Lease(run):
            removed = [_removed(one) for one in litter_of_run(run, older_than_s)]
            _remove_empty(run)
            return removed
    if run.endswith(WORK) and storage.exists(storage.join(run, WORK_FILE)):
        _refuse_young(run, older_than_s)
        found = list(_litter_of_work(run, older_than_s))
        if not dry_run:
            _remove_work(run, found)
        return found
    known = f"neither a run folder (it has no {runs.RUN_FILE}) nor a training's work folder (OUT{WORK}, with {WORK_FILE})"
    raise PreflightError(f"{run} is {known}")


def litter_of_run(run: str, older_than_s: float) -> Iterator[Litter]:
    """What may go from a run."""
    seen: set[str] = set()
    for leftover in storage.leftovers(run, min_age_s=older_than_s):
        seen.add(leftover.uri)
        yield _litter_of(leftover)
    folders = {runs.TORN: "a damaged part, set aside", runs.EVALUATION: "a piece of an `evaluate` that did not end"}
    yield from _old_claims(run)
    if storage.exists(storage.join(run, runs.SUCCESS_FILE)):
        folders[inflight.FOLDER] = "a note of a run that is complete"
    for name, why in folders.items():
        yield from (one for one in _below(storage.join(run, name), why) if one.uri not in seen)


def _old_claims(run: str) -> Iterator[Litter]:
    """Claims on generations of the lease that are over: their drivers died between winning and tidying up."""
    now = held_generation(run)
    for entry in storage.list_files(run):
        found = re.fullmatch(r"lease-(\d{6,})\.json", entry.uri.removeprefix(f"{run}/"))
        if found and int(found[1]) < now:
            yield Litter(entry.uri, "a claim on the run that is over", entry.size_bytes)


def _litter_of(leftover: Leftover) -> Litter:
    why = "an upload that nobody ended" if leftover.kind == "upload" else "a temporary file of an interrupted write"
    return Litter(leftover.uri, why, leftover.size_bytes, leftover)


def _below(folder: str, why: str) -> Iterator[Litter]:
    """The files of a folder. A folder that is a link leads to somebody else's files."""
    if not storage.is_remote(folder) and Path(folder).is_symlink():
        return
    for entry in storage.list_files(folder):
        if entry.problem is None:
            yield Litter(entry.uri, why, entry.size_bytes)


def _removed(litter: Litter) -> Litter:
    if litter.leftover is not None:
        storage.remove_leftover(litter.leftover)
    else:
        storage.delete(litter.uri)
    return litter


def _remove_empty(run: str) -> None:
    for name in (runs.TORN, runs.EVALUATION, inflight.FOLDER):
        folder = storage.join(run, name)
        if not storage.is_remote(folder) and Path(folder).is_dir() and not any(Path(folder).iterdir()):
            storage.delete_tree(folder)


# ---- the work folder of a training -----------------------------------------------------------------------------------


def _litter_of_work(work: str, older_than_s: float) -> Iterator[Litter]:
    for leftover in storage.leftovers(work, min_age_s=older_than_s):
        if leftover.kind == "upload":
            yield _litter_of(leftover)
    for entry in storage.list_files(work):
        yield Litter(entry.uri, "of a training that did not end", entry.size_bytes)


def _remove_work(work: str, found: list[Litter]) -> None:
    """Uploads first, then everything: without its claim the folder would no longer be known as a training's."""
    for litter in found:
        if litter.leftover is not None:
            storage.remove_leftover(litter.leftover)
    storage.delete_tree(work)


def _refuse_young(work: str, older_than_s: float) -> None:
    """RunError where a training may still be at it: its files are young, or their age is not known."""
    if older_than_s == 0:
        return
    if storage.is_remote(work):
        text = "the store does not tell how old its files are; if no training is at work, say so with --older-than 0s"
        raise RunError(f"{work}: {text}")
    youngest = max((int(e.tag) / 1e9 for e in storage.list_files(work) if e.problem is None), default=0.0)
    age_s = time.time() - youngest
    if age_s < older_than_s:
        text = f"something was written {max(age_s, 0):.0f} s ago; a training may be at work (see --older-than)"
        raise RunError(f"{work}: {text}")


def seconds_of(duration: str) -> float:
    """The seconds of `90s`, `30m`, `1h` or `2d`; UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", duration)
    if found is None:
        raise UsageError(f"--older-than {duration[:40]!a}: expected a number and a unit, such as 90s, 30m, 1h or 2d")
    return float(found[1]) * _UNITS_S[found[2]]
