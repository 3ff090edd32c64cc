"""Namespaces: several machines on this one, each with a network, an address and a host's name of its own.

A machine is a network namespace whose `eth0` hangs on a bridge; this process reaches it from the bridge's own address. Linux
and root are needed, `why_not` says what is missing. Whatever happens, nothing is left: processes, namespaces, the bridge.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NET = "198.18"
"""A range for tests of network devices (RFC 2544), which no real network uses."""
ENTER = """
echo "$0" >/proc/sys/kernel/hostname
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
shift
exec "$@"
"""
"""What makes a host of a namespace, whose mounts are its own: its name, the names it knows, and nobody to ask for others, since
asking somebody whom it cannot reach would take it ten seconds each time."""
GONE_S = 30.0


def why_not() -> str | None:
    """Why there can be no machines here; None where there can."""
    if missing := [name for name in ("ip", "mount", "ss", "unshare") if not shutil.which(name)]:
        return f"no {', '.join(missing)} here (iproute2, util-linux)"
    name = f"bs-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces are not allowed: {tried.stderr.strip()[:200]}"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Socket:
    """A TCP socket of a process: joined to the address of a peer, or, where that is None, listened on."""

    address: str
    port: int
    peer: str | None
    command: str


@dataclass
class Machine:
    """One namespace. What runs in it believes that it is on a host called `host`."""

    space: str
    host: str
    address: str
    outer: str
    """The end of its cable that hangs on the bridge."""
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def words(self, *words: str) -> list[str]:
        """A command as it must be called to run in here."""
        return [
            "ip",
            "netns",
            "exec",
            self.space,
            "unshare",
            "--uts",
            "sh",
            "-ec",
            ENTER,
            self.host,
            str(self.folder.parent),
            *words,
        ]

    def start(self, *words: str, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command in here, with all it says in a file."""
        with log.open("wb") as file:
            made = subprocess.Popen(self.words(*words), env=dict(environment), cwd=self.folder, stdout=file, stderr=file)
        self.started.append(made)
        return made

    def run(self, *words: str, environment: Mapping[str, str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command in here to its end."""
        command = self.words(*words)
        return subprocess.run(
            command, env=dict(environment), cwd=self.folder, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self) -> dict[int, str]:
        """Every process in here: its id and its command line."""
        found = {}
        for pid in map(int, _ip("netns", "pids", self.space).split()):
            with suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def listening(self) -> list[Socket]:
        """The TCP sockets on which somebody in here listens."""
        return [s for s in self._sockets() if s.peer is None]

    def connected(self) -> list[Socket]:
        """The TCP connections of those in here."""
        return [s for s in self._sockets() if s.peer is not None]

    def _sockets(self) -> Iterator[Socket]:
        commands = self.processes()
        for line in _ip("netns", "exec", self.space, "ss", "-Hatnp").splitlines():
            state, _, _, own, other, *who = line.split()
            found = re.search(r"pid=(\d+)", " ".join(who))
            command = commands.get(int(found[1]), "") if found else ""
            if state in ("LISTEN", "ESTAB"):
                address, port = own.rsplit(":", 1)
                yield Socket(
                    _plain(address), int(port), None if state == "LISTEN" else _plain(other.rsplit(":", 1)[0]), command
                )

    def pull_the_plug(self) -> None:
        """The machine dies: its cable first, so that no last word gets out, then every process at once."""
        _ip("link", "set", self.outer, "down")
        self.kill()

    def kill(self) -> None:
        """SIGKILL to everybody in here, and wait until all are gone."""
        deadline = time.monotonic() + GONE_S
        while pids := _ip("netns", "pids", self.space).split():
            assert time.monotonic() < deadline, self.processes()
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for one in self.started:
            one.wait(GONE_S)


def _plain(address: str) -> str:
    """An address as `ss` writes it, as others write it."""
    return "::" if address == "*" else address.strip("[]").partition("%")[0].removeprefix("::ffff:")


@dataclass
class Network:
    """A bridge, and the machines that hang on it."""

    name: str
    prefix: str
    folder: Path
    machines: list[Machine] = field(default_factory=list)

    @property
    def address(self) -> str:
        """This process's own, as the machines see it."""
        return f"{self.prefix}.1"

    def machine(self, host: str) -> Machine:
        """A machine more."""
        number = len(self.machines) + 1
        space, outer, address = f"{self.name}-{host}", f"{self.name}-{number}", f"{self.prefix}.{10 + number}"
        folder = self.folder / host
        folder.mkdir()
        with (self.folder / "hosts").open("a") as file:
            file.write(f"{address} {host}\n")
        _ip("netns", "add", space)
        made = Machine(space, host, address, outer, folder)
        self.machines.append(made)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outer, "master", self.name, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        _ip("-n", space, "route", "add", "default", "via", self.address)
        return made

    def clear_away(self) -> None:
        """End every process, then take the machines and the bridge away."""
        for machine in self.machines:
            machine.kill()
        for cable in json.loads(_ip("-json", "link", "show", "master", self.name)):
            _ip("link", "del", cable["ifname"])
        for machine in self.machines:
            _ip("netns", "del", machine.space)
        _ip("link", "del", self.name)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network without machines. Each machine has a folder below `folder`, which should have a short name."""
    _clear_after_the_dead()
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    (folder / "resolv.conf").touch()
    made = _first_free(folder)
    try:
        _ip("addr", "add", f"{made.address}/24", "dev", made.name)
        _ip("link", "set", made.name, "up")
        yield made
    finally:
        made.clear_away()


def _first_free(folder: Path) -> Network:
    """A bridge nobody else has: its name goes with its addresses, and there can be one of a name."""
    for number in range(256):
        with suppress(AssertionError):
            _ip("link", "add", f"bs-{number}", "type", "bridge")
            _ip("link", "set", f"bs-{number}", "alias", f"pid {os.getpid()}")
            return Network(f"bs-{number}", f"{NET}.{number}", folder)
    raise AssertionError("no bridge can be made")


def _clear_after_the_dead() -> None:
    """Take away what a test left that was killed before it could do so itself."""
    for link in json.loads(_ip("-json", "link", "show", "type", "bridge")):
        name, (kind, _, pid) = link["ifname"], link.get("ifalias", "").partition(" ")
        if name.startswith("bs-") and kind == "pid" and not Path(f"/proc/{pid}").exists():
            spaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{name}-")]
            Network(name, "", Path(), [Machine(space, "", "", "", Path()) for space in spaces]).clear_away()


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout
