"""Thumbnails: the right slice, the right way round, small, and nothing of the tumour cut away."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from brainseg import tables
from brainseg.geometry import Grid, to_canonical
from brainseg.thumbnails import LONG_SIDE_PX, make_thumbnail

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def head(shape, box):
    """An image (1, D, H, W) cropped to `box`, brighter towards the last row and column."""
    sizes = [stop - start for start, stop in box]
    ramp = sum(np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, n in enumerate(sizes))
    return (100 + ramp).astype(np.int16)[None]


def scan(shape=(10, 40, 30), box=((1, 9), (3, 35), (4, 24)), affine=LPS, spots=()):
    grid = Grid.of(shape, affine)
    label = np.zeros(shape, np.uint8)
    for d, h, w, value in spots:
        label[d, h, w] = value
    return head(shape, box), box, grid, label


def test_the_slice_with_the_most_label_is_shown():
    image, box, grid, label = scan()
    label[3, 10:12, 10:12] = 1
    label[6, 10:20, 10:20] = 2
    prediction = np.zeros_like(label)
    prediction[2, 10:30, 10:20] = 1
    thumbnail = make_thumbnail(image, box, grid, label, prediction, ("t1",))
    assert thumbnail["slice_index"] == 6
    assert set(np.unique(pixels(thumbnail["label"]))) == {0, 2}
    assert not pixels(thumbnail["prediction"]).any()


def test_without_label_the_prediction_decides_and_without_both_the_middle_of_the_head():
    image, box, grid, empty = scan()
    prediction = empty.copy()
    prediction[2, 10:30, 10:20] = 1
    assert make_thumbnail(image, box, grid, None, prediction, ("t1",))["slice_index"] == 2
    assert make_thumbnail(image, box, grid, empty, prediction, ("t1",))["slice_index"] == 2
    assert make_thumbnail(image, box, grid, None, empty, ("t1",))["slice_index"] == 5
    assert make_thumbnail(image, box, grid, None, empty, ("t1",))["label"] is None


def test_flair_is_preferred_then_contrast_then_the_first():
    image, box, grid, empty = scan()
    for modalities, chosen in ((("t1", "t1c", "flair"), "flair"), (("t1", "t1c"), "t1c"), (("t2", "t1"), "t2")):
        stacked = np.repeat(image, len(modalities), axis=0)
        assert make_thumbnail(stacked, box, grid, None, empty, modalities)["modality"] == chosen


def test_two_files_of_one_head_stored_in_different_directions_look_the_same():
    image, box, grid, label = scan(spots=[(6, 12, 9, 1)])
    first = make_thumbnail(image, box, grid, label, label, ("t1",))

    turned_box = (box[0], *((n - stop, n - start) for n, (start, stop) in zip(grid.shape[1:], box[1:], strict=True)))
    turned_label = np.ascontiguousarray(label[:, ::-1, ::-1])
    turned = make_thumbnail(image[:, :, ::-1, ::-1], turned_box, Grid.of(grid.shape, RAS), turned_label, turned_label, ("t1",))
    assert turned == first


def test_a_thumbnail_fits_the_table_and_the_page():
    shape = (3, 512, 400)
    box = ((0, 3), (0, 512), (0, 400))
    grid = Grid.of(shape)
    label = np.zeros(shape, np.uint8)
    label[1, 200:300, 100:200] = 1
    thumbnail = make_thumbnail(head(shape, box), box, grid, label, label, ("t1",))
    assert set(thumbnail) == {field.name for field in tables.THUMBNAIL}
    image = pixels(thumbnail["image"])
    assert max(image.shape) == LONG_SIDE_PX
    assert image.shape == pixels(thumbnail["label"]).shape == pixels(thumbnail["prediction"]).shape
    assert image.shape[0] / image.shape[1] == pytest.approx(512 / 400, rel=0.02)
    assert sum(len(thumbnail[k]) for k in ("image", "label", "prediction")) < 64_000


def test_proportions_are_those_of_the_patient_not_of_the_voxels():
    shape = (4, 20, 60)
    box = ((0, 4), (0, 20), (0, 60))
    grid = Grid.of(shape, np.diag([-1.0, -3.0, 5.0, 1.0]))
    empty = np.zeros(shape, np.uint8)
    shown = pixels(make_thumbnail(head(shape, box), box, grid, None, empty, ("t1",))["image"])
    assert shown.shape == (60, 60)


def test_the_window_ignores_background_and_a_few_bright_voxels():
    image, box, grid, empty = scan()
    image[:, :, :10] = -300
    image[0, 4, 15, 15] = 30_000
    shown = pixels(make_thumbnail(image, box, grid, None, empty, ("t1",))["image"])
    assert shown.std() > 40
    assert pixels(make_thumbnail(image, box, grid, None, empty, ("t1",), background=(-300,))["image"]).std() > 40


def test_a_constant_image_does_not_divide_by_zero():
    _, box, grid, empty = scan()
    flat = np.full((1, 8, 32, 20), 7, np.uint8)
    assert make_thumbnail(flat, box, grid, None, empty, ("t1",))["image"][:4] == b"\x89PNG"


@settings(max_examples=25, deadline=None)
@given(
    spot=st.tuples(st.integers(0, 9), st.integers(0, 39), st.integers(0, 29)),
    flips=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
)
def test_a_tumour_is_in_the_picture_wherever_it_lies_even_outside_the_crop(spot, flips):
    image, box, grid, label = scan(affine=np.diag([*flips, 1.0]))
    label[spot] = 1
    shown = make_thumbnail(image, box, grid, label, np.zeros_like(label), ("t1",))
    assert pixels(shown["label"]).sum() == 1
    assert to_canonical(label, grid)[shown["slice_index"]].any()
