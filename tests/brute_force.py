"""Metrics the slow way: sets of voxels and plain loops, sharing nothing with the code under test; and random small masks."""

import math
from itertools import product

import numpy as np
from hypothesis import strategies as st

MM = (1.0, 1.0, 1.0)


SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(st.just(1), st.integers(1, 8), st.integers(1, 8)),
)


@st.composite
def mask_pairs(draw, shapes=SHAPES):
    """Two masks of one small shape, from empty to full, often touching the border; and a spacing or none."""
    shape = draw(shapes)
    density = st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.9, 1.0])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    label, prediction = (rng.random(shape) < draw(density) for _ in range(2))
    if draw(st.booleans()):
        prediction = label ^ (rng.random(shape) < 0.1)
    size = st.sampled_from([0.47, 0.94, 1.0, 2.5, 5.5])
    return label, prediction, draw(st.one_of(st.none(), st.tuples(size, size, size)))


def voxels_of(mask):
    return {tuple(place) for place in np.argwhere(mask).tolist()}


def moved(voxel, step):
    return voxel[0] + step[0], voxel[1] + step[1], voxel[2] + step[2]


def surface_of(voxels, *, flat):
    """Voxels of which some face neighbour is not in the set; an image has no neighbours along D."""
    steps = [step for step in product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1 and not (flat and step[0])]
    return [voxel for voxel in voxels if any(moved(voxel, step) not in voxels for step in steps)]


def percentile_95(values):
    """Linear between the two nearest ranks."""
    ranked = sorted(values)
    place = 0.95 * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def distances_of(label, prediction, spacing, *, flat):
    """HD95, NSD at 1 and at 2 of two sets of voxels that are not empty, from the distance of every pair of surface voxels."""
    here, there = (np.array(surface_of(voxels, flat=flat)) * spacing for voxels in (label, prediction))
    matrix = np.sqrt(((here[:, None] - there[None]) ** 2).sum(axis=-1))
    forth, back = matrix.min(axis=1).tolist(), matrix.min(axis=0).tolist()
    near = [sum(d <= tolerance + 1e-4 for d in forth + back) / len(forth + back) for tolerance in (1, 2)]
    return [max(percentile_95(forth), percentile_95(back)), *near]


def components_of(voxels):
    """Sets of voxels joined through faces, edges and corners, by flood fill."""
    left, found = set(voxels), []
    while left:
        component, front = set(), [left.pop()]
        while front:
            voxel = front.pop()
            component.add(voxel)
            near = {moved(voxel, step) for step in product((-1, 0, 1), repeat=3)} & left
            left -= near
            front += near
        found.append(component)
    return found


def dilated(voxels, times, shape):
    """Grow by the 3x3x3 box without its corners, inside the scan; an image grows in its plane."""
    steps = [step for step in product((-1, 0, 1), repeat=3) if sum(map(abs, step)) < 3 and not (shape[0] == 1 and step[0])]
    for _ in range(times):
        grown = {moved(voxel, step) for voxel in voxels for step in steps}
        voxels = {v for v in grown if all(0 <= n < size for n, size in zip(v, shape, strict=True))}
    return voxels


def lesionwise_of(label, prediction, dilations, is_ignored, spacing):
    """The lesion-wise row of two masks: lesions one by one, each dilated by itself. `is_ignored` judges a number of voxels.

    Returns tp, fp, fn, Dice and HD95, the last two None where there is nothing to count.
    """
    truth, flat = voxels_of(label), label.shape[0] == 1
    lesions = [grown & truth for grown in components_of(dilated(truth, dilations, label.shape))]
    parts = components_of(voxels_of(prediction))
    spurious, dice, hd95, missed = list(parts), [], [], 0
    for lesion in lesions:
        reaching = [part for part in parts if part & dilated(lesion, dilations, label.shape)]
        spurious = [part for part in spurious if part not in reaching]
        if is_ignored(len(lesion)):
            continue
        answer = set().union(*reaching)
        missed += not answer
        if answer:
            dice.append(2 * len(lesion & answer) / (len(lesion) + len(answer)))
            hd95.append(distances_of(lesion, answer, spacing, flat=flat)[0])
    wrong = len(spurious) + missed
    num = len(dice) + wrong
    return len(dice), len(spurious), missed, *((sum(dice) / num, (sum(hd95) + 374 * wrong) / num) if num else (None, None))
