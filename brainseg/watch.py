"""Watch: what a person sees of a training while it runs: a line an epoch, a bar inside it, and loggers fed by the same lines.

Runs in the driver. The workers write `metrics.jsonl` and a heartbeat into the work folder; here they are read, as often as
they can have changed and no oftener: on S3 every look is a request.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from brainseg import storage
from brainseg.errors import StorageError
from brainseg.heartbeat import Progress, interval_s, read_progress
from brainseg.loggers import Loggers, Target

LOG = "metrics.jsonl"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Price:
    """What an hour of all the machines that train costs, as whoever pays says; never guessed."""

    per_hour: float
    currency: str = "EUR"


@dataclass(frozen=True)
class Watcher:
    """Who is told: `show` draws a bar and is None where nobody would see it; `log_to` are loggers that were asked for."""

    show: Callable[[Progress], None] | None = None
    log_to: Sequence[Target] = ()
    price: Price | None = None


@contextmanager
def watching(work: str, watcher: Watcher, loggers: Loggers, say: Say) -> Iterator[None]:
    """While inside, say each line that the first worker adds to the log; the last ones before leaving."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(work, watcher, loggers, say, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(work: str, watcher: Watcher, loggers: Loggers, say: Say, done: threading.Event) -> None:
    said, last = 0, False
    while not last:
        last = done.wait(interval_s(work))
        lines = _log(work)
        for line in lines[said:]:
            say(epoch_line(line))
            loggers.epoch(line)
        said = max(said, len(lines))
        if watcher.show is not None and (progress := read_progress(work)) is not None:
            watcher.show(progress)


def _log(work: str) -> list[dict[str, Any]]:
    """The log as far as it can be read now; empty where the storage does not answer: the next look finds it."""
    place = storage.join(work, LOG)
    try:
        return [json.loads(line) for line in storage.read_text(place).splitlines()] if storage.exists(place) else []
    except StorageError:
        return []


def epoch_line(m: Mapping[str, Any]) -> str:
    """One epoch as a person reads it."""
    dice = "" if m["validation_dice"] is None else f"  validation Dice {m['validation_dice']:.4f}{' *' if m['best'] else ''}"
    pace = f"{m['samples_per_s']:.1f} slices/s  {m['elapsed_s']:.0f} s"
    return f"epoch {m['epoch'] + 1:>3}/{m['epochs']}  loss {m['loss']:.4f}{dice}  {pace}"
