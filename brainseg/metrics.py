"""Metrics: one scan's label against its prediction, region by region; every number of a `regions` entry is made here.

It stands between the stored mask and the table: masks go in, the struct `tables.REGION` comes out, and `aggregate.py`
turns many of those into a cohort's figures. Pure functions on boolean arrays (D, H, W).

Conventions that other packages set differently:

- *Surface*: the voxels of a mask that its erosion by face neighbours removes (6 in a volume, 4 in an image). Outside the
  grid is background, so a mask that is cut by the border has surface there. As MONAI's `get_mask_edges`.
- *HD95*: distances between voxel centres, linear percentile of each direction, then the larger of the two. As MONAI;
  medpy pools both directions first, surface-distance weighs surface elements: other numbers.
- *NSD*: voxels of both surfaces within the tolerance of the other surface, over all voxels of both. As MONAI's
  `compute_surface_dice` without subvoxels.
- A scan of one slice (D == 1) is an image: erosion, distances and components stay in the plane.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from brainseg.errors import Code, ScanError
from brainseg.geometry import Grid
from brainseg.regions import LabelMap

Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
State = Literal["both", "missed", "spurious", "both_empty", "no_label"]

TRUST_FROM_NETWORK = ("mean_probability", "mean_entropy", "outside_head_fraction")
"""Keys of `tables.REGION` that no mask can tell; whoever holds the probabilities adds them."""

TOLERANCE_SLACK = 1e-4
"""Added to an NSD tolerance: a spacing read from float32 is 1.0000001 mm as often as 1, and both are 1 mm."""

TREE_LIMIT = 150_000
"""With more surface voxels than this, or than a tenth of the crop, a distance transform overtakes the KD-tree."""


@dataclass(frozen=True)
class Frame:
    """Where a crop lies in its scan: the scan's shape (D, H, W) and the crop's first voxel."""

    shape: tuple[int, int, int]
    start: tuple[int, int, int] = (0, 0, 0)

    @property
    def num_voxels(self) -> int:
        """Voxels of the whole scan, which true negatives are counted over."""
        return int(np.prod(self.shape))

    def inside(self, box: Box) -> "Frame":
        """The frame of a crop of this crop."""
        d, h, w = (first + part.start for first, part in zip(self.start, box, strict=True))
        return Frame(self.shape, (d, h, w))


def score_scan(
    label: NDArray[np.uint8] | None,
    prediction: NDArray[np.uint8],
    label_map: LabelMap,
    regions: Sequence[str],
    grid: Grid,
) -> list[dict[str, Any]]:
    """Score every region of one scan from its label and predicted label volume (D, H, W), both in the map's values.

    One entry per region, in order, with the keys of `score_region`. Raises ScanError SHAPE_MISMATCH unless label,
    prediction and grid have one shape.
    """
    _check_shapes("scan", prediction, grid.shape)
    if label is not None:
        _check_shapes("scan", label, grid.shape)
    box = _occupied(prediction if label is None else np.bitwise_or(label, prediction))
    frame = Frame(grid.shape).inside(box)
    predictions = label_map.masks(prediction[box], regions)
    labels = [None] * len(regions) if label is None else label_map.masks(label[box], regions)
    scored = zip(regions, labels, predictions, strict=True)
    return [_score(region, truth, mask, grid.spacing_mm, frame) for region, truth, mask in scored]


def score_region(
    region: str,
    label: Mask | None,
    prediction: Mask,
    spacing_mm: tuple[float, float, float] | None,
) -> dict[str, Any]:
    """Score one region: masks (D, H, W) on the native grid, spacing along (D, H, W) or None where unknown.

    Returns the keys of `tables.REGION` but `TRUST_FROM_NETWORK`, plain Python values. Without a label the state is
    `no_label` and all that needs one is None. Raises ScanError SHAPE_MISMATCH where the masks differ in shape.
    """
    depth, height, width = prediction.shape
    if label is not None:
        _check_shapes(region, label, prediction.shape)
        label = label.astype(np.bool_, copy=False)
    return _score(region, label, prediction.astype(np.bool_, copy=False), spacing_mm, Frame((depth, height, width)))


def _check_shapes(what: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.shape != tuple(expected):
        raise ScanError(Code.SHAPE_MISMATCH, f"{what}: mask is {array.shape}, expected {tuple(expected)}")


def _score(
    region: str, label: Mask | None, prediction: Mask, spacing_mm: tuple[float, float, float] | None, frame: Frame
) -> dict[str, Any]:
    """Score masks that are a crop of the scan; all that lies outside the crop is background in both."""
    box = _occupied(prediction if label is None else label | prediction)
    frame = frame.inside(box)
    prediction = prediction[box]
    label = None if label is None else label[box]
    counts = _counts(label, prediction, frame.num_voxels)
    state = _state(counts["label_voxels"], counts["prediction_voxels"])
    flat = frame.shape[0] == 1
    return {
        "region": region,
        "state": state,
        **counts,
        **_volumes(counts["label_voxels"], counts["prediction_voxels"], spacing_mm),
        **_overlap(state, counts),
        **_distances(state, label, prediction, spacing_mm, flat=flat),
        **_lesions(label, prediction, flat=flat),
        "touches_border": _touches_border(prediction, frame),
    }


def _occupied(array: NDArray[Any]) -> Box:
    """The smallest box around whatever is not zero; a box of no voxels where nothing is."""
    bits = array.view(np.uint8)
    rows, columns = (_extent(np.bitwise_or.reduce(bits, axis=0).any(axis=axis)) for axis in (1, 0))
    slices = _extent(np.bitwise_or.reduce(bits[:, rows, columns], axis=1).any(axis=1))
    return slices, rows, columns


def _extent(used: Mask) -> slice:
    found = np.flatnonzero(used)
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


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


def _volumes(
    labelled: int | None, predicted: int | None, spacing_mm: tuple[float, float, float] | None
) -> dict[str, float | None]:
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


# --- surface distances ----------------------------------------------------------------------------------------------


def _distances(
    state: State, label: Mask | None, prediction: Mask, spacing_mm: Sequence[float] | None, *, flat: bool
) -> dict[str, float | None]:
    """HD95 and NSD in the columns of their unit; the other unit's columns are None."""
    used, unused = ("px", "mm") if spacing_mm is None else ("mm", "px")
    names = ("hd95_{}", "nsd_1{}", "nsd_2{}")
    out: dict[str, float | None] = dict.fromkeys(name.format(unused) for name in names)
    figures: tuple[float | None, float | None, float | None] = (None, None, None)
    if state in ("missed", "spurious"):
        figures = (float("inf"), 0.0, 0.0)
    elif state == "both" and label is not None:
        spacing = tuple(spacing_mm or (1.0, 1.0, 1.0))
        pair = (label, prediction, spacing) if not flat else (label[0], prediction[0], spacing[1:])
        figures = _hd95_and_nsd(*pair)
    out.update(zip((name.format(used) for name in names), figures, strict=True))
    return {name.format(unit): out[name.format(unit)] for name in names for unit in ("mm", "px")}


