"""Observe: everybody who looks on at a bulk run, told from one place in its driver.

A person hears sentences and sees a bar (`Ear`); who collects logs gets events; Prometheus gets figures (`telemetry`); who
has none of it finds RUN/progress.json (`progress`). Nobody who looks on can fail the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from brainseg.errors import BrainsegError
from brainseg.events import Event, Kind, Level
from brainseg.progress import STAGES, Progress, ProgressFile, ended_as
from brainseg.telemetry import Meters

FAILURES_TOLD = 10
"""Failed scans of one part that get a line each; of the others it is said how many there are."""
LEVELS: Mapping[Kind, Level] = {"scan_failed": "warning", "stopped": "warning", "failed": "error"}


@dataclass(frozen=True)
class Ear:
    """Who listens: `say` gets lines for a person, `tick` the progress after every part, `note` what is for a log alone."""

    say: Callable[[str], None] = lambda _: None
    tick: Callable[[Progress], None] = lambda _: None
    note: Callable[[Event], None] = lambda _: None


class Onlookers:
    """All who look on at one attempt at a run. Used as a context: how it is left says how the run ended.

    `check` raises where another driver has taken the run over: then its progress.json is left alone.
    """

    def __init__(
        self, run: str, body: Mapping[str, Any], total: int, ear: Ear, check: Callable[[], None] = lambda: None
    ) -> None:
        self._run_id, self._ear, self._check = str(body["run_id"]), ear, check
        self._file = ProgressFile(run, {"run_id": self._run_id, "attempt": body["attempt"]}, ear.say)
        self._meters = Meters(run_id=self._run_id)
        self._progress = Progress(total)
        self._attempt = int(body["attempt"])

    def __enter__(self) -> Self:
        self._note("begun", f"attempt {self._attempt} at run {self._run_id}", {"attempt": self._attempt})
        self._file.show(self._progress)
        self._file.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state = ended_as(error)
        self._file.close(state if error is None or self._is_ours() else None)
        self._note(state, f"{state}: {self._progress.line()}", self._counts())

    def see(self, progress: Progress) -> None:
        """What there is to do, and what of it earlier attempts have done."""
        self._progress = progress
        self._file.show(progress)
        self._meters.tell("brainseg_scans_left", progress.total - progress.done)

    def part(self, receipt: Mapping[str, Any]) -> None:
        """A part is written: take its receipt, and tell everybody."""
        progress = self._progress
        progress.take(receipt)
        self.see(progress)
        failed = receipt["failed"]
        self._measure(receipt, failed)
        self._note("part_written", f"{receipt['part']}: {progress.line()}", self._counts())
        for one in failed[:FAILURES_TOLD]:
            self._note("scan_failed", one["message"], scan_id=one["scan_id"], stage=one["stage"], code=one["code"])
        if len(failed) > FAILURES_TOLD:
            self._note("scan_failed", f"{len(failed) - FAILURES_TOLD} more of this part failed; the run's rows name them")
        self._ear.tick(progress)

    def _measure(self, receipt: Mapping[str, Any], failed: list[Mapping[str, str]]) -> None:
        self._meters.tell("brainseg_scans", int(receipt["ok"]) + len(failed))
        for one in failed:
            self._meters.tell("brainseg_scans_failed", 1, code=one["code"])
        for stage in STAGES:
            for name in ("brainseg_stage_seconds", "brainseg_part_seconds"):
                self._meters.tell(name, float(receipt[f"seconds_{stage}"]), stage=stage)

    def _counts(self) -> dict[str, float | None]:
        body = self._progress.to_json()
        return {name: body[name] for name in ("done", "ok", "failed", "total", "scans_per_s", "left_s")}

    def _is_ours(self) -> bool:
        try:
            self._check()
        except BrainsegError:
            return False
        return True

    def _note(self, kind: Kind, message: str, counts: Mapping[str, float | None] | None = None, **fields: str) -> None:
        self._ear.note(Event(kind, message, LEVELS.get(kind, "info"), self._run_id, **fields, counts=counts or {}))
