"""DICOM: a series becomes a volume where it lies, whatever its coding; what is odd is refused, and no name ever gets out."""

import io
import json
import logging
import os
import struct
import tarfile
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pydicom.data
import pytest
from factory import affine, make_model, make_row, make_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

from brainseg import stages
from brainseg.config import SegmentConfig
from brainseg.errors import Code, ScanError
from brainseg.formats import Notes
from brainseg.formats.dicom import read_series
from brainseg.formats.dicom_elements import MAX_DEPTH, MAX_ELEMENTS, MAX_INFLATED_BYTES, read_elements
from brainseg.formats.dicom_pixels import judge_pixels, read_frame
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.geometry import Grid, to_canonical
from brainseg.manifest import index_archive
from brainseg.model import Prediction
from brainseg.scans import load_scan
from brainseg.tables import SCANS

_DATA = os.environ.get("BRAINSEG_DATA")
_BAD_INPUTS = Path(_DATA).resolve().parent / "bad-inputs" if _DATA else None

EXPLICIT, IMPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".1.99"))
RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000 = (f"1.2.840.10008.1.2.{end}" for end in ("5", "4.70", "4.80", "4.90"))
MR, UNDEFINED = "1.2.840.10008.5.1.4.1.1.4", 0xFFFFFFFF
LPS_OF_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORDERS = ["".join(o) for sides in product("LR", "PA", "IS") for o in permutations(sides)]

LOW = SegmentConfig(threshold=0.12)

Files = list[tuple[str, bytes]]


def encoded(data_set: Dataset, syntax: str) -> bytes:
    """The bytes of a file as pydicom writes it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(MR), UID("1.2.3.4")
    meta.TransferSyntaxUID = UID(syntax)
    data_set.file_meta = meta
    out = io.BytesIO()
    data_set.save_as(out, enforce_file_format=True)
    return out.getvalue()


def compressed(pixels: np.ndarray, syntax: str) -> bytes:
    """One plane as the codec of a transfer syntax writes it."""
    if syntax == RLE:
        planes = pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, pixels.itemsize).T
        parts = [imagecodecs.packbits_encode(plane.tobytes()) for plane in planes]
        starts = np.cumsum([64, *(len(part) for part in parts)])[:-1].tolist()
        return struct.pack("<16I", len(parts), *starts, *[0] * (15 - len(parts))) + b"".join(parts)
    if syntax == JPEG_2000:
        return bytes(imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True))
    plain = pixels.view(f"u{pixels.itemsize}")
    return bytes(imagecodecs.jpegls_encode(plain) if syntax == JPEG_LS else imagecodecs.jpeg_encode(plain, lossless=True))


def slice_set(pixels: np.ndarray, matrix: np.ndarray, syntax: str = EXPLICIT, **changes: Any) -> Dataset:
    """A classic MR image of one plane `(H, W)` whose voxel (0, 0) lies at the matrix's origin (RAS+, columns i, j, k)."""
    lps = LPS_OF_RAS @ matrix
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    data_set = Dataset()
    data_set.SOPClassUID, data_set.SOPInstanceUID = UID(MR), UID("1.2.3.4")
    data_set.Modality, data_set.SeriesInstanceUID = "MR", UID("1.2.3")
    data_set.PatientName, data_set.PatientID, data_set.PatientBirthDate = "A^B", "7", "19700101"
    data_set.ImagePositionPatient = [f"{x:.8g}" for x in lps[:3, 3]]
    data_set.ImageOrientationPatient = [f"{x:.9f}" for x in (lps[:3, :2] / spacing[:2]).T.reshape(-1)]
    data_set.PixelSpacing = [f"{x:.10g}" for x in spacing[1::-1]]
    data_set.SamplesPerPixel, data_set.PhotometricInterpretation = 1, "MONOCHROME2"
    data_set.Rows, data_set.Columns = pixels.shape
    data_set.BitsAllocated = data_set.BitsStored = 8 * pixels.itemsize
    data_set.HighBit, data_set.PixelRepresentation = data_set.BitsStored - 1, int(pixels.dtype.kind == "i")
    if syntax.startswith((RLE, "1.2.840.10008.1.2.4")):
        data_set.PixelData = encapsulate([compressed(pixels, syntax)])
    else:
        data_set.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == BIG else "<")).tobytes()
        data_set.PixelData += b"\0" * (len(data_set.PixelData) % 2)
    data_set["PixelData"].VR = "OB" if pixels.itemsize == 1 or syntax not in (EXPLICIT, IMPLICIT, BIG, DEFLATED) else "OW"
    for name, value in changes.items():
        if value is None:
            delattr(data_set, name)
        else:
            setattr(data_set, name, value)
    return data_set


