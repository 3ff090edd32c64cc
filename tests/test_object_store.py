"""Object store: what S3 has beside the laws of every storage: pages, odd keys, ranges, retries, HTTPS."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy, faulty_store, only
from hypothesis import given, settings
from hypothesis import strategies as st
from object_stores import (
    BUCKET,
    SWIFT_KEYS,
    Answer,
    Server,
    certificate,
    closed_port,
    moto_server,
    moto_store,
    s3,
    surroundings,
)

from brainseg import storage
from brainseg.errors import Code, StorageError
from brainseg.storage import s3 as s3_store
from brainseg.storage.attempts import Patience
from brainseg.storage.ranges import RangedFile, coalesced
from brainseg.storage.s3 import ObjectStore

AT = f"s3://{BUCKET}"


@pytest.fixture(scope="class", params=["moto", pytest.param("swift", marks=pytest.mark.slow)])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """A bucket on each kind of object store."""
    if request.param == "moto":
        with moto_store() as uri:
            yield uri
    else:
        with surroundings(request.getfixturevalue("swift"), **SWIFT_KEYS):
            yield AT


@pytest.fixture(scope="class")
def store() -> Iterator[FaultProxy]:
    """The proxy before an empty bucket of moto."""
    with faulty_store() as proxy:
        yield proxy


@pytest.fixture
def proxy(store: FaultProxy) -> Iterator[FaultProxy]:
    """The same, innocent before and after the test."""
    yield store
    store.choose = lambda number, request: None
    storage.delete_tree(AT)


def names(root: str) -> list[str]:
    return [entry.uri.removeprefix(root + "/") for entry in storage.list_files(root)]


class TestObjectStore:
    def test_lists_past_the_first_page(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_store, "KEYS_A_PAGE", 4)
        wanted = [f"{n:02d}" for n in range(11)]
        for name in wanted:
            storage.write_bytes(f"{bucket}/p/{name}", b"")
        assert names(f"{bucket}/p") == wanted

    def test_folder_markers_are_folders(self, bucket: str) -> None:
        s3().put_object(Bucket=BUCKET, Key="m/")
        storage.write_bytes(f"{bucket}/m/x", b"")
        assert names(f"{bucket}/m") == ["x"]
        storage.delete_tree(f"{bucket}/m")
        assert not storage.is_dir(f"{bucket}/m")

    @pytest.mark.parametrize(
        "act", [storage.read_bytes, lambda uri: list(storage.list_files(uri)), lambda uri: storage.write_bytes(uri, b"")]
    )
    def test_a_missing_bucket_is_named_as_such(self, bucket: str, act: Callable[[str], object]) -> None:
        with pytest.raises(StorageError, match="no such bucket"):
            act("s3://no-such-bucket/x")

    def test_keys_that_no_disk_could_hold_break_nothing(self, bucket: str) -> None:
        fine, odd = ["b/c", "new\nline", "tab\t", "plus+ and %41", "x" * 800], ["a/../../b", "a//b", "./a"]
        for name in fine + odd:
            storage.write_bytes(f"{bucket}/odd/{name}", name.encode())
        found = {e.uri.removeprefix(f"{bucket}/odd/"): e.problem for e in storage.list_files(f"{bucket}/odd")}
        assert found == dict.fromkeys(fine) | dict.fromkeys(odd, Code.BAD_ID)
        assert all(storage.read_bytes(f"{bucket}/odd/{name}") == name.encode() for name in fine + odd)
        storage.delete_tree(f"{bucket}/odd")
        assert names(f"{bucket}/odd") == []

    def test_an_upload_that_nobody_ended_is_a_leftover(self, bucket: str) -> None:
        keys = ["run/ray/a b", "run10/other"]
        for key in keys:
            s3().create_multipart_upload(Bucket=BUCKET, Key=key)
        (found,) = storage.leftovers(f"{bucket}/run", min_age_s=-60)
        assert (found.uri, found.kind) == (f"{bucket}/run/ray/a b", "upload")
        for _ in range(2):
            storage.remove_leftover(found)
        assert [e.uri for e in storage.leftovers(bucket, min_age_s=-60)] == [f"{bucket}/run10/other"]

    def test_an_object_uploaded_in_pieces_is_read(self, bucket: str) -> None:
        pieces = [bytes([n]) * (5 << 20) for n in range(2)]
        upload = {"Bucket": BUCKET, "Key": "pieces"}
        upload["UploadId"] = s3().create_multipart_upload(**upload)["UploadId"]
        tags = [s3().upload_part(**upload, PartNumber=n + 1, Body=p)["ETag"] for n, p in enumerate(pieces)]
        parts = [{"ETag": tag, "PartNumber": n + 1} for n, tag in enumerate(tags)]
        s3().complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        assert storage.read_bytes(f"{bucket}/pieces") == b"".join(pieces)

    def test_what_no_put_can_hold_is_refused_before_it_is_sent(self, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_store, "MOST_BYTES", 10)
        storage.write_bytes(f"{bucket}/large", b"x" * 10)
        with pytest.raises(StorageError, match="11 bytes; the most for one object is 10"):
            storage.write_bytes(f"{bucket}/large", b"x" * 11)


class Endless(Answer):
    """A store of 100,000 keys, a thousand a page."""

    def answer(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        first = int(asked.get("continuation-token", ["0"])[0])
        facts = "<LastModified>2026-01-01T00:00:00Z</LastModified><ETag>e</ETag><Size>1</Size>"
        items = "".join(f"<Contents><Key>run/{n:06d}</Key>{facts}</Contents>" for n in range(first, first + 1000))
        more = first + 1000 < 100_000
        token = f"<NextContinuationToken>{first + 1000}</NextContinuationToken><IsTruncated>true</IsTruncated>"
        page = f"<ListBucketResult><KeyCount>1000</KeyCount>{items}{token if more else ''}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
        self.wfile.flush()


@pytest.mark.slow
def test_a_hundred_thousand_keys_stream_through_little_memory() -> None:
    with Server(Endless) as server, surroundings(server.endpoint):
        next(storage.list_files(f"{AT}/run"))
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        listed = sum(entry.size_bytes for entry in storage.list_files(f"{AT}/run"))
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"\n{listed} keys in {time.monotonic() - started:.1f} s, {grown_mb:.0f} MB")
    assert listed == 100_000
    assert grown_mb < 50


class TestColumns:
    """What of a table travels when some columns are asked for."""

    def test_a_small_column_costs_a_small_share_of_a_part(self, proxy: FaultProxy) -> None:
        masks = pa.array([os.urandom(100_000) for _ in range(32)], pa.large_binary())
        part = pa.table({"scan_id": [f"s{n}" for n in range(32)], "mask": masks, "status": ["ok"] * 32})
        storage.write_table(f"{AT}/part.parquet", part)
        size_bytes = next(storage.list_files(AT)).size_bytes
        requests, down = proxy.count.requests, proxy.count.bytes_down
        assert storage.read_table(f"{AT}/part.parquet", ["scan_id"]).equals(part.select(["scan_id"]))
        requests, down = proxy.count.requests - requests, proxy.count.bytes_down - down
        print(f"\nscan_id of a part of {size_bytes} bytes: {requests} requests, {down} bytes")
        assert requests == 4  # the tail and the column; over plain HTTP each twice
        assert down < size_bytes / 20

    def test_a_table_of_many_row_groups_and_a_long_footer_is_read(self, proxy: FaultProxy) -> None:
        many = pa.table({f"column {n}": [f"{n} {row}" for row in range(60)] for n in range(60)})
        storage.write_table(f"{AT}/t", many, row_group_rows=2)
        before = proxy.count.requests
        assert storage.read_table(f"{AT}/t", ["column 7", "column 41"]).equals(many.select(["column 7", "column 41"]))
        assert proxy.count.requests - before < 20

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 90))), st.integers(0, 40))
    def test_joined_ranges_cover_the_asked_for_and_lie_apart(self, asked: list[tuple[int, int]], gap: int) -> None:
        ranges = [(start, start + length) for start, length in asked]
        joined = coalesced(ranges, gap)
        assert all(any(s <= start and end <= e for s, e in joined) for start, end in ranges)
        assert all(first[1] + gap < second[0] for first, second in pairwise(joined))

    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=200), st.integers(0, 50), st.lists(st.tuples(st.integers(0, 220), st.integers(-1, 220))))
    def test_a_ranged_file_reads_as_a_file_does(self, data: bytes, tail: int, reads: list[tuple[int, int]]) -> None:
        ranged = RangedFile(len(data), lambda start, end: data[start:end], data[len(data) - min(tail, len(data)) :])
        for at, size in reads:
            ranged.seek(at)
            assert ranged.read(size) == (data[at:] if size < 0 else data[at : at + size])


BODY = bytes(range(256)) * 40
READ_FAULTS = ["refuse", "refuse_late", "reset", "reset_late", "reset_in_body", "short_body", "lying_length", "flip"]
WRITE_FAULTS = ["refuse", "refuse_late", "reset", "reset_late", "flip_upload"]
SHORT = Patience(deadline_s=1.5, connect_s=0.3, read_s=0.3)


class TestRetries:
    @pytest.mark.parametrize("fault", READ_FAULTS)
    def test_a_read_outlives(self, proxy: FaultProxy, fault: str) -> None:
        storage.write_bytes(f"{AT}/x", BODY)
        proxy.choose, before = only(fault, times=2), proxy.count.requests
        assert storage.read_bytes(f"{AT}/x") == BODY
        assert proxy.count.requests - before == 3

    @pytest.mark.parametrize("fault", READ_FAULTS)
    def test_a_read_of_columns_outlives(self, proxy: FaultProxy, fault: str) -> None:
        part = pa.table({"scan_id": [f"s{n}" for n in range(50)], "mask": [os.urandom(9000) for _ in range(50)]})
        storage.write_table(f"{AT}/t", part)
        proxy.choose = only(fault, times=3)
        assert storage.read_table(f"{AT}/t", ["scan_id"]).equals(part.select(["scan_id"]))

    @pytest.mark.parametrize("fault", WRITE_FAULTS)
    def test_a_write_outlives(self, proxy: FaultProxy, fault: str) -> None:
        storage.write_bytes(f"{AT}/x", b"old")
        proxy.choose = only(fault, method="PUT", times=2)
        storage.write_bytes(f"{AT}/x", BODY)
        assert storage.read_bytes(f"{AT}/x") == BODY

    def test_what_has_arrived_though_its_answer_was_lost_is_not_put_again(self, proxy: FaultProxy) -> None:
        proxy.choose, before = only("reset_late"), len(proxy.count.log)
        storage.write_bytes(f"{AT}/x", BODY)
        assert "".join(method[0] for method, _ in proxy.count.log[before:]) in ("PH", "PHH")

    @pytest.mark.parametrize("fault", WRITE_FAULTS)
    def test_who_has_created_an_object_knows_it_though_the_answer_was_lost(self, proxy: FaultProxy, fault: str) -> None:
        proxy.choose = only(fault, method="PUT")
        assert storage.create_bytes(f"{AT}/x", b"mine")
        assert storage.read_bytes(f"{AT}/x") == b"mine"
        proxy.choose = only(fault)
        assert not storage.create_bytes(f"{AT}/x", b"another's")
        assert storage.read_bytes(f"{AT}/x") == b"mine"

    @pytest.mark.parametrize("fault", [None, *WRITE_FAULTS])
    def test_a_creation_without_rivals_waits_for_nobody(
        self, proxy: FaultProxy, fault: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Elsewhere than on AWS the others that may be at it are given a second; only an answer that was lost still asks."""
        waited: list[float] = []
        monkeypatch.setattr("brainseg.storage.s3.sleep", waited.append)
        if fault:
            proxy.choose = only(fault, method="PUT")
        assert storage.create_bytes(f"{AT}/x", b"mine", rivals=False)
        assert bool(waited) <= bool(fault)
        assert not storage.create_bytes(f"{AT}/x", b"mine again", rivals=False)
        assert storage.read_bytes(f"{AT}/x") == b"mine"
        assert storage.create_bytes(f"{AT}/y", b"mine")
        assert waited

    @pytest.mark.parametrize("fault", READ_FAULTS[:-1])
    def test_a_listing_and_a_deletion_outlive(self, proxy: FaultProxy, fault: str) -> None:
        for name in "abc":
            storage.write_bytes(f"{AT}/run/{name}", b"")
        proxy.choose = only(fault)
        assert names(f"{AT}/run") == ["a", "b", "c"]
        proxy.choose = only(fault, method="POST" if "body" not in fault and "length" not in fault else "GET")
        storage.delete_tree(f"{AT}/run")
        assert names(f"{AT}/run") == []

    def test_a_refusal_is_not_asked_again(self, proxy: FaultProxy) -> None:
        proxy.choose, before = only("forbid", times=9), proxy.count.requests
        with pytest.raises(StorageError, match="refuses access"):
            storage.read_bytes(f"{AT}/x")
        assert proxy.count.requests - before == 1

    @pytest.mark.parametrize("fault", ["refuse", "short_body", "flip"])
    def test_a_lasting_fault_ends_at_the_deadline(self, proxy: FaultProxy, fault: str) -> None:
        storage.write_bytes(f"{AT}/x", BODY)
        proxy.choose, started = only(fault, times=999), time.monotonic()
        with pytest.raises(StorageError, match=r"could not read s3://archive/x: .* attempts"):
            ObjectStore(SHORT).read_bytes(f"{AT}/x")
        assert time.monotonic() - started < 3

    def test_a_body_that_drips_in_ends_at_the_deadline(self) -> None:
        with Server(Drip) as dripping, surroundings(dripping.endpoint):
            started = time.monotonic()
            with pytest.raises(StorageError, match=f"could not read {AT}/x"):
                ObjectStore(SHORT).read_bytes(f"{AT}/x")
            assert time.monotonic() - started < 4


