"""NIfTI: nibabel is the oracle; what is damaged is refused with a reason, never read as something else."""

import gzip
import io
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats.gzipped import RUN
from brainseg.formats.nifti import read_nifti, write_nifti
from brainseg.geometry import Grid

LPS = np.array([[-0.5, 0, 0, 12], [0, -0.75, 0, 10], [0, 0, 2, -8], [0, 0, 0, 1.0]])
SHAPES = npst.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7)
KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
ARRAYS = st.sampled_from(KINDS).flatmap(lambda kind: npst.arrays(kind, SHAPES, elements=_values(kind)))


def _values(kind: str) -> st.SearchStrategy:
    if kind.startswith("f"):
        return st.floats(-1e6, 1e6, width=32)
    return st.integers(np.iinfo(kind).min, np.iinfo(kind).max)


@st.composite
def affines(draw) -> NDArray[np.float64]:
    """Any rotation with any handedness, voxels of 0.3 to 8 mm, an origin within two metres: float32 throughout."""
    quaternion = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1)))
    rotation = nib.quaternions.quat2mat(quaternion)
    spacing = np.array(draw(st.tuples(*[st.floats(0.3, 8)] * 3)))
    flips = np.array(draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * spacing * flips
    matrix[:3, 3] = draw(st.tuples(*[st.floats(-2000, 2000, width=32)] * 3))
    return matrix.astype(np.float32).astype(np.float64)


def head(shape: tuple[int, int, int] = (4, 5, 6)) -> NDArray[np.int16]:
    """A small volume in which every voxel differs."""
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def packed(array: NDArray | None = None) -> bytes:
    """A well-formed `.nii.gz` of one member."""
    array = head() if array is None else array
    return write_nifti(array, Grid.of(array.shape, LPS))


def patched(at: int, layout: str, *values: float) -> bytes:
    """A well-formed plain `.nii`, but for some header fields."""
    data = bytearray(gzip.decompress(packed()))
    struct.pack_into("<" + layout, data, at, *values)
    return bytes(data)


def by_nibabel(data: bytes) -> nib.Nifti1Image:
    data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Image
    return kind.from_bytes(data)


def codes(warnings: tuple[str, ...]) -> list[str]:
    return [line.split(":")[0] for line in warnings]


def refusal(data: bytes, name: str = "x.nii") -> Code:
    with pytest.raises(ScanError) as caught:
        read_nifti(data, name)
    assert str(caught.value).startswith(f"{name}: ")
    return caught.value.code


# --- agreement with nibabel and with ourselves


@given(ARRAYS, affines())
@settings(max_examples=40, deadline=None)
def test_what_is_written_opens_in_nibabel_with_equal_voxels_and_affine(array, affine):
    image = by_nibabel(write_nifti(array, Grid.of(array.shape, affine)))
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).T, array)
    np.testing.assert_array_equal(image.affine, affine)
    assert image.get_data_dtype() == array.dtype
    assert int(image.header["sform_code"]) == 1


@given(ARRAYS, affines())
@settings(max_examples=40, deadline=None)
def test_reading_undoes_writing_and_writing_is_deterministic(array, affine):
    grid = Grid.of(array.shape, affine)
    data = write_nifti(array, grid)
    back = read_nifti(data, "x.nii.gz")
    assert back.array.dtype == array.dtype
    np.testing.assert_array_equal(back.array, array)
    assert back.grid == grid
    assert write_nifti(array.copy(), grid) == data


