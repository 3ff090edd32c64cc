"""Cache: what comes out of a shard is what was put in, from memory or from disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from factory import CPU, make_scan, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainseg import storage
from brainseg.cache import Entry, SampleSet, region_bits, write_shard
from brainseg.config import NetworkConfig, PrepareConfig
from brainseg.errors import Code, ScanError
from brainseg.geometry import to_canonical
from brainseg.prepare import gather_context, model_masks, model_slices, plan_scan, select_modalities
from brainseg.regions import label_map
from brainseg.uploads import to_tensor

CONTEXT = tiny_config(network=NetworkConfig(widths=(8, 8), norm="group", context_slices=1))


def heads():
    """Scans of several depths, types and orientations; the first takes an odd number of bytes, so the next is unaligned."""
    first = make_scan((5, 21, 23), seed=1, name="a")
    second = make_scan((3, 24, 20), order="RAS", seed=2, name="b")
    third = make_scan((4, 22, 22), order="SPL", seed=3, name="c")
    return [
        replace(first, image=(first.image // 12).astype(np.uint8)),
        second,
        replace(third, image=third.image.astype(np.float32) / 7),
    ]


def shelved(folder, config=CONTEXT, scans=None):
    return write_shard([(s, "binary") for s in scans or heads()], str(folder / "shard.bin"), config)


def directly(scan, config=CONTEXT):
    """A scan's model slices and masks without any cache."""
    plan = plan_scan(scan, config.modalities, config.prepare, config.network.context_slices)
    crop, _ = select_modalities(scan, config.modalities)
    x = model_slices(to_tensor(gather_context(crop, range(crop.shape[1]), plan.context), CPU), plan)
    inside = scan.label[tuple(slice(a, b) for a, b in scan.box)]
    masks = label_map("binary").masks(to_canonical(inside, scan.grid), config.regions)
    return x, model_masks(torch.from_numpy(masks).transpose(0, 1).float(), plan)


def test_a_set_read_from_disk_gives_exactly_what_preparing_the_scans_gives(tmp_path):
    samples = SampleSet(shelved(tmp_path), 1, memory_bytes=0)
    images, masks = samples.batch(np.arange(len(samples)), CPU)
    expected = [directly(scan) for scan in heads()]
    assert torch.equal(images, torch.cat([x for x, _ in expected]))
    assert torch.equal(masks, torch.cat([y for _, y in expected]))


def test_a_set_held_in_memory_gives_the_same_to_half_precision(tmp_path):
    entries = shelved(tmp_path)
    disk, memory = SampleSet(entries, 1, memory_bytes=0), SampleSet(entries, 1)
    storage.delete(entries[0].shard)
    numbers = np.random.default_rng(0).permutation(len(memory))
    with pytest.raises(OSError, match="shard"):
        disk.batch(numbers, CPU)
    shelved(tmp_path)
    for one, other in zip(memory.batch(numbers, CPU), disk.batch(numbers, CPU), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.allclose(one, other, atol=4e-3)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_context_never_reaches_into_the_neighbouring_scan(tmp_path, memory_bytes):
    samples = SampleSet(shelved(tmp_path), 1, memory_bytes)
    for number in range(len(samples)):
        scan = samples.scan_of[number]
        first, last = samples.first[scan], samples.first[scan + 1] - 1
        images, _ = samples.batch(np.array([number]), CPU)
        before, here, after = images[0].split(2)
        middle = samples.batch(np.array([max(number - 1, first), min(number + 1, last)]), CPU)[0][:, 2:4]
        assert torch.equal(before, middle[0] if number > first else here)
        assert torch.equal(after, middle[1] if number < last else here)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 8), min_size=1, max_size=6))
def test_a_batch_is_its_slices_one_by_one(tmp_path, numbers):
    samples = SampleSet(shelved(tmp_path), 1)
    images, masks = samples.batch(np.array(numbers), CPU)
    for row, number in enumerate(numbers):
        image, mask = samples.batch(np.array([number]), CPU)
        assert torch.equal(images[row], image[0])
        assert torch.equal(masks[row], mask[0])


def test_foreground_marks_the_slices_with_tumour(tmp_path):
    samples = SampleSet(shelved(tmp_path), 1)
    _, masks = samples.batch(np.arange(len(samples)), CPU)
    assert np.array_equal(samples.foreground, masks.numpy().any(axis=(1, 2, 3)))
    assert 0 < samples.foreground.sum() < len(samples)


def test_each_region_has_a_bit_of_its_own():
    scan = make_scan((4, 24, 24), order="RAS")
    label = scan.label * np.random.default_rng(0).choice([1, 2, 4], scan.label.shape).astype(np.uint8)
    bits = region_bits(replace(scan, label=label), ("WT", "TC", "ET"), label_map("brats2020"))
    masks = label_map("brats2020").masks(label, ("WT", "TC", "ET"))
    for row, mask in enumerate(masks):
        inside = to_canonical(mask[tuple(slice(a, b) for a, b in scan.box)], scan.grid)
        assert np.array_equal((bits >> row) & 1, inside)


def test_several_regions_come_in_the_order_of_the_recipe(tmp_path):
    config = tiny_config(regions=("TC", "WT"), prepare=PrepareConfig(size=32))
    scan = make_scan((4, 32, 32))
    scan = replace(scan, label=scan.label * 2)  # oedema alone: WT, no TC
    samples = SampleSet(write_shard([(scan, "brats2020")], str(tmp_path / "s.bin"), config), 2)
    _, masks = samples.batch(np.arange(len(samples)), CPU)
    assert masks[:, 0].sum() == 0
    assert masks[:, 1].sum() == np.count_nonzero(scan.label)


def test_a_scan_without_a_label_cannot_be_trained_on():
    with pytest.raises(ScanError, match="expected one to train on") as caught:
        region_bits(replace(make_scan(), label=None), ("tumor",), label_map("binary"))
    assert caught.value.code is Code.MISSING_FILE


def test_entries_survive_the_way_through_json(tmp_path):
    entries = shelved(tmp_path)
    assert [Entry.from_json(json.loads(json.dumps(e.to_json()))) for e in entries] == entries


def test_equal_scans_make_equal_shards_and_other_scans_another_digest(tmp_path):
    one, same = shelved(tmp_path / "one"), shelved(tmp_path / "same")
    other = shelved(tmp_path / "other", scans=heads()[::-1])
    assert {e.digest for e in one} == {e.digest for e in same}
    assert {e.digest for e in one}.isdisjoint(e.digest for e in other)


def test_a_set_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one scan"):
        SampleSet([], 1)
