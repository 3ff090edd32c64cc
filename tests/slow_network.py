"""A mock-up of an actor of the split plan: its network sleeps, and its store may be late."""

import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from factory import make_scan

from brainseg import stages
from brainseg.model import Prediction
from brainseg.stages import Work
from brainseg.telemetry import BusyShare
from brainseg.turns import Turns
from brainseg.workers import Forward


class Slow:
    """A network that takes its time for a scan, and more before it, and notices who else is in it."""

    def __init__(self, seconds, before=0.0):
        self.seconds, self.before, self.inside, self.most = seconds, before, 0, 0

    def predict(self, scans, patients, on_device):
        time.sleep(self.before)
        with on_device():
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(self.seconds)
            self.inside -= 1
        return [Prediction(np.zeros(scan.grid.shape, np.uint8), (), self.seconds) for scan in scans]


def block(number, scans=4):
    rows = [{"scan_id": f"{number}-{n}", "patient_id": None} for n in range(scans)]
    works = stages.column(stages.pack(Work(row, make_scan((2, 8, 8)))) for row in rows)
    return pa.table({name: [row[name] for row in rows] for name in rows[0]} | {"work": works})


def actor(run, scan_s, before_s=0.0):
    """Without what its constructor wants: a cluster and a model."""
    made = object.__new__(Forward)
    made.job = SimpleNamespace(run=run, run_id="mock-up", scan_seconds=60.0, suspects=frozenset())
    made.model, made.busy, made.turns = Slow(scan_s, before_s), BusyShare(), Turns()
    return made


def late(call, seconds):
    """The same call, so much later."""

    def answered(*words, **how):
        time.sleep(seconds)
        return call(*words, **how)

    return answered
