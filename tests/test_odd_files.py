"""What a tar cannot carry: pipes, sockets, links that lead astray, folders named like files, names that are no text.

Each stands in an archive beside good scans. Whatever it is, it is one row with its reason or one line of what was left
aside, nothing waits for it, and its name breaks neither a table nor a log.
"""

import json
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from factory import make_card, make_scan, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import runs, stages, storage
from brainseg.config import SegmentConfig
from brainseg.errors import Code, ScanError, one_line
from brainseg.formats.nifti import write_nifti
from brainseg.manifest import index_archive, read_manifest, write_manifest
from brainseg.readers import read_files
from brainseg.stages import Job
from brainseg.tables import SCANS

SECONDS = 10.0
"""What must not hang is given this long; it takes milliseconds."""

SCAN = make_scan(shape=(4, 12, 12))
VOLUME = write_nifti(make_scan(shape=(4, 12, 12)).label, SCAN.grid)


def good_case(root: Path, name: str) -> Path:
    """Write `name/name-flair.nii.gz` and `-t1c`; returns the folder."""
    folder = root / name
    folder.mkdir(parents=True)
    for number, modality in enumerate(("flair", "t1c")):
        volume = SCAN.label.astype("i2") * 100 + number
        (folder / f"{name}-{modality}.nii.gz").write_bytes(write_nifti(volume, SCAN.grid))
    return folder


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what the call returns; fails where it does not come back."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert answers, "it hangs, or it raised"
    return answers[0]


def row_of(path: Path | str) -> dict[str, Any]:
    file = {"uri": str(path), "role": "image", "modality": "t1", "index": None}
    row = {"scan_id": "s", "reader": "volumes", "modalities": ["t1"], "sources": [file], "has_label": False}
    return row | {"label_map": "brats2020", "problem_code": None, "problem": None}


def refusal_on_reading(path: Path | str) -> ScanError:
    def call() -> ScanError:
        with pytest.raises(ScanError) as caught:
            read_files(row_of(path), with_label=False)
        return caught.value

    error = within(SECONDS, call)
    assert isinstance(error, ScanError)
    return error


def pipe(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(outside / "s"))  # a socket's own path may have 107 bytes only
    (outside / "s").rename(path)


def device(path: Path, _outside: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5))  # /dev/zero: whoever reads it never comes to an end
    except PermissionError:
        pytest.skip("this user may not make a device")


