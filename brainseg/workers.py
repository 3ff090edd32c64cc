"""Workers: what runs in Ray's processes during a bulk run, a block of scans at a time.

`WholeWay` takes a block all the way to a written part. Where the network has a GPU of its own, `decode_block`, `Forward` and
`finish_block` share that way out among processes. What happens to a scan is in `stages`; here it is called in an order that
survives the death of the process: see `inflight`.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import torch

from brainseg import ahead, inflight, lease, memory, runs, stages, storage
from brainseg.ensemble import load_segmenter
from brainseg.inflight import Flight
from brainseg.model import Segmenter
from brainseg.stages import Job, Row, Work
from brainseg.telemetry import BusyShare, Meters
from brainseg.time_limit import TimeLimit
from brainseg.turns import Turn, Turns

RECEIPT = pa.schema(
    [
        ("part", pa.string()),
        ("ok", pa.int64()),
        ("failed", pa.list_(pa.struct([(name, pa.string()) for name in ("scan_id", "code", "stage", "message")]))),
        ("seconds_decode", pa.float64()),
        ("seconds_predict", pa.float64()),
        ("seconds_finish", pa.float64()),
    ]
)

LARGE_BYTES = 24_000_000
"""A full scan's crop, slices and probabilities are larger; what a network makes of a batch on a CPU is not."""


class WholeWay:
    """An actor that takes a block of manifest rows all the way to a written part."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = ready_model(job)
        self.busy = BusyShare()

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        with _meters(self.job).holding(len(rows), "whole"):
            receipt = self._whole_way(rows)
        _meters(self.job).tell("brainseg_device_busy_share", self.busy.look())
        return receipt

    def _whole_way(self, rows: list[Row]) -> pa.Table:
        flight = _flight("whole", rows, self.job)
        if flight.begin():
            done = [self._alone(row, flight) for row in rows]
        else:
            works = _predicted(_decoded(rows, self.job), self._predict)
            finish = functools.partial(stages.finish, job=self.job)
            done = list(map(finish, works))  # a loop's variable would keep hold of the last scan
        receipt = _written(self.job, done)
        flight.end()
        return receipt

    def _predict(self, works: Sequence[Work]) -> list[Work]:
        with self.busy.inside():
            return stages.predict(self.model, works)

    def _alone(self, row: Row, flight: Flight) -> dict[str, Any]:
        """One scan of a block over which a process died before."""
        work = _alone(flight, "decode", row, lambda: _decode(row, self.job))
        work = _alone(flight, "predict", row, lambda: self._predict([work])[0])
        return _finish_alone(flight, work, self.job)


def decode_block(block: pa.Table, job: Job) -> pa.Table:
    """A task: manifest rows -> the same with the decoded scans as bytes in a column `work`."""
    rows = block.to_pylist()
    with _meters(job).holding(len(rows), "decode"):
        flight = _flight("decode", rows, job)
        if flight.begin():
            works: Iterator[Work] = (_alone(flight, "decode", r, functools.partial(_decode, r, job)) for r in rows)
        else:
            works = _decoded(rows, job)
        packed = stages.column(map(stages.pack, works))
        flight.end()
    return block.append_column("work", packed)


class Forward:
    """An actor that holds the network and nothing else.

    Ray calls it in several threads (`plan.BLOCKS_AT_ONCE`). One of them has the network; the others prepare what comes next
    and send it ahead, put away what was, or wait for the store that their notes go to, so that a GPU does not. A scan that is
    tried alone has the network as long as its note is there: no other scan of this process could then be blamed for its death.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = ready_model(job)
        self.busy = BusyShare()
        self.turns = Turns()

    def __call__(self, block: pa.Table) -> pa.Table:
        rows, works = _unpacked(block)
        turn = self.turns.enter()
        with _meters(self.job).holding(len(rows), "predict"):
            flight = _flight("predict", rows, self.job)
            if flight.begin():
                done: Iterator[Work] = (self._alone(work, flight, turn) for work in works)
            else:
                done = _predicted(works, functools.partial(stages.predict, self.model, on_device=lambda: self._network(turn)))
            packed = stages.column(stages.pack(replace(work, scan=None)) for work in done)  # it stands in `work`
            flight.end()
        with turn:
            _meters(self.job).tell("brainseg_device_busy_share", self.busy.look())
        return block.append_column("answer", packed)

    @contextmanager
    def _network(self, turn: Turn) -> Iterator[None]:
        with turn, self.busy.inside():
            yield

    def _alone(self, work: Work, flight: Flight, turn: Turn) -> Work:
        with turn:
            return _alone(flight, "predict", work.row, lambda: stages.predict(self.model, [work], self.busy.inside)[0])


