"""Loggers: a training's log, line by line, into TensorBoard or MLflow, where a person asked for it by `--log-to`.

Both are foreign and optional: they are imported when asked for, fed from the lines of `metrics.jsonl` in the driver, never
in a worker, and by a thread of their own. A logger that fails or hangs costs one warning, never a training.
"""

import importlib.util
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self

from brainseg import storage
from brainseg.errors import UsageError, one_line

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
PATIENCE_S = 60.0
"""How long a finished training waits for what a logger has not written yet."""
EXPERIMENT = "brainseg"
Row = Mapping[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """One word of `--log-to`: a kind of logger and where it writes; an empty place is the kind's own default."""

    kind: str
    place: str = ""


def targets(words: Sequence[str]) -> tuple[Target, ...]:
    """Read `tensorboard:DIR`, `mlflow:URI`, several with commas. UsageError for another kind, or one that is not installed."""
    found = []
    for word in (part.strip() for text in words for part in text.split(",")):
        kind, _, place = word.partition(":")
        if kind not in PACKAGES:
            raise UsageError(f"--log-to {word}: expected tensorboard[:DIR] or mlflow[:URI]")
        if importlib.util.find_spec(PACKAGES[kind]) is None:
            raise UsageError(f"--log-to {kind} needs the package {PACKAGES[kind]}: pip install {PACKAGES[kind]}")
        if kind == "tensorboard" and storage.is_remote(place):
            raise UsageError(f"--log-to {word}: TensorBoard's files are written to a local folder")
        found.append(Target(kind, place))
    return tuple(found)


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The figures of one line of `metrics.jsonl`; texts, counts of epochs and what is null are none."""
    for name, value in row.items():
        if name not in ("epoch", "epochs") and isinstance(value, int | float):
            yield name, float(value)


def flat(values: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted key."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Logger(Protocol):
    """What a logger can do. All of it may raise whatever its package raises."""

    def epoch(self, row: Row) -> None:
        """Take one line of the log."""

    def finish(self, figures: Row) -> None:
        """Take the held-out figures by dotted name, and close."""


class TensorBoard:
    """Event files in `DIR/NAME`."""

    def __init__(self, place: str, name: str, params: Row) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=storage.join(place, name))
        self._writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in flat(params)))

    def epoch(self, row: Row) -> None:
        for name, value in numbers(row):
            self._writer.add_scalar(name, value, row["epoch"] + 1)
        self._writer.flush()

    def finish(self, figures: Row) -> None:
        for name, value in numbers(figures):
            self._writer.add_scalar(name.replace(".", "/"), value, 0)
        self._writer.close()


class MLflow:
    """A run of the experiment `brainseg` on the tracking server or store of the URI, or of MLflow's own default."""

    def __init__(self, place: str, name: str, params: Row) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=place or None)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        for key, value in flat(params):
            self._client.log_param(self._run, key, str(value)[:500])

    def epoch(self, row: Row) -> None:
        for name, value in numbers(row):
            self._client.log_metric(self._run, name, value, step=row["epoch"] + 1)

    def finish(self, figures: Row) -> None:
        for name, value in numbers(figures):
            self._client.log_metric(self._run, name, value)
        self._client.set_terminated(self._run)


KINDS: Mapping[str, Callable[[str, str, Row], Logger]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
Call = Callable[[Logger], None]


class Loggers:
    """All loggers of one training behind one call each; used as a context, which waits for them at its end."""

    def __init__(self, makers: Mapping[str, Callable[[], Logger]], say: Say) -> None:
        self._lines = [_Line(name, make, say) for name, make in makers.items()]
        self._say = say

    @classmethod
    def of(
        cls, wanted: Sequence[Target], out: str, params: Row, say: Say, more: Mapping[str, Callable[[], Logger]] | None = None
    ) -> "Loggers":
        """The loggers of the training that makes the model folder `out`, and `more` by name; each opens in its own thread."""
        name = storage.name_of(out.rstrip("/"))
        places = {t: t.place or (f"{out}.tensorboard" if t.kind == "tensorboard" else "") for t in wanted}
        asked: dict[str, Callable[[], Logger]] = {t.kind: partial(KINDS[t.kind], places[t], name, params) for t in wanted}
        return cls({**asked, **(more or {})}, say)

    def epoch(self, row: Row) -> None:
        """One line of the log for each of them."""
        for line in self._lines:
            line.put(lambda logger: logger.epoch(row))

    def finish(self, figures: Row) -> None:
        """The held-out figures for each of them."""
        for line in self._lines:
            line.put(lambda logger: logger.finish(figures))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for line in self._lines:
            line.close(PATIENCE_S)


class _Line:
    """What one logger has still to do, and the thread that does it."""

    def __init__(self, name: str, make: Callable[[], Logger], say: Say) -> None:
        self._name, self._make, self._say = name, make, say
        self._todo: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        self._todo.put(call)

    def close(self, seconds: float) -> None:
        self._todo.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(
                f"warning: {self._name} has not taken everything within {seconds:.0f} s; what it lacks is in metrics.jsonl"
            )

    def _work(self) -> None:
        try:
            logger = self._make()
            while (call := self._todo.get()) is not None:
                call(logger)
        except Exception as error:  # noqa: BLE001  a foreign logger may raise anything, and must not end a training
            said = one_line(f"{type(error).__name__}: {error}")[:300]
            self._say(f"warning: logging to {self._name} failed and is given up; the training goes on ({said})")
