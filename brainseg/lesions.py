"""Lesions: a mask as separate tumours, and how many of the label's the prediction finds, misses and invents.

It stands between `surfaces.py` and `metrics.py`, which puts these figures into a scan's row. A mask is a volume
(D, H, W), whose lesions are 26-connected, or an image (H, W), where everything stays in the plane (8-connected).

Two answers to one question. The *plain* figures count components and ask whether they share a voxel. The *lesion-wise*
ones follow BraTS 2023 (`eval.py` of github.com/rachitsaluja/BraTS-2023-Metrics):

1. Label lesions whose dilations join are one lesion.
2. It is found if any predicted component reaches its dilation, and is then compared, undilated, with all components
   that do. A component that reaches two lesions counts in full for both.
3. Label lesions that are too small count neither as found nor as missed, but a component that reaches only such a one
   is not spurious either. Predicted components are never too small.
4. Dice and HD95 are summed over the found lesions; each missed or spurious one adds 0 and 374 mm; the sum is divided by
   their number.

As there: the structuring element is the 3x3x3 box without its eight corners, applied again and again; connectivity.
Different here: a lesion *under* the limit is too small (there also one at the limit), the limit is in voxels (there in
mm3, of scans that all have 1 mm), HD95 takes surface voxels (there weighted surface elements), a scan with nothing to
count has no value (there 1 and 0; the aggregation rule `brats` puts them in), images of one slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cc3d
import numpy as np
from numpy.typing import NDArray

from brainseg.config import LesionPreset
from brainseg.surfaces import Pair

Mask = NDArray[np.bool_]
Integers = NDArray[np.integer]

ABSENT_MM = 374.0
"""HD95 of a missed or spurious lesion: the diagonal of 240 x 240 x 155 mm, as BraTS 2023 rounds it."""

PLAIN = ("lesions_label", "lesions_found", "lesions_spurious", "lesion_recall", "lesion_precision", "lesion_f1")
LESIONWISE = ("lesionwise_dice", "lesionwise_hd95_mm", "lesionwise_tp", "lesionwise_fp", "lesionwise_fn")
"""Keys of `tables.REGION` that need a label."""


@dataclass(frozen=True)
class LesionRule:
    """How often a label is dilated to join its lesions, and the voxels below which a lesion is ignored."""

    dilations: int
    smallest_voxels: int


LESION_RULES: dict[LesionPreset, LesionRule] = {
    "glioma": LesionRule(3, 50),
    "meningioma": LesionRule(1, 50),
    "metastasis": LesionRule(1, 2),
}
"""BraTS 2023 by challenge; its paediatric and sub-Saharan ones follow glioma."""


@dataclass(frozen=True)
class Components:
    """A mask in pieces: `ids` of its shape, 0 outside and from 1 inside; `index`, its voxels' flat indices."""

    ids: Integers
    index: NDArray[np.int64]
    num: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Voxels by id; of id 0 none."""
        return np.bincount(self.at(self.index), minlength=self.num + 1)

    def at(self, index: NDArray[np.int64]) -> Integers:
        """The ids at flat indices."""
        return self.ids.ravel()[index]


def components(mask: Mask) -> Components:
    """Part a mask into components joined through faces, edges and corners."""
    index = np.flatnonzero(mask)
    if not index.size:
        return Components(np.zeros(mask.shape, np.uint16), index, 0)
    # As bytes, copied: given booleans, cc3d 4.1.1 miscounts images and fails on lines of voxels.
    bits = mask.astype(np.uint8, order="C")
    ids, num = cc3d.connected_components(bits, connectivity=8 if mask.ndim == 2 else 26, return_N=True)
    return Components(ids, index, int(num))


def count_lesions(label: Components | None, prediction: Components) -> dict[str, int | float | None]:
    """The plain figures: components, and which of them share a voxel with the other mask."""
    out: dict[str, int | float | None] = dict.fromkeys(PLAIN)
    out |= {"lesions_prediction": prediction.num, "largest_lesion_voxels": int(prediction.sizes.max(initial=0))}
    if label is None:
        return out
    shared = label.index[prediction.at(label.index) > 0]
    found, confirmed = (int(np.unique(side.at(shared)).size) for side in (label, prediction))
    recall, precision = _share(found, label.num), _share(confirmed, prediction.num)
    return out | {
        "lesions_label": label.num,
        "lesions_found": found,
        "lesions_spurious": prediction.num - confirmed,
        "lesion_recall": recall,
        "lesion_precision": precision,
        "lesion_f1": _harmonic_mean(recall, precision),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _harmonic_mean(recall: float | None, precision: float | None) -> float | None:
    """None of two unknowns; 0 where one is unknown or both are 0: nothing was found that is there."""
    if recall is None and precision is None:
        return None
    return 2 * recall * precision / (recall + precision) if recall and precision else 0.0


@dataclass(frozen=True)
class Match:
    """The lesions of a label, joined by dilation, and the predicted components that reach them.

    `ids` (D, H, W) or (H, W) numbers the joined lesions from 1, 0 outside; `voxels`, `overlap` and `predicted_voxels` say by
    lesion (0-based) how large it is, how much of it is predicted, and how large the components are that reach it. `reached`
    holds the pairs (lesion, component), (N, 2). Lesions are `counted` unless too small, and `found` if counted and reached.
    """

    ids: Integers
    voxels: NDArray[np.int64]
    overlap: NDArray[np.int64]
    predicted_voxels: NDArray[np.int64]
    reached: NDArray[np.int64]
    prediction: Components
    counted: Mask
    found: Mask

    @property
    def tp(self) -> int:
        return int(self.found.sum())

    @property
    def fn(self) -> int:
        return int(self.counted.sum()) - self.tp

    @property
    def fp(self) -> int:
        """Predicted components that reach no label lesion, not even one that is too small."""
        return self.prediction.num - int(np.unique(self.reached[:, 1]).size)

    @property
    def dice(self) -> float | None:
        """The found lesions' Dice, summed, over all that is found, missed or spurious; None where nothing is."""
        each = 2 * self.overlap / (self.voxels + self.predicted_voxels)
        return self._over_all(float(each[self.found].sum()))

    def hd95_mm(self, pair: Pair | None) -> float | None:
        """The same of HD95, from the surfaces of the two masks in mm, which may be None where one of them is empty."""
        found = 0.0 if pair is None else sum(part.hd95 for part in self._pairs(pair))
        return self._over_all(found + ABSENT_MM * (self.fp + self.fn))

    def _over_all(self, total: float) -> float | None:
        num = self.tp + self.fp + self.fn
        return total / num if num else None

    def _pairs(self, pair: Pair) -> Iterator[Pair]:
        """For each found lesion its surface and that of the components that reach it.

        Components never share a face, so the surface of some of them is theirs in the surface of all. What a lesion's surface
        shares with the prediction it shares with a component that reaches it; the other way round it may be another lesion's.
        """
        lesion_here, lesion_there = (self.ids.ravel()[side.index] for side in (pair.label, pair.prediction))
        part_there = self.prediction.at(pair.prediction.index)
        for lesion in np.flatnonzero(self.found) + 1:
            chosen = np.zeros(self.prediction.num + 1, np.bool_)
            chosen[self.reached[self.reached[:, 0] == lesion, 1]] = True
            here, there = lesion_here == lesion, chosen[part_there]
            if here.all() and there.all():
                yield pair  # whose distances are known
                continue
            answer = replace(pair.prediction, shared=pair.prediction.shared & (lesion_there == lesion))
            yield replace(pair, label=pair.label.part(here), prediction=answer.part(there))


