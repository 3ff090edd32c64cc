"""Images: Pillow and tifffile are the oracles; pages, claims and colours are judged before pixels are handed on."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from brainseg.errors import Code, ScanError
from brainseg.formats.images import read_image, write_png

GREY = (np.arange(20 * 24, dtype=np.uint16) % 251).astype(np.uint8).reshape(20, 24)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def png(array: NDArray, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(array)
    return saved(image.convert(mode) if mode else image, "PNG", **options)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(array: NDArray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def codes(warnings: tuple[str, ...]) -> list[str]:
    return [line.split(":")[0] for line in warnings]


def refusal(data: bytes, name: str = "x") -> Code:
    with pytest.raises(ScanError) as caught:
        read_image(data, name)
    assert str(caught.value).startswith(f"{name}: ")
    return caught.value.code


# --- pixels


@given(
    st.sampled_from(["u1", "u2"]).flatmap(lambda kind: npst.arrays(kind, npst.array_shapes(min_dims=2, max_dims=2, max_side=9)))
)
@settings(max_examples=60, deadline=None)
def test_reading_undoes_writing_and_pillow_agrees(array):
    data = write_png(array)
    back, warnings = read_image(data, "x.png")
    assert (back.dtype, warnings) == (array.dtype, ())
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), array)
    assert write_png(array.copy()) == data


@pytest.mark.parametrize("array", [GREY.astype(np.float32), COLOUR, GREY[0]])
def test_only_grey_bytes_and_words_are_written(array):
    with pytest.raises(ValueError, match="grey PNG"):
        write_png(array)


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"tile": (16, 16)},
        {"compression": "zlib"},
        {"compression": "lzw"},
        {"compression": "zstd", "predictor": True},
        {"rowsperstrip": 3},
    ],
    ids=str,
)
def test_every_usual_tiff_reads_as_tifffile_wrote_it(kind, options):
    array = GREY.astype(kind) * 3
    back, warnings = read_image(tiff(array, **options), "x.tif")
    assert (back.dtype, warnings) == (np.dtype(kind), ())
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_colour_is_handed_on_with_channels_last_however_it_is_stored(planes):
    array = COLOUR if planes == "contig" else np.ascontiguousarray(np.moveaxis(COLOUR, -1, 0))
    back, _ = read_image(tiff(array, photometric="rgb", planarconfig=planes), "x.tif")
    np.testing.assert_array_equal(back, COLOUR)
    np.testing.assert_array_equal(read_image(png(COLOUR), "x.png")[0], COLOUR)


def test_one_bit_pictures_are_zero_and_one():
    mask = GREY > 100
    for data in (png(mask), tiff(mask, photometric="minisblack"), saved(Image.fromarray(mask), "TIFF", compression="group4")):
        back, warnings = read_image(data, "x")
        assert (back.dtype, warnings) == (np.uint8, ())
        np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("kind", ["f2", "f8"])
def test_other_floats_become_float32(kind):
    back, _ = read_image(tiff(GREY.astype(kind)), "x.tif")
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, GREY)


def test_opaque_alpha_is_dropped_silently_and_any_other_with_a_warning():
    opaque, half = np.full_like(GREY, 255), np.full_like(GREY, 128)
    for alpha, expected in ((opaque, []), (half, ["ALPHA"])):
        rgba = np.dstack([COLOUR, alpha])
        for data in (png(rgba), tiff(rgba, photometric="rgb", extrasamples=["unassalpha"])):
            back, warnings = read_image(data, "x")
            assert codes(warnings) == expected
            np.testing.assert_array_equal(back, COLOUR)


def test_four_channels_that_are_not_declared_alpha_are_four_channels():
    array = np.dstack([COLOUR, GREY])
    back, warnings = read_image(tiff(array, photometric="minisblack", planarconfig="contig"), "x.tif")
    assert warnings == ()
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_a_palette_is_replaced_by_its_values(kind):
    palette = Image.fromarray(GREY, "L").convert("P")
    back, warnings = read_image(saved(palette, kind), "x")
    assert codes(warnings) == ([] if kind == "GIF" else ["PALETTE"])  # Pillow stores and reads this one as plain grey
    np.testing.assert_array_equal(back, GREY)
    coloured = Image.fromarray(COLOUR).quantize(16)
    back, warnings = read_image(saved(coloured, kind), "x")
    assert codes(warnings) == ["PALETTE"]
    np.testing.assert_array_equal(back, np.asarray(coloured.convert("RGB")))


@pytest.mark.parametrize("kind", ["u1", "u2", "bool"])
def test_zero_as_white_is_inverted_with_a_warning(kind):
    array = (GREY * np.iinfo("u1").max).astype(kind)
    back, warnings = read_image(tiff(array, photometric="miniswhite", software="other"), "x.tif")
    top = 1 if kind == "bool" else np.iinfo(kind).max
    assert codes(warnings) == ["INVERTED"]
    np.testing.assert_array_equal(back, top - array.astype(np.int64))


def test_a_boolean_mask_of_tifffile_is_read_as_it_was_given():
    mask = GREY > 100
    back, warnings = read_image(tiff(mask), "x.tif")  # declares zero as white without inverting
    assert codes(warnings) == ["INVERTED"]
    np.testing.assert_array_equal(back, mask)


def test_a_declared_rotation_is_told_and_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF"):
        back, warnings = read_image(saved(Image.fromarray(GREY), kind, exif=exif), "x")
        assert codes(warnings) == ["EXIF_ROTATION"], kind
        assert back.shape == GREY.shape


def test_content_decides_and_a_wrong_name_is_told():
    back, warnings = read_image(tiff(GREY), "x.png")
    assert codes(warnings) == ["WRONG_EXTENSION"]
    np.testing.assert_array_equal(back, GREY)
    assert read_image(tiff(GREY), "x.TIFF")[1] == ()


# --- what is refused


def test_more_pages_than_one_are_refused_but_a_thumbnail_is_no_page():
    stack = np.stack([GREY] * 3)
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    assert refusal(tiff(stack, photometric="minisblack")) is Code.MULTI_PAGE
    assert refusal(tiff(stack, imagej=True)) is Code.MULTI_PAGE
    assert refusal(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) is Code.MULTI_PAGE
    assert refusal(saved(frames[0], "PNG", save_all=True, append_images=frames[1:])) is Code.MULTI_PAGE
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY)
        writer.write(GREY[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_image(file.getvalue(), "x.tif")[0], GREY)


def test_print_colours_are_refused():
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    assert refusal(saved(cmyk, "JPEG")) is Code.NOT_GREY
    assert refusal(saved(cmyk, "TIFF")) is Code.NOT_GREY


def giant_png() -> bytes:
    body = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return b"\x89PNG\r\n\x1a\n" + chunk + png(GREY)[33:]


def giant_tiff(tag: int) -> bytes:
    """A TIFF one of whose page or tile sizes is a million."""
    data = tiff(GREY, tile=(16, 16))
    entry = (
        data.index(struct.pack("<HH", tag, 3), 8)
        if struct.pack("<HH", tag, 3) in data
        else data.index(struct.pack("<HH", tag, 4), 8)
    )
    return data[: entry + 2] + struct.pack("<HII", 4, 1, 1 << 24) + data[entry + 12 :]


@pytest.mark.parametrize("data", [giant_png(), *(giant_tiff(tag) for tag in (256, 257, 322, 323))])
def test_giant_claims_are_refused_before_they_are_allocated(data):
    assert refusal(data) is Code.TOO_LARGE


def test_a_directory_that_leads_back_to_itself_is_refused():
    data = bytearray(tiff(GREY))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    assert refusal(bytes(data)) is Code.CORRUPT


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Code.EMPTY_FILE),
        (b"<!DOCTYPE html><html></html>", Code.NOT_IMAGE),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", Code.NOT_IMAGE),
        (b"II*\0\x08\0\0\0", Code.TRUNCATED),
        (b"II*\0", Code.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", Code.TRUNCATED),
        (tiff(GREY)[:-1], Code.TRUNCATED),
        (tiff(COLOUR, photometric="rgb").decode("utf-8", "replace").encode(), Code.CORRUPT),
        (saved(Image.fromarray(GREY), "JPEG")[:-200], Code.TRUNCATED),
        (b"\xff\xd8\xff" + bytes(40) + b"\xff\xd9", Code.CORRUPT),
    ],
)
def test_what_is_no_picture_is_named(data, code):
    assert refusal(data) is code


def test_only_the_end_marker_of_a_png_may_be_missing():
    whole = png(GREY)
    back, warnings = read_image(whole[:-12], "x.png")
    assert codes(warnings) == ["TRUNCATED"]
    np.testing.assert_array_equal(back, GREY)
    for length in range(8, len(whole) - 16, 7):
        assert refusal(whole[:length]) is Code.TRUNCATED


@given(st.integers(0, len(png(GREY)) * 8 - 1))
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_a_png_never_changes_a_pixel(bit):
    data = bytearray(png(GREY))
    data[bit // 8] ^= 1 << bit % 8
    try:
        found, _ = read_image(bytes(data), "x.png")
    except ScanError:
        return
    np.testing.assert_array_equal(found, GREY)


@given(st.sampled_from(["TIFF", "JPEG", "GIF", "PNG"]), st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_picture_is_read_or_refused_and_nothing_else(kind, data):
    whole = bytearray(saved(Image.fromarray(GREY), kind))
    at = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=8))
    whole[at : at + len(noise)] = noise
    try:
        found, _ = read_image(bytes(whole), "x")
    except ScanError:
        return
    assert found.ndim in (2, 3)
    assert found.size > 0


def test_every_broken_tiff_of_the_real_ones_is_refused(data_dir):
    paths = sorted(data_dir.glob("broken/*.tif"))
    assert paths
    for path in paths:
        assert refusal(path.read_bytes(), path.name) in (Code.CORRUPT, Code.NOT_IMAGE)
