"""Progress: how far a bulk run is, as its receipts tell; kept in RUN/progress.json for whoever has no dashboard.

{"state": "running", "run_id": ..., "attempt": 1, "done": 12, "ok": 11, "failed": 1, "total": 40, "failed_by_code": {...},
 "scans_per_s": 0.8, "left_s": 35, "seconds": {"decode": ..., ...}, "written_at": "2026-01-31T12:00:00.000Z"}

It is no part of the run: nothing is decided by it, `verify` does not ask for it, a store that refuses it costs one warning.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Event as Signal
from threading import Thread
from typing import Any, Literal

from brainseg import storage
from brainseg.errors import FailureLimitError, StorageError
from brainseg.events import utc

FILE = "progress.json"
EVERY_S = 10.0
"""Between two writes, however many parts are done meanwhile: on S3 each is a request that is paid for."""
LAST_WRITE_S = 20.0
"""How long the end of a job waits for a store to take the last word."""
STAGES = ("decode", "predict", "finish")
Ending = Literal["finished", "failed", "stopped"]
"""`stopped`: somebody wanted it so, by a limit or by hand."""
State = Literal["running"] | Ending
Say = Callable[[str], None]


@dataclass
class Progress:
    """What the receipts have told so far. `before` and `failed_before` are what earlier attempts had finished."""

    total: int
    before: int = 0
    failed_before: int = 0
    ok: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    codes: Counter[str] = field(default_factory=Counter)
    """Failed scans by code, those of earlier attempts among them."""
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.before + self.ok + self.failed

    @property
    def all_failed(self) -> int:
        return self.failed_before + self.failed

    @property
    def scans_per_s(self) -> float:
        """The pace of this attempt."""
        elapsed = time.monotonic() - self.started
        return (self.ok + self.failed) / elapsed if elapsed else 0.0

    @property
    def left_s(self) -> float | None:
        """How long the rest takes at this pace; None where nothing is left or no pace is known."""
        pace = self.scans_per_s
        return (self.total - self.done) / pace if pace and self.done < self.total else None

    def take(self, receipt: Mapping[str, Any]) -> None:
        """Count what a receipt tells of a part."""
        self.ok += int(receipt["ok"])
        self.failed += len(receipt["failed"])
        self.codes.update(str(f["code"]) for f in receipt["failed"])
        for stage in self.seconds:
            self.seconds[stage] += float(receipt[f"seconds_{stage}"])

    def line(self) -> str:
        """Scans done, failed and to come, the pace, and how long it will take."""
        left = "" if self.left_s is None else f", {self.left_s:.0f} s left"
        return f"{self.done}/{self.total} scans, {self.all_failed} failed, {self.scans_per_s:.2f} scans/s{left}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        left = self.left_s
        return {
            "done": self.done,
            "ok": self.done - self.all_failed,
            "failed": self.all_failed,
            "total": self.total,
            "failed_by_code": dict(sorted(self.codes.items())),
            "scans_per_s": round(self.scans_per_s, 3),
            "left_s": None if left is None else round(left),
            "seconds": {stage: round(s, 3) for stage, s in self.seconds.items()},
        }


class ProgressFile:
    """RUN/progress.json, written by a thread of its own: a slow store delays nothing, one that fails is said once."""

    def __init__(self, run: str, about: Mapping[str, Any], say: Say, *, every_s: float = EVERY_S) -> None:
        self._place, self._about, self._say, self._every_s = storage.join(run, FILE), dict(about), say, every_s
        self._body: dict[str, Any] = {}
        self._last: Ending | None = None
        self._is_warned = False
        self._end = Signal()
        self._thread = Thread(target=self._keep_writing, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def show(self, progress: Progress) -> None:
        """What the next write will hold. Costs microseconds."""
        self._body = progress.to_json()

    def close(self, state: Ending | None) -> None:
        """Write the last word and end; None writes nothing more, because the run is somebody else's by now."""
        self._last = state
        self._end.set()
        self._thread.join(LAST_WRITE_S)

    def _keep_writing(self) -> None:
        self._write("running")
        while not self._end.wait(self._every_s):
            self._write("running")
        if self._last is not None:
            self._write(self._last)

    def _write(self, state: State) -> None:
        body = {"state": state, **self._about, **self._body, "written_at": utc(datetime.now(UTC))}
        try:
            storage.write_json(self._place, body)
        except StorageError as error:
            if not self._is_warned:
                self._is_warned = True
                self._say(f"warning: {FILE} could not be written; the run goes on without it ({error})")


def ended_as(error: BaseException | None) -> Ending:
    """How a job ended that was left with this error."""
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, FailureLimitError | KeyboardInterrupt | SystemExit) else "failed"
