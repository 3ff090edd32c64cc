"""Submit: a spec becomes a job on a cluster that somebody runs, is found again, is followed through dropped connections."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import factory
import pytest
from heads import ray_head
from test_specs import PLACES, write_spec

from brainseg import submit
from brainseg.errors import ConfigError, ExitCode, PreflightError, UsageError
from brainseg.phantom import write_archive
from brainseg.specs import KINDS, read_spec

SPECS = {
    "train": {"manifest": "/a/m.parquet", "out": "/a/model", "workers": 2},
    "segment": PLACES,
    "report": {"runs": ["/a/run"]},
}


@pytest.mark.parametrize("kind", SPECS)
def test_the_kind_of_a_job_is_told_by_its_keys(tmp_path, kind):
    assert submit.kind_of(write_spec(tmp_path, **SPECS[kind])) == kind


def test_the_files_name_settles_what_its_keys_leave_open(tmp_path):
    (tmp_path / "train-x.yaml").write_text("runs: [/a/run]\n")
    with pytest.raises(ConfigError, match="manifest: Field required"):
        submit.kind_of(str(tmp_path / "train-x.yaml"))


def test_a_spec_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="say which with --job"):
        submit.kind_of(write_spec(tmp_path, nonsense=1))


def test_jobs_are_called_after_what_they_make(tmp_path):
    one = read_spec(KINDS["segment"], write_spec(tmp_path, **PLACES))
    same = read_spec(KINDS["segment"], write_spec(tmp_path, **PLACES, max_failures=5))
    other = read_spec(KINDS["segment"], write_spec(tmp_path, **{**PLACES, "out": "s3://bucket/other"}))
    assert submit.called("segment", one) == submit.called("segment", same) != submit.called("segment", other)
    assert re.fullmatch(r"brainseg-segment-[0-9a-f]{12}", submit.called("segment", one))


def test_only_code_and_the_spec_travel(tmp_path):
    spec = Path(write_spec(tmp_path, **PLACES))
    with submit.packed(spec) as folder:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.relative_to(folder).parts[0] for path in files} == {"brainseg", "spec.yaml"}
        assert not any("__pycache__" in path.parts for path in files)
        shipped = sum(path.stat().st_size for path in files if "models" in path.parts)
        assert sum(path.stat().st_size for path in files) - shipped < 4 << 20
        assert shipped < 16 << 20
    assert not folder.exists()


@pytest.mark.parametrize("address", ["head:8265", "ftp://head", "", "http://", "ray://head:10001"])
def test_an_address_that_is_no_dashboard_is_a_usage_error(address):
    with pytest.raises(UsageError, match="expected the dashboard's"):
        submit.connect(address)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UsageError) as caught:
        submit.connect("http://me:swordfish@head:8265")
    assert "swordfish" not in str(caught.value)


def test_a_cluster_that_is_not_there_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PreflightError, match="does not answer as a Ray dashboard") as caught:
        submit.connect(f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


class Doorman(BaseHTTPRequestHandler):
    """A dashboard that lets nobody in."""

    answer = 401

    def do_GET(self) -> None:
        self.send_response(self.answer)
        self.end_headers()
        self.wfile.write(b"Unauthorized: Missing authentication token" if self.answer == 401 else b"Forbidden: Invalid token")

    def log_message(self, *words: object) -> None:
        """Keep the test's output clean."""


@pytest.mark.parametrize("answer", [401, 403])
def test_without_the_token_or_with_another_one_a_line_says_what_to_set(monkeypatch, answer):
    monkeypatch.setattr(Doorman, "answer", answer)
    with ThreadingHTTPServer(("127.0.0.1", 0), Doorman) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(PreflightError, match="wants a token") as caught:
            submit.connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "\n" not in str(caught.value)


# ---- on a real head ------------------------------------------------------------------------------------------------------


class Cuts:
    """A relay before the dashboard that cuts every connection when it is told to, and for a while takes no new one."""

    def __init__(self, address: str) -> None:
        self._to = (urlsplit(address).hostname, urlsplit(address).port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.away = False
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Drop what is open, refuse what comes, and be back after so many seconds."""
        self.away = True
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()
        time.sleep(seconds)
        self.away = False

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self.away:
                client.close()
                continue
            server = socket.create_connection(self._to)
            self._open += [client, server]
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture(scope="module")
def head() -> Iterator[Cuts]:
    with ray_head() as address:
        yield Cuts(address)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A spec's words for a small archive with one broken scan, and a model that is not trained."""
    place = tmp_path_factory.mktemp("submit")
    write_archive(place / "archive", "lgg", scans=6, broken=1, shape=(2, 32, 32))
    factory.make_model(place / "model", factory.make_card(factory.tiny_config(modalities=("flair",))))
    return {"archive": str(place / "archive"), "model": str(place / "model"), "out": str(place / "run")}


@pytest.mark.slow
def test_a_job_is_followed_through_a_cut_and_its_exit_code_comes_home(tmp_path, head, keys):
    spec = write_spec(tmp_path, **keys)
    made = submit.submit(spec, head.address)
    assert made.is_new
    assert submit.submit(spec, head.address) == submit.Submission(made.id, is_new=False)
    with pytest.raises(UsageError, match="from another spec"):
        submit.submit(write_spec(tmp_path, **keys, max_failures=3), head.address)
    heard: list[str] = []
    said: list[str] = []
    threading.Timer(4, head.cut, args=(3,)).start()
    assert submit.follow(head.address, made.id, heard.append, said.append) == ExitCode.SOME_FAILED
    assert "".join(heard).count("5 of 6 scans segmented, 1 failed") == 1
    assert any("is gone; trying again" in line for line in said)
    assert (Path(keys["out"]) / "_SUCCESS.json").is_file()
    again = submit.submit(write_spec(tmp_path, **keys), head.address)
    assert again.is_new
    assert submit.follow(head.address, again.id, heard.append, said.append) == ExitCode.SOME_FAILED
    listed = {job["id"]: job for job in submit.listed(head.address)}
    assert {listed[one]["exit_code"] for one in (made.id, again.id)} == {ExitCode.SOME_FAILED}
    assert all(job["makes"] == keys["out"] for job in listed.values())


@pytest.mark.slow
def test_a_job_can_be_stopped_and_an_unknown_one_is_said(tmp_path, head, keys):
    made = submit.submit(write_spec(tmp_path, **{**keys, "out": f"{keys['out']}-2"}), head.address)
    submit.stop(head.address, made.id)
    said: list[str] = []
    assert submit.follow(head.address, made.id, lambda _: None, said.append) == ExitCode.CRASH
    assert any("was stopped" in line for line in said)
    with pytest.raises(UsageError, match="knows no job brainseg-nothing"):
        submit.follow(head.address, "brainseg-nothing", lambda _: None, said.append)
