"""Events: what a job's driver tells of itself as lines of JSON, one a moment, for whoever collects logs of many machines.

A person reads sentences (`console.py`); here the same moments have fields that can be searched. No field ever holds what a
file's header says: messages are those of the quarantine, names are those of the archive's files and folders.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, cast, get_args

from brainseg.errors import BrainsegError, UsageError, one_line

LOG_FORMAT = "BRAINSEG_LOG_FORMAT"
"""The variable by which a process, and whatever it starts, is told which lines to write."""
LogFormat = Literal["text", "json"]
Level = Literal["info", "warning", "error"]
Kind = Literal["said", "begun", "scan_failed", "part_written", "finished", "failed", "stopped"]
"""`said` is a sentence for a person; the others are moments of a run."""
FIELDS = ("time", "level", "event", "run_id", "scan_id", "stage", "code", "message")
"""What every line has, null where there is nothing to say; counts of an event come after them."""


@dataclass(frozen=True)
class Event:
    """One moment of a job. `counts` are further fields of its line."""

    event: Kind
    message: str
    level: Level = "info"
    run_id: str | None = None
    scan_id: str | None = None
    stage: str | None = None
    code: str | None = None
    counts: Mapping[str, str | float | None] = field(default_factory=dict)


def json_line(event: Event, now: datetime) -> str:
    """An event as one line of JSON in ASCII; `now` must know its time zone."""
    known = {name: getattr(event, name) for name in FIELDS[1:-1]}
    body = {"time": utc(now), **known, "message": one_line(event.message), **event.counts}
    return json.dumps(body, allow_nan=False)


def utc(now: datetime) -> str:
    """A moment to the millisecond in UTC, such as 2026-01-31T12:00:00.000Z."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def said(text: str, run_id: str | None = None) -> Event:
    """A sentence for a person as an event; those that begin with `warning:` or `problem:` are warnings."""
    level: Level = "warning" if text.lower().startswith(("warning:", "problem:")) else "info"
    return Event("said", text, level, run_id)


def log_format() -> LogFormat:
    """Which lines this process writes. UsageError where the environment asks for something else."""
    asked = os.environ.get(LOG_FORMAT) or "text"
    if asked not in get_args(LogFormat):
        raise UsageError(f"{LOG_FORMAT}={one_line(asked)[:40]}: expected {' or '.join(get_args(LogFormat))}")
    return cast(LogFormat, asked)


def choose_log_format(name: LogFormat | None) -> None:
    """What a command line or a spec asks for counts for this process and those it starts; None leaves it as it is."""
    if name is not None:
        os.environ[LOG_FORMAT] = name


def last_words(error: BrainsegError, hint: str = "") -> str:
    """The line by which a command ends that failed, in the format chosen; `hint` follows it for a person."""
    if os.environ.get(LOG_FORMAT) == "json":
        return json_line(Event("failed", str(error), "error", code=type(error).__name__), datetime.now(UTC)) + "\n"
    return f"brainseg: {one_line(str(error))}{hint}\n"
