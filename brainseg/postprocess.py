"""Postprocess: what may be done to a network's answer after the threshold, before it is written down.

It stands between the painted label of a scan and the mask that a run stores: components of a region that are too small, or
all but the largest, go. Off unless asked for; which rule a model's validation patients favour is found by `sweep.py`.

Regions may hold one another (WT holds TC holds ET), and stay so. They are taken from the widest to the narrowest, as the
label map paints them: a narrower region is first cut down to what is left of the wider ones, then loses its own components.
So what goes from WT takes the TC and ET in it along, and what goes from TC or ET alone stays tumour of the wider region.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainseg.geometry import occupied
from brainseg.lesions import components
from brainseg.regions import LabelMap

Smallest = int | Literal["largest"]
"""How many voxels of the native grid a component needs to stay (0 and 1: all stay), or only the largest one stays."""


def drop_components(label: NDArray[np.uint8], meaning: LabelMap, names: Sequence[str], smallest: Smallest) -> NDArray[np.uint8]:
    """Return a painted label `(D, H, W)`, in the map's values, without the components that the rule drops.

    Components are joined through faces, edges and corners (26-connected); in a single slice that is 8-connected. Of equally
    large ones the first in the order of the voxels stays.
    """
    if smallest in (0, 1) or not label.any():
        return label
    order = [name for name, _ in meaning.paint if name in names]
    box = occupied(label)
    inner = label[box]
    kept: dict[str, NDArray[np.bool_]] = {}
    for name, mask in zip(order, meaning.masks(inner, order), strict=True):
        for wider, theirs in kept.items():
            if set(meaning.regions[name]) <= set(meaning.regions[wider]):
                mask &= theirs
        _drop_from(mask, smallest)
        kept[name] = mask
    out = np.zeros_like(label)
    out[box] = meaning.paint_label(np.stack(list(kept.values())), order)
    return out


def _drop_from(mask: NDArray[np.bool_], smallest: Smallest) -> None:
    """Take the components that the rule drops out of a contiguous mask `(D, H, W)`."""
    found = components(mask)
    sizes = found.sizes
    keep = np.arange(sizes.size) == np.argmax(sizes) if smallest == "largest" else sizes >= smallest
    if not keep[1:].all():
        mask.reshape(-1)[found.index] = keep[found.at(found.index)]
