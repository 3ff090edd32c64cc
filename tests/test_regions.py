"""Regions: label values mean what their data set declares, and what is painted is read back as it was."""

import numpy as np
import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainseg.errors import Code, ConfigError, ScanError
from brainseg.regions import LABEL_MAPS, label_map

BRATS = [name for name in LABEL_MAPS if name != "binary"]
SHAPE = (2, 3, 4)
masks_of = hnp.arrays(np.bool_, (3, *SHAPE))


@pytest.mark.parametrize("name", BRATS)
@FEW
@given(raw=masks_of)
def test_nested_regions_survive_painting_for_any_masks(name, raw):
    """WT holds TC holds ET: such masks come back from the painted label exactly."""
    meaning, names = label_map(name), ["WT", "TC", "ET"]
    enhancing = raw[2]
    core = raw[1] | enhancing
    nested = np.stack([raw[0] | core, core, enhancing])
    assert np.array_equal(meaning.masks(meaning.paint_label(nested, names), names), nested)


@pytest.mark.parametrize("name", BRATS)
@FEW
@given(raw=masks_of, order=st.permutations(["WT", "TC", "ET"]))
def test_a_painted_label_is_nested_and_keeps_the_narrow_regions_whatever_was_painted(name, raw, order):
    meaning = label_map(name)
    got = dict(zip(order, meaning.masks(meaning.paint_label(raw, order), order), strict=True))
    asked = dict(zip(order, raw, strict=True))
    assert np.array_equal(got["ET"], asked["ET"])
    assert np.array_equal(got["TC"], asked["TC"] | asked["ET"])
    assert np.array_equal(got["WT"], asked["WT"] | asked["TC"] | asked["ET"])


@FEW
@given(
    mask=hnp.arrays(np.bool_, (1, *SHAPE)), region=st.sampled_from(["tumor", "WT"]), name=st.sampled_from(sorted(LABEL_MAPS))
)
def test_a_single_region_survives_painting_in_every_map(mask, region, name):
    meaning = label_map(name)
    assert np.array_equal(meaning.masks(meaning.paint_label(mask, [region]), [region]), mask)


@pytest.mark.parametrize("meaning", LABEL_MAPS.values(), ids=LABEL_MAPS)
def test_a_map_is_consistent_with_itself(meaning):
    painted = {value for _, value in meaning.paint}
    assert painted <= set(meaning.values)
    assert {region for region, _ in meaning.paint} == set(meaning.regions)
    assert {v for values in meaning.regions.values() for v in values} <= set(meaning.values) - {0}
    assert set(meaning.aliases.values()) <= set(meaning.values)


def test_the_enhancing_tumour_is_4_until_2021_and_3_from_2023():
    label = np.array([0, 1, 2, 3, 4], np.uint8)
    assert label_map("brats2020").masks(label, ["ET"])[0].tolist() == [False, False, False, False, True]
    assert label_map("brats2023").masks(label, ["ET"])[0].tolist() == [False, False, False, True, False]


def test_a_resection_cavity_is_no_tumour():
    assert not label_map("brats2024").masks(np.array([4], np.uint8), ["WT", "TC", "ET"]).any()


def test_checking_turns_aliases_into_what_they_mean():
    checked = label_map("binary").check(np.array([[0, 255], [1, 0]], np.int16), "mask.png")
    assert checked.dtype == np.uint8
    assert checked.tolist() == [[0, 1], [1, 0]]


def test_an_unknown_value_is_refused_by_file_and_value():
    with pytest.raises(ScanError, match=r"seg\.nii\.gz: label value 3 .* 'brats2020'") as caught:
        label_map("brats2020").check(np.array([0, 3]), "seg.nii.gz")
    assert caught.value.code is Code.BAD_LABELS


def test_values_that_only_wrap_into_the_map_are_refused():
    for value in (256, 257, -255):
        with pytest.raises(ScanError, match=f"label value {value}"):
            label_map("binary").check(np.array([0, value]), "mask.tif")


def test_an_unknown_region_or_map_lists_the_known_ones():
    with pytest.raises(ConfigError, match="tumor, WT"):
        label_map("binary").masks(np.zeros(1, np.uint8), ["ET"])
    with pytest.raises(ConfigError, match="brats2023"):
        label_map("brats2019")
