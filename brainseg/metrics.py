"""Metrics: one scan's label against its prediction, region by region; every number of a `regions` entry is made here.

It stands between the stored mask and the table: masks go in, the struct `tables.REGION` comes out, and `aggregate.py`
turns many of those into a cohort's figures. Pure functions on boolean arrays (D, H, W).

A scan of one slice (D == 1) is an image: surfaces, distances and lesions stay in the plane. What a surface is and how its
distances are taken stands in `surfaces.py`, what a lesion is in `lesions.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainseg.config import LesionPreset
from brainseg.errors import Code, ScanError
from brainseg.geometry import Grid, Slices, occupied
from brainseg.lesions import LESION_RULES, LESIONWISE, components, count_lesions, match_lesions
from brainseg.regions import LabelMap
from brainseg.surfaces import Pair, surface_pair

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
State = Literal["both", "missed", "spurious", "both_empty", "no_label"]

TRUST_FROM_NETWORK = ("mean_probability", "mean_entropy", "outside_head_fraction")
"""Keys of `tables.REGION` that no mask can tell; whoever holds the probabilities adds them."""


@dataclass(frozen=True)
class Frame:
    """Where a crop lies in its scan: the scan's shape (D, H, W) and the crop's first voxel."""

    shape: tuple[int, int, int]
    start: tuple[int, int, int] = (0, 0, 0)

    @property
    def num_voxels(self) -> int:
        """Voxels of the whole scan, which true negatives are counted over."""
        return int(np.prod(self.shape))

    def seen(self, mask: Mask) -> Mask:
        """A crop (D, H, W) as distances and lesions see it: of a scan of one slice the image (H, W)."""
        return mask[0] if self.shape[0] == 1 and mask.size else mask

    def inside(self, box: Slices) -> "Frame":
        """The frame of a crop of this crop."""
        d, h, w = (first + part.start for first, part in zip(self.start, box, strict=True))
        return Frame(self.shape, (d, h, w))


def score_scan(
    label: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    label_map: LabelMap,
    regions: Sequence[str],
    grid: Grid,
    *,
    lesions: LesionPreset | None = "glioma",
) -> list[dict[str, Any]]:
    """Score every region of one scan from its label and predicted label volume (D, H, W), both in the map's values.

    One entry per region, in order, with the keys of `score_region`. With `lesions` None the lesion-wise figures, which
    take about as long as all others, are None. Raises ScanError SHAPE_MISMATCH unless label, prediction and grid have one
    shape.
    """
    _check_shapes("scan", prediction, grid.shape)
    if label is not None:
        _check_shapes("scan", label, grid.shape)
    box = occupied(prediction) if label is None else occupied(label, prediction)
    frame = Frame(grid.shape).inside(box)
    predictions = label_map.masks(prediction[box], regions)
    labels = [None] * len(regions) if label is None else label_map.masks(label[box], regions)
    scored = zip(regions, labels, predictions, strict=True)
    return [_score(region, truth, mask, grid.spacing_mm, frame, lesions) for region, truth, mask in scored]


def score_region(
    region: str,
    label: Mask | None,
    prediction: Mask,
    spacing_mm: Spacing | None,
    *,
    lesions: LesionPreset | None = "glioma",
) -> dict[str, Any]:
    """Score one region: masks (D, H, W) on the native grid, spacing along (D, H, W) or None where unknown.

    Returns the keys of `tables.REGION` but `TRUST_FROM_NETWORK`, plain Python values. Without a label the state is
    `no_label` and all that needs one is None. Raises ScanError SHAPE_MISMATCH where the masks differ in shape.
    """
    depth, height, width = prediction.shape
    if label is not None:
        _check_shapes(region, label, prediction.shape)
        label = label.astype(np.bool_, copy=False)
    prediction, frame = prediction.astype(np.bool_, copy=False), Frame((depth, height, width))
    return _score(region, label, prediction, spacing_mm, frame, lesions)


def _check_shapes(what: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.shape != tuple(expected):
        raise ScanError(Code.SHAPE_MISMATCH, f"{what}: mask is {array.shape}, expected {tuple(expected)}")


def _score(
    region: str,
    label: Mask | None,
    prediction: Mask,
    spacing_mm: Spacing | None,
    frame: Frame,
    lesions: LesionPreset | None,
) -> dict[str, Any]:
    """Score masks that are a crop of the scan; all that lies outside the crop is background in both."""
    box = occupied(prediction) if label is None else occupied(label, prediction)
    frame = frame.inside(box)
    prediction = prediction[box]
    label = None if label is None else label[box]
    counts = _counts(label, prediction, frame.num_voxels)
    state = _state(counts["label_voxels"], counts["prediction_voxels"])
    truth, answer = None if label is None else frame.seen(label), frame.seen(prediction)
    pair = None if truth is None or state != "both" else _surfaces(truth, answer, spacing_mm)
    return {
        "region": region,
        "state": state,
        **counts,
        **_volumes(counts["label_voxels"], counts["prediction_voxels"], spacing_mm),
        **_overlap(state, counts),
        **_distances(state, pair, spacing_mm),
        **_lesions(truth, answer, pair, spacing_mm, lesions),
        "touches_border": _touches_border(prediction, frame),
    }


# --- counts, volumes, overlap ---------------------------------------------------------------------------------------


def _counts(label: Mask | None, prediction: Mask, num_voxels: int) -> dict[str, int | None]:
    predicted = int(np.count_nonzero(prediction))
    if label is None:
        return {"tp": None, "fp": None, "fn": None, "tn": None, "label_voxels": None, "prediction_voxels": predicted}
    labelled = int(np.count_nonzero(label))
    tp = int(np.count_nonzero(label & prediction))
    fp, fn = predicted - tp, labelled - tp
    return {
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": num_voxels - tp - fp - fn,
        "label_voxels": labelled,
        "prediction_voxels": predicted,
    }


def _state(label_voxels: int | None, prediction_voxels: int | None) -> State:
    if label_voxels is None:
        return "no_label"
    if label_voxels:
        return "both" if prediction_voxels else "missed"
    return "spurious" if prediction_voxels else "both_empty"


def _volumes(labelled: int | None, predicted: int | None, spacing_mm: Spacing | None) -> dict[str, float | None]:
    voxel_mm3 = None if spacing_mm is None else float(np.prod(spacing_mm))
    error = None if labelled is None or predicted is None else predicted - labelled
    return {
        "label_volume_mm3": _times(labelled, voxel_mm3),
        "prediction_volume_mm3": _times(predicted, voxel_mm3),
        "volume_error_mm3": _times(error, voxel_mm3),
        "volume_error_relative": None if error is None else _ratio(error, labelled or 0),
    }


def _times(count: int | None, unit: float | None) -> float | None:
    return None if count is None or unit is None else count * unit


def _ratio(part: int, whole: int) -> float | None:
    """A ratio of counts; 0/0 is not a number anyone measured, so it is None."""
    return part / whole if whole else None


def _overlap(state: State, counts: Mapping[str, int | None]) -> dict[str, float | None]:
    """The six overlap ratios, without smoothing; all None where both are empty or there is no label."""
    if state in ("no_label", "both_empty"):
        return dict.fromkeys(("dice", "iou", "precision", "recall", "specificity", "accuracy"))
    tp, fp, fn, tn = (counts[name] or 0 for name in ("tp", "fp", "fn", "tn"))
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
    }


# --- surface distances, lesions, border -----------------------------------------------------------------------------


def _surfaces(label: Mask, prediction: Mask, spacing_mm: Spacing | None) -> Pair:
    """The surfaces of both in mm, or in pixels where the spacing is unknown."""
    return surface_pair(label, prediction, (spacing_mm or (1.0, 1.0, 1.0))[-label.ndim :])


def _distances(state: State, pair: Pair | None, spacing_mm: Spacing | None) -> dict[str, float | None]:
    """HD95 and NSD in the columns of their unit; the other unit's columns are None."""
    figures: tuple[float | None, float | None, float | None] = (None, None, None)
    if state in ("missed", "spurious"):
        figures = (float("inf"), 0.0, 0.0)
    elif pair is not None:
        figures = (pair.hd95, pair.nsd(1), pair.nsd(2))
    names, used = ("hd95_{}", "nsd_1{}", "nsd_2{}"), "px" if spacing_mm is None else "mm"
    known = {name.format(used): figure for name, figure in zip(names, figures, strict=True)}
    return {name.format(unit): known.get(name.format(unit)) for name in names for unit in ("mm", "px")}


def _lesions(
    label: Mask | None, prediction: Mask, pair: Pair | None, spacing_mm: Spacing | None, preset: LesionPreset | None
) -> dict[str, int | float | None]:
    """The plain lesion figures, and the lesion-wise ones where a preset asks for them."""
    labelled, predicted = None if label is None else components(label), components(prediction)
    out = count_lesions(labelled, predicted) | dict.fromkeys(LESIONWISE)
    if labelled is not None and preset is not None:
        match = match_lesions(labelled, predicted, LESION_RULES[preset])
        hd95_mm = None if spacing_mm is None else match.hd95_mm(pair)
        out |= zip(LESIONWISE, (match.dice, hd95_mm, match.tp, match.fp, match.fn), strict=True)
    return out


def _touches_border(prediction: Mask, frame: Frame) -> bool:
    """Whether a mask reaches the first or last row or column of the scan. The first and last slice do not count."""
    for axis in (1, 2) if prediction.size else ():
        before, after = frame.start[axis], frame.shape[axis] - frame.start[axis] - prediction.shape[axis]
        if (before == 0 and prediction.take(0, axis).any()) or (after == 0 and prediction.take(-1, axis).any()):
            return True
    return False