@given(ARRAYS, affines(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_file_of_nibabel_reads_as_nibabel_reads_it(array, affine, big_endian, second_version, pack):
    kind, header = (nib.Nifti2Image, nib.Nifti2Header) if second_version else (nib.Nifti1Image, nib.Nifti1Header)
    empty = header(endianness=">" if big_endian else "<")
    empty.set_data_dtype(array.dtype)
    image = kind(array.T, affine, empty)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    ours = read_nifti(gzip.compress(data) if pack else data, "x")
    oracle = by_nibabel(data)
    np.testing.assert_array_equal(ours.array, np.asanyarray(oracle.dataobj).T)
    np.testing.assert_allclose(ours.grid.matrix, oracle.affine, atol=1e-6)
    assert ours.array.dtype == array.dtype
    assert ours.array.dtype.isnative


ALMOST_HALF_A_TURN = np.array(
    [[1, 0, 0, 0], [0, -0.999999166, 5.11999801e-3, 0], [0, -1.2799995e-3, -3.99999666, 0], [0, 0, 0, 1]]
)


@given(affines())
@example(ALMOST_HALF_A_TURN)
@settings(max_examples=40, deadline=None)
def test_a_qform_alone_places_the_volume_where_nibabel_does(affine):
    image = nib.Nifti1Image(head().T, None)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    ours = read_nifti(image.to_bytes(), "x")
    np.testing.assert_allclose(ours.grid.matrix, image.header.get_qform(), atol=1e-6)


@pytest.mark.parametrize(("slope", "inter"), [(2.0, 10.0), (0.001, 0.0), (1.0, -1024.0), (-1.0, 0.0)])
def test_slope_and_intercept_are_applied_as_nibabel_does_in_float32(slope, inter):
    data = patched(112, "2f", slope, inter)
    ours = read_nifti(data, "x")
    assert ours.array.dtype == np.float32
    np.testing.assert_allclose(ours.array, by_nibabel(data).get_fdata().T, rtol=1e-6)


@pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (0.0, 0.0), (0.0, 7.0)])
def test_voxels_without_a_scale_keep_their_stored_type(slope, inter):
    ours = read_nifti(patched(112, "2f", slope, inter), "x")
    assert ours.array.dtype == np.int16
    np.testing.assert_array_equal(ours.array, head())
    assert ours.warnings == ()


def test_voxels_are_a_view_of_the_file_and_not_a_copy():
    data = patched(112, "2f", 1.0, 0.0)
    assert np.shares_memory(read_nifti(data, "x.nii").array, np.frombuffer(data, np.uint8))


def test_an_unknown_affine_is_written_as_unknown():
    back = read_nifti(write_nifti(head(), Grid.of((4, 5, 6))), "x.nii.gz")
    assert codes(back.warnings) == ["NO_ORIENTATION"]


def test_booleans_are_written_as_bytes_and_what_nifti_lacks_is_refused():
    assert read_nifti(write_nifti(head() > 3, Grid.of((4, 5, 6), LPS)), "x").array.dtype == np.uint8
    for array, shape in ((head().astype(np.complex64), (4, 5, 6)), (head(), (5, 4, 6))):
        with pytest.raises(ValueError, match="cannot write"):
            write_nifti(array, Grid.of(shape, LPS))


def test_lengths_in_micrometres_become_millimetres():
    ours = read_nifti(patched(123, "B", 3), "x")
    np.testing.assert_allclose(ours.grid.spacing_mm, (0.002, 0.00075, 0.0005))
    assert "SPACING" in codes(ours.warnings)


# --- gzip


@given(st.integers(0, len(packed()) - 1))
@settings(max_examples=40, deadline=None)
def test_no_beginning_of_a_packed_file_is_accepted(length):
    assert refusal(packed()[:length]) in (Code.TRUNCATED, Code.EMPTY_FILE, Code.NOT_NIFTI)


@given(st.integers(0, len(packed()) * 8 - 1))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_in_a_packed_file_never_changes_a_voxel(bit):
    data = bytearray(packed())
    data[bit // 8] ^= 1 << bit % 8
    try:
        found = read_nifti(bytes(data), "x")
    except ScanError:
        return
    np.testing.assert_array_equal(found.array, head())


@given(st.integers(1, 600), st.integers(0, 700))
@settings(max_examples=30, deadline=None)
def test_members_and_zero_padding_are_legal_gzip(cut, padding):
    plain = gzip.decompress(packed())
    data = gzip.compress(plain[:cut]) + gzip.compress(plain[cut:]) + bytes(padding)
    found = read_nifti(data, "x.nii.gz")
    np.testing.assert_array_equal(found.array, head())
    assert found.warnings == ()


@pytest.mark.parametrize("surplus", [packed() + b"junk", gzip.compress(gzip.decompress(packed()) + b"more")])
def test_what_follows_the_voxels_is_ignored_with_a_warning(surplus):
    found = read_nifti(surplus, "x.nii.gz")
    np.testing.assert_array_equal(found.array, head())
    assert codes(found.warnings) == ["TRAILING_DATA"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (packed()[:-8] + bytes(4) + packed()[-4:], Code.CORRUPT_GZIP),
        (packed()[:-4] + bytes(4), Code.CORRUPT_GZIP),
        (gzip.compress(packed()), Code.BAD_MAGIC),
    ],
    ids=["wrong CRC", "wrong length", "packed twice"],
)
def test_damaged_packing_is_named(data, code):
    assert refusal(data) is code