class Drip(Answer):
    """A store that sends its 1,000 bytes one by one, never silent for long."""

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)


class TestEndpoints:
    def test_https_with_a_certificate_of_ones_own(self, tmp_path: Path) -> None:
        made = certificate(tmp_path)
        with moto_server(tls=made) as endpoint:
            with surroundings(endpoint, AWS_CA_BUNDLE=str(made)):
                s3().create_bucket(Bucket=BUCKET)
                storage.write_bytes(f"{AT}/x", BODY)
                assert storage.read_bytes(f"{AT}/x") == BODY
                assert storage.create_bytes(f"{AT}/y", b"1")
                assert names(AT) == ["x", "y"]
            with surroundings(endpoint), pytest.raises(StorageError, match=r"no certificate that is trusted.*AWS_CA_BUNDLE"):
                storage.read_bytes(f"{AT}/x")

    def test_no_error_shows_a_password_of_the_endpoint(self) -> None:
        with surroundings(closed_port().replace("//", "//somebody:password@")), pytest.raises(StorageError) as caught:
            ObjectStore(SHORT).read_bytes(f"{AT}/x")
        assert "password" not in str(caught.value)

    @pytest.mark.parametrize(("chosen", "sent"), [("", False), ("when_supported", True)])
    def test_checksums_that_older_stores_refuse_are_sent_only_on_demand(self, chosen: str, sent: bool) -> None:
        seen: list[str] = []
        with moto_server() as endpoint, surroundings(endpoint, AWS_REQUEST_CHECKSUM_CALCULATION=chosen):
            s3().create_bucket(Bucket=BUCKET)
            s3().meta.events.register("before-send.s3.PutObject", lambda request, **_: seen.extend(request.headers))
            storage.write_bytes(f"{AT}/x", BODY)
        assert ("Content-MD5" in seen) != sent
        assert any(name.lower().startswith("x-amz-checksum") for name in seen) == sent
