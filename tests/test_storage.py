"""Storage: one class of laws that local disk, moto and Swift all keep, then what is particular to each."""

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import faulty_store, some
from hypothesis import given, settings
from hypothesis import strategies as st
from object_stores import BUCKET, SWIFT_KEYS, moto_store, surroundings

from brainseg import storage
from brainseg.errors import Code, PreflightError, StorageError
from brainseg.storage import place

SLOW = pytest.mark.slow


@pytest.fixture(scope="class", params=["disk", "moto", pytest.param("faulty", marks=SLOW), pytest.param("swift", marks=SLOW)])
def home(request: pytest.FixtureRequest) -> Iterator[str]:
    """A place on each kind of storage; `faulty` is moto behind a proxy that commits a fault at every tenth request."""
    with ExitStack() as stack:
        yield opened(request, stack)


def opened(request: pytest.FixtureRequest, stack: ExitStack) -> str:
    """Open storage of the kind that the fixture is asked for, and return a place on it."""
    if request.param == "disk":
        return str(request.getfixturevalue("tmp_path_factory").mktemp("disk"))
    if request.param == "moto":
        return stack.enter_context(moto_store())
    if request.param == "swift":
        stack.enter_context(surroundings(request.getfixturevalue("swift"), **SWIFT_KEYS))
    else:
        stack.enter_context(faulty_store()).choose = some(0.1, seed=1)
    return f"s3://{BUCKET}"


@pytest.fixture
def base(home: str, tmp_path: Path) -> str:
    """An empty place to write to, on each kind of storage."""
    return f"{home}/{tmp_path.name}/base"


def names(root: str) -> list[str]:
    return [entry.uri.removeprefix(root + "/") for entry in storage.list_files(root)]


