"""Calibrate: take a few scans of an archive the whole way, without writing anything, to know what one costs.

On a cluster that happens in a task of the size of an actor; on one machine in the driver itself, without a cluster.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch

from brainseg import stages
from brainseg.ensemble import load_segmenter
from brainseg.model import Segmenter
from brainseg.plan import Costs
from brainseg.stages import Job, Row

SAMPLE = 4
"""Scans looked at, spread over the archive. The first of them pays for what is done once, and is not counted."""


def sample(table: pa.Table) -> list[Row]:
    """A few rows of a manifest, from its beginning to its end; those that were refused while listing are passed over."""
    usable = [number for number, code in enumerate(table["problem_code"].to_pylist()) if not code]
    chosen = {usable[round(place)] for place in np.linspace(0, len(usable) - 1, SAMPLE)} if usable else set()
    rows: list[Row] = table.take(sorted(chosen)).to_pylist()
    return rows


def measure(rows: Sequence[Row], job: Job) -> Costs | None:
    """What these scans cost on this process's device, one thread where it is a CPU; None where none could be segmented."""
    on_gpu = torch.cuda.is_available()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if on_gpu else 1)
    try:
        model = load_segmenter((job.model, *job.other_models), job.settings, torch.device("cuda" if on_gpu else "cpu"))
        found = [cost for cost in (_cost(row, job, model) for row in rows) if cost is not None]
    finally:
        torch.set_num_threads(threads)
    return _mean(found[1:] or found)


def _cost(row: Row, job: Job, model: Segmenter) -> Costs | None:
    work = stages.decode(row, with_label=job.settings.score)
    size = 0.0 if work.scan is None else float(work.scan.image.nbytes)
    spent: list[float] = []
    work = stages.predict(model, [work], lambda: _timed(spent))[0]
    done = stages.finish(work, job)
    if done["status"] != "ok":
        return None
    return Costs(1, done["seconds_decode"], done["seconds_predict"], done["seconds_finish"], size, sum(spent))


@contextmanager
def _timed(spent: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    spent.append(time.perf_counter() - began)


def _mean(found: Sequence[Costs]) -> Costs | None:
    if not found:
        return None
    names = ("decode_s", "predict_s", "finish_s", "voxel_bytes", "device_s")
    return Costs(len(found), *(sum(getattr(c, name) for c in found) / len(found) for name in names))
