"""Listening: what brainseg starts is reached from this machine alone and by nobody without the token; what is open is said."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent import futures
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from heads import free_ports, ray_head

from brainseg.environment import FOR_A_NODE_OF_OUR_OWN, ONE_MACHINE, prepare_environment
from brainseg.session import asks_for_token

ROOT = Path(__file__).parents[1]
ASKED = "/ray.rpc.InternalKVGcsService/GetInternalConfig"


def listening_below(pid):
    """(address, port, what) of every TCP socket on which this process or one below it listens."""
    import psutil  # comes with Ray

    me = psutil.Process(pid)
    for process in [me, *me.children(recursive=True)]:
        try:
            found = process.net_connections(kind="tcp")
        except psutil.Error:  # it has just ended
            continue
        yield from ((c.laddr.ip, c.laddr.port, process.name()) for c in found if c.status == psutil.CONN_LISTEN)


def is_loopback(address):
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_a_ray_that_brainseg_starts_listens_on_loopback_alone(local_ray):
    import ray

    @ray.remote(num_cpus=1)
    def started():
        return os.getpid()

    assert ray.get(started.remote(), timeout=120) != os.getpid()
    assert os.environ[ONE_MACHINE] == "0"
    sockets = list(listening_below(os.getpid()))
    assert len({what for *_, what in sockets}) >= 3, "the head's books, its node, a worker"
    assert [s for s in sockets if not is_loopback(s[0])] == []
    assert "127.0.0.1 alone" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("joined_by", ["word", "RAY_ADDRESS", "RAY_JOB_ID"])
def test_what_a_node_of_our_own_finds_is_not_found_where_somebody_elses_is_joined(monkeypatch, joined_by):
    for name in (*FOR_A_NODE_OF_OUR_OWN, "RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    prepare_environment()
    assert FOR_A_NODE_OF_OUR_OWN.items() <= os.environ.items()
    if joined_by != "word":
        monkeypatch.setenv(joined_by, "somewhere")
    prepare_environment(joins=joined_by == "word")
    assert not FOR_A_NODE_OF_OUR_OWN.keys() & os.environ.keys()


def test_a_socket_on_every_network_would_be_seen():
    import socket

    with socket.create_server(("0.0.0.0", 0)) as server:
        found = list(listening_below(os.getpid()))
        assert server.getsockname()[1] in {port for address, port, _ in found if not is_loopback(address)}


class Books(grpc.GenericRpcHandler):
    """A cluster's books as far as they are asked: open, or with a lock that wants a token."""

    def __init__(self, token):
        self.token = token

    def service(self, details):
        told = dict(details.invocation_metadata)

        def answer(_, context):
            if self.token and told.get("authorization") != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token is missing")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer) if details.method == ASKED else None


@pytest.mark.parametrize(("token", "asks"), [("", False), ("0123", True)])
def test_whether_a_cluster_asks_for_a_token_is_tried_without_one(token, asks):
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Books(token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert asks_for_token(f"127.0.0.1:{port}") is asks
    finally:
        server.stop(None).wait()


def test_where_nobody_answers_nothing_is_claimed():
    assert asks_for_token(f"127.0.0.1:{free_ports(1)[0]}") is True


# ---- a head as a cluster's owner starts it -----------------------------------------------------------------------------


def status(url, token=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def joined(gcs):
    """What brainseg says when it joins this cluster."""
    code = "import brainseg.environment as e; e.prepare_environment()\nfrom brainseg.session import connect; connect(print)"
    environment = {**os.environ, "RAY_ADDRESS": gcs}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_head_with_a_token_is_shut_to_whoever_has_none_and_works_for_whoever_has_it():
    (port,) = free_ports(1)
    with ray_head(gcs_port=port) as address:
        token = os.environ["RAY_AUTH_TOKEN"]
        for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
            assert status(address + path) == 401
            assert status(address + path, "0" * len(token)) == 403
            assert status(address + path, token) == 200
        assert asks_for_token(f"127.0.0.1:{port}") is True
        assert joined(f"127.0.0.1:{port}") == []


@pytest.mark.slow
def test_joining_a_head_that_asks_for_nothing_is_a_warning_of_one_line(monkeypatch):
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_head(gcs_port=port) as address:
        assert status(f"{address}/api/jobs/") == 200
        said = joined(f"127.0.0.1:{port}")
    assert len(said) == 1
    assert said[0].startswith("warning: the cluster at ")
    assert "asks for no token" in said[0]
