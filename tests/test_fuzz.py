"""Good files, damaged at random: whatever comes of it is a Scan or a ScanError in one line, and it comes soon."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crafted import IMAGE_H5, PICTURE, h5, nii, nii_2, nii_gz, picture, png, tif
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_more_bad_inputs import Kind, image, interlaced, made, packed, row_of, slice_h5, tiff, volume

from brainseg.errors import ScanError
from brainseg.scans import Scan, load_scan

SECONDS = 5.0
PLACES = 1 << 16
"""Where in a file damage is done: so many parts of its length."""

GOOD: dict[str, tuple[Callable[..., Kind], list[bytes]]] = {
    "nifti": (volume, [nii(), nii_2(), nii(PICTURE[None].astype("f4"))]),
    "packed nifti": (packed, [nii_gz(), nii_gz() + nii_gz()]),
    "png": (image, [png(), interlaced(), picture("PNG", mode="P"), picture("PNG", mode="LA")]),
    "jpeg": (image, [picture("JPEG"), picture("JPEG", progressive=True)]),
    "gif": (image, [picture("GIF")]),
    "tiff": (
        tiff,
        [
            tif(),
            tif(bigtiff=True),
            tif(rowsperstrip=2),
            tif(np.tile(PICTURE, (8, 8)), tile=(16, 16)),
            *(tif(compression=way) for way in ("deflate", "lzw", "zstd", "jpeg", "packbits", "lzma", "lerc")),
        ],
    ),
    "hdf5": (
        slice_h5,
        [h5(), h5(libver="latest"), made(), made(chunks=True, compression="lzf"), made(chunks=IMAGE_H5.shape, shuffle=True)],
    ),
}

flips = st.tuples(st.just("flip"), st.integers(0, PLACES), st.integers(1, 255))
words = st.tuples(st.just("word"), st.integers(0, PLACES), st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
cuts = st.tuples(st.just("cut"), st.integers(0, PLACES), st.integers(1, 64))
splices = st.tuples(st.just("splice"), st.integers(0, PLACES), st.integers(0, PLACES))
ends = st.tuples(st.just("end"), st.integers(0, PLACES), st.just(0))
DAMAGE = st.lists(st.one_of(flips, words, cuts, splices, ends), min_size=1, max_size=8)


def damaged(data: bytes, damage: list[tuple[str, int, int]]) -> bytes:
    for how, place, value in damage:
        at = place * len(data) // (PLACES + 1)
        head, tail = data[:at], data[at:]
        if how == "flip" and tail:
            data = head + bytes([tail[0] ^ value]) + tail[1:]
        elif how == "word":
            data = head + value.to_bytes(4, "little") + tail[4:]
        elif how == "cut":
            data = head + tail[value:]
        elif how == "splice":
            start = value * len(data) // (PLACES + 1)
            data = head + data[start : start + 32] + tail
        elif how == "end":
            data = head
    return data


def requires_a_verdict(form: str, number: int, damage: list[tuple[str, int, int]], folder: Path) -> None:
    make, goods = GOOD[form]
    kind = make("damaged", damaged(goods[number % len(goods)], damage), "")
    started = time.process_time()
    scan, said = verdict_on(row_of(kind, folder))
    assert time.process_time() - started < SECONDS
    assert scan is None or np.isfinite(scan.image).all()
    for line in said:
        assert line.isprintable()
        assert kind.files[0][0] in line or "scan-1" in line
        assert str(folder) not in line


def verdict_on(row: dict[str, Any]) -> tuple[Scan | None, tuple[str, ...]]:
    """The scan with its warnings, or None and why; any other exception is the test's failure."""
    try:
        scan = load_scan(row)
    except ScanError as error:
        return None, (error.message,)
    return scan, scan.warnings


@pytest.mark.parametrize("form", GOOD)
@given(number=st.integers(0, 20), damage=DAMAGE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused(form, tmp_path, number, damage):
    requires_a_verdict(form, number, damage, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", GOOD)
@given(number=st.integers(0, 20), damage=DAMAGE)
@settings(max_examples=10_000, derandomize=False, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ten_thousand_damaged_files_are_read_or_refused(form, tmp_path, number, damage):
    requires_a_verdict(form, number, damage, tmp_path)


@given(damage=DAMAGE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_to_a_packed_volume_never_changes_a_voxel_in_silence(tmp_path, damage):
    data = damaged(nii_gz(), damage)
    whole = load_scan(row_of(packed("whole", nii_gz(), ""), tmp_path))
    scan, _ = verdict_on(row_of(packed("damaged", data, ""), tmp_path))
    assert scan is None or np.array_equal(scan.image, whole.image)
    assert scan is None or scan.grid == whole.grid


@given(
    content=st.binary(max_size=400),
    start=st.sampled_from([b"", b"\x1f\x8b\x08\0", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\x5c\1\0\0"]),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_were_never_a_file_are_refused(tmp_path, content, start):
    for make in (volume, image, slice_h5):
        with pytest.raises(ScanError):
            load_scan(row_of(make("noise", start + content, ""), tmp_path))