def series(volume: np.ndarray, matrix: np.ndarray, syntax: str = EXPLICIT, **changes: Any) -> Files:
    """A volume `(D, H, W)` on an affine as the files of a series, last slice first."""
    files = []
    for k, plane in enumerate(volume):
        placed = matrix.copy()
        placed[:3, 3] = matrix[:3, 3] + k * matrix[:3, 2]
        files.append((f"{k}.dcm", encoded(slice_set(plane, placed, syntax, **changes), syntax)))
    return files[::-1]


def volume(shape=(5, 6, 7), dtype="int16", seed=0) -> np.ndarray:
    low, high = (-900, 900) if np.dtype(dtype).kind == "i" else (0, 250)
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def places(grid: Grid) -> np.ndarray:
    """Where each voxel lies: `(3, D, H, W)` in mm."""
    d, h, w = np.indices(grid.shape)
    return np.einsum("xi,idhw->xdhw", grid.matrix, np.stack([w, h, d, np.ones_like(d)]))[:3]


def refusal(files: Files) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_series(files, "series")
    return caught.value


def codes(files: Files) -> list[str]:
    return [line.split(":")[0] for line in read_series(files, "series").warnings]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), settings=LOW)


def job_of(model):
    return stages.Job("run", "model", LOW, "run-1", 1, model.fingerprint, "config-1", model.card)


def one(syntax: str = EXPLICIT, pixels: np.ndarray | None = None, **changes: Any) -> Files:
    plane = volume((1, 6, 8))[0] if pixels is None else pixels
    return [("one.dcm", encoded(slice_set(plane, affine(), syntax, **changes), syntax))]


def spliced(elements: bytes) -> Files:
    """A good explicit file with raw elements put before everything that follows group 8."""
    ((name, data),) = one()
    at = data.index(b"\x10\0\x10\0PN")
    return [(name, data[:at] + elements + data[at:])]


def raw(group: int, number: int, vr: bytes, value: bytes = b"", length: int | None = None) -> bytes:
    """One explicit element of a long value representation, whose length may lie."""
    return struct.pack("<HH2sHI", group, number, vr, 0, len(value) if length is None else length) + value


