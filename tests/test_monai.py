"""Metrics beside MONAI's: one figure where conventions agree, and a table of where they differ and why."""

import math
import warnings

import nibabel
import numpy as np
import pytest
from brute_force import mask_pairs
from hypothesis import assume, given, settings
from scipy.ndimage import binary_dilation, binary_erosion

from brainseg.geometry import Grid
from brainseg.metrics import score_region, score_scan
from brainseg.regions import label_map

torch = pytest.importorskip("torch")
monai = pytest.importorskip("monai.metrics", reason="MONAI, the oracle of these figures, is not installed")

pytestmark = pytest.mark.filterwarnings(
    # MONAI passes an argument of its own that it has deprecated, and says of every empty mask that it is empty.
    "ignore:.*always_return_as_numpy.*:FutureWarning",
    "ignore:.*this may result in nan/inf distance:UserWarning",
)

MM = (1.0, 1.0, 1.0)
NAN, INF = math.nan, math.inf
FIGURES = ("dice", "iou", "recall", "precision", "specificity", "accuracy", "hd95_mm", "nsd_1mm", "nsd_2mm")


def batch(mask):
    """A mask as MONAI takes it: batch and channel in front."""
    return torch.as_tensor(np.ascontiguousarray(mask))[None, None]


def distances(label, prediction, spacing):
    """MONAI's HD95 and surface Dice at 1 and at 2, under the arguments that mean what our columns mean."""
    y, y_pred, size = batch(label), batch(prediction), list(spacing)
    hd95 = monai.compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, directed=False, spacing=size)
    at = (1.0001, 2.0001)  # as our tolerances
    nsd = [monai.compute_surface_dice(y_pred, y, [t], include_background=True, spacing=size).item() for t in at]
    return {"hd95_mm": hd95.item(), "nsd_1mm": nsd[0], "nsd_2mm": nsd[1]}


def overlaps(label, prediction):
    y, y_pred = batch(label).float(), batch(prediction).float()
    counts = monai.get_confusion_matrix(y_pred, y, include_background=True)
    names = ("recall", "precision", "specificity", "accuracy")
    ratios = {name: monai.compute_confusion_matrix_metric(name, counts).item() for name in names}
    return {"dice": monai.compute_dice(y_pred, y).item(), "iou": monai.compute_iou(y_pred, y).item(), **ratios}


def theirs(label, prediction, spacing):
    return overlaps(label, prediction) | distances(label, prediction, spacing)


# --- agreement --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(mask_pairs())
def test_small_masks_have_one_set_of_figures(case):
    label, prediction, spacing = case
    assume(label.any() and prediction.any())  # the rest stands in the table
    spacing = spacing or MM
    flat = label.shape[0] == 1
    row = score_region("tumor", label, prediction, spacing)
    seen = (label[0], prediction[0], spacing[1:]) if flat else (label, prediction, spacing)
    compared = [name for name in FIGURES if name != "specificity" or not label.all()]  # 0/0 stands in the table
    expected = theirs(*seen)
    assert {name: row[name] for name in compared} == pytest.approx({n: expected[n] for n in compared}, rel=1e-4, abs=1e-6)


PREDICTIONS = {
    "shifted": lambda label: np.roll(label, (2, 3, -4), (0, 1, 2)),
    "eroded": lambda label: np.where(binary_erosion(label > 0, iterations=3), label, 0).astype(np.uint8),
    "dilated": lambda label: np.where(binary_dilation(label > 0, iterations=2) & (label == 0), 2, label).astype(np.uint8),
    "partial": lambda label: np.where(np.arange(label.shape[2]) < np.median(np.nonzero(label)[2]), label, 0).astype(np.uint8),
}


