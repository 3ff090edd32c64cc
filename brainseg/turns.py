"""Turns: several threads share what only one of them may have at a time, such as a network on a GPU."""

import heapq
import itertools
import threading
from dataclasses import dataclass


class Turns:
    """Who has what only one thread may have: of those who want it, whoever entered first.

    So the oldest block is soon through, and each of its neighbours waits for the store at another time.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.taken = False
        self.wanted: list[int] = []
        self._numbers = itertools.count()

    def enter(self) -> "Turn":
        """A place in the order, with which it can be had any number of times."""
        return Turn(self, next(self._numbers))


@dataclass(frozen=True)
class Turn:
    """A context in which its thread has it."""

    turns: Turns
    number: int

    def __enter__(self) -> None:
        with self.turns.changed:
            heapq.heappush(self.turns.wanted, self.number)
            self.turns.changed.wait_for(lambda: not self.turns.taken and self.turns.wanted[0] == self.number)
            heapq.heappop(self.turns.wanted)
            self.turns.taken = True

    def __exit__(self, *_: object) -> None:
        with self.turns.changed:
            self.turns.taken = False
            self.turns.changed.notify_all()