def finish_block(block: pa.Table, job: Job) -> pa.Table:
    """A task: predictions -> a written part; returns its receipt."""
    rows, works = _unpacked(block)
    with _meters(job).holding(len(rows), "finish"):
        flight = _flight("finish", rows, job)
        finish = functools.partial(_finish_alone, flight) if flight.begin() else stages.finish
        receipt = _written(job, [finish(work, job) for work in works])
        flight.end()
    return receipt


def ready_model(job: Job) -> Segmenter:
    """The network, or all of an ensemble's, on this actor's device; one thread where it shares cores with its siblings."""
    actor = ray.get_runtime_context().get_actor_id() or f"process-{os.getpid()}"
    inflight.note_start(job.run, actor)
    on_gpu = bool(ray.get_gpu_ids())
    if not on_gpu:
        torch.set_num_threads(1)
        memory.give_back_from(LARGE_BYTES)
    model = load_segmenter((job.model, *job.other_models), job.settings, torch.device("cuda" if on_gpu else "cpu"))
    inflight.note_ready(job.run, actor)
    return model


def _flight(what: str, rows: Sequence[Row], job: Job) -> Flight:
    """What this process is about to do. A process in which too many reads hang leaves it to a fresh one: Ray starts that."""
    if _time_limit(job.scan_seconds).is_worn:
        os._exit(1)
    return Flight(job.run, what, [row["scan_id"] for row in rows], job.suspects)


@functools.cache
def _time_limit(seconds: float) -> TimeLimit:
    """This process's own: a task's process does many tasks, and what hangs in it hangs on."""
    return TimeLimit(seconds, fatal=True)


def _meters(job: Job) -> Meters:
    """What this process tells Prometheus."""
    return Meters(run_id=job.run_id)


def _decode(row: Row, job: Job, fetched: Row | None = None) -> Work:
    return stages.decode(row, with_label=job.settings.score, limit=_time_limit(job.scan_seconds), fetched=fetched)


def _decoded(rows: Sequence[Row], job: Job) -> Iterator[Work]:
    """Rows decoded one by one; the files of those that follow are fetched meanwhile. Nobody here keeps hold of either.

    Not where a process died over the block: whatever is touched there is touched alone.
    """
    coming = ahead.fetched(rows, with_label=job.settings.score)
    for row in rows:
        yield _decode(row, job, next(coming))


def _alone(flight: Flight, stage: str, row: Row, call: Callable[[], Work]) -> Work:
    return flight.alone(row["scan_id"], stage, call, lambda: stages.lost(row, stage))


def _finish_alone(flight: Flight, work: Work, job: Job) -> dict[str, Any]:
    def give_up() -> dict[str, Any]:
        return stages.finish(stages.lost(work.row, "finish"), job)

    return flight.alone(work.row["scan_id"], "finish", lambda: stages.finish(work, job), give_up)


def _predicted(works: Iterable[Work], predict: Callable[[list[Work]], list[Work]]) -> Iterator[Work]:
    """Works with their predictions, group by group. Nobody here keeps hold of a scan while the next group is read."""
    for group in stages.in_groups(works):
        answered = predict(group)
        group.clear()
        while answered:
            yield answered.pop(0)


def _unpacked(block: pa.Table) -> tuple[list[Row], Iterator[Work]]:
    """The manifest rows of a block, and their works, of which each is unpacked, answered if there are answers, in its turn."""
    columns = [stages.values(block[name]) for name in ("work", "answer") if name in block.column_names]
    rows: list[Row] = block.drop_columns(["work", "answer"][: len(columns)]).to_pylist()
    return rows, (_joined(row, *packed) for row, *packed in zip(rows, *columns, strict=True))


def _joined(row: Row, work: pa.Buffer, answer: pa.Buffer | None = None) -> Work:
    """A packed work, with what a network made of it."""
    decoded = stages.unpack(work, row)
    if answer is None:
        return decoded
    answered = stages.unpack(answer, row)
    return replace(answered, scan=decoded.scan if answered.failure is None else None)


def _written(job: Job, rows: Sequence[Row]) -> pa.Table:
    """Commit finished rows as a part; the receipt says what is in it. RunError where another driver holds the run by now."""
    if not rows:
        return RECEIPT.empty_table()
    if job.lease:
        lease.refuse_overtaken(job.run, job.lease)
    receipt = {
        "part": storage.name_of(runs.write_part(job.run, rows)),
        "ok": sum(r["status"] == "ok" for r in rows),
        "failed": [_failure(r) for r in rows if r["status"] == "failed"],
        **{f"seconds_{s}": sum(r[f"seconds_{s}"] for r in rows) for s in ("decode", "predict", "finish")},
    }
    return pa.Table.from_pylist([receipt], schema=RECEIPT)


def _failure(row: Row) -> dict[str, str]:
    """What the driver is told of a failed scan."""
    return {"scan_id": row["scan_id"], **{name: str(row[f"error_{name}"]) for name in ("code", "stage", "message")}}
