"""Heartbeat: how far a training is inside its epoch, written by its first worker, read by the driver for whoever watches.

`WORK/progress.json` is written by a thread of its own, so that a slow store never delays a step, and seldom: once a second
on a disk, every 30 s where each write and each look is a request that is paid for. Losing it loses nothing. A finished training
takes it along with its work folder; one that broke off says there, beside how far it came, that it failed or was stopped.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from threading import Event, Thread
from types import TracebackType
from typing import Any, Literal, Self

from brainseg import storage
from brainseg.errors import StorageError
from brainseg.events import utc
from brainseg.progress import FILE, State, ended_as

ON_DISK_S, REMOTE_S = 1.0, 30.0
Phase = Literal["train", "validate", "checkpoint", "measure"]
WORDS = {"train": "training", "validate": "validating", "checkpoint": "saving", "measure": "measuring on the held-out fold"}


def interval_s(uri: str) -> float:
    """Seconds between two writes of a heartbeat there, or two looks at it."""
    return REMOTE_S if storage.is_remote(uri) else ON_DISK_S


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `epoch` counts from 0; `left_s` is what all its epochs would still take, None where unknown."""

    phase: Phase
    epoch: int
    epochs: int
    step: int
    steps: int
    left_s: float | None

    def line(self) -> str:
        """The state as a person reads it beside a bar."""
        left = "" if self.left_s is None else f"  {in_words(self.left_s)} left"
        return f"{WORDS[self.phase]}{left}"


def in_words(seconds: float) -> str:
    """A duration, rounded to what a person plans with."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def read_progress(work: str) -> Progress | None:
    """What the heartbeat last said; None where it has not spoken or cannot be heard."""
    place = storage.join(work, FILE)
    try:
        body = storage.read_json(place) if storage.exists(place) else None
        known = body and {f.name: body[f.name] for f in fields(Progress)}
    except (StorageError, KeyError, TypeError, ValueError):
        return None
    return Progress(**known) if known and known["phase"] in WORDS else None


def _stamped(state: State, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "state": state, "written_at": utc(datetime.now(UTC))}


@contextlib.contextmanager
def leaving_word(work: str) -> Iterator[None]:
    """While inside, an error leaves in the heartbeat's file how the training ended, and goes on its way."""
    try:
        yield
    except BaseException as error:
        place = storage.join(work, FILE)
        with contextlib.suppress(StorageError):
            known = storage.read_json(place) if storage.exists(place) else {}
            storage.write_json(place, _stamped(ended_as(error), known if isinstance(known, dict) else {}), indent=None)
        raise


class Heartbeat:
    """The clock of one worker: seconds of each phase, steps done, what is left. The first worker's is written down.

    Used as a context; `begin` and `step` cost microseconds.
    """

    def __init__(
        self,
        work: str,
        epochs: int,
        steps: int,
        *,
        writes: bool = True,
        every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._writes, self._clock = storage.join(work, FILE), writes, clock
        self._every_s = interval_s(work) if every_s is None else every_s
        self._epochs, self._steps = epochs, steps
        self._phase: Phase = "train"
        self._epoch = self._step = self._all_steps = self._all_epochs = 0
        self._since = clock()
        self._all: dict[str, float] = dict.fromkeys(WORDS, 0.0)
        self._of_epoch: dict[str, float] = {}
        self._end = Event()
        self._thread = Thread(target=self._keep_writing, daemon=True)

    def __enter__(self) -> Self:
        self._since = self._clock()
        if self._writes:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._writes:
            self._thread.join(timeout=REMOTE_S)

    def begin(self, phase: Phase, epoch: int) -> None:
        """Another phase begins; with `train` another epoch."""
        now = self._clock()
        self._all[self._phase] += now - self._since
        self._of_epoch[self._phase] = self._of_epoch.get(self._phase, 0.0) + now - self._since
        if phase == "train" and self._step:
            self._all_epochs += 1
        if phase == "train":
            self._of_epoch = {}
        self._step = 0 if phase == "train" else self._step
        self._phase, self._epoch, self._since = phase, epoch, now

    def step(self) -> None:
        """An optimiser's step is done."""
        self._step += 1
        self._all_steps += 1

    def seconds(self, phase: Phase) -> float:
        """What a phase of this epoch has taken so far."""
        running = self._clock() - self._since if phase == self._phase else 0.0
        return self._of_epoch.get(phase, 0.0) + running

    def now(self) -> Progress:
        """The state at this moment."""
        return Progress(self._phase, self._epoch, self._epochs, self._step, self._steps, self._left_s())

    def _left_s(self) -> float | None:
        """What all epochs still take at the pace since this process began; an early stop may come before."""
        if not self._all_steps or self._phase == "measure":
            return None
        elapsed = self._clock() - self._since
        training = self._all["train"] + (elapsed if self._phase == "train" else 0.0)
        steps = (self._epochs - self._epoch) * self._steps - self._step
        unfinished = self._of_epoch if self._all_epochs else {}
        besides = sum(self._all[p] - unfinished.get(p, 0.0) for p in ("validate", "checkpoint")) / max(1, self._all_epochs)
        epochs = self._epochs - self._epoch - (0 if self._phase == "train" else 1)
        return max(0.0, steps * training / self._all_steps + epochs * besides)

    def _keep_writing(self) -> None:
        said: Any = None
        while not self._end.wait(self._every_s):
            body = asdict(self.now())
            if body != said:
                said = body
                with contextlib.suppress(StorageError):  # whoever watches sees the next one
                    storage.write_json(self._place, _stamped("running", body), indent=None)