class TestEveryStorage:
    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
    def test_reads_back_what_was_written(self, base: str, data: bytes) -> None:
        storage.write_bytes(f"{base}/a/b.bin", data)
        assert storage.read_bytes(f"{base}/a/b.bin") == data

    def test_writing_again_replaces_and_changes_the_tag_or_the_size(self, base: str) -> None:
        storage.write_bytes(f"{base}/x", b"one")
        before = next(storage.list_files(base))
        storage.write_bytes(f"{base}/x", b"three")
        after = next(storage.list_files(base))
        assert storage.read_bytes(f"{base}/x") == b"three"
        assert (before.size_bytes, before.tag) != (after.size_bytes, after.tag)

    def test_lists_recursively_in_the_order_of_uris_with_sizes(self, base: str) -> None:
        wanted = ["a/2", "a.b", "a-b/1", "b/c/d", "Ä/é", "a/10", ".hidden", "z", "glob[x]*?", "a%2Fb", "q'\"`$(x)"]
        for name in wanted:
            storage.write_bytes(f"{base}/{name}", name.encode())
        assert names(base) == sorted(wanted)
        assert [e.size_bytes for e in storage.list_files(base)] == [len(n.encode()) for n in sorted(wanted)]
        assert all(e.problem is None and e.tag for e in storage.list_files(base))

    def test_lists_nothing_where_nothing_is(self, base: str) -> None:
        assert list(storage.list_files(base)) == []
        assert not storage.is_dir(base)

    def test_a_name_that_begins_like_a_folder_is_not_inside_it(self, base: str) -> None:
        storage.write_bytes(f"{base}/run1/x", b"")
        storage.write_bytes(f"{base}/run10/x", b"")
        assert names(f"{base}/run1") == ["x"]
        assert not storage.is_dir(f"{base}/run")

    def test_a_file_exists_a_folder_is_a_folder_and_neither_is_the_other(self, base: str) -> None:
        storage.write_bytes(f"{base}/folder/file", b"")
        assert storage.exists(f"{base}/folder/file")
        assert storage.is_dir(f"{base}/folder")
        assert not storage.exists(f"{base}/folder")
        assert not storage.is_dir(f"{base}/folder/file")
        assert not storage.exists(f"{base}/nothing")

    def test_reading_what_is_not_there_is_one_clear_line(self, base: str) -> None:
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(f"{base}/nothing")
        assert f"{base}/nothing" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_deleting_twice_is_as_good_as_once(self, base: str) -> None:
        storage.write_bytes(f"{base}/x", b"1")
        storage.delete(f"{base}/x")
        storage.delete(f"{base}/x")
        assert not storage.exists(f"{base}/x")

    def test_deleting_a_tree_leaves_its_neighbours(self, base: str) -> None:
        for name in ("a/1", "a/b/2", "ab/3"):
            storage.write_bytes(f"{base}/{name}", b"")
        storage.delete_tree(f"{base}/a")
        storage.delete_tree(f"{base}/a")
        assert names(base) == ["ab/3"]

    def test_a_writable_place_passes_the_probe_and_keeps_no_trace(self, base: str) -> None:
        storage.write_bytes(f"{base}/x", b"")
        storage.check_writable(base)
        assert names(base) == ["x"]

    def test_json_and_text_keep_every_letter(self, base: str) -> None:
        storage.write_json(f"{base}/a.json", {"Zoë": [1, None, "脳"]})
        assert storage.read_json(f"{base}/a.json") == {"Zoë": [1, None, "脳"]}
        assert json.loads(storage.read_text(f"{base}/a.json")) == {"Zoë": [1, None, "脳"]}

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
    def test_what_no_other_reader_would_accept_is_no_json(self, base: str, value: object) -> None:
        with pytest.raises(StorageError):
            storage.write_json(f"{base}/a.json", {"x": value})
        assert not storage.exists(f"{base}/a.json")

    @pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe"])
    def test_broken_json_is_a_storage_error(self, base: str, data: bytes) -> None:
        storage.write_bytes(f"{base}/a.json", data)
        with pytest.raises(StorageError, match=r"a\.json"):
            storage.read_json(f"{base}/a.json")

    def test_a_table_comes_back_with_its_schema(self, base: str) -> None:
        storage.write_table(f"{base}/t.parquet", table(200))
        back = storage.read_table(f"{base}/t.parquet")
        assert back.equals(table(200))
        assert back.schema.metadata == table(200).schema.metadata
        assert storage.read_table(f"{base}/t.parquet", ["scan_id"]).column_names == ["scan_id"]

    def test_an_absent_column_is_named(self, base: str) -> None:
        storage.write_table(f"{base}/t.parquet", table(1))
        with pytest.raises(StorageError, match="no column dice"):
            storage.read_table(f"{base}/t.parquet", ["scan_id", "dice"])

    @pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
    def test_a_torn_table_is_a_storage_error(self, base: str, keep: float) -> None:
        storage.write_table(f"{base}/t.parquet", table(50))
        whole = storage.read_bytes(f"{base}/t.parquet")
        storage.write_bytes(f"{base}/t.parquet", whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
        with pytest.raises(StorageError, match=r"t\.parquet"):
            storage.read_table(f"{base}/t.parquet")

    def test_a_flipped_byte_in_a_table_does_not_pass(self, base: str) -> None:
        storage.write_table(f"{base}/t.parquet", table(50))
        data = bytearray(storage.read_bytes(f"{base}/t.parquet"))
        data[data.index(hashlib.sha512(b"7").digest()) + 3] ^= 1
        storage.write_bytes(f"{base}/t.parquet", bytes(data))
        with pytest.raises(StorageError):
            storage.read_table(f"{base}/t.parquet")

    def test_masks_carry_neither_statistics_nor_dictionary(self, base: str) -> None:
        storage.write_table(f"{base}/t.parquet", table(130))
        meta = pq.ParquetFile(pa.BufferReader(storage.read_bytes(f"{base}/t.parquet"))).metadata
        group = meta.row_group(0)
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        assert meta.num_row_groups == 3
        assert {name for name, column in columns.items() if not column.is_stats_set} == {"mask", "thumbnail.image"}
        assert columns["mask"].dictionary_page_offset is None
        assert columns["scan_id"].compression == "ZSTD"

    def test_some_columns_are_those_of_the_whole(self, base: str) -> None:
        storage.write_table(f"{base}/t.parquet", table(200))
        whole = storage.read_table(f"{base}/t.parquet")
        for columns in (["thumbnail"], ["scan_id", "attributes"]):
            assert storage.read_table(f"{base}/t.parquet", columns).equals(whole.select(columns))

    @pytest.mark.parametrize("sizes", [[], [0], [200], [1, 63, 64, 65, 7], [130, 0, 130]])
    def test_a_table_in_pieces_is_the_table_whole(self, base: str, sizes: list[int]) -> None:
        whole, ends = table(300).slice(0, sum(sizes)), [sum(sizes[:n]) for n in range(len(sizes))]
        pieces = (whole.slice(end, size) for end, size in zip(ends, sizes, strict=True))
        storage.write_pieces(f"{base}/pieces.parquet", whole.schema, pieces, row_group_rows=64)
        storage.write_table(f"{base}/whole.parquet", whole)
        known = storage.read_table(f"{base}/whole.parquet")
        assert known.equals(whole)
        assert storage.read_table(f"{base}/pieces.parquet").equals(known, check_metadata=True)
        assert row_groups(f"{base}/pieces.parquet") == [n for n in row_groups(f"{base}/whole.parquet") if n]
        for name in ("pieces", "whole"):
            back = list(storage.read_pieces(f"{base}/{name}.parquet"))
            assert pa.concat_tables(back).equals(known, check_metadata=True)
            assert max(piece.num_rows for piece in back) <= 64

    def test_a_table_whose_pieces_break_off_has_never_been(self, base: str) -> None:
        def pieces() -> Iterator[pa.Table]:
            yield table(100)
            raise StorageError("the disk of the parts is gone")

        for there in ([], ["t.parquet"]):
            with pytest.raises(StorageError, match="disk of the parts"):
                storage.write_pieces(f"{base}/t.parquet", table(1).schema, pieces(), row_group_rows=64)
            assert names(base) == there
            storage.write_table(f"{base}/t.parquet", table(3))
        assert storage.read_table(f"{base}/t.parquet").equals(table(3))

    @pytest.mark.parametrize("size", [0, 1, 3_000_001])
    def test_a_digest_is_that_of_the_bytes(self, base: str, size: int) -> None:
        data = hashlib.shake_128(b"data").digest(size)
        storage.write_bytes(f"{base}/x", data)
        assert storage.digest(f"{base}/x") == (size, hashlib.sha256(data).hexdigest())
        with pytest.raises(StorageError, match="nothing"):
            storage.digest(f"{base}/nothing")

    def test_what_is_there_is_not_created_again(self, base: str) -> None:
        assert storage.create_bytes(f"{base}/a/x", b"one")
        assert not storage.create_bytes(f"{base}/a/x", b"two")
        assert storage.read_bytes(f"{base}/a/x") == b"one"
        assert names(base) == ["a/x"]
        storage.delete(f"{base}/a/x")
        assert storage.create_bytes(f"{base}/a/x", b"two")

    def test_of_many_who_create_at_once_one_wins(self, base: str) -> None:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n: storage.create_bytes(f"{base}/x", f"writer {n}".encode()), range(16)))
        assert won.count(True) == 1
        assert storage.read_bytes(f"{base}/x") == f"writer {won.index(True)}".encode()

    def test_many_files_are_listed_once_each_and_deleted(self, base: str) -> None:
        wanted = [f"{n:04d}" for n in range(260)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: storage.write_bytes(f"{base}/{name}", name.encode()), wanted))
        assert names(base) == wanted
        storage.delete_tree(base)
        assert names(base) == []

    def test_what_can_be_read_passes_and_what_is_not_there_does_not(self, base: str) -> None:
        storage.write_bytes(f"{base}/folder/x", b"")
        for there in ("folder/x", "folder"):
            storage.check_readable(f"{base}/{there}")
        with pytest.raises(PreflightError, match="there is no such"):
            storage.check_readable(f"{base}/nothing")

    def test_a_probe_of_a_place_that_is_not_there_yet_leaves_no_trace(self, base: str) -> None:
        storage.check_writable(f"{base}/new/run")
        assert names(base) == []
        assert not storage.is_dir(f"{base}/new")

    def test_leftovers_are_ours_and_old_and_can_be_removed(self, base: str) -> None:
        left, kept = place.temporary_name("probe"), [".probe-x", ".tmp-file", "scans/x.parquet"]
        for name in (left, *kept):
            storage.write_bytes(f"{base}/{name}", b"123")
        assert list(storage.leftovers(base)) == []
        (found,) = storage.leftovers(base, now=time.time() + 2 * storage.LEFTOVER_AGE_S)
        assert (found.uri, found.kind, found.size_bytes) == (f"{base}/{left}", "file", 3)
        assert abs(found.modified_at - time.time()) < 60
        for _ in range(2):
            storage.remove_leftover(found)
        assert names(base) == kept