class TestWhereItLies:
    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(ORDERS),
        st.tuples(*[st.floats(0.3, 6)] * 3),
        st.tuples(*[st.floats(-200, 200)] * 3),
        st.tuples(*[st.floats(-0.4, 0.4)] * 3),
        st.tuples(*[st.integers(2, 5)] * 3),
    )
    def test_every_voxel_lies_where_the_same_nifti_has_it(self, order, spacing, origin, turn, shape):
        a, b, c = turn
        x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
        matrix = affine(order, spacing)
        matrix[:3, :3] = x @ y @ z @ matrix[:3, :3]
        matrix[:3, 3] = origin
        stored, grid = volume(shape), Grid.of(shape, matrix)
        found = read_series(series(stored, matrix), "series")
        mirrored = np.linalg.det(matrix[:3, :3]) < 0
        back = found.array[::-1] if mirrored != (np.linalg.det(found.grid.matrix[:3, :3]) < 0) else found.array
        assert np.array_equal(back, stored)
        assert np.array_equal(to_canonical(found.array, found.grid), to_canonical(stored, grid))
        assert to_canonical(places(found.grid), found.grid) == pytest.approx(to_canonical(places(grid), grid), abs=1e-4)

    def test_files_may_come_in_any_order(self):
        files = series(volume(), affine("LPS", (1.0, 2.0, 3.0)))
        one_way, other = read_series(files, "series"), read_series([files[i] for i in (3, 0, 4, 2, 1)], "series")
        assert np.array_equal(one_way.array, other.array)
        assert one_way.grid == other.grid
        assert one_way.grid.spacing_mm == pytest.approx((3.0, 2.0, 1.0))

    def test_a_lone_slice_is_as_thick_as_it_says(self):
        assert read_series(one(SliceThickness="4"), "series").grid.spacing_mm == pytest.approx((4, 1, 1))
        assert read_series(one(SliceThickness="4", SpacingBetweenSlices="5"), "series").grid.spacing_mm[0] == pytest.approx(5)
        assert codes(one()) == ["SPACING"]

    def test_frames_of_one_file_are_slices(self):
        stored = volume()
        enhanced = slice_set(stored[0], affine(), ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
        shared, plane, measures = Dataset(), Dataset(), Dataset()
        plane.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [2, 1]
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
        enhanced.SharedFunctionalGroupsSequence = [shared]
        frames = []
        for k in (3, 0, 1, 4, 2):
            frame, position = Dataset(), Dataset()
            position.ImagePositionPatient = [0, 0, 3 * k]
            frame.PlanePositionSequence = [position]
            frames.append(frame)
        enhanced.PerFrameFunctionalGroupsSequence, enhanced.NumberOfFrames = frames, 5
        enhanced.PixelData = stored[[3, 0, 1, 4, 2]].tobytes()
        for syntax in (EXPLICIT, IMPLICIT):
            found = read_series([("all.dcm", encoded(enhanced, syntax))], "series")
            assert np.array_equal(found.array, stored)
            assert found.grid.spacing_mm == pytest.approx((3, 2, 1))
        del enhanced.PerFrameFunctionalGroupsSequence[-1]
        assert refusal([("all.dcm", encoded(enhanced, EXPLICIT))]).code == Code.BAD_HEADER


class TestWhatIsInIt:
    @pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, DEFLATED, RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000])
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
    def test_every_coding_gives_the_same_voxels(self, syntax, dtype):
        stored = volume(dtype=dtype)
        found = read_series(series(stored, affine(), syntax), "series")
        assert found.array.dtype == stored.dtype
        assert np.array_equal(found.array, stored)
        assert found.warnings == ()

    @pytest.mark.parametrize(
        "name", ["CT_small", "MR_small_RLE", "MR_small_bigendian", "rtdose_rle", "rtdose_expb", "image_dfl"]
    )
    def test_other_peoples_files_decode_as_pydicom_decodes_them(self, name):
        path = pydicom.data.get_testdata_file(f"{name}.dcm")
        notes = Notes(name)
        file = read_elements(Path(path).read_bytes(), notes)
        plan = judge_pixels(file, notes)
        frames = np.stack([read_frame(file, plan, index, notes) for index in range(plan.frames)])
        assert np.array_equal(frames.squeeze(), pydicom.dcmread(path).pixel_array)

    @pytest.mark.parametrize("name", ["MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_implicit"])
    def test_one_image_in_many_codings_is_one_image(self, name):
        files = [(n, Path(pydicom.data.get_testdata_file(f"{n}.dcm")).read_bytes()) for n in ("MR_small", name)]
        plain, other = (read_series([file], "series") for file in files)
        assert np.array_equal(plain.array, other.array)
        assert plain.grid == other.grid

    def test_slope_and_intercept_are_those_of_each_slice(self):
        stored = volume((2, 4, 4))
        files = series(stored, affine(), RescaleSlope="1", RescaleIntercept="0")
        assert read_series(files, "series").array.dtype == np.int16
        second = series(stored, affine(), RescaleSlope="2.5", RescaleIntercept="-10")
        found = read_series([files[1], second[0]], "series").array
        assert found.dtype == np.float32
        assert np.array_equal(found, np.stack([stored[0], stored[1] * np.float32(2.5) - 10]).astype(np.float32))

    def test_unused_bits_are_cleared_and_the_sign_is_extended(self):
        plane = np.array([[0x0FFF, 0x1800], [0xF001, 0x0800]], np.uint16)
        twelve = {"BitsStored": 12, "HighBit": 11, "SliceThickness": "1"}
        assert read_series(one(pixels=plane, **twelve), "s").array[0].tolist() == [[0xFFF, 0x800], [1, 0x800]]
        signed = read_series(one(pixels=plane.view(np.int16), **twelve), "s").array[0]
        assert signed.tolist() == [[-1, -2048], [1, -2048]]

    def test_white_as_lowest_is_inverted_within_the_stored_bits(self):
        changes = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, "SliceThickness": "1"}
        files = one(pixels=np.array([[0, 4095], [1, 7]], np.uint16), **changes)
        assert read_series(files, "s").array[0].tolist() == [[4095, 0], [4094, 4088]]
        assert codes(files) == ["INVERTED"]

    def test_odd_beginnings_and_ends_are_warned_of(self):
        ((name, data),) = one(SliceThickness="1")
        assert codes([(name, data[132:])]) == ["BAD_MAGIC"]
        assert codes([(name, data[128:])]) == ["BAD_MAGIC"]
        assert codes([(name, b"MZ" + data[2:])]) == ["PREAMBLE"]
        assert codes([(name, b"II*\0" + data[4:])]) == []
        assert codes([(name, data + b"more" * 9)]) == ["TRAILING_DATA"]
        assert codes([(name, data + raw(0xFFFC, 0xFFFC, b"OB", bytes(9)))]) == []

    def test_elements_coded_otherwise_than_declared_are_read_as_they_are(self):
        ((name, data),) = one(IMPLICIT, SliceThickness="1")
        lying = data.replace(b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1\0")
        lying = lying.replace(b"UI\x12\0" + b"1.2.840.10008.1.2.1\0", b"UI\x14\0" + b"1.2.840.10008.1.2.1\0")
        assert codes([(name, lying)]) == ["BAD_HEADER"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"ImagePositionPatient": None}, Code.NO_GEOMETRY),
            ({"ImageOrientationPatient": None}, Code.NO_GEOMETRY),
            ({"PixelSpacing": None}, Code.NO_GEOMETRY),
            ({"ImagePositionPatient": ["1", "2"]}, Code.NO_GEOMETRY),
            ({"ImagePositionPatient": ["1e999", "2", "3"]}, Code.NO_GEOMETRY),
            ({"PixelSpacing": ["0", "1"]}, Code.BAD_SPACING),
            ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, Code.BAD_AFFINE),
            ({"ImageOrientationPatient": ["0"] * 6}, Code.BAD_AFFINE),
            ({"RescaleSlope": "0"}, Code.BAD_SCALE),
            ({"RescaleIntercept": "1e38"}, Code.BAD_SCALE),
            ({"Rows": 4000}, Code.TRUNCATED),
            ({"Rows": 0}, Code.BAD_HEADER),
            ({"Rows": 65535, "Columns": 65535}, Code.TOO_LARGE),
            ({"NumberOfFrames": "2147483647"}, Code.TOO_LARGE),
            ({"NumberOfFrames": "2"}, Code.TRUNCATED),
            ({"BitsAllocated": 12}, Code.UNSUPPORTED),
            ({"BitsStored": 12}, Code.BAD_HEADER),
            ({"BitsStored": 0, "HighBit": 0}, Code.BAD_HEADER),
            ({"PixelRepresentation": None}, Code.BAD_HEADER),
            ({"SamplesPerPixel": 3}, Code.NOT_GREY),
            ({"PhotometricInterpretation": "PALETTE COLOR"}, Code.NOT_GREY),
            ({"PixelData": None}, Code.NOT_IMAGE),
            ({"Modality": "CT"}, Code.UNSUPPORTED),
            ({"ModalityLUTSequence": [Dataset()]}, Code.UNSUPPORTED),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_a_header_that_promises_what_is_not_there(self, changes, code):
        assert refusal(one(**changes)).code == code

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (b"", Code.EMPTY_FILE),
            (b"<html>no</html>", Code.NOT_DICOM),
            (b"version https://git-lfs.github.com/spec/v1", Code.NOT_DICOM),
            (bytes(128) + b"DICM", Code.NOT_IMAGE),
            (bytes(132), Code.NOT_DICOM),
        ],
    )
    def test_what_is_no_dicom(self, content, code):
        assert refusal([("x.dcm", content)]).code == code

    def test_no_files_at_all(self):
        assert refusal([]).code == Code.MISSING_FILE

    @pytest.mark.parametrize("ends", [".4.201", ".4.100", ".1.98", ".777"])
    def test_a_coding_it_cannot_decode_is_named(self, ends):
        ((name, data),) = one()
        uid = b"1.2.840.10008.1.2" + ends.encode()
        uid += b"\0" * (len(uid) % 2)
        known = b"UI\x14\0" + EXPLICIT.encode() + b"\0"
        assert data.count(known) == 1
        error = refusal([(name, data.replace(known, b"UI" + struct.pack("<H", len(uid)) + uid))])
        assert error.code == Code.UNSUPPORTED
        assert uid.decode().strip("\0") in error.message

    def test_pixels_plain_where_they_should_be_compressed(self):
        ((name, data),) = one()
        plain = data.replace(b"UI\x14\0" + EXPLICIT.encode() + b"\0", b"UI\x16\0" + JPEG_LS.encode())
        assert refusal([(name, plain)]).code == Code.CORRUPT

    @pytest.mark.parametrize("syntax", [RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000])
    def test_a_frame_that_is_no_frame(self, syntax):
        for junk in (b"", bytes(64), b"\xff\xd8" * 40, b"\xff\x4f\xff\x51" * 20, np.random.default_rng(1).bytes(400)):
            data_set = slice_set(volume((1, 6, 8))[0], affine(), syntax, PixelData=encapsulate([junk or b"\0\0"]))
            assert refusal([("x.dcm", encoded(data_set, syntax))]).code == Code.CORRUPT

    @pytest.mark.parametrize("syntax", [RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000])
    @pytest.mark.parametrize("shape", [(6, 7), (7, 8), (300, 400)])
    def test_a_frame_of_another_size_than_the_header_says(self, syntax, shape):
        frame = compressed(np.zeros(shape, np.int16), syntax)
        data_set = slice_set(volume((1, 6, 8))[0], affine(), syntax, PixelData=encapsulate([frame]))
        assert refusal([("x.dcm", encoded(data_set, syntax))]).code == Code.CORRUPT