def zeros(mebibytes: int) -> bytes:
    return gzip.compress(bytes(1 << 20), compresslevel=1) * mebibytes


def test_a_stream_that_never_ends_costs_neither_memory_nor_time():
    data = packed() + zeros(200)
    tracemalloc.start()
    assert refusal(data) is Code.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(("side", "code"), [(3000, Code.TOO_LARGE), (500, Code.TRUNCATED)])
def test_a_giant_claim_is_refused_before_it_is_allocated(side, code):
    data = gzip.compress(patched(42, "3h", side, side, side))
    tracemalloc.start()
    assert refusal(data) is code
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- headers


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (patched(0, "i", 347), Code.BAD_HEADER),
        (patched(344, "4s", b"ni1\0"), Code.BAD_MAGIC),
        (patched(344, "4s", bytes(4)), Code.BAD_MAGIC),
        (patched(40, "h", 0), Code.BAD_HEADER),
        (patched(40, "h", 8), Code.BAD_HEADER),
        (patched(44, "h", -5), Code.BAD_HEADER),
        (patched(40, "5h", 4, 6, 5, 2, 2), Code.NOT_3D),
        (patched(40, "h", 2), Code.NOT_3D),
        (patched(70, "h", 32), Code.BAD_DATATYPE),
        (patched(70, "h", 128), Code.BAD_DATATYPE),
        (patched(108, "f", 0.0), Code.BAD_HEADER),
        (patched(108, "f", 352.5), Code.BAD_HEADER),
        (patched(108, "f", np.nan), Code.BAD_HEADER),
        (patched(108, "f", np.inf), Code.BAD_HEADER),
        (patched(112, "f", np.inf), Code.BAD_SCALE),
        (patched(116, "f", np.nan), Code.BAD_SCALE),
        (patched(280, "f", np.nan), Code.BAD_AFFINE),
        (patched(280, "12f", *[0.0] * 12), Code.BAD_AFFINE),
        (patched(252, "2h3f", 1, 0, 2.0, 2.0, 2.0), Code.BAD_AFFINE),
        (patched(80, "f", np.nan)[:252] + struct.pack("<2h", 1, 0) + patched(0, "i", 348)[256:], Code.BAD_SPACING),
        (patched(0, "i", 348)[:-1], Code.TRUNCATED),
        (patched(0, "i", 348)[:100], Code.TRUNCATED),
        (b"<html>no such key</html>", Code.NOT_NIFTI),
        (b"", Code.EMPTY_FILE),
    ],
)
def test_a_header_that_cannot_be_believed_is_refused(data, code):
    assert refusal(data) is code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (patched(72, "h", 8), "BAD_HEADER"),
        (patched(112, "f", np.nan), "BAD_SCALE"),
        (patched(112, "f", 1e-39), "BAD_SCALE"),
        (patched(254, "h", 0), "NO_ORIENTATION"),
        (patched(80, "3f", 0.0, 0.75, 2.0), "BAD_SPACING"),
        (patched(80, "3f", 0.9, 0.75, 2.0), "BAD_SPACING"),
        (patched(0, "i", 348) + b"\0", "TRAILING_DATA"),
    ],
)
def test_an_odd_header_is_used_with_a_warning(data, code):
    found = read_nifti(data, "x.nii")
    assert codes(found.warnings) == [code]
    np.testing.assert_array_equal(found.array, head())


