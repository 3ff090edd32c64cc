"""Preflight: each mistake about a place is one clear line within 10 s, before any work is done."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, faulty_store, some
from object_stores import BUCKET, SWIFT_KEYS, closed_port, silent_server, surroundings

from brainseg import commands, storage
from brainseg.config import How
from brainseg.console import Voice
from brainseg.errors import ExitCode, PreflightError
from brainseg.presets import preset
from brainseg.storage.attempts import forget_clients

AT = f"s3://{BUCKET}"
LIMIT_S = 10.0


@pytest.fixture(scope="module")
def store() -> Iterator[FaultProxy]:
    """moto behind a proxy that refuses to change anything below `closed/`; an object lies at `folder/x`."""
    with faulty_store() as proxy:
        storage.write_bytes(f"{AT}/folder/x", b"")
        proxy.choose = lambda _, asked: "forbid" if asked.method == "PUT" and "/closed/" in asked.path else None
        yield proxy


def refused(act: Callable[[], object], says: str) -> str:
    """The line with which something is refused in time; it is one line, has what is expected, and shows no key."""
    started = time.monotonic()
    with pytest.raises(PreflightError, match=says) as caught:
        act()
    elapsed_s, line = time.monotonic() - started, str(caught.value)
    print(f"\n{elapsed_s:.1f} s: {line}")
    assert elapsed_s < LIMIT_S
    assert "\n" not in line
    assert "secret" not in line.replace("AWS_SECRET", "").replace("secret key", "")
    assert caught.value.exit_code == ExitCode.USAGE
    return line


class TestMistakes:
    def test_a_wrong_bucket(self, store: FaultProxy) -> None:
        refused(lambda: storage.check_readable("s3://no-such-bucket/x"), "no such bucket")
        refused(lambda: storage.check_writable("s3://no-such-bucket/run"), "no such bucket")

    def test_a_wrong_key(self, store: FaultProxy) -> None:
        refused(lambda: storage.check_readable(f"{AT}/folder/y"), f"{AT}/folder/y: there is no such object")
        storage.check_readable(f"{AT}/folder/x")
        storage.check_readable(f"{AT}/folder")

    def test_a_prefix_that_may_not_be_written(self, store: FaultProxy) -> None:
        refused(lambda: storage.check_writable(f"{AT}/closed/run"), f"{AT}/closed/run: .* refuses access")
        storage.check_writable(f"{AT}/open/run")

    def test_no_credentials(self, store: FaultProxy) -> None:
        with surroundings(store.endpoint, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""):
            refused(lambda: storage.check_readable(f"{AT}/folder"), "no credentials were found")

    def test_a_profile_that_is_not_there(self, store: FaultProxy) -> None:
        with surroundings(store.endpoint, AWS_PROFILE="hospital"):
            refused(lambda: storage.check_readable(f"{AT}/folder"), r"profile \(hospital\) could not be found")

    @pytest.mark.parametrize("act", [storage.check_readable, storage.check_writable])
    def test_an_endpoint_at_which_nothing_listens(self, act: Callable[[str], None]) -> None:
        endpoint = closed_port()
        with surroundings(endpoint):
            refused(lambda: act(f"{AT}/x"), f"nothing answers at {endpoint}.*AWS_ENDPOINT_URL")

    def test_a_store_of_which_every_third_answer_is_spoilt_is_no_mistake(
        self, store: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store, "choose", some(0.35, seed=3))
        for _ in range(25):
            storage.check_readable(f"{AT}/folder/x")
            storage.check_writable(f"{AT}/open/run")
        assert sum(store.count.faults.values()) > 25

    def test_credentials_in_a_place_are_refused_and_not_repeated(self, store: FaultProxy) -> None:
        line = refused(lambda: storage.check_readable("s3://user:swordfish@archive/x"), "a place cannot carry credentials")
        assert "swordfish" not in line

    def test_an_endpoint_that_is_a_black_hole(self) -> None:
        with silent_server(takes_connections=False) as endpoint, surroundings(endpoint):
            refused(lambda: storage.check_readable(f"{AT}/x"), f"nothing answers at {endpoint}")

    @pytest.mark.slow
    def test_an_endpoint_that_never_answers(self) -> None:
        with silent_server(takes_connections=True) as endpoint, surroundings(endpoint):
            refused(lambda: storage.check_readable(f"{AT}/x"), f"{endpoint} takes connections and does not answer")

    def test_an_endpoint_that_is_no_address(self) -> None:
        with surroundings("no address"):
            refused(lambda: storage.check_readable(f"{AT}/x"), "Invalid endpoint")

    @pytest.mark.slow
    @pytest.mark.parametrize(("key", "secret"), [("test:nobody", "testing"), ("test:tester", "x")])
    def test_a_wrong_key_pair(self, swift: str, key: str, secret: str) -> None:
        with surroundings(swift, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret):
            refused(lambda: storage.check_readable(f"{AT}/x"), "rejects the signature: the secret key is wrong")

    @pytest.mark.slow
    def test_a_right_key_pair(self, swift: str) -> None:
        with surroundings(swift, **SWIFT_KEYS):
            storage.check_writable(f"{AT}/run")

    def test_a_disk_that_will_not(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        refused(lambda: storage.check_readable(f"{tmp_path}/absent"), "no such folder or file")
        refused(lambda: storage.check_writable(f"{tmp_path}/file/run"), "could not write")
        refused(lambda: storage.check_writable("/proc/brainseg/run"), "could not write")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_a_mount_that_is_dead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage, "PREFLIGHT_S", 0.3)
        before = set(threading.enumerate())
        with silent_server(takes_connections=True) as endpoint, surroundings(endpoint):
            refused(lambda: storage.check_readable(f"{AT}/x"), "no answer within")
        for given_up in set(threading.enumerate()) - before:  # on a busy machine it has yet to make its client,
            given_up.join(30)  # which the tests after this one would then find: one of an endpoint that is gone
        forget_clients()


QUIET = Voice(quiet=True, as_json=False)
TRY = {
    "index": lambda source, out: commands.index(source, f"{out}/m.parquet", QUIET),
    "train": lambda source, out: commands.train(source, out, preset("demo"), QUIET),
    "cross_validate": lambda source, out: commands.cross_validate(source, out, preset("demo"), QUIET),
    "segment": lambda source, out: commands.segment(source, source, out, QUIET, How()),
    "dry_run": lambda source, out: commands.segment(source, source, out, QUIET, How(dry_run=True)),
    "report": lambda source, out: commands.report([source], f"{out}/report.html", QUIET),
    "export": lambda source, out: commands.export(source, out, "nifti", QUIET),
}


class TestEveryCommand:
    @pytest.mark.parametrize("word", TRY)
    def test_refuses_what_it_cannot_read_or_write_before_it_does_anything(self, store: FaultProxy, word: str) -> None:
        before = [entry.uri for entry in storage.list_files(AT)]
        refused(lambda: TRY[word](f"{AT}/folder/y", f"{AT}/open"), "there is no such object")
        refused(lambda: TRY[word](f"{AT}/folder/x", f"{AT}/closed/run"), "refuses access")
        refused(lambda: TRY[word](f"{AT}/folder/x", "s3://no-such-bucket/run"), "no such bucket")
        assert [entry.uri for entry in storage.list_files(AT)] == before

    @pytest.mark.parametrize("word", ["train", "segment"])
    def test_does_not_wait_for_an_endpoint_that_is_dead(self, word: str) -> None:
        with ExitStack() as stack:
            stack.enter_context(surroundings(closed_port()))
            refused(lambda: TRY[word](f"{AT}/folder/x", f"{AT}/open"), "nothing answers")