class TestSeries:
    def test_a_gap(self):
        files = series(volume((7, 4, 4)), affine(spacing=(1, 1, 2.5)))
        error = refusal([file for file in files if file[0] != "3.dcm"])
        assert error.code == Code.MISSING_SLICE
        assert "6 slices 2.5 mm apart, but 5 mm between two of them" in error.message

    def test_every_other_slice_gone_is_suspected(self):
        files = series(volume((7, 4, 4)), affine(), SpacingBetweenSlices="1")
        assert codes(files) == []
        assert codes(files[::2]) == ["MISSING_SLICE"]

    def test_a_slice_twice(self):
        files = series(volume(), affine())
        assert refusal([*files, ("copy.dcm", files[0][1])]).code == Code.DUPLICATE_SLICE

    def test_two_orientations(self):
        axial, sagittal = series(volume(), affine("LPS")), series(volume(), affine("PSL"))
        assert refusal(axial + sagittal[:1]).code == Code.AFFINE_MISMATCH

    def test_two_spacings(self):
        fine, coarse = series(volume(), affine()), series(volume(), affine(spacing=(2, 2, 1)))
        assert refusal(fine[1:] + coarse[:1]).code == Code.AFFINE_MISMATCH

    def test_two_sizes_and_two_types(self):
        small, large = series(volume(), affine()), series(volume((5, 6, 9)), affine())
        assert refusal(small[1:] + large[:1]).code == Code.SHAPE_MISMATCH
        other = series(volume(dtype="uint8"), affine())
        assert refusal(small[1:] + other[:1]).code == Code.BAD_DATATYPE

    def test_two_series(self):
        mine, other = series(volume(), affine()), series(volume(), affine(), SeriesInstanceUID=UID("1.2.9"))
        assert refusal(mine[1:] + other[:1]).code == Code.MIXED_SERIES

    def test_uneven_steps(self):
        files = series(volume(), affine())
        moved = series(volume(), affine() + np.array([[0, 0, 0, 0]] * 2 + [[0, 0, 0, 0.3]] + [[0, 0, 0, 0]]))
        assert refusal([*files[:2], moved[2], *files[3:]]).code == Code.BAD_SPACING

    def test_a_slice_out_of_line_and_a_stack_aslant(self):
        files = series(volume(), affine())
        shift = np.zeros((4, 4))
        shift[0, 3] = 2
        assert refusal([*files[:2], series(volume(), affine() + shift)[2], *files[3:]]).code == Code.BAD_SPACING
        tilted = affine()
        tilted[1, 2] = 0.4
        assert refusal(series(volume(), tilted)).code == Code.BAD_AFFINE

    def test_all_slices_together_may_not_claim_too_much(self):
        claims = {"Rows": 9000, "Columns": 9000}
        files = [(f"{k}", data) for k in range(3) for _, data in one(RLE, **claims, ImagePositionPatient=[0, 0, k])]
        tracemalloc.start()
        assert refusal(files).code == Code.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


