"""In flight: notes of what has been begun, so that a scan that kills whoever touches it is found and set aside.

RUN/inflight/block-<digest>.json          a block that a process has begun, with the ids of its scans
RUN/inflight/<stage>-<scan>-<try>.json    a scan that is being tried alone
RUN/inflight/start-<actor>-<try>.json     an actor that is loading its model

Ray does a block again whose process died, for ever. A note costs one small write a block, and one delete. Whoever finds the
note of its block there already knows that a process died over it, and does its scans one at a time, each with notes of its
own: a scan over which processes died `MOST_TRIES` times alone becomes a quarantine row, and nobody touches it again. Notes
outlive the driver, so that a scan that takes the whole machine down is found by the commands that come after.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar
from uuid import uuid4

from brainseg import storage
from brainseg.errors import ClusterError, StorageError

T = TypeVar("T")
FOLDER = "inflight"
MOST_TRIES = 2
"""How often a scan is tried alone, after its block died once: three deaths in all."""
MOST_STARTS = 5
"""How often an actor may die in a row while it starts, before that is the run's problem."""


class Flight:
    """One process's work on one block.

    `suspects` are scans that an earlier driver left in flight; a block that holds one is done scan by scan from the start.
    """

    def __init__(self, run: str, what: str, scan_ids: Sequence[str], suspects: frozenset[str] = frozenset()) -> None:
        self.run = run
        self.scan_ids = list(scan_ids)
        self.suspects = suspects
        self.note = _place(run, "block", _digest([what, *sorted(scan_ids)]))
        self.given_up: list[tuple[str, str]] = []

    def begin(self) -> bool:
        """Note that the block is begun; True where it must be done scan by scan, because a process died over it."""
        is_first = _create(self.note, self.scan_ids)
        return not is_first or not self.suspects.isdisjoint(self.scan_ids)

    def alone(self, scan_id: str, stage: str, call: Callable[[], T], give_up: Callable[[], T]) -> T:
        """Do one stage of one scan, noted; or, where processes died over it `MOST_TRIES` times, what is done instead."""
        tries = _tries(self.run, stage, scan_id)
        if not any(_create(uri, [scan_id]) for uri in tries):
            self.given_up.append((stage, scan_id))
            return give_up()
        answer = call()
        _delete(tries)
        return answer

    def end(self) -> None:
        """Take the notes back: the block's work is safe."""
        for stage, scan_id in self.given_up:
            _delete(_tries(self.run, stage, scan_id))
        storage.delete(self.note)


def note_start(run: str, actor: str) -> None:
    """Note that an actor begins to start. ClusterError once it died over that `MOST_STARTS` times in a row."""
    if not any(_create(uri, []) for uri in _starts(run, actor)):
        text = f"an inference process died {MOST_STARTS} times while it loaded the model; is there memory enough for it?"
        raise ClusterError(f"{text} What is done is kept, and the same command goes on from there")


def note_ready(run: str, actor: str) -> None:
    """Take the notes of an actor's start back."""
    _delete(_starts(run, actor))


def left_behind(run: str) -> frozenset[str]:
    """The scans that were in flight when the last driver died. Its notes of blocks and starts go; those of scans stay."""
    suspects: set[str] = set()
    for entry in list(storage.list_files(storage.join(run, FOLDER))):
        kind = storage.name_of(entry.uri).split("-")[0]
        if kind == "block":
            suspects.update(_ids(entry.uri))
        if kind in ("block", "start"):
            storage.delete(entry.uri)
    return frozenset(suspects)


def clear(run: str) -> None:
    """Remove every note: the run is complete."""
    storage.delete_tree(storage.join(run, FOLDER))


def _ids(note: str) -> list[str]:
    """The scans of a block's note; none where it is not readable, as it was then not written before its work began."""
    try:
        return [str(scan_id) for scan_id in storage.read_json(note)["scan_ids"]]
    except StorageError:
        return []


def _create(note: str, scan_ids: Sequence[str]) -> bool:
    """Whether the note was not there yet. Who writes it tells it apart from another's, should the store's answer be lost.

    Ray gives a block to one process, and to the next when that one has died: there are no rivals.
    """
    body = json.dumps({"writer": uuid4().hex, "scan_ids": list(scan_ids)}).encode()
    return storage.create_bytes(note, body, rivals=False)


def _tries(run: str, stage: str, scan_id: str) -> list[str]:
    return [_place(run, stage, _digest([scan_id]), str(n)) for n in range(1, MOST_TRIES + 1)]


def _starts(run: str, actor: str) -> list[str]:
    return [_place(run, "start", actor, str(n)) for n in range(1, MOST_STARTS + 1)]


def _place(run: str, *words: str) -> str:
    return storage.join(run, FOLDER, f"{'-'.join(words)}.json")


def _delete(uris: Sequence[str]) -> None:
    for uri in uris:
        storage.delete(uri)


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]
