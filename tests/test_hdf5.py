"""HDF5: named arrays out of one file's bytes, and nothing from outside that file."""

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.errors import Code, ScanError
from brainseg.formats.hdf5 import read_keys

IMAGE = np.linspace(-0.6, 4.0, 6 * 5 * 4).reshape(6, 5, 4)


def made(fill: Callable[[h5py.File], object]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as root:
        fill(root)
    return file.getvalue()


def slice_file(root: h5py.File) -> None:
    root.create_dataset("image", data=IMAGE, compression="gzip", chunks=(3, 5, 1))
    root.create_dataset("mask", data=np.zeros((6, 5, 3), np.uint8), fletcher32=True, chunks=(6, 5, 3))


def refusal(data: bytes, key: str = "image") -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_keys(data, [key], "x.h5")
    assert str(caught.value).startswith("x.h5: ")
    return caught.value


def test_named_arrays_come_back_as_stored():
    arrays, warnings = read_keys(made(slice_file), ["image", "mask"], "x.h5")
    np.testing.assert_array_equal(arrays["image"], IMAGE)
    assert arrays["image"].dtype == np.float64
    assert arrays["mask"].dtype == np.uint8
    assert warnings == ()


def test_foreign_byte_order_becomes_native():
    arrays, _ = read_keys(made(lambda root: root.create_dataset("image", data=IMAGE, dtype=">f8")), ["image"], "x.h5")
    assert arrays["image"].dtype.isnative
    np.testing.assert_array_equal(arrays["image"], IMAGE)


def test_values_without_any_checksum_are_told():
    _, warnings = read_keys(made(lambda root: root.create_dataset("image", data=IMAGE)), ["image"], "x.h5")
    assert [line.split(":")[0] for line in warnings] == ["NO_CHECKSUM"]


def test_a_path_through_groups_and_soft_links_inside_the_file_is_followed():
    def fill(root: h5py.File) -> None:
        root["deep/er/image"] = IMAGE
        root["image"] = h5py.SoftLink("/folder/image")
        root["folder"] = h5py.SoftLink("deep/er")

    data = made(fill)
    for key in ("deep/er/image", "image", "/folder/image"):
        np.testing.assert_array_equal(read_keys(data, [key], "x.h5")[0][key], IMAGE)


def test_a_missing_key_is_answered_with_those_that_are_there():
    error = refusal(made(slice_file), "cjdata")
    assert error.code is Code.MISSING_KEY
    assert "'image', 'mask'" in error.message


@pytest.mark.parametrize(
    "fill",
    [
        lambda root: root.create_group("image"),
        lambda root: root.__setitem__("image", h5py.SoftLink("/nowhere")),
        lambda root: root.__setitem__("image", h5py.SoftLink("/image")),
    ],
    ids=["a group", "a dangling link", "a link to itself"],
)
def test_what_is_no_dataset_is_a_missing_key(fill):
    assert refusal(made(fill)).code is Code.MISSING_KEY


def test_no_value_comes_from_another_file(tmp_path: Path):
    other = tmp_path / "other.h5"
    other.write_bytes(made(slice_file))
    raw = tmp_path / "secret"
    raw.write_bytes(bytes(range(120)))
    layout = h5py.VirtualLayout((6, 5, 4), np.float64)
    layout[:] = h5py.VirtualSource(str(other), "image", (6, 5, 4))

    def linked(root: h5py.File) -> None:
        root["image"] = h5py.ExternalLink(str(other), "/image")

    def linked_folder(root: h5py.File) -> None:
        root["far"] = h5py.ExternalLink(str(other), "/")
        root["image"] = h5py.SoftLink("/far/image")

    def stored(root: h5py.File) -> None:
        root.create_dataset("image", (6, 5, 4), "u1", external=[(str(raw), 0, 120)])

    def virtual(root: h5py.File) -> None:
        root.create_virtual_dataset("image", layout)

    for fill in (linked, linked_folder, stored, virtual):
        assert refusal(made(fill)).code is Code.OUTSIDE_ROOT, fill.__name__


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (200_000, 200_000, 4), "chunks": (64, 64, 1)},
        {"shape": (4, 4), "maxshape": (None, None), "chunks": (60_000, 8_000)},
    ],
    ids=["in all", "in a chunk"],
)
def test_giant_claims_are_refused_before_they_are_allocated(options):
    assert refusal(made(lambda root: root.create_dataset("image", dtype="u1", **options))).code is Code.TOO_LARGE


@pytest.mark.parametrize("values", [["text"], np.zeros(3, np.complex128), np.zeros(3, [("a", "u1")])], ids=str)
def test_what_are_no_numbers_is_refused(values):
    assert refusal(made(lambda root: root.create_dataset("image", data=values))).code is Code.BAD_DATATYPE


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Code.EMPTY_FILE),
        (b"PK\x03\x04" + bytes(100), Code.NOT_HDF5),
        (b"<html></html>", Code.NOT_HDF5),
        (made(slice_file)[:-100], Code.TRUNCATED),
    ],
)
def test_what_is_no_hdf5_file_is_named(data, code):
    assert refusal(data).code is code


@given(st.integers(0, len(made(slice_file)) - 1), st.binary(min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(at, noise):
    data = bytearray(made(slice_file))
    data[at : at + len(noise)] = noise
    try:
        arrays, _ = read_keys(bytes(data), ["image", "mask"], "x.h5")
    except ScanError:
        return
    assert set(arrays) == {"image", "mask"}


def test_real_blocks_of_the_decathlon_open(data_dir):
    paths = sorted(data_dir.glob("msd-h5/*.h5"))
    assert paths
    arrays, _ = read_keys(paths[0].read_bytes(), ["x", "y"], paths[0].name)
    assert arrays["x"].shape == (4, 160, 160, 16)
    assert arrays["y"].shape == (160, 160, 16, 4)
