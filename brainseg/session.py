"""Session: reach the Ray cluster that this job runs on, or start a local one; know what it can bear.

Nothing here schedules anything: that is Ray's. A cluster is joined where `RAY_ADDRESS` names one or where this process is
a submitted Ray job; otherwise a local Ray lives as long as the process, with token authentication and no dashboard.
"""

import gc
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
import torch

from brainseg.errors import BrainsegError, ClusterError, ExitCode, PreflightError, StorageError, one_line
from brainseg.events import last_words

SPARE_CPUS = 2
"""Logical CPUs a local Ray gets beyond the machine's cores, for the light tasks around the busy ones."""
OBJECT_STORE_BYTES = 1 << 30
QUIET_LOGGERS = {"ray": logging.ERROR, "ray.data": logging.CRITICAL, "ray.train": logging.ERROR, "ray.tune": logging.ERROR}
"""What Ray Data says of an error it raises as well."""
KEPT = "what is done is kept, and the same command goes on from there"
DEATHS = (
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ObjectStoreFullError,
    ray.exceptions.OutOfDiskError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RaySystemError,
    ray.exceptions.WorkerCrashedError,
)
STARTS = 4
TOO_SLOW = "timed out during startup"
"""What Ray says when its node is not up in 30 s, which cannot be changed and which a busy machine may need."""
ANSWER_S = 5.0
"""How long a cluster that we have joined may take to say whether it asks for a token."""
STANDSTILLS = ("GetTimeoutError", "ExecutionTimeoutError")


@dataclass(frozen=True)
class Cluster:
    """What the cluster offers. `cpus` are logical; `cores` are those that heavy work may fill, one being left for the rest."""

    cpus: float
    gpus: float
    cores: int
    nodes: int
    local: bool
    free_cpus: float | None = None
    """CPUs that no job holds now; None where nobody asked."""
    shapes: tuple[tuple[float, float], ...] = ()
    """CPUs and GPUs of each node: a process must fit into one of them."""

    def room_for(self, cpus: float, gpus: float) -> int:
        """How many processes of this size the nodes can hold at once, were they empty."""
        shapes = self.shapes or ((self.cpus, self.gpus),)
        return sum(int(min(c / cpus, g / gpus if gpus else math.inf)) for c, g in shapes)


def connect(say: Callable[[str], None] = lambda _: None) -> Cluster:
    """Join or start Ray, with a warning where somebody else's asks for no token; safe to call again."""
    local = not joins_cluster()
    if not ray.is_initialized():
        _start_local() if local else _join(say)
    else:
        gc.collect()  # the error of an earlier job in this process keeps its actors alive in cycles, and with them their CPUs
    for name, level in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    return survey(local=local)


