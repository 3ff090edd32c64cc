"""Three nodes: a real cluster on this one machine trains on two nodes, loses one in mid-run, gains another, and loses no scan.

    pytest -n 0 -m slow -s tests/faults/test_three_nodes.py      as root, on Linux; some minutes, with a table of who did what

Each node is a network namespace with an address and a host's name of its own, started with the words of
cluster/on-premises.yaml. The archive lies in a Swift that all of them reach; what opens it stands in the nodes' environment.
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from cluster_files import documents
from faults.namespaces import Machine, Network, network, why_not
from object_stores import BUCKET, SWIFT_KEYS, surroundings, swift_server, upload
from test_cluster import table
from test_listening import is_loopback

from brainseg import manifest, runs, storage
from brainseg.errors import ExitCode
from brainseg.phantom import write_archive
from brainseg.session import asks_for_token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HOME = f"s3://{BUCKET}/nodes"
SCANS, BROKEN = 200, 3
TRAINING_SCANS = 16
SHAPE = (16, 64, 64)
RECIPE = ["epochs=2", "samples_per_epoch=64", "batch_size=8", "prepare.size=128", "network.widths=[24,48,96]"]
"""Large for what is learnt: half a second of a core for each scan, so that a run outlives the coming of a node."""
DONE_BEFORE = 40
"""Scans that have their row when the plug is pulled."""
START_S = 600.0
JOB_S = 1800.0
DASHBOARD = "http://127.0.0.1:8265"
ASK = """
import os, pathlib, sys, urllib.request
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + token})).read().decode())
"""
TRAINS = "ray::RayTrainWorker"


@dataclass
class Cluster:
    """A head without work and its workers. `environment` is what all nodes share."""

    net: Network
    environment: dict[str, str]
    nodes: dict[str, Machine] = field(default_factory=dict)

    @property
    def head(self) -> Machine:
        return self.nodes["head"]

    def join(self, host: str) -> Machine:
        """A machine more, with Ray on it as its owner would start it; once the cluster's books call it alive.

        Ray gives a start up after 30 s, which a busy machine may need; whoever keeps nodes up starts it again, as here.
        """
        made = self.nodes[host] = self.net.machine(host)
        deadline, node = time.monotonic() + START_S, None
        while made.address not in self.alive():
            assert time.monotonic() < deadline, self.log(host).read_text()[-2000:]
            if node is None or node.poll() is not None:
                made.kill()
                node = made.start(*self._ray_start(made), environment=self.environment, log=self.log(host))
            time.sleep(2)
        return made

    def _ray_start(self, machine: Machine) -> list[str]:
        """The words of cluster/on-premises.yaml, and what its Docker and its autoscaler would add."""
        kind = "head" if machine.host == "head" else "worker"
        words = shlex.split(documents("on-premises.yaml")[0][f"{kind}_start_ray_commands"][-1])
        assert words[:2] == ["ray", "start"]
        left_out = ("--autoscaling-config", "--object-spilling-directory")
        words = [w.replace("$RAY_HEAD_IP", self.head.address) for w in words[1:] if not w.startswith(left_out)]
        words += ["--block", f"--node-ip-address={machine.address}", f"--temp-dir={machine.folder}"]
        words += ["--object-store-memory=200000000", *([] if kind == "head" else ["--num-cpus=2"])]
        return [sys.executable, "-m", "ray.scripts.scripts", *words]

    def log(self, name: str) -> Path:
        return self.net.folder / f"{name}.log"

    def alive(self) -> set[str]:
        """Addresses of the nodes that the cluster's books call alive."""
        asked = self.head.run(sys.executable, "-c", ASK, f"{DASHBOARD}/nodes?view=summary", environment=self.environment)
        nodes = json.loads(asked.stdout)["data"]["summary"] if asked.returncode == 0 else []
        return {node.get("ip", "") for node in nodes if node["raylet"].get("state") == "ALIVE"}

    def brainseg(self, *words: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """The command, called where a tunnel to the head ends."""
        environment = {k: v for k, v in {**self.environment, **changes}.items() if v is not None}
        return self.head.run(sys.executable, "-m", "brainseg.cli", *words, environment=environment, timeout=JOB_S)

    def submit(self, name: str, **keys: object) -> subprocess.Popen[bytes]:
        """`brainseg submit` of a spec with these keys; what it says is in a file called after it."""
        spec = self.net.folder / f"{name}.yaml"
        spec.write_text(yaml.safe_dump(keys))
        words = ["-m", "brainseg.cli", "submit", str(spec), "--address", DASHBOARD]
        return self.head.start(sys.executable, *words, environment=self.environment, log=self.log(name))


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """An empty network; its folder has a short name, for Ray's sockets."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="n"))
    try:
        with network(folder) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(net: Network) -> Iterator[None]:
    """Swift, where all machines reach it, with two archives; this process and what it starts know the way."""
    with swift_server(net.folder, net.address) as endpoint, surroundings(endpoint, **SWIFT_KEYS, NO_PROXY="*"):
        write_archive(net.folder / "archive", "brats", scans=SCANS, broken=BROKEN, shape=SHAPE, seed=3)
        write_archive(net.folder / "training", "brats", scans=TRAINING_SCANS, shape=SHAPE, seed=4)
        for name in ("archive", "training"):
            upload(net.folder / name, f"{HOME}/{name}")
        manifest.write_manifest(f"{HOME}/training.parquet", manifest.index_archive(f"{HOME}/training")[0])
        yield


@pytest.fixture(scope="module")
def cluster(net: Network, store: None) -> Cluster:
    """A head and two workers, with one token for all."""
    token = net.folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    plain |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # a job's `python` is this one
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    made = Cluster(net, {**plain, **ray, "GLOO_SOCKET_IFNAME": "eth0"})
    for host in ("head", "w1", "w2"):
        made.join(host)
    return made


# ---- who listens, and who is let in ----------------------------------------------------------------------------------


def test_every_open_port_stands_in_the_readme_and_the_dashboard_is_on_loopback(cluster: Cluster) -> None:
    rows = [(first, last) for first, (last, _) in table().items()]
    for host, node in cluster.nodes.items():
        sockets = node.listening()
        assert sockets, host
        outside = {(s.port, s.command[:60]) for s in sockets if not is_loopback(s.address)}
        print(f"{host}: {sorted(port for port, _ in outside)}")
        assert [one for one in outside if not any(first <= one[0] <= last for first, last in rows)] == []
    assert {is_loopback(s.address) for s in cluster.head.listening() if s.port == 8265} == {True}


def test_nobody_is_let_in_without_the_token(cluster: Cluster) -> None:
    spec = cluster.net.folder / "segment-nothing.yaml"
    spec.write_text(yaml.safe_dump({"archive": HOME, "model": HOME, "out": HOME}))
    words = ("submit", str(spec), "--address", DASHBOARD)
    refused = cluster.brainseg(*words, RAY_AUTH_MODE=None, RAY_AUTH_TOKEN_PATH=None, HOME="/nonexistent")
    assert refused.returncode == ExitCode.USAGE, refused.stderr
    assert "wants a token" in refused.stderr
    assert asks_for_token(f"{cluster.head.address}:6379")
    for node in cluster.nodes.values():
        assert _status(f"http://{node.address}:52365/api/local_raylet_healthz") == 200
        assert _status(f"http://{node.address}:52365/log_agent") == 401


def _status(url: str) -> int:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


# ---- a training ------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """A model that was trained on the cluster, and what was seen of its workers meanwhile."""

    model: str
    trained_on: set[str]
    """Nodes on which a worker was seen."""
    exchanged: set[tuple[str, str]]
    """Addresses between which a connection of a worker stood."""
    seconds: float


@pytest.fixture(scope="module")
def training(cluster: Cluster) -> Training:
    model, started = f"{HOME}/model", time.monotonic()
    keys = {"manifest": f"{HOME}/training.parquet", "out": model, "preset": "demo", "set": RECIPE, "workers": 2}
    job = cluster.submit("train", **keys)
    seen, exchanged = set[str](), set[tuple[str, str]]()
    while job.poll() is None:
        for host, node in cluster.nodes.items():
            if any(TRAINS in command for command in node.processes().values()):
                seen.add(host)
                exchanged |= {(s.address, s.peer) for s in node.connected() if TRAINS in s.command and s.peer}
        time.sleep(0.5)
        assert time.monotonic() - started < JOB_S, cluster.log("train").read_text()
    assert job.returncode == ExitCode.OK, cluster.log("train").read_text()
    return Training(model, seen, exchanged, time.monotonic() - started)


def test_two_workers_train_on_two_nodes(cluster: Cluster, training: Training) -> None:
    log = storage.read_text(storage.join(training.model, "metrics.jsonl")).splitlines()
    print(f"trained on {sorted(training.trained_on)} in {training.seconds:.0f} s")
    assert [json.loads(line)["workers"] for line in log] == [2, 2]
    assert training.trained_on == {"w1", "w2"}
    one, other = (cluster.nodes[host].address for host in ("w1", "w2"))
    assert {(one, other), (other, one)} <= {
        (a.removeprefix("::ffff:"), b.removeprefix("::ffff:")) for a, b in training.exchanged
    }


# ---- a segmentation, and the death of a node -------------------------------------------------------------------------


def rows_of(run: str, parts: list[str]) -> list[dict[str, object]]:
    """The rows of these parts."""
    columns = ["scan_id", "status", "node", "finished_at"]
    return [row for part in parts for row in storage.read_table(part, columns).to_pylist()]


def by_node(rows: list[dict[str, object]]) -> dict[str, int]:
    return dict(Counter(str(row["node"]) for row in rows))


def test_a_node_dies_and_another_joins_and_every_scan_is_there_once(cluster: Cluster, training: Training) -> None:
    run, started = f"{HOME}/run", time.monotonic()
    keys = {"archive": f"{HOME}/archive", "model": training.model, "out": run, "set": ["flip=true"], "scans_per_part": 4}
    job = cluster.submit("segment", **keys)
    before: list[dict[str, object]] = []
    while len(before) < DONE_BEFORE or "w1" not in by_node(before):
        assert job.poll() is None, cluster.log("segment").read_text()
        before = rows_of(run, runs.parts(run))
        time.sleep(1)
    cluster.nodes["w1"].pull_the_plug()
    died = time.monotonic()
    cluster.join("w3")
    assert job.wait(JOB_S) == ExitCode.SOME_FAILED, cluster.log("segment").read_text()
    ended = time.monotonic()
    rows = rows_of(run, runs.parts(run))
    print(f"{len(before)} scans done by {by_node(before)} when w1 died, {died - started:.0f} s after submitting")
    print(f"{len(rows)} scans done by {by_node(rows)} {ended - died:.0f} s later")
    when = {row["scan_id"]: row["finished_at"] for row in rows}
    assert len(rows) == len(when) == SCANS
    assert Counter(row["status"] for row in rows) == {"ok": SCANS - BROKEN, "failed": BROKEN}
    assert [row["scan_id"] for row in before if when[row["scan_id"]] != row["finished_at"]] == []
    assert by_node(rows).keys() == {"w1", "w2", "w3"}
    assert not storage.is_dir(storage.join(run, "inflight"))
    verified = cluster.brainseg("verify", run)
    assert verified.returncode == ExitCode.OK, verified.stdout + verified.stderr