class TestAbuse:
    def test_nested_too_deep(self):
        for length in (UNDEFINED, None):
            deep = b""
            for _ in range(MAX_DEPTH + 1000):
                item = struct.pack("<HHI", 0xFFFE, 0xE000, len(deep)) + deep
                if length:
                    item = struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED) + deep + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
                    item += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
                deep = raw(0x5200, 0x9229, b"SQ", item, length)
            ((name, data),) = spliced(deep)
            assert refusal([(name, data)]).code == Code.BAD_HEADER

    def test_an_undefined_length_without_an_end(self):
        for vr in (b"SQ", b"UN"):
            ((name, data),) = spliced(raw(0x0008, 0x1140, vr, length=UNDEFINED))
            assert refusal([(name, data)]).code in (Code.CORRUPT, Code.TRUNCATED)
            item = struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
            assert refusal(spliced(raw(0x0008, 0x1140, vr, item, UNDEFINED))).code in (Code.CORRUPT, Code.TRUNCATED)

    def test_a_sequence_of_unknown_representation_is_passed_by(self):
        inner = struct.pack("<HHI", 0x0010, 0x0010, 4) + b"A^B "
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
        end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        assert codes(spliced(raw(0x0009, 0x1010, b"UN", item + end, UNDEFINED))) == ["PHI", "SPACING"]

    @pytest.mark.parametrize("length", [1 << 20, 0xFFFFFFFE])
    def test_an_element_longer_than_the_file(self, length):
        assert refusal(spliced(raw(0x0009, 0x1001, b"OB", length=length))).code == Code.TRUNCATED

    def test_more_elements_than_an_image_has(self):
        many = struct.pack("<HH2sH", 0x0009, 0x0010, b"LO", 0) * (MAX_ELEMENTS + 1)
        assert refusal(spliced(many)).code == Code.TOO_LARGE

    def test_geometry_said_twice(self):
        twice = struct.pack("<HH2sH", 0x0028, 0x0010, b"US", 2) + b"\x06\0"
        assert refusal(spliced(twice)).code == Code.CORRUPT

    def test_a_deflated_bomb(self):
        ((name, data),) = one(DEFLATED)
        at = data.index(DEFLATED.encode()) + len(DEFLATED)
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        zeros = bytes(MAX_INFLATED_BYTES // 8)
        bomb = b"".join(packer.compress(zeros) for _ in range(9)) + packer.flush()
        tracemalloc.start()
        assert refusal([(name, data[:at] + bomb)]).code == Code.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_INFLATED_BYTES
        tracemalloc.stop()

    def test_a_deflate_stream_cut_short_or_damaged(self):
        ((name, data),) = one(DEFLATED)
        assert refusal([(name, data[:-8])]).code == Code.TRUNCATED
        at = data.index(DEFLATED.encode()) + len(DEFLATED)
        assert refusal([(name, data[:at] + b"\xff" * 50)]).code == Code.CORRUPT

    def test_an_rle_segment_that_unpacks_to_more_than_the_picture(self):
        bomb = struct.pack("<16I", 2, 64, 64 + 4000, *[0] * 13) + b"\x81\0" * 4000
        data_set = slice_set(volume((1, 6, 8))[0], affine(), RLE, PixelData=encapsulate([bomb]))
        assert refusal([("x.dcm", encoded(data_set, RLE))]).code == Code.CORRUPT

    def test_a_jpeg_that_kills_a_careless_decoder(self):
        frame = compressed(volume((1, 6, 8))[0], JPEG_LOSSLESS)
        assert frame.count(b"\xff\xc4") == 1
        hierarchical = encapsulate([frame.replace(b"\xff\xc4", b"\xff\xc5")])
        data_set = slice_set(volume((1, 6, 8))[0], affine(), JPEG_LOSSLESS, PixelData=hierarchical)
        assert refusal([("x.dcm", encoded(data_set, JPEG_LOSSLESS))]).code == Code.CORRUPT

    @settings(max_examples=200, deadline=None)
    @given(
        st.sampled_from([EXPLICIT, IMPLICIT, BIG, DEFLATED, RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000]),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4),
        st.floats(0, 1),
        st.booleans(),
    )
    def test_whatever_was_done_to_a_file_it_is_read_or_refused(self, syntax, flips, cut, whole):
        ((name, data),) = GOOD[syntax]
        broken = bytearray(data)
        for place, change in flips:
            broken[128 + int(place * (len(data) - 128))] ^= change
        content = bytes(broken[: None if whole else int(cut * len(data))])
        with suppress(ScanError):
            found = read_series([(name, content)], "series")
            assert found.array.shape == found.grid.shape
            assert found.grid.affine is not None