def row_groups(uri: str) -> list[int]:
    meta = pq.ParquetFile(pa.BufferReader(storage.read_bytes(uri))).metadata
    return [meta.row_group(n).num_rows for n in range(meta.num_row_groups)]


def table(rows: int) -> pa.Table:
    """A small table of the kinds of columns a part has; its masks do not compress, as real ones do not."""
    masks = [hashlib.sha512(str(n).encode()).digest() for n in range(rows)]
    columns = {
        "scan_id": pa.array([str(n) for n in range(rows)]),
        "mask": pa.array(masks, pa.large_binary()),
        "thumbnail": pa.array([{"image": mask} for mask in masks], pa.struct([("image", pa.binary())])),
        "attributes": pa.array([[("site", "CS")]] * rows, pa.map_(pa.string(), pa.string())),
    }
    return pa.table(columns).replace_schema_metadata({"table": "scans"})


class TestAhead:
    @pytest.mark.parametrize("number", [0, 1, 40])
    def test_what_is_read_ahead_comes_in_order_and_little_of_it_waits(self, number: int) -> None:
        begun: list[str] = []

        def read(uri: str) -> int:
            begun.append(uri)
            return int(uri)

        for taken, value in enumerate(storage.ahead(read, map(str, range(number)), 2)):
            assert value == taken
            assert len(begun) <= taken + 6
        assert len(begun) == number

    def test_a_failure_comes_where_it_belongs(self) -> None:
        found = storage.ahead(lambda uri: 1 // int(uri), "1101", 2)
        assert [next(found), next(found)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(found)


class TestNames:
    @settings(max_examples=60, deadline=None)
    @given(st.text(), st.text())
    def test_no_part_leads_out_of_its_base(self, first: str, second: str) -> None:
        base = "/archive/run"
        try:
            joined = storage.join(base, first, second)
        except StorageError:
            return
        assert joined == f"{base}/{first}/{second}"
        assert Path(os.path.normpath(joined)).is_relative_to(base)
        assert os.path.normpath(joined) == joined

    @pytest.mark.parametrize(
        "part", ["", "..", ".", "/etc/x", "../../x", "a/../../b", "a\\..\\b", "a//b", "a/", "x\0", "s3://b/k"]
    )
    def test_a_part_that_could_is_refused(self, part: str) -> None:
        with pytest.raises(StorageError):
            storage.join("s3://bucket/run", part)

    def test_names_and_joins_agree(self) -> None:
        assert storage.join("s3://bucket/", "a/b", "c") == "s3://bucket/a/b/c"
        assert storage.name_of("s3://bucket/a/b/c/") == "c"
        assert storage.is_remote("s3://bucket/a")
        assert not storage.is_remote("/s3:/a")

    def test_absolute_expands_and_is_its_own_fixed_point(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert storage.absolute("a/../b/") == storage.absolute("~/b") == str(tmp_path / "b")
        assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"
        assert storage.absolute(storage.absolute("b")) == storage.absolute("b")

    @pytest.mark.parametrize("uri", ["gs://bucket/x", "https://host/x", "s3:///key"])
    def test_a_place_of_another_kind_is_refused(self, uri: str) -> None:
        with pytest.raises(StorageError):
            storage.absolute(uri)


class TestLocalDisk:
    def problems(self, root: Path) -> dict[str, Code | None]:
        return {e.uri.removeprefix(f"{root}/"): e.problem for e in storage.list_files(str(root))}

    def test_links_are_followed_only_to_files_inside_the_root(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        (root / "real").mkdir(parents=True)
        (root / "real/file").write_bytes(b"inside")
        outside.write_bytes(b"secret")
        for name, target in {
            "inside": "real/file",
            "outside": outside,
            "folder": "real",
            "up": "..",
            "dangling": "nothing",
            "loop": "loop",
        }.items():
            (root / name).symlink_to(target)
        assert self.problems(root) == {
            "dangling": Code.NOT_A_FILE,
            "folder": Code.NOT_A_FILE,
            "inside": None,
            "loop": Code.NOT_A_FILE,
            "outside": Code.OUTSIDE_ROOT,
            "real/file": None,
            "up": Code.OUTSIDE_ROOT,
        }

    def test_a_root_that_is_itself_a_link_is_listed(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real/file").write_bytes(b"")
        (tmp_path / "link").symlink_to("real")
        assert self.problems(tmp_path / "link") == {"file": None}

    def test_a_pipe_is_listed_as_a_problem_and_never_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.nii.gz")
        assert self.problems(tmp_path) == {"pipe.nii.gz": Code.NOT_A_FILE}
        with pytest.raises(StorageError, match="regular file"):
            storage.read_bytes(str(tmp_path / "pipe.nii.gz"))

    def test_a_socket_and_a_folder_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
            for name in ("s", "."):
                with pytest.raises(StorageError):
                    storage.read_bytes(name)

    def test_a_name_that_is_not_utf8_is_listed_readably(self, tmp_path: Path) -> None:
        os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT))
        ((uri, problem),) = self.problems(tmp_path).items()
        assert problem == Code.BAD_ID
        assert uri.encode("utf-8") == b"caf\\udce9.png"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_folder_that_may_not_be_read_is_listed(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0)
        assert self.problems(tmp_path) == {"closed": Code.UNREADABLE}

    def test_a_very_deep_tree_is_no_trouble(self, tmp_path: Path) -> None:
        deep = tmp_path.joinpath(*["d"] * 1200)
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            for _ in range(1200):
                os.mkdir("d", dir_fd=folder)
                below = os.open("d", os.O_RDONLY, dir_fd=folder)
                os.close(folder)
                folder = below
        finally:
            os.close(folder)
        storage.write_bytes(str(deep / "x"), b"1")
        assert [e.size_bytes for e in storage.list_files(str(tmp_path))] == [1]
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # deeper than Python can remove it

    def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(self, tmp_path: Path) -> None:
        storage.write_bytes(str(tmp_path / "x"), b"old")
        with pytest.raises((StorageError, TypeError)):
            storage.write_bytes(str(tmp_path / "x"), "not bytes")  # type: ignore[arg-type]
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError):
            storage.write_bytes(str(tmp_path / "folder"), b"new")
        assert (tmp_path / "x").read_bytes() == b"old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x"]

    def test_readers_see_a_whole_file_while_it_is_rewritten(self, tmp_path: Path) -> None:
        bodies = [bytes([n]) * 100_000 for n in range(4)]
        storage.write_bytes(f"{tmp_path}/x", bodies[0])
        with ThreadPoolExecutor(4) as pool:
            seen = pool.map(lambda _: storage.read_bytes(f"{tmp_path}/x"), range(24))
            for body in bodies:
                storage.write_bytes(f"{tmp_path}/x", body)
            assert all(data in bodies for data in seen)
        assert names(str(tmp_path)) == ["x"]

    def test_a_file_in_the_way_of_a_folder_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"")
        with pytest.raises(StorageError):
            storage.write_bytes(str(tmp_path / "x/y"), b"")
        assert not storage.exists(str(tmp_path / "x/y"))

    def test_a_killed_writer_leaves_what_leftovers_finds(self, tmp_path: Path) -> None:
        storage.write_bytes(f"{tmp_path}/run/scans/a.parquet", b"")
        torn = tmp_path / "run/scans" / place.temporary_name("tmp")
        torn.write_bytes(b"half a part")
        (tmp_path / "run" / place.temporary_name("tmp")).symlink_to("/etc/passwd")
        (found,) = storage.leftovers(f"{tmp_path}/run", min_age_s=-60)
        storage.remove_leftover(found)
        assert not torn.exists()
        assert names(f"{tmp_path}/run/scans") == ["a.parquet"]

    def test_where_no_hard_links_are_one_still_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", refuse_to_link)
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n: storage.create_bytes(f"{tmp_path}/x", f"writer {n}".encode()), range(16)))
        assert won.count(True) == 1
        assert names(str(tmp_path)) == ["x"]

    def test_a_pipe_is_no_table(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "t.parquet")
        with pytest.raises(StorageError, match="regular file"):
            storage.read_table(f"{tmp_path}/t.parquet")


def refuse_to_link(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")
