"""Object stores for tests, all on loopback: moto behind real HTTP or HTTPS, a real OpenStack Swift, and stores that are dead.

moto answers at once and believes every signature; Swift verifies them, and costs a minute to install.
"""

import base64
import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import threading
import time
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.compat import HTTPHeaders
from heads import free_ports

from brainseg import storage
from brainseg.storage.attempts import PATIENT, client, forget_clients

BUCKET = "archive"
DAY = timedelta(days=1)


def s3() -> Any:
    """The client that brainseg itself uses now."""
    return client(os.getpid(), PATIENT)


def upload(folder: Path, uri: str) -> None:
    """Copy a folder into the store."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda p: storage.write_bytes(f"{uri}/{p.relative_to(folder).as_posix()}", p.read_bytes()), files))


@contextlib.contextmanager
def surroundings(endpoint: str | None, **variables: str) -> Iterator[None]:
    """An environment in which boto3 finds this endpoint, these variables, and nothing of this machine's own."""
    found = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    found |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent", "NO_PROXY": "127.0.0.1"}
    found |= {"AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", **({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})}
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (found | variables).items():
            patch.setenv(name, value) if value else patch.delenv(name, raising=False)
        forget_clients()
        yield
    forget_clients()


# ---- moto ------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A threaded server on a port of its own; `tls` makes it speak HTTPS with this certificate."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], tls: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no event."""


class Answer(BaseHTTPRequestHandler):
    """One connection of a client; whatever its method, `answer` deals with it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self) -> None:
        """Read what is left of the request and send an answer."""
        raise NotImplementedError

    def handle_expect_100(self) -> bool:
        """Ask for the body at once: the client waits a second for this line."""
        told = super().handle_expect_100()
        self.wfile.flush()
        return told

    def log_message(self, *words: object) -> None:
        """Keep the test's output clean."""


class MotoAnswer(Answer):
    """One connection to moto's S3, whose own server would need Flask. The digest of a body is verified, as stores do."""

    _one_at_a_time = threading.Lock()

    def answer(self) -> None:
        from moto.core.botocore_stubber import BotocoreStubber

        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = HTTPHeaders()
        for name, value in self.headers.items():
            headers[name] = value
        promised = self.headers.get("Content-MD5", "")
        if promised not in ("", base64.b64encode(hashlib.md5(body).digest()).decode()):
            return self._send(400, {}, b"<Error><Code>BadDigest</Code></Error>")
        url = f"https://s3.amazonaws.com{self.path}"
        with self._one_at_a_time:
            made = BotocoreStubber().process_request(AWSPreparedRequest(self.command, url, headers, body, False))
        assert made is not None
        status, told, data = made
        return self._send(status, told, data.encode() if isinstance(data, str) else data)

    def _send(self, status: int, told: Any, data: bytes) -> None:
        self.send_response(status)
        size = next((v for n, v in told.items() if n.lower() == "content-length" and self.command == "HEAD"), len(data))
        for name, value in told.items():
            if name.lower() not in ("content-length", "date", "server", "connection", "transfer-encoding"):
                self.send_header(name, str(value))
        if status not in (204, 304):
            self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)
        self.wfile.flush()


@contextlib.contextmanager
def moto_server(tls: Path | None = None) -> Iterator[str]:
    """An empty moto; returns its endpoint. It does one thing at a time, so no writer need wait for another to be done."""
    from moto.backends import get_backend

    get_backend("s3").reset()
    with pytest.MonkeyPatch.context() as patch, Server(MotoAnswer, tls) as server:
        patch.setattr("brainseg.storage.s3.SETTLE_S", 0.02)
        yield server.endpoint
    get_backend("s3").reset()


@contextlib.contextmanager
def moto_store() -> Iterator[str]:
    """An empty bucket of an empty moto, with the environment in which it is found; returns its uri."""
    with moto_server() as endpoint, surroundings(endpoint):
        s3().create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 and its key, as one PEM."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=127.0.0.1")
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem, pkcs8, bare = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "both.pem").write_bytes(signed + key.private_bytes(pem, pkcs8, bare))
    return folder / "both.pem"


# ---- Swift -----------------------------------------------------------------------------------------------------------

SWIFT_KEYS = {"AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing"}
SWIFT_VENV = "BRAINSEG_TEST_SWIFT"
"""Names a virtual environment in which Swift is installed already; without it one is made, which takes a minute."""

