"""Contents: equal files have equal hashes, others are not read in vain, and a blank image is evidence of nothing."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest
from factory import FEW, make_row
from hypothesis import given
from hypothesis import strategies as st
from object_stores import moto_store

from brainseg import storage
from brainseg.contents import with_contents
from brainseg.formats.images import write_png
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid
from brainseg.tables import MANIFEST


def listed(root, reader="stack", role="image", **changes):
    """A manifest in which every file below a place is a scan of its own."""
    rows = []
    for entry in storage.list_files(str(root)):
        source = {"uri": entry.uri, "role": role, "index": 0, "size_bytes": entry.size_bytes, "tag": entry.tag}
        rows.append(make_row(storage.name_of(entry.uri), None, None, [source], reader=reader, **changes))
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def hashes(table):
    """File name -> hash."""
    return {row["scan_id"]: row["sources"][0]["sha256"] for row in with_contents(table).to_pylist()}


def write(folder: Path, **files: bytes):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@FEW
@given(st.lists(st.binary(max_size=3), min_size=1, max_size=8))
def test_two_files_have_one_hash_exactly_when_their_bytes_are_equal(tmp_path_factory, data):
    folder = write(tmp_path_factory.mktemp("set"), **{f"f{n}": d for n, d in enumerate(data)})
    found = hashes(listed(folder))
    for n, one in enumerate(data):
        alone = sum(len(one) == len(other) for other in data) == 1
        assert (found[f"f{n}"] is None) == (alone or not one)
        for m, other in enumerate(data):
            if found[f"f{n}"] and n != m:
                assert (found[f"f{n}"] == found[f"f{m}"]) == (one == other)


def test_only_image_files_of_usable_scans_are_compared(tmp_path):
    folder = write(tmp_path, a=b"same", b=b"same")
    assert set(hashes(listed(folder, role="label")).values()) == {None}
    assert set(hashes(listed(folder, problem_code="CORRUPT")).values()) == {None}
    assert None not in hashes(listed(folder, role="both")).values()


def test_a_file_that_cannot_be_read_has_no_hash_and_stops_nothing(tmp_path):
    table = listed(write(tmp_path, a=b"same", b=b"same", c=b"gone"))
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    found = hashes(table)
    assert found["a"] == found["b"] is not None
    assert found["c"] is None


def hdf5(path: Path, image):
    with h5py.File(path, "w") as file:
        file["image"] = image
    return path.read_bytes()


@pytest.mark.parametrize("reader", ["stack", "h5slices", "volumes"])
def test_blank_images_are_no_evidence_and_others_are(tmp_path, reader):
    def stored(values):
        if reader == "stack":
            return write_png(values[0])
        if reader == "volumes":
            return write_nifti(values, Grid.of(values.shape, np.eye(4)))
        return hdf5(tmp_path.parent / "one.h5", np.stack([values[0] - 0.5, values[0] + 0.7], axis=-1))

    blank = np.full((2, 6, 6), 3, np.uint8)
    seen = blank.copy()
    seen[0, 2, 3] = 4
    folder = write(tmp_path, a=stored(blank), b=stored(blank), c=stored(seen), d=stored(seen))
    found = hashes(listed(folder, reader=reader))
    assert (found["a"], found["b"]) == (None, None)
    assert found["c"] == found["d"] is not None


@pytest.fixture
def bucket():
    with moto_store() as uri:
        yield uri


def test_on_s3_an_etag_spares_the_reading_of_all_but_one_of_each_set_of_equals(bucket):
    for name in "abcd":
        storage.write_bytes(f"{bucket}/{name}", b"same" if name in "bd" else f"it {name}".encode())
    table = listed(bucket)
    for name in "cd":
        storage.delete(f"{bucket}/{name}")
    found = hashes(table)
    assert found["b"] == found["d"] == hashlib.sha256(b"same").hexdigest()
    assert found["a"] is found["c"] is None


def test_on_s3_etags_that_are_no_md5_are_not_believed(bucket):
    for name in "abcd":
        storage.write_bytes(f"{bucket}/{name}", b"same" if name in "bd" else f"it {name}".encode())
    for odd in ("0123456789abcdef0123456789abcde{}", "0123456789abcdef0123456789abcdef-{}"):
        rows = listed(bucket).to_pylist()
        for n, row in enumerate(rows):
            row["sources"][0]["tag"] = odd.format(n)
        found = hashes(pa.Table.from_pylist(rows, schema=MANIFEST))
        assert found["b"] == found["d"] is not None
        assert None not in found.values()
