"""Lesions: tumours that grow into an anatomy, and the label an expert would have drawn.

Three kinds: `rim` (necrotic core, enhancing ring, wide oedema), `diffuse` (bright in flair, no enhancement, soft edge)
and `solid` (uniform enhancement, often on the dura). Label values are those of BraTS 2017 to 2021: 1 necrotic or
non-enhancing core, 2 oedema, 4 enhancing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainseg.phantom.anatomy import Anatomy, Layer, Person
from brainseg.phantom.fields import Array, Frame, Real, coverage, field_on

Kind: TypeAlias = Literal["rim", "diffuse", "solid"]
VALUES = {"core": 1, "necrosis": 1, "oedema": 2, "enhancing": 4}


@dataclass(frozen=True)
class Lesion:
    """One tumour: where it sits, how large its core is, how far its oedema reaches. Points as in `fields`."""

    kind: Kind
    centre_mm: tuple[float, float, float]
    radius_mm: float  # of the core
    stretch: tuple[float, ...]  # 9 numbers, row-major: turns and stretches the core into an ellipsoid of equal volume
    oedema_mm: float
    rim_mm: float
    push: float  # share of the way by which tissue near the centre was displaced
    rater: float  # share of tumour in a voxel from which the expert counts it in


def draw(rng: np.random.Generator, kind: Kind, person: Person) -> tuple[Lesion, ...]:
    """One tumour, sometimes with satellites; radius of the core from 5 to 33 mm, small ones as common as large."""
    radius = float(np.exp(rng.uniform(np.log(5), np.log(33 if kind != "solid" else 21))))
    reach = {"rim": rng.uniform(3, 24), "diffuse": rng.uniform(1, 9), "solid": rng.uniform(0, 9)}[kind]
    main = Lesion(
        kind=kind,
        centre_mm=_place(rng, person, 0.78 if kind == "solid" else 0.5),
        radius_mm=radius,
        stretch=tuple(float(v) for v in _stretch(rng).ravel()),
        oedema_mm=float(reach),
        rim_mm=float(rng.uniform(1.8, 5)),
        push=float(rng.uniform(0.1, 0.45)),
        rater=float(rng.uniform(0.35, 0.6)),
    )
    satellites = int(rng.choice(3, p=(0.8, 0.13, 0.07)))
    return main, *(_satellite(rng, main) for _ in range(satellites))


def _place(rng: np.random.Generator, person: Person, reach: float) -> tuple[float, float, float]:
    """A point of one hemisphere, between a third of the way to the surface and about `reach` of it."""
    up, back, left = person.brain_mm
    angle, lift = rng.uniform(0.2, np.pi - 0.2), rng.uniform(-0.22, 0.62)
    share = rng.uniform(0.6, 1.1) * reach * np.sqrt(1 - lift**2)
    side = rng.choice((-1, 1))
    return float(lift * up), float(-np.cos(angle) * share * back), float(side * np.sin(angle) * share * left)


def _stretch(rng: np.random.Generator) -> NDArray[np.float64]:
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    axes = np.exp(rng.normal(0, 0.22, 3))
    return np.asarray(turn @ np.diag(axes / np.prod(axes) ** (1 / 3)) @ turn.T)


def _satellite(rng: np.random.Generator, main: Lesion) -> Lesion:
    z, y, x = np.array(main.centre_mm) + rng.normal(0, 1, 3) * (0.5, 1, 0.7) * (main.radius_mm + 12)
    radius = float(np.clip(main.radius_mm * rng.uniform(0.25, 0.6), 3, 12))
    return replace(main, centre_mm=(float(z), float(y), float(x)), radius_mm=radius, push=0.0)


def displaced(points: Array, lesions: Sequence[Lesion], inside: Array) -> Array:
    """Where the tissue now at `points` lay before the tumours pushed it aside; the skull does not give way."""
    give = coverage(inside - 10, 20)
    origin = points.copy()
    for lesion in lesions:
        centre = np.array(lesion.centre_mm, np.float32).reshape(3, 1, 1, 1)
        offset = points - centre
        width = 1.5 * lesion.radius_mm + 6
        pull = lesion.push * give * np.exp((offset**2).sum(axis=0) / np.float32(-2 * width**2))
        origin -= offset * pull
    return origin


def grow(
    rng: np.random.Generator, frame: Frame, anatomy: Anatomy, lesions: Sequence[Lesion], edge_mm: float
) -> tuple[list[Layer], NDArray[np.uint8]]:
    """Return the tumours' layers and the label (D, H, W) in values 0, 1, 2, 4."""
    layers: list[Layer] = []
    label = np.zeros(anatomy.inside.shape, np.uint8)
    for lesion in lesions:
        grown = _layers(rng, frame, anatomy, lesion, edge_mm)
        layers += grown
        for tissue, share in grown:
            free = label == 0 if tissue == "oedema" else np.ones_like(label, bool)
            label[(share > lesion.rater) & free] = VALUES[tissue]
    return layers, label


def _layers(rng: np.random.Generator, frame: Frame, anatomy: Anatomy, lesion: Lesion, edge_mm: float) -> list[Layer]:
    """Oedema below, the core on it, then what is within the core."""
    lumps = 0.75 * field_on(rng, frame.axes, 1.3 * lesion.radius_mm + 6) + 0.4 * field_on(rng, frame.axes, 8)
    fingers = field_on(rng, frame.axes, 14)
    body = _body(frame.points, lesion) + np.float32(0.22 * lesion.radius_mm + 0.6) * lumps
    patchy = np.clip(0.92 + 0.12 * fingers, 0.6, 1)
    layers: list[Layer] = [("oedema", _oedema(body, fingers, anatomy, lesion, edge_mm) * patchy)]
    room = coverage(anatomy.inside, edge_mm)
    if lesion.kind == "diffuse":
        return [*layers, ("core", coverage(body, 3 * edge_mm) * room * np.clip(0.3 + anatomy.tissue, 0, 1) * patchy)]
    if lesion.kind == "solid":
        return [*layers, ("enhancing", coverage(body, edge_mm) * coverage(anatomy.inside + 1.5, edge_mm))]
    hollow = coverage(body - lesion.rim_mm * np.clip(1 + 0.5 * lumps, 0.3, 2), 1.3 * edge_mm)
    core = coverage(body, edge_mm) * room
    return [*layers, ("core", core), ("enhancing", core * coverage(fingers + 1.5, 0.8)), ("necrosis", core * hollow)]


def _oedema(body: Real, fingers: Real, anatomy: Anatomy, lesion: Lesion, edge_mm: float) -> Array:
    """Share of oedema: it runs along the white matter, spares the cortex and fades out."""
    reach = lesion.oedema_mm * (0.25 + 0.9 * anatomy.white + 0.3 * fingers)
    fading = coverage(body + reach - 1, 2 * edge_mm + 0.25 * lesion.oedema_mm)
    return np.asarray(fading * np.clip(0.25 + anatomy.tissue, 0, 1) * anatomy.tissue, np.float32)


def _body(points: Array, lesion: Lesion) -> Array:
    """Signed distance to the undeformed core, an ellipsoid, (D, H, W)."""
    offset = points - np.array(lesion.centre_mm, np.float32).reshape(3, 1, 1, 1)
    matrix = np.array(lesion.stretch, np.float32).reshape(3, 3)
    turned = np.einsum("ab,bdhw->adhw", matrix, offset)
    return np.asarray(np.float32(lesion.radius_mm) - np.sqrt((turned**2).sum(axis=0)), np.float32)