def match_lesions(label: Components, prediction: Components, rule: LesionRule) -> Match:
    """Join the label's lesions by dilation and find the predicted components that reach each; both of one shape."""
    near, joined = _joined(label, rule.dilations)
    ids = np.zeros(label.ids.shape, joined.ids.dtype)
    ids[near] = joined.ids * (label.ids[near] > 0)
    here = ids.ravel()[label.index]
    voxels = np.bincount(here, minlength=joined.num + 1)[1:]
    overlap = np.bincount(here[prediction.at(label.index) > 0], minlength=joined.num + 1)[1:]
    reached = _pairs_of_ids(joined, prediction.ids[near], prediction.num)
    sizes = np.zeros(joined.num + 1, np.int64)
    np.add.at(sizes, reached[:, 0], prediction.sizes[reached[:, 1]])
    counted = voxels >= rule.smallest_voxels
    return Match(ids, voxels, overlap, sizes[1:], reached, prediction, counted, counted & (sizes[1:] > 0))


def _joined(label: Components, dilations: int) -> tuple[tuple[slice, ...], Components]:
    """The components of the dilated label in a box just around it, and that box.

    The box may cut a dilation at the scan's border or at a crop around all masks: what is joined outside is joined inside.
    """
    places = np.unravel_index(label.index, label.ids.shape)
    spans = [(int(p.min()), int(p.max()) + 1) if p.size else (0, 0) for p in places]
    near = tuple(slice(max(0, a - dilations), b + dilations) for a, b in spans)
    return near, components(dilate(label.ids[near] > 0, dilations))


def dilate(mask: Mask, times: int) -> Mask:
    """Dilate by the 3x3x3 box without its corners (an image: by the 3x3 square), clipped to the array."""
    for _ in range(times):
        along = _spread(mask, -1)
        grown = _spread(along, -2)
        if mask.ndim == 3:
            grown |= _spread(along, 0)
            grown |= _spread(_spread(mask, -2), 0)
        mask = grown
    return mask


def _spread(mask: Mask, axis: int) -> Mask:
    """Each voxel to its two neighbours along one axis."""
    out = mask.copy()
    moved, source = np.moveaxis(out, axis, 0), np.moveaxis(mask, axis, 0)
    moved[1:] |= source[:-1]
    moved[:-1] |= source[1:]
    return out


def _pairs_of_ids(joined: Components, predicted: Integers, num_predicted: int) -> NDArray[np.int64]:
    """Each (lesion, component) that share a voxel, once: (N, 2)."""
    lesions, parts = joined.at(joined.index).astype(np.int64), predicted.ravel()[joined.index]
    met = parts > 0
    keys = np.unique(lesions[met] * (num_predicted + 1) + parts[met])
    return np.stack(np.divmod(keys, num_predicted + 1), axis=-1)