class TestNames:
    CANARY = "CANARY"

    def telling(self, **changes: Any) -> Files:
        """A slice in which every text that is not needed says CANARY."""
        texts = ["PatientName", "PatientID", "PatientComments", "OtherPatientIDs", "StudyDescription", "SeriesDescription"]
        texts += ["ImageComments", "InstitutionName", "ReferringPhysicianName", "AccessionNumber", "StudyID", "ProtocolName"]
        data_set = slice_set(volume((1, 6, 8))[0], affine(), **dict.fromkeys(texts, self.CANARY), **changes)
        block = data_set.private_block(0x0011, f"{self.CANARY} 1", create=True)
        block.add_new(1, "LO", self.CANARY)
        block.add_new(2, "UN", self.CANARY.encode())
        inner = Dataset()
        inner.PatientName = self.CANARY
        data_set.ReferencedPatientSequence = [inner]
        data_set.BurnedInAnnotation, data_set.PatientIdentityRemoved = "YES", "NO"
        return [("0.dcm", encoded(data_set, EXPLICIT))]

    def broken(self) -> list[Files]:
        """The same with the canary where a number, a code or a UID is expected, and with damage."""
        ((name, data),) = self.telling()
        swaps = [
            (b"1.000000000", b"CANARY00000"),
            (b"MONOCHROME2 ", b"CANARY 4 5 6"),
            (b"CS\x02\0MR", b"CS\x02\0CA"),
            (b"UI\x06\x001.2.3\0", b"UI\x06\0CANARY"),
        ]
        swaps += [(b"1.2.840.10008.1.2.1\0", b"CANARYCANARYCANARYCA"), (b"OW\0\0", b"CANA")]
        assert all(a in data for a, _ in swaps)
        return [*([(name, data.replace(a, b))] for a, b in swaps), [(name, data[: len(data) // 2])]]

    def test_a_warning_says_how_much_may_name_a_person_and_never_what(self):
        found = read_series(self.telling(SliceThickness="1"), "series")
        (line,) = found.warnings
        assert line.startswith("PHI: 0.dcm: found private elements (2), names, addresses or free text (3), a picture")

    def test_nothing_that_names_a_person_leaves_the_files(self, model, tmp_path, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        folder = tmp_path / "p" / "t1"
        folder.mkdir(parents=True)
        said = []
        for files in [self.telling(), *self.broken()]:
            for name, data in files:
                (folder / name).write_bytes(data)
            row = index_archive(str(tmp_path), layout="dicom")[0].to_pylist()[0]
            work = stages.decode(row, with_label=True)
            if work.scan is not None:
                trust = {"mean_probability": 0.9, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
                work = replace(work, prediction=Prediction(np.ones(work.scan.grid.shape, np.uint8), (trust,), 0.5))
            done = stages.finish(work, job_of(model))
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist([done], schema=SCANS), sink, compression="none")
            said.append(f"{done} {sink.getvalue()!r}")
        out = capfd.readouterr()
        assert ["'failed'" in text for text in said] == [False, True, True, True, False, True, True, True]
        assert "PHI" in said[0]
        assert self.CANARY not in "".join([*said, caplog.text, out.out, out.err])


class TestTheWholeWay:
    ORDERS = ("LPS", "RAS", "PSL", "LAS")

    def archives(self, root: Path) -> None:
        """The same heads as DICOM series and as NIfTI, labels as NIfTI."""
        for order in self.ORDERS:
            scan = make_scan(order=order, spacing=(1.0, 1.5, 2.0), name=order)
            whole = np.zeros((2, *scan.grid.shape), scan.image.dtype)
            whole[:, *(slice(a, b) for a, b in scan.box)] = scan.image
            for modality, stored in zip(scan.modalities, whole, strict=True):
                folder = root / "dicom" / order / modality
                folder.mkdir(parents=True)
                for name, data in series(stored, scan.grid.matrix):
                    (folder / name).write_bytes(data)
                (root / "nifti").mkdir(exist_ok=True)
                (root / "nifti" / f"{order}_{modality}.nii.gz").write_bytes(write_nifti(stored, scan.grid))
            label = write_nifti(scan.label, scan.grid)
            (root / "nifti" / f"{order}_seg.nii.gz").write_bytes(label)
            if np.linalg.det(scan.grid.matrix[:3, :3]) < 0:  # where a series is stacked the other way
                last = scan.grid.matrix @ np.diag([1, 1, -1, 1])
                last[:3, 3] += (len(scan.label) - 1) * scan.grid.matrix[:3, 2]
                label = write_nifti(scan.label[::-1], Grid.of(scan.label.shape, last))
            (root / "dicom" / order / "x-seg.nii.gz").write_bytes(label)

    def test_a_series_is_segmented_as_the_same_nifti_is_and_its_mask_lies_on_its_grid(self, model, tmp_path):
        self.archives(tmp_path)
        rows = {
            name: sorted(index_archive(str(tmp_path / name), label_map="binary")[0].to_pylist(), key=lambda row: row["scan_id"])
            for name in ("dicom", "nifti")
        }
        assert [row["reader"] for row in rows["dicom"]] == ["dicom"] * 4
        for series_row, volume_row in zip(rows["dicom"], rows["nifti"], strict=True):
            work = [stages.decode(row, with_label=True) for row in (series_row, volume_row)]
            one, other = (w.scan for w in work)
            assert (one.background, one.duplicated, one.warnings) == (other.background, other.duplicated, ())
            assert np.array_equal(to_canonical(one.image, one.grid), to_canonical(other.image, other.grid))
            assert np.array_equal(to_canonical(one.label, one.grid), to_canonical(other.label, other.grid))
            far = to_canonical(places(one.grid), one.grid) - to_canonical(places(other.grid), other.grid)
            assert np.abs(far).max() < 1e-4
            masks = []
            for predicted, scan in zip(stages.predict(model, work), (one, other), strict=True):
                done = stages.finish(predicted, job_of(model))
                assert done["status"] == "ok"
                mask = read_nifti(done["mask"], "mask")
                assert mask.grid.same_as(scan.grid)
                masks.append(to_canonical(mask.array, mask.grid))
            assert np.array_equal(*masks)
            assert masks[0].any()

    def test_equal_modalities_and_modalities_apart_are_told(self, tmp_path):
        stored = volume()
        for modality, matrix in {"t1": affine(), "t2": affine(), "flair": affine(spacing=(1, 1, 2))}.items():
            (tmp_path / "p" / modality).mkdir(parents=True)
            for name, data in series(stored, matrix):
                (tmp_path / "p" / modality / name).write_bytes(data)
        (row,) = index_archive(str(tmp_path))[0].to_pylist()
        with pytest.raises(ScanError, match=r"found flair is .* expected modalities and label on one grid") as caught:
            load_scan(row)
        assert caught.value.code == Code.AFFINE_MISMATCH
        assert load_scan(row | {"modalities": ["t1"]}).image.shape == (1, *stored.shape)
        with pytest.raises(ScanError, match="found t2 equal to an earlier modality") as caught:
            load_scan(row | {"modalities": ["t1", "t2"]})
        assert caught.value.code == Code.DUPLICATE_CONTENT
        with pytest.raises(ScanError, match="t1c") as caught:
            load_scan(row | {"modalities": ["t1", "t1c"]})
        assert caught.value.code == Code.MISSING_MODALITY


def bad_inputs():
    if _BAD_INPUTS is None or not (_BAD_INPUTS / "manifest.json").is_file():
        return [pytest.param({}, marks=pytest.mark.skip(reason="no bad-inputs beside the folder that BRAINSEG_DATA names"))]
    entries = json.loads((_BAD_INPUTS / "manifest.json").read_text())
    return [pytest.param(entry, id=entry["kind"]) for entry in entries if entry["family"] == "dicom"]


class TestTheCollection:
    @pytest.mark.parametrize("entry", bad_inputs())
    def test_every_kind_gets_its_verdict(self, entry, tmp_path):
        with tarfile.open(_BAD_INPUTS / "inputs.tar.gz") as archive:
            members = [m for m in archive if m.name.removeprefix("./").startswith(entry["path"])]
            archive.extractall(tmp_path, members, filter="data")
        place = tmp_path / entry["path"]
        paths = sorted(place.iterdir()) if place.is_dir() else [place]
        sources = [
            {"uri": str(p), "role": "image", "modality": "t1", "index": i, "size_bytes": 1, "tag": ""}
            for i, p in enumerate(paths)
        ]
        row = make_row(sources=sources, modalities=["t1"], reader="dicom", has_label=False)
        if entry["want"] == "quarantine":
            with pytest.raises(ScanError) as caught:
                load_scan(row)
            assert caught.value.code == entry["code"]
            return
        found = [line.split(":")[0] for line in load_scan(row).warnings]
        assert found == ([entry["code"]] if entry["code"] else [])

    def test_the_truncated_one_and_the_mangled_one(self, data_dir):
        for name, code in {"MR_truncated.dcm": Code.TRUNCATED, "no_meta.dcm": Code.NOT_DICOM}.items():
            assert refusal([(name, (data_dir / "broken" / name).read_bytes())]).code == code


GOOD = {s: one(s) for s in (EXPLICIT, IMPLICIT, BIG, DEFLATED, RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000)}