@pytest.mark.parametrize("patient", ["0003", "0004", "0005"])
def test_real_tumours_have_one_set_of_figures(data_dir, patient):
    volume = nibabel.load(data_dir / f"brats2013/brats_2013_pat{patient}_1/OTMultiClass.nii.gz")
    label = np.ascontiguousarray(np.round(volume.get_fdata()).astype(np.uint8).T)
    affine = volume.affine[[2, 1, 0, 3]][:, [2, 1, 0, 3]]
    grid, known = Grid.of(label.shape, affine), label_map("brats2013")
    for (name, predict), region in zip(PREDICTIONS.items(), ("WT", "TC", "WT", "ET"), strict=True):
        prediction = predict(label)
        (row,) = score_scan(label, prediction, known, [region], grid)
        box = tuple(slice(p.min(), p.max() + 1) for p in np.nonzero(label | prediction))
        masks = [known.masks(volume[box], [region])[0] for volume in (label, prediction)]
        expected = theirs(*masks, grid.spacing_mm)
        compared = [name for name in FIGURES if name not in ("specificity", "accuracy")]  # of the crop, not of the scan
        assert {key: row[key] for key in compared} == pytest.approx({key: expected[key] for key in compared}, rel=1e-4), name


# --- differences ------------------------------------------------------------------------------------------------------


def cube(*boxes, shape=(5, 5, 5)):
    mask = np.zeros(shape, bool)
    for start, stop in boxes:
        mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


NOTHING = cube()
ONE = cube(((2, 2, 2), (3, 3, 3)))
NEXT = cube(((2, 2, 3), (3, 3, 4)))
ALL = np.ones((5, 5, 5), bool)

