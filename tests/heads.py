"""A Ray head for tests, as a cluster's owner would start one: a process of its own with a dashboard that takes jobs."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from brainseg.environment import FOR_A_NODE_OF_OUR_OWN

START_S = 180.0


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on; another Ray on this machine may hold the usual ones."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def ray_node(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node of a cluster, started as its owner would: `ray start` with these words. It is ended with all that it started."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=200000000", *words]
    ours = {"RAY_ADDRESS", "RAY_worker_niceness", *FOR_A_NODE_OF_OUR_OWN}
    plain = {k: v for k, v in os.environ.items() if k not in ours}
    env = {**plain, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # a job's `python` is this one
    started = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(timeout=60)


@contextlib.contextmanager
def ray_head(cpus: int = 4, gcs_port: int = 0) -> Iterator[str]:
    """A Ray head of its own, with a dashboard on a free port; gives the dashboard's address once it answers."""
    port, agent = free_ports(2)
    folder = tempfile.mkdtemp(prefix="bs")  # sockets below it must have short names
    words = ["--head", f"--port={gcs_port}", f"--num-cpus={cpus}", f"--temp-dir={folder}", "--include-dashboard=true"]
    try:
        with ray_node(*words, f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent}") as head:
            address = f"http://127.0.0.1:{port}"
            _await(address, head)
            yield address
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _await(address: str, head: subprocess.Popen[bytes]) -> None:
    """Until the dashboard answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert head.poll() is None, "the head ended"
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except urllib.error.HTTPError:  # it wants a token: it is there
            return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("the head does not answer")
