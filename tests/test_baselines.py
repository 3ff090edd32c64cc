"""Baselines: predicting nothing earns nothing, and the nearest mask is a copy of a training mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg import baselines
from brainseg.baselines import NearestMask, predict_nothing
from brainseg.errors import ScanError, UsageError
from brainseg.geometry import Grid
from brainseg.metrics import score_scan
from brainseg.regions import label_map


def scan(seed, shape=(4, 40, 36), modalities=2, regions=1):
    """An image (C, D, H, W) of smooth noise as uint16 and masks (R, D, H, W), one slice of them empty."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 4000, (modalities, *shape)).astype(np.uint16)
    masks = np.zeros((regions, *shape), bool)
    for d in range(1, shape[0]):
        top, left = rng.integers(0, shape[1] // 2), rng.integers(0, shape[2] // 2)
        for r in range(regions):
            masks[r, d, top : top + 12 - 4 * r, left : left + 10 - 3 * r] = True
    return image, masks


def trained(*seeds, **shape):
    model = NearestMask(["tumor"])
    for seed in seeds:
        model.add(*scan(seed, **shape))
    return model


def test_predicting_nothing_misses_every_tumour_and_is_scored_like_any_scan():
    known, grid = label_map("brats2013"), Grid.of((3, 8, 8), np.diag([1.0, 1, 2, 1]))
    label = np.zeros((3, 8, 8), np.uint8)
    label[1, 2:5, 2:5] = 2
    rows = predict_nothing(label, known, ["WT", "ET"], grid)
    assert [(r["region"], r["state"], r["dice"], r["prediction_voxels"]) for r in rows] == [
        ("WT", "missed", 0, 0),
        ("ET", "both_empty", None, 0),
    ]
    assert rows == score_scan(label, label * 0, known, ["WT", "ET"], grid)


def test_a_training_scan_gets_its_own_masks_back():
    model = NearestMask(["WT", "TC"])
    scans = [scan(seed, regions=2) for seed in range(5)]
    for image, masks in scans:
        model.add(image, masks)
    for image, masks in scans:
        assert np.array_equal(model.predict(image), masks)


def test_every_slice_is_looked_up_for_itself():
    image, masks = scan(0)
    order = [2, 0, 3, 1, 2]
    assert np.array_equal(trained(1, 0, 2).predict(image[:, order]), masks[:, order])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_a_scanners_scale_and_offset_do_not_matter(seed, scale, offset):
    image, masks = scan(seed)
    changed = image * np.array([scale, 1 / scale]).reshape(2, 1, 1, 1) + offset
    assert np.array_equal(trained(seed, seed + 1).predict(changed), masks)


def test_a_little_noise_still_finds_the_neighbour():
    image, masks = scan(0)
    noisy = image + np.random.default_rng(9).normal(0, 200, image.shape)
    assert np.array_equal(trained(3, 2, 1, 0).predict(noisy), masks)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_nearest_equals_a_plain_search(seed):
    model = trained(*range(seed, seed + 4))
    known = np.concatenate(model._thumbnails).astype(np.float64)
    query = baselines._thumbnails(scan(seed + 9)[0])
    distances = ((query[:, None].astype(np.float64) - known[None]) ** 2).sum(-1)
    for slices_at_once in (1, 5, 1000):
        assert model._nearest(query, slices_at_once).tolist() == distances.argmin(1).tolist()


@pytest.mark.parametrize("shape", [(3, 40, 36), (3, 128, 128), (3, 20, 24), (1, 33, 57)])
def test_masks_up_to_the_kept_size_are_kept_exactly(shape):
    image, masks = scan(1, shape)
    assert np.array_equal(trained(1, shape=shape).predict(image), masks)


def test_larger_masks_lose_at_most_their_rim():
    image, masks = scan(1, (2, 256, 256))
    masks[:, 1, 40:120, 60:141] = True
    model = NearestMask(["tumor"])
    model.add(image, masks)
    found = model.predict(image)
    assert np.count_nonzero(found != masks) < 0.03 * np.count_nonzero(masks)


def test_a_mask_is_stretched_to_the_queried_slices_size():
    image, masks = scan(1, (2, 32, 32))
    model = NearestMask(["tumor"])
    model.add(image, masks)
    double = np.kron(image, np.ones((1, 1, 2, 2), np.uint16))
    assert np.array_equal(model.predict(double), np.kron(masks, np.ones((1, 1, 2, 2), bool)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_an_area_mean_keeps_the_mean_and_the_constants(height, width, new_height, new_width):
    planes = np.random.default_rng(height).random((2, height, width))
    small = baselines._area_mean(planes, new_height, new_width)
    assert small.shape == (2, new_height, new_width)
    assert small.mean((1, 2)) == pytest.approx(planes.mean((1, 2)), abs=1e-5)
    assert baselines._area_mean(np.ones((1, height, width)), new_height, new_width) == pytest.approx(1, abs=1e-5)


def test_an_area_mean_of_whole_blocks_is_their_mean():
    planes = np.random.default_rng(0).random((3, 64, 96))
    assert baselines._area_mean(planes, 32, 32) == pytest.approx(planes.reshape(3, 32, 2, 32, 3).mean((2, 4)), abs=1e-6)


def test_constant_and_broken_slices_are_looked_up_all_the_same():
    image, masks = scan(0)
    query = image.astype(np.float64)
    query[:, 0] = 0.1
    query[:, 1] = np.nan
    query[0, 2, 0, 0] = np.inf
    found = trained(0, 1).predict(query)
    assert np.array_equal(found[:, 2:], masks[:, 2:])
    assert not np.isnan(baselines._thumbnails(query)).any()
    assert not baselines._thumbnails(query)[:2].any()


def test_a_scan_is_scored_whole():
    image, masks = scan(0)
    label = masks[0].astype(np.uint8)
    model = NearestMask(["tumor"])
    model.add(*scan(1))
    model.add(image, masks)
    (row,) = model.score(image, label, label_map("binary"), Grid(label.shape))
    assert (row["region"], row["dice"], row["hd95_px"], row["tp"]) == ("tumor", 1, 0, label.sum())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="no training slice"):
        NearestMask(["tumor"]).predict(scan(0)[0])
    model = trained(0)
    with pytest.raises(ScanError, match="3 modalities, expected 2"):
        model.predict(scan(0, modalities=3)[0])
    with pytest.raises(ScanError, match=r"\(2, 4, 40, 36\), expected \(1, 4, 40, 36\)"):
        model.add(*scan(0, regions=2))


def test_a_slice_without_tumour_costs_no_mask():
    model = trained(0, 1)
    assert [mask is None for mask in model._masks] == [True, False, False, False] * 2
    assert sum(mask.bits.nbytes for mask in model._masks if mask) == 6 * 40 * 36 // 8
