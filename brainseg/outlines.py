"""Outlines: a mask's border as closed walks along pixel edges, for whoever draws it: the report in SVG, training in PNG."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Corner = tuple[int, int]


def loops(mask: NDArray[np.bool_]) -> Iterator[list[Corner]]:
    """Closed walks over pixel corners (x, y) around a mask (H, W), clockwise around the inside; each ends where it began."""
    steps = _border(mask)
    for start in list(steps):
        while steps[start]:
            walk = [start, steps[start].pop()]
            while walk[-1] != start:  # as many steps lead into a corner as out of it
                walk.append(steps[walk[-1]].pop())
            yield walk


def _border(mask: NDArray[np.bool_]) -> dict[Corner, list[Corner]]:
    """From each corner (x, y) on the border, the corners that a unit step with the inside on the right leads to."""
    steps: dict[Corner, list[Corner]] = defaultdict(list)
    padded = np.pad(mask, 1).astype(np.int8)
    across, down = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1, :]
    for sign, (dx0, dx1) in ((1, (0, 1)), (-1, (1, 0))):
        for y, x in np.argwhere(across == sign).tolist():
            steps[x + dx0, y].append((x + dx1, y))
        for y, x in np.argwhere(down == sign).tolist():
            steps[x, y + dx1].append((x, y + dx0))
    return steps