def joins_cluster() -> bool:
    """Whether somebody's cluster is to be joined, rather than a local Ray started."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def this_machine() -> Cluster:
    """What a local Ray would offer, without starting one."""
    cores, gpus = os.cpu_count() or 1, float(torch.cuda.device_count())
    cpus = float(cores + SPARE_CPUS)
    return Cluster(cpus, gpus, cores, 1, True, cpus, ((cpus, gpus),))


def survey(*, local: bool) -> Cluster:
    """What the cluster offers at this moment."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    cpus = total.get("CPU", 0.0)
    cores = min(os.cpu_count() or 1, int(cpus)) if local else int(cpus) - 1
    shapes = tuple((n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes)
    free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    return Cluster(cpus, total.get("GPU", 0.0), max(1, cores), len(nodes), local, free, shapes)


def _join(say: Callable[[str], None]) -> None:
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    address = ray.get_runtime_context().gcs_address
    if not asks_for_token(address):
        way = "start it with RAY_AUTH_MODE=token and a token"
        say(f"warning: the cluster at {address} asks for no token: whoever reaches it can run code on it; {way}")


def asks_for_token(address: str) -> bool:
    """Whether a cluster's books (GCS) turn away who comes without a token, or will not say whether they do."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        read = channel.unary_unary("/ray.rpc.InternalKVGcsService/GetInternalConfig")
        try:
            read(b"", timeout=ANSWER_S)
        except grpc.RpcError:  # refused; or it speaks TLS, whose certificates are a lock of their own
            return True
    return False


def _start_local() -> None:
    """Start Ray on this machine: quiet and small. Its token, and that it listens on loopback alone, are `environment.py`'s.

    Raises ClusterError where Ray does not come up.
    """
    for attempt in range(1, STARTS + 1):
        try:
            with _hushed_stderr():
                _init_local()
        except Exception as error:  # Ray raises a bare Exception when its node times out
            ray.shutdown()
            if attempt < STARTS and TOO_SLOW in str(error):
                continue
            said = one_line(str(error) or type(error).__name__)[:200]
            text = "a local Ray did not come up on this machine; it may be too busy, or short of memory or of room below /tmp"
            raise ClusterError(f"{text}. Ray says: {said}") from error
        else:
            return


def _init_local() -> None:
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
        hint = "Wait until its nodes have joined" if cluster.cpus < 1 else "Ask for fewer workers"
        raise PreflightError(f"{what} needs {needs}. {hint}.")


def require_room(cluster: Cluster, processes: int, *, cpus: float, gpus: float, what: str) -> None:
    """Raise PreflightError where processes of this size would not all find a node: the sum of all nodes is not enough."""
    room = cluster.room_for(cpus, gpus)
    if room < processes:
        size = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        text = f"{what} needs {size} each on one node; the {cluster.nodes} node(s) have room for {room} of them"
        raise PreflightError(f"{text}. Ask for fewer workers.")


def await_room(seconds: float) -> None:
    """Wait until one CPU of the cluster is free. Raises Ray's GetTimeoutError: Ray Data itself would wait without an end."""
    probe = ray.remote(num_cpus=1)(_is_here).remote()
    try:
        ray.get(probe, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(probe)
        raise


def _is_here() -> bool:
    return True


@contextmanager
def lifeline() -> Iterator[None]:
    """While inside: when this machine's Ray dies, say so in one line and end the process with exit code 1.

    Without its raylet a driver waits, or is ended by Ray's core without a word. A raylet keeps the connection of whoever
    knocks and says nothing; when it dies, the kernel closes it.
    """
    place = _raylet_socket()
    if place is None:
        yield
        return
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(place)
        leaving = Event()
        Thread(target=_wait_for_the_end, args=(line, leaving), daemon=True).start()
        try:
            yield
        finally:
            leaving.set()
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


def _raylet_socket() -> str | None:
    """Where the raylet of this process's node listens; None where that is no local socket."""
    me = ray.get_runtime_context().get_node_id()
    places = [str(n.get("RayletSocketName", "")) for n in ray.nodes() if n["NodeID"] == me]  # type: ignore[no-untyped-call]
    return places[0] if places and os.path.exists(places[0]) else None  # noqa: PTH110


def _wait_for_the_end(line: socket.socket, leaving: Event) -> None:
    with suppress(OSError):
        while line.recv(64):
            pass
    if not leaving.is_set():
        sys.stderr.write(last_words(ClusterError(f"Ray has died on this machine (its raylet is gone); {KEPT}")))
        sys.stderr.flush()
        os._exit(ExitCode.CRASH)


@contextmanager
def plain_words() -> Iterator[None]:
    """Translate what Ray raises: what our own code raised in a worker as itself, a death or a standstill as ClusterError.

    A fault of ours in a worker stays what it is, with its traceback.
    """
    try:
        yield
    except Exception as error:  # looked through for what caused it; what is not known is raised as it is
        known = next((e for e in _chain(error) if isinstance(e, BrainsegError)), None) or _quoted(error)
        if known is not None:
            raise known from None
        if type(error).__name__ in STANDSTILLS:
            text = "nothing has moved for too long: the cluster has no room for the job, or a process hangs"
            raise ClusterError(f"{text}; {KEPT}") from error
        if isinstance(error, DEATHS):
            text = f"Ray gave up ({type(error).__name__}): a process, a machine or its disk failed"
            raise ClusterError(f"{text}; {KEPT}") from error
        raise


def _quoted(error: BaseException) -> BrainsegError | None:
    """An error of ours that a worker raised while it started: of that one Ray keeps the words alone."""
    found = re.findall(r"^brainseg\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    kinds = {kind.__name__: kind for kind in (ClusterError, PreflightError, StorageError)}
    return next((kinds[name](words) for name, words in reversed(found) if name in kinds), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that led to it, also in the worker."""
    todo: list[Any] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [getattr(one, "cause", None), one.__cause__, one.__context__]
