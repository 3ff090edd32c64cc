"""Patches: blocks of the volume that the cache holds, around a tumour where the slice has one, and the same for any worker."""

import numpy as np
import pytest
import torch
from factory import CPU, FEW, make_scan, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from brainseg.cache import SampleSet, write_shard
from brainseg.config import NetworkConfig, PrepareConfig
from brainseg.patches import cut, draw_places, middle_of, span

FLAT = (0, 0, 0)
PATCH = (4, 8, 8)
CONFIG = tiny_config(
    network=NetworkConfig(dimensions=3, widths=(8, 8), norm="group"), prepare=PrepareConfig(size=32, patch=PATCH)
)


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    scans = [make_scan((9, 32, 32), seed=1, name="a"), make_scan((6, 30, 34), order="RAS", seed=2, name="b")]
    return write_shard([(s, "binary") for s in scans], str(tmp_path_factory.mktemp("patches") / "s.bin"), CONFIG)


@pytest.fixture(scope="module")
def samples(entries):
    return SampleSet(entries, 1)


def volume(samples, scan):
    """A scan's images `(C, D, S, S)` and masks `(R, D, S, S)`, slice by slice."""
    numbers = np.arange(samples.first[scan], samples.first[scan + 1])
    images, masks = samples.batch(numbers, CPU)
    return images.transpose(0, 1), masks.transpose(0, 1)


@FEW
@given(seed=st.integers(0, 1000))
def test_a_patch_is_a_block_of_its_volume(samples, seed):
    number = seed % len(samples)
    images, masks = cut(samples, np.array([number]), draw_places(1, (seed,)), PATCH, FLAT, CPU)
    assert images.shape == (1, 2, *PATCH)
    assert masks.shape == (1, 1, *PATCH)
    whole, marked = volume(samples, samples.scan_of[number])
    found = [
        (d, h, w)
        for d in range(whole.shape[1] - 3)
        for h in range(25)
        for w in range(25)
        if torch.equal(whole[:, d : d + 4, h : h + 8, w : w + 8], images[0])
        and torch.equal(marked[:, d : d + 4, h : h + 8, w : w + 8], masks[0])
    ]
    assert found


@FEW
@given(seed=st.integers(0, 1000))
def test_a_tumour_slice_gives_a_patch_with_tumour(samples, seed):
    numbers = np.flatnonzero(samples.foreground)
    _, masks = cut(samples, numbers, draw_places(len(numbers), (seed,)), PATCH, FLAT, CPU)
    assert masks.flatten(1).any(dim=1).all()


def test_patches_from_disk_are_those_from_memory(entries, samples):
    disk = SampleSet(entries, 1, memory_bytes=0)
    numbers, places = np.arange(len(disk)), draw_places(len(disk), (1,))
    for margin in (FLAT, (1, 2, 2)):
        one, other = (cut(s, numbers, places, PATCH, margin, CPU) for s in (disk, samples))
        assert torch.allclose(one[0], other[0], atol=4e-3)
        assert torch.allclose(one[1], other[1], atol=4e-3)


def test_a_margin_goes_around_the_patch(samples):
    numbers, places = np.arange(len(samples)), draw_places(len(samples), (2,))
    images, masks = cut(samples, numbers, places, PATCH, FLAT, CPU)
    wide_images, wide_masks = cut(samples, numbers, places, PATCH, (1, 2, 3), CPU)
    assert wide_images.shape[2:] == (6, 12, 14)
    assert torch.equal(wide_images[:, :, 1:-1, 2:-2, 3:-3], images)
    assert torch.equal(wide_masks[:, :, 1:-1, 2:-2, 3:-3], masks)


@FEW
@given(workers=st.integers(1, 4), seed=st.integers(0, 50))
def test_workers_cut_together_what_one_cuts_alone(samples, workers, seed):
    numbers, places = np.arange(8), draw_places(8, (seed, 0, 3))
    alone, _ = cut(samples, numbers, places, PATCH, FLAT, CPU)
    for rank in range(workers):
        mine = np.arange(rank, 8, workers)
        assert torch.equal(cut(samples, numbers[mine], places[mine], PATCH, FLAT, CPU)[0], alone[mine])


@FEW
@given(length=st.integers(1, 60), side=st.integers(1, 40), margin=st.integers(0, 10), data=st.data())
def test_a_span_holds_its_middle_and_stays_inside(length, side, margin, data):
    middle = data.draw(st.integers(0, length - 1))
    places = span(middle, side, margin, length)
    assert len(places) == side + 2 * margin
    assert places.min() >= 0
    assert places.max() < length
    inner = places[margin : margin + side]
    assert middle in inner
    if length >= side:
        assert (np.diff(inner) == 1).all()
    else:
        assert set(inner) == set(range(length))


def test_every_tumour_pixel_may_be_the_middle_and_no_other():
    mask = torch.zeros(2, 6, 6)
    mask[0, 1, 2] = mask[1, 4, 5] = mask[1, 1, 2] = 1
    seen = {middle_of(mask, (place, 0.5)) for place in np.linspace(0, 0.999, 20)}
    assert seen == {(1, 2), (4, 5)}
    anywhere = {middle_of(torch.zeros(2, 6, 6), (a, b)) for a in np.linspace(0, 0.999, 12) for b in np.linspace(0, 0.999, 12)}
    assert anywhere == {(row, column) for row in range(6) for column in range(6)}


def test_places_are_other_numbers_than_those_of_the_augmentation():
    assert not np.isin(draw_places(4, (1, 2, 3)), np.random.default_rng((1, 2, 3)).random(1000)).any()