def dangling_link(path: Path, _outside: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def looping_link(path: Path, _outside: Path) -> None:
    path.symlink_to(path)


def long_loop(path: Path, _outside: Path) -> None:
    other = path.with_name("other")
    path.symlink_to(other)
    other.symlink_to(path)


def link_to_folder(path: Path, _outside: Path) -> None:
    path.symlink_to(path.parent)


def outward_link(path: Path, outside: Path) -> None:
    (outside / "x.nii.gz").write_bytes(VOLUME)
    path.symlink_to(outside / "x.nii.gz")


def outward_by_steps(path: Path, outside: Path) -> None:
    (outside / "x.nii.gz").write_bytes(VOLUME)
    step = path.with_name("step")
    step.symlink_to(os.path.relpath(outside / "x.nii.gz", path.parent))
    path.symlink_to(step.name)


def link_to_password_file(path: Path, _outside: Path) -> None:
    path.symlink_to("/etc/passwd")


def empty_folder(path: Path, _outside: Path) -> None:
    path.mkdir()


def folder_with_a_volume(path: Path, _outside: Path) -> None:
    path.mkdir()
    (path / "inside.nii.gz").write_bytes(VOLUME)


def unreadable_file(path: Path, _outside: Path) -> None:
    path.write_bytes(VOLUME)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")


ON_LISTING = {
    pipe: Code.NOT_A_FILE,
    listening_socket: Code.NOT_A_FILE,
    device: Code.NOT_A_FILE,
    dangling_link: Code.NOT_A_FILE,
    looping_link: Code.NOT_A_FILE,
    long_loop: Code.NOT_A_FILE,
    link_to_folder: Code.NOT_A_FILE,
    outward_link: Code.OUTSIDE_ROOT,
    outward_by_steps: Code.OUTSIDE_ROOT,
    link_to_password_file: Code.OUTSIDE_ROOT,
    empty_folder: Code.NOT_A_FILE,
    folder_with_a_volume: Code.NOT_A_FILE,
}
"""How a file comes to be odd -> what the scan that it would belong to is refused for."""

ON_READING = {
    pipe: Code.NOT_A_FILE,
    listening_socket: Code.NOT_A_FILE,
    device: Code.NOT_A_FILE,
    dangling_link: Code.NOT_A_FILE,
    looping_link: Code.NOT_A_FILE,
    link_to_folder: Code.NOT_A_FILE,
    empty_folder: Code.NOT_A_FILE,
    unreadable_file: Code.UNREADABLE,
}
"""The same where a file turned odd after it was listed."""


@pytest.mark.parametrize("make", ON_LISTING, ids=lambda make: make.__name__)
def test_a_scan_whose_file_is_no_file_is_one_row_with_its_reason(make, tmp_path):
    root, outside = tmp_path / "archive", tmp_path / "outside"
    outside.mkdir()
    good_case(root, "case-1")
    odd = good_case(root, "case-2") / "case-2-t1c.nii.gz"
    odd.unlink()
    make(odd, outside)
    table, _ = within(SECONDS, lambda: index_archive(str(root)))
    rows = {row["scan_id"]: row for row in table.to_pylist()}
    assert rows["case-1"]["problem_code"] is None
    assert rows["case-2"]["problem_code"] == ON_LISTING[make]
    assert rows["case-2"]["problem"].startswith("'case-2-t1c.nii.gz': ")
    assert str(tmp_path) not in rows["case-2"]["problem"]


@pytest.mark.parametrize("make", ON_READING, ids=lambda make: make.__name__)
def test_reading_what_is_no_file_neither_hangs_nor_names_the_path(make, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = tmp_path / "x.nii.gz"
    make(path, outside)
    error = refusal_on_reading(path)
    assert error.code is ON_READING[make]
    assert error.message.startswith("x.nii.gz: could not be read")
    assert str(tmp_path) not in error.message


@pytest.mark.parametrize("name", ["two  spaces.nii.gz", "line\nfeed.nii.gz", "esc\x1b[2Jape.nii.gz", f"{'n' * 240}.nii.gz"])
def test_a_path_of_odd_characters_or_great_length_stays_out_of_the_line(name, tmp_path):
    folder = tmp_path / "deep  folder\nof odd name" / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    (folder / name).mkdir()
    for place in (folder / name, folder / f"gone {name}"):
        if len(place.name) > 255:
            continue
        error = refusal_on_reading(place)
        assert "deep" not in error.message
        assert error.message.isprintable()


ODD_NAMES = {
    "not utf-8": b"case-\xff\xfe",
    "latin-1": "Müller".encode("latin-1"),
    "line feed": b"case\nline",
    "carriage return": b"case\rline",
    "escape": b"case\x1b[31m",
    "bell": b"case\x07",
    "right to left": "case\N{RIGHT-TO-LEFT OVERRIDE}gz.iin".encode(),
    "line separator": "case\N{LINE SEPARATOR}x".encode(),
    "next line": "case\x85x".encode(),
    "zero width": "case\N{ZERO WIDTH SPACE}x".encode(),
    "long": b"n" * 230,
    "html": b"<script>alert(1)<",
    "quotes": b"a'b\"c",
    "shell": b"$(reboot)",
    "windows device": b"CON",
    "space": b"a b",
    "backslash": b"a\\..\\..\\x",
    "comma": b"a,b",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_a_case_of_odd_name_is_a_row_that_tables_json_and_logs_can_hold(name, tmp_path):
    root = tmp_path / "archive"
    good_case(root, "case-1")
    (root / "odd").mkdir()
    for number, modality in enumerate(("flair", "t1c")):
        volume = write_nifti(SCAN.label.astype("i2") + number, SCAN.grid)
        (root / "odd" / f"{os.fsdecode(name)}-{modality}.nii.gz").write_bytes(volume)
    table, _ = index_archive(str(root))
    write_manifest(str(tmp_path / "m.parquet"), table)
    rows = read_manifest(str(tmp_path / "m.parquet")).to_pylist()
    good, odd = sorted(rows, key=lambda row: row["scan_id"] != "case-1")
    assert good["problem_code"] is None
    assert odd["problem_code"] == Code.BAD_ID
    finished = as_failed_row(odd)
    assert finished["error_code"] == Code.BAD_ID
    assert finished["error_message"].isprintable()
    assert len(finished["error_message"]) < 1000
    json.dumps(finished["error_message"]).encode("utf-8")
    json.dumps(rows, ensure_ascii=False, default=str).encode("utf-8")


def as_failed_row(row: dict[str, Any]) -> dict[str, Any]:
    """Take a row all the way to its table's bytes and back."""
    card = make_card(tiny_config())
    job = Job("run", "model", SegmentConfig(), "run-1", 1, "m", "c", card)
    done = stages.finish(stages.decode(row, with_label=True), job)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist([done], schema=SCANS), sink)
    (back,) = pa.parquet.read_table(pa.BufferReader(sink.getvalue())).to_pylist()
    assert back["scan_id"] == row["scan_id"]
    assert back["content_tag"] == runs.content_tag(row)
    return back


def test_a_folder_of_odd_name_spoils_no_scan_beside_it(tmp_path):
    root = tmp_path / "archive"
    good_case(root, "case-1")
    folder = root / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    (folder / "case-2-t1c.nii.gz").write_bytes(VOLUME)
    table, _ = index_archive(str(root))
    verdicts = {row["scan_id"]: row["problem_code"] for row in table.to_pylist()}
    assert verdicts == {"case-1": None, "case-2": Code.BAD_ID}
    assert all("\udcff" not in source["uri"] for row in table.to_pylist() for source in row["sources"])


def test_an_unreadable_folder_is_named(tmp_path):
    root = tmp_path / "archive"
    good_case(root, "case-1")
    closed = good_case(root, "case-2")
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may list every folder")
        _, inventory = index_archive(str(root))
    finally:
        closed.chmod(0o755)
    assert [reason for uri, reason in inventory.ignored if uri.endswith("case-2")] == ["may not be read"]


def test_files_larger_than_a_scan_may_be_are_not_read(tmp_path):
    path = tmp_path / "x.nii.gz"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing, which takes no room on disk
    row = row_of(path)
    row["sources"][0]["size_bytes"] = storage.list_files(str(tmp_path)).__next__().size_bytes
    with pytest.raises(ScanError) as caught:
        read_files(row, with_label=False)
    assert caught.value.code is Code.TOO_LARGE


@given(st.text(max_size=60) | st.binary(max_size=60).map(os.fsdecode))
@settings(max_examples=200, deadline=None)
def test_any_words_make_one_line_that_is_valid_text(words):
    for line in (one_line(words), ScanError(Code.CORRUPT, words).message):
        assert line.isprintable()
        assert line.encode("utf-8").decode("utf-8") == line
        assert one_line(line) == line
