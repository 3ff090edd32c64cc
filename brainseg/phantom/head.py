"""Head: one synthetic patient, from a seed to four modalities and a label on one grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainseg.phantom import anatomy, lesions, scanner
from brainseg.phantom.fields import Frame

MODALITIES = ("flair", "t1", "t1c", "t2")

FIELD_OF_VIEW_MM = (130.0, 226.0)
"""Extent along (D, H) of an average head's scan; the slices run from the orbits to the crown."""

Tumour = Literal["any", "none", "rim", "diffuse", "solid"]


@dataclass(frozen=True)
class Head:
    """One scan: `image` (4, D, H, W) in the order of `MODALITIES`, `label` (D, H, W) in values 0, 1, 2, 4.

    Slices run from feet to head, rows front to back, columns from the patient's right to the left (LPS).
    `spacing_mm` is along (D, H, W). `tumour` is the kind that was drawn, or "none".
    """

    image: NDArray[np.int16]
    label: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]
    tumour: Tumour


def make_head(
    seed: int,
    shape: tuple[int, int, int] = (16, 96, 96),
    *,
    tumour: Tumour = "any",
    skull: bool = True,
) -> Head:
    """Draw the head that belongs to `seed`, sampled on a grid (D, H, W).

    Another shape gives the same anatomy on finer or coarser voxels, with other noise. `tumour="any"` leaves about one
    head in twelve without; `skull=False` sets everything outside the brain to 0, as a stripped dataset does.
    """
    draws = [np.random.default_rng((seed, stage)) for stage in range(5)]
    kind = _kind(draws[0], tumour)
    person, protocol = anatomy.Person.draw(draws[0]), scanner.Protocol.draw(draws[1])
    found = () if kind == "none" else lesions.draw(draws[2], kind, person)
    spacing, frame = _frame(draws[0], shape)
    edge_mm = max(spacing[1], 1.0)
    inside = anatomy.outline(frame.points, person)
    origin = lesions.displaced(frame.points, found, inside)
    body = anatomy.build(draws[3], person, frame, inside, origin, edge_mm)
    grown, label = lesions.grow(draws[2], frame, body, found, edge_mm)
    image = scanner.render([*body.layers, *grown], protocol.tissues)
    stored = scanner.acquire(draws[4], image, frame, inside, protocol)
    if not skull:
        stored[:, inside < 0] = 0
        label[inside < 0] = 0
    return Head(stored, label, spacing, kind if label.any() else "none")


def _kind(rng: np.random.Generator, tumour: Tumour) -> Literal["none", "rim", "diffuse", "solid"]:
    drawn = rng.choice(("none", "rim", "diffuse", "solid"), p=(0.08, 0.42, 0.35, 0.15))
    return str(drawn) if tumour == "any" else tumour  # type: ignore[return-value]


def _frame(rng: np.random.Generator, shape: Sequence[int]) -> tuple[tuple[float, float, float], Frame]:
    """Spacing in mm and the voxels of a slightly turned and shifted head."""
    depth, height = np.array(FIELD_OF_VIEW_MM[:2]) * rng.normal(1, (0.03, 0.025))
    spacing = (float(depth / shape[0]), float(height / shape[1]), float(height / shape[1]))
    centre = np.array((17, -2, 0)) + rng.normal(0, (3, 3, 2.5))
    axes = [((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(shape, spacing, strict=True)]
    nod, roll, turn = np.deg2rad(rng.normal(0, (4, 2, 4)))
    matrix = _rotation(0, 1, nod) @ _rotation(0, 2, roll) @ _rotation(1, 2, turn)
    upright = np.stack(np.meshgrid(*axes, indexing="ij"))
    points = np.einsum("ab,bdhw->adhw", matrix, upright) + centre.reshape(3, 1, 1, 1)
    return spacing, Frame((axes[0], axes[1], axes[2]), points.astype(np.float32))


def _rotation(a: int, b: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(3)
    matrix[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix
