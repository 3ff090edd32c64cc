"""Console: what a person sees while a job runs, and what a program reads when it ends.

Messages go to stderr, results to stdout, so that `--json` output can be piped. On a terminal progress is a bar; elsewhere
it is a line every 30 seconds. Names come from strangers' archives: a line stays one line, and what would steer a terminal is
shown escaped. Where logs are collected by machines, `BRAINSEG_LOG_FORMAT=json` makes every line a JSON object (`events.py`).
"""

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from brainseg.errors import visible
from brainseg.events import Event, LogFormat, json_line, log_format, said

LINE_EVERY_S = 30.0


class Voice:
    """Says things to a person, unless told to be quiet, and gives the result in the form asked for."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, lines: LogFormat | None = None) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.lines = lines or log_format()
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._run_id: str | None = None

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.lines == "json":
            self.note(said(text, self._run_id))
        elif not self.quiet:
            self.err.print(visible(text.replace("\n", " ")), markup=False)

    def note(self, event: Event) -> None:
        """One moment of a job, for a log that machines read; a person is told in sentences."""
        self._run_id = event.run_id or self._run_id
        if self.lines == "json" and not (self.quiet and event.level == "info"):
            sys.stderr.write(json_line(event, datetime.now(UTC)) + "\n")
            sys.stderr.flush()

    def hear(self, text: str) -> None:
        """Pass on what another process says, line by line as it comes."""
        if not self.quiet:
            sys.stderr.write("\n".join(map(visible, text.split("\n"))))
            sys.stderr.flush()

    def result(self, body: Mapping[str, Any], text: str) -> None:
        """The outcome: JSON for a program, or text for a person."""
        if self.as_json:
            sys.stdout.write(json.dumps(body, indent=2, default=str) + "\n")
        elif self.lines == "json":
            self.say(text)
        elif not self.quiet:
            sys.stdout.write("\n".join(map(visible, text.split("\n"))) + "\n")
        sys.stdout.flush()

    def bar(self, what: str) -> "Bar":
        """A progress display, used as a context."""
        return Bar(self, what)

    @property
    def has_bars(self) -> bool:
        """Whether somebody would see a bar: on a terminal, unless told to be quiet or to write JSON."""
        return self.err.is_terminal and not self.quiet and self.lines == "text"


class Bar:
    """Progress of one job: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, voice: Voice, what: str) -> None:
        self.voice = voice
        self.what = what
        self._last = 0.0
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self.voice.has_bars:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[line]}"))
            self._progress = Progress(*columns, console=self.voice.err)
            self._task = self._progress.add_task(self.what, total=None, line="")
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, total: int, line: str, what: str | None = None) -> None:
        """Show how far the job is, or one part of it that `what` names."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, line=line, description=what or self.what)
        elif self.voice.lines == "json":
            return  # each part has an event with the same figures
        elif time.monotonic() - self._last > LINE_EVERY_S or done == total:
            self._last = time.monotonic()
            self.voice.say(line)
