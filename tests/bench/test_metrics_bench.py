"""How long a scan's figures take on one core: beside MONAI on the same masks, and with many small lesions."""

import time

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from brainseg.geometry import Grid
from brainseg.metrics import score_region, score_scan
from brainseg.regions import label_map

pytestmark = [
    pytest.mark.bench,
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning"),  # MONAI's own, in its own code
]

SHAPE = (155, 240, 240)
REGIONS = ("WT", "TC", "ET")


def tumour(seed):
    """A label volume of BRATS 2013 with a lobed tumour of about 130,000 voxels, and a prediction that is a bit off."""
    rng = np.random.default_rng(seed)
    away = np.sqrt(sum((axis - centre) ** 2 for axis, centre in zip(np.ogrid[:155, :240, :240], (80, 120, 150), strict=True)))
    lumps = gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), 6)
    depth = 30 + lumps / lumps.std() * 4 - away
    label = np.select([depth > 20, depth > 14, depth > 0], [1, 4, 2], 0).astype(np.uint8)
    return label, np.roll(label, (1, 3, -2), (0, 1, 2))


def scattered(seed, num=200):
    """Many small cubes, half of which the prediction has a voxel off, the others elsewhere."""
    rng = np.random.default_rng(seed)
    label, prediction = np.zeros((2, *SHAPE), np.uint8)
    for number in range(num):
        here, there = rng.integers(2, np.array(SHAPE) - 9, (2, 3))
        label[tuple(slice(n, n + 5) for n in here)] = 4
        prediction[tuple(slice(n, n + 5) for n in (there if number % 2 else here + 1))] = 4
    return label, prediction


def best_of(num, call):
    seconds = []
    for _ in range(num):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


@pytest.mark.parametrize(("case", "limit_s"), [(tumour, 0.5), (scattered, 2.0)])
def test_a_scan_with_three_regions_takes_well_under_a_second(case, limit_s):
    label, prediction = case(0)
    known, grid = label_map("brats2013"), Grid.of(SHAPE, np.eye(4))
    plain, lesionwise = (
        best_of(3, lambda lesions=lesions: score_scan(label, prediction, known, REGIONS, grid, lesions=lesions))
        for lesions in (None, "glioma")
    )
    print(f"\n{case.__name__}: {plain:.3f} s, with lesion-wise figures {lesionwise:.3f} s, {np.count_nonzero(label)} voxels")
    assert lesionwise < limit_s


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_is_scored_ten_times_as_fast_as_monai_takes_for_its_hd95(name):
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    torch.set_num_threads(1)
    masks = [label_map("brats2013").masks(volume, [name])[0] for volume in tumour(0)]
    y, y_pred = (torch.as_tensor(mask)[None, None] for mask in masks)
    args = {"include_background": True, "percentile": 95, "spacing": [1.0, 1.0, 1.0]}
    theirs = best_of(3, lambda: monai.compute_hausdorff_distance(y_pred, y, **args))
    plain, lesionwise = (
        best_of(3, lambda lesions=lesions: score_region(name, *masks, (1.0, 1.0, 1.0), lesions=lesions))
        for lesions in (None, "glioma")
    )
    print(f"\n{name}: MONAI's HD95 {theirs:.3f} s; all our figures {plain:.3f} s, {theirs / plain:.1f} times as fast;", end=" ")
    print(f"with the lesion-wise ones {lesionwise:.3f} s, {theirs / lesionwise:.1f} times")
    assert theirs > 10 * plain
