"""Telemetry: the figures of a job as Prometheus scrapes them from Ray's nodes. `METERS` is the one table of their names.

Ray puts `ray_` before each name and says in labels which process told it; cluster/grafana.json shows them. What receipts and
logs carry is told by the driver, what only an actor knows by the actor. Telling costs microseconds and never raises: a job
does not end because nobody could be told of it. A scan's id is no label: labels are kept for ever, and stand in other hands.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

PREFIX = "brainseg_"
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds of the histogram's buckets. Ray makes its sum up from them; an exact sum needs a counter."""


@dataclass(frozen=True)
class Meter:
    """One figure: what it counts or measures, in which unit, and what tells its series apart."""

    kind: Literal["counter", "gauge", "histogram"]
    what: str
    labels: tuple[str, ...]


METERS: Mapping[str, Meter] = {
    "brainseg_scans": Meter("counter", "scans that have their row, segmented or failed", ("run_id",)),
    "brainseg_scans_failed": Meter("counter", "scans that failed, by code of the quarantine", ("run_id", "code")),
    "brainseg_scans_left": Meter("gauge", "scans that have no row yet", ("run_id",)),
    "brainseg_scans_in_flight": Meter("gauge", "scans that a process has in hand, by what it does", ("run_id", "stage")),
    "brainseg_stage_seconds": Meter("counter", "seconds that scans took in a stage, in all processes", ("run_id", "stage")),
    "brainseg_part_seconds": Meter("histogram", "seconds that the scans of a part took in a stage", ("run_id", "stage")),
    "brainseg_device_busy_share": Meter("gauge", "share of an actor's time inside the network, 0 to 1", ("run_id",)),
    "brainseg_train_epoch": Meter("gauge", "epochs that are done", ("model",)),
    "brainseg_train_loss": Meter("gauge", "mean training loss of the last epoch", ("model",)),
    "brainseg_train_validation_dice": Meter("gauge", "mean Dice of the validation scans, 0 to 1", ("model",)),
    "brainseg_train_samples_per_second": Meter("gauge", "slices, or patches, a second", ("model",)),
}


def exported(name: str) -> tuple[str, ...]:
    """The names under which Prometheus finds a meter."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return tuple(f"ray_{name}{ending}" for ending in endings[METERS[name].kind])


@functools.cache
def _made(name: str) -> Any:
    """Ray's own object for a meter, once a process. It may be anything that Ray raises where there is no Ray."""
    meter = METERS[name]
    if meter.kind == "histogram":
        return Histogram(name, meter.what, list(SECONDS), meter.labels)
    return (Counter if meter.kind == "counter" else Gauge)(name, meter.what, meter.labels)


class Meters:
    """The meters as one process of a job uses them; `labels` are those that all its figures share."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels

    def tell(self, name: str, value: float | None, **labels: str) -> None:
        """Add to a counter, set a gauge, or put into a histogram; None, and adding nothing, tells nothing."""
        meter = METERS[name]
        if value is None or (meter.kind == "counter" and value <= 0):
            return
        with suppress(Exception):  # Ray's client of metrics may raise anything, and nobody waits for these figures
            made = _made(name)
            act = {"counter": "inc", "gauge": "set", "histogram": "observe"}[meter.kind]
            getattr(made, act)(float(value), tags={**self._labels, **labels})

    @contextmanager
    def holding(self, scans: int, stage: str) -> Iterator[None]:
        """While inside, this process has so many scans in hand."""
        self.tell("brainseg_scans_in_flight", scans, stage=stage)
        try:
            yield
        finally:
            self.tell("brainseg_scans_in_flight", 0, stage=stage)


class BusyShare:
    """Which share of the time since the last look was spent inside."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._since, self._inside = clock, clock(), 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What happens inside counts as busy."""
        began = self._clock()
        try:
            yield
        finally:
            self._inside += self._clock() - began

    def look(self) -> float:
        """The share, 0 to 1; the next look begins anew."""
        now = self._clock()
        share = self._inside / (now - self._since) if now > self._since else 0.0
        self._since, self._inside = now, 0.0
        return min(1.0, share)


class TrainingMeters:
    """A training's log, line by line, as Prometheus finds it (a `loggers.Logger`)."""

    def __init__(self, model: str) -> None:
        self._meters = Meters(model=model)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._meters.tell("brainseg_train_epoch", row["epoch"] + 1)
        self._meters.tell("brainseg_train_loss", row["loss"])
        self._meters.tell("brainseg_train_validation_dice", row["validation_dice"])
        self._meters.tell("brainseg_train_samples_per_second", row["samples_per_s"])

    def finish(self, figures: Mapping[str, Any]) -> None:
        """The held-out figures are no series: they stand in the model's card."""