EMPTY = {
    # label, prediction, column, ours, MONAI's, why
    "Dice, both empty": (NOTHING, NOTHING, "dice", None, NAN, "a named state and null; NaN says the same only by its absence"),
    "Dice, spurious": (NOTHING, ONE, "dice", 0, NAN, "MONAI ignores an empty label; a false tumour must cost something"),
    "IoU, spurious": (NOTHING, ONE, "iou", 0, NAN, "as Dice"),
    "Dice, missed": (ONE, NOTHING, "dice", 0, 0, "agreed"),
    "HD95, both empty": (NOTHING, NOTHING, "hd95_mm", None, NAN, "null, with its state"),
    "HD95, missed": (ONE, NOTHING, "hd95_mm", INF, NAN, "NaN drops out of a mean, so finding nothing would improve it"),
    "HD95, spurious": (NOTHING, ONE, "hd95_mm", INF, NAN, "as missed"),
    "NSD, both empty": (NOTHING, NOTHING, "nsd_1mm", None, NAN, "null, with its state"),
    "NSD, missed": (ONE, NOTHING, "nsd_1mm", 0, 0, "agreed"),
    "NSD, spurious": (NOTHING, ONE, "nsd_1mm", 0, 0, "agreed"),
    "precision, missed": (ONE, NOTHING, "precision", None, NAN, "0/0 is no number anyone measured"),
    "recall, spurious": (NOTHING, ONE, "recall", None, NAN, "0/0"),
    "specificity, a label that fills the scan": (ALL, ONE, "specificity", None, NAN, "0/0"),
    "specificity, both empty": (NOTHING, NOTHING, "specificity", None, 1, "nothing was there to be told apart"),
    "accuracy, both empty": (NOTHING, NOTHING, "accuracy", None, 1, "would lift a mean over scans without tumour"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_an_empty_mask_gives(name):
    label, prediction, column, ours, expected, _ = EMPTY[name]
    assert score_region("tumor", label, prediction, MM)[column] == ours
    assert theirs(label, prediction, MM)[column] == pytest.approx(expected, nan_ok=True)


def test_a_missed_tumour_is_infinite_as_a_maximum_and_unknown_as_a_percentile():
    y, y_pred = batch(ONE), batch(NOTHING)
    assert monai.compute_hausdorff_distance(y_pred, y, include_background=True).item() == INF
    assert math.isnan(monai.compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95).item())


def test_a_missed_tumour_leaves_monais_mean_untouched():
    metric = monai.HausdorffDistanceMetric(include_background=True, percentile=95, get_not_nans=True)
    for label, prediction in ((ONE, NOTHING), (ONE, NEXT)):
        metric(batch(prediction).float(), batch(label).float())
    mean, num = metric.aggregate()
    assert (mean.item(), num.item()) == (1, 1)


def test_both_empty_is_perfect_where_monai_is_told_not_to_ignore_it():
    y, y_pred = batch(NOTHING).float(), batch(NOTHING).float()
    assert monai.compute_dice(y_pred, y, ignore_empty=False).item() == 1  # our rule `brats`, applied when aggregating


def test_monai_drops_the_first_of_several_channels_unless_told():
    regions = torch.cat([batch(ONE), batch(NEXT)], dim=1)
    assert monai.compute_hausdorff_distance(regions, regions, percentile=95).shape == (1, 1)
    assert monai.compute_hausdorff_distance(regions, regions, percentile=95, include_background=True).shape == (1, 2)
    assert monai.compute_dice(regions, regions).shape == (1, 2)  # here the default is the other one


def test_monai_takes_the_maximum_unless_told_and_unit_spacing_where_it_is_unknown():
    label, prediction = cube(((0, 0, 0), (3, 3, 3))), cube(((1, 1, 1), (4, 4, 4)))
    far = monai.compute_hausdorff_distance(batch(prediction), batch(label), include_background=True).item()
    row = score_region("tumor", label, prediction, None)
    assert far == pytest.approx(math.sqrt(3))
    assert (row["hd95_px"], row["hd95_mm"]) == (pytest.approx(math.sqrt(2)), None)


def test_a_directed_distance_goes_from_prediction_to_label():
    label, prediction = cube(((0, 0, 0), (5, 5, 1))), cube(((0, 0, 0), (2, 2, 1)))
    one_way = monai.compute_hausdorff_distance(batch(prediction), batch(label), include_background=True, directed=True)
    assert one_way.item() == 0
    assert score_region("tumor", label, prediction, MM)["hd95_mm"] > 3


def test_a_volume_of_one_slice_is_all_surface_to_monai_and_an_image_to_us():
    shape, spacing = (1, 9, 9), (50.0, 3.0, 3.0)
    label, prediction = cube(((0, 1, 1), (1, 8, 8)), shape=shape), cube(((0, 1, 1), (1, 8, 7)), shape=shape)
    row = score_region("tumor", label, prediction, spacing)
    in_plane, in_volume = distances(label[0], prediction[0], spacing[1:]), distances(label, prediction, spacing)
    assert row["nsd_1mm"] == pytest.approx(in_plane["nsd_1mm"]) == pytest.approx(1 - (7 + 5) / (24 + 22))
    assert in_volume["nsd_1mm"] == pytest.approx(1 - 7 / (49 + 42))


def test_a_spacing_rounded_to_float32_costs_nothing_here_and_everything_there():
    spacing = [1.000001] * 3
    nsd = monai.compute_surface_dice(batch(NEXT), batch(ONE), [1.0], include_background=True, spacing=spacing)
    assert nsd.item() == 0
    assert score_region("tumor", ONE, NEXT, tuple(spacing))["nsd_1mm"] == 1


def test_subvoxel_surfaces_are_another_figure():
    label, prediction = cube(((0, 0, 0), (3, 3, 3))), cube(((0, 0, 0), (3, 3, 5)))
    args = {"include_background": True, "spacing": [1.0] * 3}
    voxels, subvoxels = (
        monai.compute_surface_dice(batch(prediction), batch(label), [1.0], use_subvoxels=choice, **args).item()
        for choice in (False, True)
    )
    assert score_region("tumor", label, prediction, MM)["nsd_1mm"] == pytest.approx(voxels)
    assert voxels != pytest.approx(subvoxels, abs=0.02)


def test_importing_and_measuring_warns_of_nothing_but_what_is_named_above():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs(ONE, NEXT, MM)
    assert {str(one.message).split(":")[1] for one in caught} <= {"always_return_as_numpy"}
