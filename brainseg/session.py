"""Session: reach the Ray cluster that this job runs on, or start a local one; know what it can bear.

Nothing here schedules anything: that is Ray's. A cluster is joined where `RAY_ADDRESS` names one or where this process is
a submitted Ray job; otherwise a local Ray lives as long as the process, with token authentication and no dashboard.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from brainseg.errors import PreflightError

SPARE_CPUS = 2
"""Logical CPUs a local Ray gets beyond the machine's cores, for the light tasks around the busy ones."""
OBJECT_STORE_BYTES = 1 << 30
QUIET_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")


@dataclass(frozen=True)
class Cluster:
    """What the cluster offers. `cpus` are logical; `cores` are those that heavy work may fill, one being left for the rest."""

    cpus: float
    gpus: float
    cores: int
    nodes: int
    local: bool


def connect() -> Cluster:
    """Join or start Ray; safe to call again."""
    local = not os.environ.get("RAY_ADDRESS") and not os.environ.get("RAY_JOB_ID")
    if not ray.is_initialized():
        _start_local() if local else ray.init(log_to_driver=False, logging_level=logging.ERROR)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    cpus = total.get("CPU", 0.0)
    cores = min(os.cpu_count() or 1, int(cpus)) if local else int(cpus) - 1
    return Cluster(cpus, total.get("GPU", 0.0), max(1, cores), len(nodes), local)


def _start_local() -> None:
    """Start Ray on this machine: quiet and small. Its authentication is the environment's (`environment.py`)."""
    with _hushed_stderr():
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + SPARE_CPUS,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextmanager
def _hushed_stderr() -> Iterator[None]:
    """Keep what Ray's core prints while it starts off the terminal: its log level is itself announced there. Errors raise."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def require(cluster: Cluster, *, cpus: float, gpus: float = 0, what: str) -> None:
    """Raise PreflightError where a job would wait for resources for ever, which Ray does without a word."""
    if cpus > cluster.cpus or gpus > cluster.gpus:
        needs = f"{cpus:g} CPUs and {gpus:g} GPUs at once; the cluster has {cluster.cpus:g} and {cluster.gpus:g}"
        raise PreflightError(f"{what} needs {needs}. Ask for fewer workers.")
