"""Contrasts: names that are exchanged are told, right ones never, on heads as physics has them and on real ones."""

from itertools import permutations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.contrasts import suspicion

NAMES = ("flair", "t1", "t1c", "t2")


def head(seed=0, shape=(12, 20, 20), noise=20.0):
    """FLAIR, t1, t1c, t2 `(C, D, H, W)` of a head whose water is dark on the middle two and bright on t2."""
    rng = np.random.default_rng(seed)
    water = rng.uniform(0.1, 0.9, shape)
    t1 = 900 - 700 * water
    volumes = np.stack([500 + 100 * water, t1, 1.3 * t1, 200 + 900 * water]) + rng.normal(0, noise, (4, *shape))
    volumes[:, [0, -1]] = 0
    return volumes.astype(np.int16)


def verdict(image, names):
    return suspicion(image, names, (0,) * len(names))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_right_names_raise_no_suspicion_in_any_order(seed):
    image = head(seed)
    for order in list(permutations(range(4)))[:: 1 + seed % 7]:
        assert verdict(image[list(order)], [NAMES[n] for n in order]) is None


@pytest.mark.parametrize("wrong", [("flair", "t1", "t2", "t1c"), ("flair", "t2", "t1c", "t1")])
def test_t2_under_the_name_of_a_t1_is_told(wrong):
    assert "are the files' names exchanged?" in verdict(head(), wrong)


def test_a_missing_modality_leaves_nothing_to_compare():
    assert verdict(head()[:3], ("flair", "t1", "t1c")) is None
    assert verdict(head()[1:3], ("t1", "t2")) is None


@pytest.mark.parametrize("kind", ["f4", "f8", "u2", "i4"])
def test_the_stored_type_and_its_scale_make_no_difference(kind):
    wrong = ("flair", "t1", "t2", "t1c")
    assert verdict((head() * 40.0).astype(kind), wrong) == verdict(head().astype(kind), wrong) == verdict(head(), wrong)


def test_noise_and_a_few_voxels_are_no_evidence():
    noise = np.random.default_rng(0).normal(size=(4, 8, 20, 20)).astype("f4")
    few = np.zeros((4, 8, 20, 20), np.int16)
    few[:, 3, 3:6, 3:6] = np.arange(36).reshape(4, 3, 3) + 1
    flat = np.where(noise > 0, 1, 0)
    for image in (noise, few, flat):
        assert verdict(image, NAMES) is None


def test_real_heads_are_told_from_exchanged_ones(data_dir):
    paths = sorted((data_dir / "msd-h5").glob("*.h5"))
    assert paths
    for path in paths:
        with h5py.File(path) as file:
            image = file["x"][()]
        background = [float(volume.flat[0]) for volume in image]
        assert suspicion(image, NAMES, background) is None
        for wrong in (("flair", "t1", "t2", "t1c"), ("flair", "t2", "t1c", "t1")):
            assert suspicion(image, wrong, background) is not None