@pytest.mark.parametrize(("name", "data"), [("x.nii.gz", patched(0, "i", 348)), ("x.NII", packed())])
def test_content_decides_and_a_wrong_name_is_told(name, data):
    found = read_nifti(data, name)
    assert codes(found.warnings) == ["WRONG_EXTENSION"]
    np.testing.assert_array_equal(found.array, head())


def two_forms(sform: NDArray, qform: NDArray) -> bytes:
    image = nib.Nifti1Image(head().T, None)
    image.set_qform(qform, code=1)
    image.set_sform(sform, code=1)
    return image.to_bytes()


@pytest.mark.parametrize("flips", [(-1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_affines_that_disagree_about_the_side_are_refused(flips):
    assert refusal(two_forms(LPS, LPS @ np.diag([*flips, 1.0]))) is Code.AFFINE_MISMATCH


def test_affines_that_differ_in_place_alone_give_the_sform_and_a_warning():
    moved = LPS.copy()
    moved[:3, 3] += 5
    found = read_nifti(two_forms(LPS, moved), "x")
    np.testing.assert_array_equal(found.grid.matrix, LPS)
    assert codes(found.warnings) == ["AFFINE_MISMATCH"]


# --- anything at all


@given(st.binary(max_size=700))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_are_refused_with_a_reason(data):
    refusal(data)


@given(st.integers(0, 347), st.binary(min_size=1, max_size=12), st.booleans())
@settings(max_examples=150, deadline=None)
def test_an_arbitrary_header_is_read_or_refused_and_nothing_else(at, noise, pack):
    data = bytearray(gzip.decompress(packed()))
    data[at : at + len(noise)] = noise
    try:
        found = read_nifti(gzip.compress(bytes(data)) if pack else bytes(data), "x")
    except ScanError:
        return
    assert found.array.shape == found.grid.shape
    assert found.array.size > 0


def test_an_extension_that_does_not_add_up_is_told_and_a_good_one_is_not():
    image = nib.Nifti1Image(head().T, LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"not ours to quote"))
    good = image.to_bytes()
    assert read_nifti(good, "x").warnings == ()
    bad = good[:352] + struct.pack("<i", 13) + good[356:]
    found = read_nifti(bad, "x")
    assert codes(found.warnings) == ["BAD_HEADER"]
    assert "quote" not in found.warnings[0]
    np.testing.assert_array_equal(found.array, head())


def test_a_file_mangled_by_a_text_decoder_is_told_so():
    mangled = packed().decode("utf-8", "replace").encode()
    with pytest.raises(ScanError, match="UTF-8"):
        read_nifti(mangled, "x.nii.gz")


def test_every_real_nifti_reads_as_nibabel_reads_it(data_dir):
    paths = sorted(data_dir.glob("anisotropic/*.nii.gz"))[:3] + sorted(data_dir.glob("broken/all-ones*.nii.gz"))
    assert paths
    for path in paths:
        image = nib.load(path)
        ours = read_nifti(path.read_bytes(), path.name)
        np.testing.assert_array_equal(ours.array, np.asanyarray(image.dataobj).T)
        np.testing.assert_allclose(ours.grid.matrix, image.affine, atol=1e-4)


def test_what_is_written_is_one_gzip_member_without_a_time():
    data = packed()
    assert data[4:8] == bytes(4)
    stream = zlib.decompressobj(31)
    assert stream.decompress(data) == gzip.GzipFile(fileobj=io.BytesIO(data)).read()
    assert stream.unused_data == b""


@pytest.mark.parametrize("first", [None, 0, 1, RUN - 1, RUN, 5 * RUN + 7, 8 * RUN - 1])
def test_the_zeros_before_a_mask_come_back(first):
    """They are packed apart: whole runs of them, of which none, some or (in an empty mask) nearly all are there."""
    mask = np.zeros((8, 256, 256), np.uint8)
    if first is not None:
        mask.reshape(-1)[first :: 3 * RUN // 2] = 4
    data = write_nifti(mask, Grid.of(mask.shape, np.eye(4)))
    stream = zlib.decompressobj(wbits=31)
    assert stream.decompress(data)[352:] == mask.tobytes()
    assert stream.eof
    assert not stream.unused_data
    assert np.array_equal(read_nifti(data, "mask.nii.gz").array, mask)
    assert len(data) < 3000