_COMMON = """[DEFAULT]
bind_ip = {host}
bind_port = {port}
swift_dir = {etc}
devices = {root}/node
mount_check = false
workers = 0
user = {user}
log_address = /dev/null
log_level = ERROR
fallocate_reserve = 0
disable_fallocate = true
"""
_SERVERS = ("account", "container", "object")
_RINGS = """
import sys
from swift.common.ring import RingBuilder

etc, *ports = sys.argv[1:]
for kind, port in zip(("account", "container", "object"), ports):
    ring = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    device = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1}
    ring.add_dev(device | {"replication_ip": "127.0.0.1", "replication_port": int(port)})
    ring.rebalance()
    ring.get_ring().save(f"{etc}/{kind}.ring.gz")
"""
_PIPELINE = "catch_errors proxy-logging cache listing_formats bulk s3api tempauth copy slo dlo versioned_writes proxy-server"
_FILTERS = {
    "tempauth": "user_test_tester = testing .admin\nuser_test_reader = reading",
    "s3api": "location = us-east-1\ncheck_bucket_owner = false\ns3_acl = false",
    "cache": "use = egg:swift#memcache\nmemcache_servers = 127.0.0.1:1",
    "slo": "min_segment_size = 1",
    "versioned_writes": "allow_versioned_writes = true",
    "proxy-logging": "use = egg:swift#proxy_logging",
}


class Swift:
    """A single-node Swift with its S3 interface at `host`, everything below one folder."""

    def __init__(self, binaries: Path, root: Path, host: str) -> None:
        self._binaries, self._root, self._host, self._started = binaries, root, host, list[subprocess.Popen[bytes]]()
        self._ports = free_ports(4)
        self.endpoint = f"http://{host}:{self._ports[3]}"

    def start(self) -> None:
        """Bring it up, with the bucket in it; skip where that fails."""
        etc = self._root / "etc"
        for folder in (etc, self._root / "node/d1"):
            folder.mkdir(parents=True)
        (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n")
        subprocess.run([self._binaries / "python", "-c", _RINGS, etc, *map(str, self._ports)], check=True)
        for kind, port in zip(_SERVERS, self._ports, strict=False):
            self._serve(kind, port, f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n")
        self._serve("proxy", self._ports[3], _proxy_sections())
        self._wait()

    def stop(self) -> None:
        """End what was started, however far that came."""
        for process in self._started:  # nothing of theirs is to be kept
            process.kill()
        for process in self._started:
            process.wait(10)

    def _serve(self, kind: str, port: int, sections: str) -> None:
        config = self._root / f"etc/{kind}-server.conf"
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        host = self._host if kind == "proxy" else "127.0.0.1"
        config.write_text(_COMMON.format(host=host, port=port, etc=config.parent, root=self._root, user=user) + sections)
        with (self._root / f"{kind}.log").open("wb") as log:
            command = [self._binaries / f"swift-{kind}-server", config]
            self._started.append(subprocess.Popen(command, stdout=log, stderr=log))

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), surroundings(self.endpoint, **SWIFT_KEYS):
                socket.create_connection((self._host, self._ports[3]), 1).close()
                with contextlib.suppress(Exception):
                    s3().create_bucket(Bucket=BUCKET)
                    return
            time.sleep(0.3)
        pytest.skip(f"Swift does not come up: {(self._root / 'proxy.log').read_text()[-300:]}")


def _proxy_sections() -> str:
    filters = ""
    for name in _PIPELINE.split()[:-1]:
        words = _FILTERS.get(name, "")
        filters += f"[filter:{name}]\n" + words + ("\n" if "use = " in words else f"\nuse = egg:swift#{name}\n")
    app = "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nallow_account_management = true\n"
    return f"[pipeline:main]\npipeline = {_PIPELINE}\n{app}{filters}"


@contextlib.contextmanager
def swift_server(root: Path, host: str = "127.0.0.1") -> Iterator[str]:
    """A fresh Swift with the bucket in it; returns its endpoint. Skips, with the reason, where it cannot be had."""
    place = Path(os.environ.get(SWIFT_VENV) or root / "venv")
    if not (place / "bin/swift-proxy-server").exists():
        try:
            venv.create(place, with_pip=True)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no virtual environment for Swift can be made: {error}")
        install = [place / "bin/pip", "install", "-q", "--disable-pip-version-check", "swift", "setuptools<81"]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Swift cannot be installed: {done.stderr.strip()[-300:]}")
    home = root / f"swift-{secrets.token_hex(4)}"
    swift = Swift(place / "bin", home, host)
    try:
        swift.start()
        yield swift.endpoint
    finally:
        swift.stop()
        shutil.rmtree(home, ignore_errors=True)


# ---- the dead --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_server(*, takes_connections: bool) -> Iterator[str]:
    """An endpoint that never answers: it takes connections and says nothing, or is a black hole to every new one."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16 if takes_connections else 0)
        for _ in range(0 if takes_connections else 3):  # the queue of a listener that never accepts is full at once
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def closed_port() -> str:
    """An endpoint at which nothing listens."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"
