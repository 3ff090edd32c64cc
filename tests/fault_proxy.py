"""A proxy before an object store that commits faults, each request's drawn from a seed. It keeps count of what it did.

refuse          503 before the store hears of it          refuse_late     503 after the store has done it
reset           the connection is reset before            reset_late      and after the store has done it
reset_in_body   in the middle of the answer's body        short_body      the body ends early, its length promised in full
lying_length    a shorter body, and a length to match     flip            one byte of an object's body is another
flip_upload     one byte of what is put is another        delay           the answer comes late
"""

import contextlib
import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from object_stores import BUCKET, Answer, Server, moto_server, s3, surroundings

EVERYWHERE = ("refuse", "refuse_late", "reset", "reset_late", "delay")
WITH_BODY = ("reset_in_body", "short_body", "lying_length")
DELAY_S = 0.1
BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
FORBIDDEN = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class Request:
    """What a choice of fault goes by."""

    method: str
    path: str

    @property
    def is_object(self) -> bool:
        """Whether a key is named, rather than a bucket alone."""
        return "/" in urlsplit(self.path).path.strip("/")

    def faults(self) -> tuple[str, ...]:
        """The faults that can be told apart from an answer: a listing over plain HTTP has nothing to tell a flipped byte by."""
        if self.method == "GET":
            return (*EVERYWHERE, *WITH_BODY, *(("flip",) if self.is_object else ()))
        return (*EVERYWHERE, "flip_upload") if self.method == "PUT" else EVERYWHERE


Choose = Callable[[int, Request], str | None]


def some(share: float, seed: int) -> Choose:
    """A fault, of any kind that fits, for this share of the requests."""

    def choose(number: int, request: Request) -> str | None:
        dice = random.Random(f"{seed} {number}")
        return dice.choice(request.faults()) if dice.random() < share else None

    return choose


def only(fault: str, *, method: str = "", times: int = 1) -> Choose:
    """This fault for the first requests of a method; `times` of them."""
    left = [times]

    def choose(number: int, request: Request) -> str | None:
        if left[0] == 0 or (method and request.method != method):
            return None
        left[0] -= 1
        return fault

    return choose


@dataclass
class Count:
    """What came through."""

    requests: int = 0
    bytes_down: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    log: list[tuple[str, str]] = field(default_factory=list)


class FaultProxy(Server):
    """Start it with `with`; `endpoint` is where the client goes. `choose` and `count` may be replaced at any time."""

    def __init__(self, upstream: str, choose: Choose = lambda number, request: None) -> None:
        super().__init__(Relay)
        self.upstream, self.choose, self.count, self.lock = urlsplit(upstream).netloc, choose, Count(), threading.Lock()

    def draw(self, request: Request) -> str | None:
        """Count a request and choose its fault."""
        with self.lock:
            self.count.requests += 1
            self.count.log.append((request.method, request.path))
            fault = self.choose(self.count.requests, request)
            if fault:
                self.count.faults[fault] += 1
            return fault

    def spare(self, fault: str | None) -> None:
        """Take back a fault of a body where there is none."""
        if fault in (*WITH_BODY, "flip"):
            with self.lock:
                self.count.faults[fault] -= 1


class Relay(Answer):
    """One connection of a client."""

    server: FaultProxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.draw(Request(self.command, self.path))
        if fault == "reset":
            return self._reset()
        if fault in ("refuse", "forbid"):
            return self._send(*((503, BUSY) if fault == "refuse" else (403, FORBIDDEN)))
        if fault == "delay":
            time.sleep(DELAY_S)
        status, headers, data = self._ask(flipped(body) if fault == "flip_upload" else body)
        if fault == "reset_late":
            return self._reset()
        if fault == "refuse_late":
            return self._send(503, BUSY)
        if status >= 300 or not data:
            fault = self.server.spare(fault)
        return self._send(status, flipped(data) if fault == "flip" else data, headers, fault)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        line = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            line.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    line.putheader(name, value)
            line.putheader("Connection", "close")
            line.endheaders(body)
            answer = line.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            line.close()

    def _send(self, status: int, data: bytes, headers: list[tuple[str, str]] | None = None, fault: str | None = None) -> None:
        told = {name.lower(): value for name, value in headers or ()}
        half = data[: len(data) // 2]
        sent = half if fault in WITH_BODY else data
        promised = len(half) if fault == "lying_length" else len(data)
        stored = told.pop("content-length", "0")
        self.send_response(status)
        for name, value in told.items():
            if name not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", stored if self.command == "HEAD" else str(promised))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else sent)
        self.wfile.flush()
        with self.server.lock:
            self.server.count.bytes_down += len(sent)
        if fault in ("reset_in_body", "short_body"):
            self.close_connection = True
        if fault == "reset_in_body":
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        os.close(self.connection.detach())


def flipped(data: bytes) -> bytes:
    """The data with one bit of its middle byte turned."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


@contextlib.contextmanager
def faulty_store(upstream: str | None = None, **variables: str) -> Iterator[FaultProxy]:
    """A proxy before an empty bucket of moto, or before another store, with the environment in which it is found."""
    with contextlib.ExitStack() as stack:
        endpoint = upstream or stack.enter_context(moto_server())
        proxy = stack.enter_context(FaultProxy(endpoint))
        stack.enter_context(surroundings(proxy.endpoint, **variables))
        if upstream is None:
            s3().create_bucket(Bucket=BUCKET)
        yield proxy
