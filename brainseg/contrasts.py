"""Contrasts: whether modalities show what their names say, as far as their voxels can tell.

Water is dark where a sequence weighs T1 and bright where it weighs T2, and contrast agent changes few voxels: so t1 and t1c
are much alike in any head, and t2 is unlike both. Names that are exchanged turn this round. No header could tell.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_VOXELS = 100
LOOKED_AT = 20_000
"""About as many voxels are compared: a correlation over more of them is no surer."""
STANDARD_ERRORS = 2.0
"""What chance leaves of a difference between correlations over `n` voxels is this over the root of `n`."""
LEAST_ALIKE = 0.4
"""Two volumes less alike than this are no pair of t1 and t1c, whatever the third is."""
TUMOUR_MARGIN = 0.3
"""By how much t2 may be more like t1c than t1 is: a large enhancing tumour is bright on both."""


def suspicion(image: NDArray[Any], modalities: Sequence[str], background: Sequence[Any]) -> str | None:
    """What speaks against the names t1, t1c and t2 of an image `(C, D, H, W)`, or None. Silent where one is missing.

    Correlations over the head: on real scans t1 with t1c is 0.6 to 0.8, t1 with t2 below 0.
    """
    if not {"t1", "t1c", "t2"} <= set(modalities):
        return None
    places = [modalities.index(name) for name in ("t1", "t1c", "t2")]
    between = _correlations([image[place] for place in places], [background[place] for place in places])
    if between is None:
        return None
    t1_t1c, t1_t2, t1c_t2, chance = between
    if t1_t2 > max(t1_t1c + chance, LEAST_ALIKE):
        pair, others = "t1 more like t2", f"{t1_t2:.2f} against {t1_t1c:.2f}"
    elif t1c_t2 > max(t1_t1c + TUMOUR_MARGIN, LEAST_ALIKE):
        pair, others = "t1c more like t2", f"{t1c_t2:.2f} against {t1_t1c:.2f}"
    else:
        return None
    return f"found {pair} than t1 like t1c (correlation {others}), expected the opposite; are the files' names exchanged?"


def _correlations(volumes: Sequence[NDArray[Any]], background: Sequence[Any]) -> tuple[float, float, float, float] | None:
    """Between the first and second, first and third, second and third volume, over voxels where all show something.

    The fourth number is what chance may add to a difference between them. None where too little is shown.
    """
    step = max(1, round((volumes[0].size / LOOKED_AT) ** (1 / 3)))
    sample = np.stack([volume[::step, ::step, ::step].reshape(-1).astype(np.float64) for volume in volumes])
    head = np.all(sample != np.array([float(value) for value in background])[:, None], axis=0)
    if head.sum() < LEAST_VOXELS:
        return None
    shown = sample[:, head]
    shown = shown / np.abs(shown).max(axis=1, keepdims=True)
    if not (np.ptp(shown, axis=1) > 0).all():
        return None
    table = np.corrcoef(shown)
    return float(table[0, 1]), float(table[0, 2]), float(table[1, 2]), STANDARD_ERRORS / float(np.sqrt(head.sum()))