def _hd95_and_nsd(label: Mask, prediction: Mask, spacing: tuple[float, ...]) -> tuple[float, float, float]:
    """95 % Hausdorff distance and surface Dice at 1 and 2, in the unit of the spacing, of two masks that are not empty."""
    surfaces = _surface(label), _surface(prediction)
    both = [_directed(surfaces[a], surfaces[b], spacing) for a, b in ((0, 1), (1, 0))]
    hd95 = max(float(np.percentile(distances, 95)) for distances in both)
    merged = np.concatenate(both)
    near = [float(np.mean(merged <= tolerance + TOLERANCE_SLACK)) for tolerance in (1, 2)]
    return hd95, near[0], near[1]


def _surface(mask: Mask) -> Mask:
    """Voxels of a mask, 2-D or 3-D, with a face neighbour outside it; beyond the array is outside."""
    padded = np.pad(mask, 1)
    middle = (slice(1, -1),) * mask.ndim
    inner = mask.copy()
    for axis in range(mask.ndim):
        for shifted in (slice(None, -2), slice(2, None)):
            inner &= padded[(*middle[:axis], shifted, *middle[axis + 1 :])]
    return mask ^ inner


def _directed(source: Mask, target: Mask, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Distances from every voxel of one surface to the nearest of the other, in no order.

    A voxel on both surfaces is at distance 0 and is not looked up, but keeps its place among the values.
    """
    own = source & ~target
    distances = np.zeros(np.count_nonzero(source), np.float64)
    num_own = np.count_nonzero(own)
    if num_own:
        crowded = num_own + np.count_nonzero(target) > min(TREE_LIMIT, source.size // 10)
        distances[:num_own] = (_by_transform if crowded else _by_tree)(own, target, spacing)
    return distances


def _by_tree(own: Mask, target: Mask, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Distance from each voxel of `own` to the nearest of `target`: the time goes by the number of voxels."""
    tree = KDTree(np.argwhere(target) * spacing, balanced_tree=False, compact_nodes=False)
    return np.atleast_1d(tree.query(np.argwhere(own) * spacing)[0])


def _by_transform(own: Mask, target: Mask, spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """The same by a transform of the whole crop: the time goes by the crop's size alone."""
    found: NDArray[np.float64] = distance_transform_edt(~target, sampling=spacing)[own]
    return found


# --- lesions and border ---------------------------------------------------------------------------------------------


def _lesions(label: Mask | None, prediction: Mask, *, flat: bool) -> dict[str, int | None]:
    """Count components and which of them share a voxel with the other mask."""
    predicted, num_predicted = _components(prediction, flat=flat)
    sizes = np.bincount(predicted.ravel(), minlength=1)[1:]
    out: dict[str, int | None] = dict.fromkeys(("lesions_label", "lesions_prediction", "lesions_found", "lesions_spurious"))
    out |= {"lesions_prediction": num_predicted, "largest_lesion_voxels": int(sizes.max(initial=0))}
    if label is not None:
        labelled, num_labelled = _components(label, flat=flat)
        shared = label & prediction
        out["lesions_label"] = num_labelled
        out["lesions_found"] = int(np.unique(labelled[shared]).size)
        out["lesions_spurious"] = num_predicted - int(np.unique(predicted[shared]).size)
    return out


def _components(mask: Mask, *, flat: bool) -> tuple[NDArray[Any], int]:
    """Number the components of a mask (D, H, W) from 1: 26-connected, or 8-connected in the plane of a single slice."""
    if not mask.size:
        return np.zeros(mask.shape, np.uint32), 0
    # As bytes, copied: given booleans, cc3d 4.1.1 miscounts images and fails on lines of voxels.
    bits = mask.astype(np.uint8, order="C")
    if flat:
        components, count = cc3d.connected_components(bits[0], connectivity=8, return_N=True)
        return components[None], int(count)
    components, count = cc3d.connected_components(bits, connectivity=26, return_N=True)
    return components, int(count)


def _touches_border(prediction: Mask, frame: Frame) -> bool:
    """Whether a mask reaches the first or last row or column of the scan. The first and last slice do not count."""
    for axis in (1, 2) if prediction.size else ():
        before, after = frame.start[axis], frame.shape[axis] - frame.start[axis] - prediction.shape[axis]
        if (before == 0 and prediction.take(0, axis).any()) or (after == 0 and prediction.take(-1, axis).any()):
            return True
    return False
