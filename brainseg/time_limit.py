"""Time limit: give up on a call that does not come back, such as a read from a mount that is dead.

A thread cannot be killed, and a helper process would cost a copy of every voxel. So calls run in a thread beside, which is
left behind when it does not answer in time; the caller goes on with a new one. A process that has left several behind
should be replaced (`is_worn`). A call that hangs inside a C library without giving up Python's lock stops the whole process;
for that case the kernel's alarm, which needs no lock, ends the process a while later if `fatal` is asked for.
"""

import faulthandler
import signal
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from brainseg.errors import Code, ScanError

T = TypeVar("T")
STDERR = 2
MOST_LEFT_BEHIND = 3
"""Threads that a process may have hanging in it before it should be replaced."""
FATAL_AFTER = 1.5
"""Times the limit after which a process that does not even notice its limit is ended."""


class TimeLimit:
    """Runs calls one at a time, each for at most so many seconds."""

    def __init__(self, seconds: float, *, fatal: bool = False) -> None:
        self.seconds = seconds
        self.fatal = fatal
        self._helper: _Helper | None = None
        self._left_behind: list[_Helper] = []
        if fatal:  # where it hung is written to stderr, then the signal does what it does by default
            faulthandler.register(signal.SIGALRM, file=STDERR, all_threads=True, chain=True)

    @property
    def is_worn(self) -> bool:
        """Whether so many threads hang in this process that another one should take over."""
        self._left_behind = [helper for helper in self._left_behind if helper.is_alive()]
        return len(self._left_behind) >= MOST_LEFT_BEHIND

    def call(self, function: Callable[[], T], who: str) -> T:
        """Return what `function` returns, or raise what it raises; ScanError TIMEOUT where it does neither in time."""
        if self._helper is None:
            self._helper = _Helper()
        self._set_alarm(self.seconds * FATAL_AFTER + 1)
        try:
            done, answer = self._helper.ask(function, self.seconds)
        except Empty:
            self._helper.dismiss()
            self._left_behind.append(self._helper)
            self._helper = None
            text = f"{who}: found no end of reading within {self.seconds:g} s, expected its files to answer"
            raise ScanError(Code.TIMEOUT, text) from None
        finally:
            self._set_alarm(0)
        if not done:
            raise answer
        return answer  # type: ignore[no-any-return]

    def _set_alarm(self, seconds: float) -> None:
        if self.fatal:
            signal.setitimer(signal.ITIMER_REAL, seconds)


class _Helper:
    """A thread that answers calls until it is dismissed."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, function: Callable[[], Any], seconds: float) -> tuple[bool, Any]:
        """Whether the call returned, and what it returned or raised. Raises queue.Empty where time runs out."""
        self._calls.put(function)
        return self._answers.get(timeout=seconds)

    def dismiss(self) -> None:
        self._calls.put(None)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while (function := self._calls.get()) is not None:
            try:
                answer = True, function()
            except BaseException as error:  # noqa: BLE001  whatever it is, it is raised again where the call was made
                answer = False, error
            self._answers.put(answer)
            del answer, function
