"""Anatomy: the tissues of one head without disease, as layers that cover one another.

Nothing here is a patient's: surfaces are ellipsoids and tubes, and the cortex is folded along the zero lines of a
smooth random field, nearly the same on both sides. Distances are in mm, points as in `fields`.
"""

from dataclasses import dataclass

import numpy as np

from brainseg.phantom.fields import Array, Frame, Real, coverage, ellipsoid, field_at, field_on, tube

Layer = tuple[str, Array]
"""A tissue of `scanner.TISSUES` and the share of each voxel that it covers, (D, H, W)."""


@dataclass(frozen=True)
class Person:
    """What differs from head to head, drawn before anything is made."""

    brain_mm: tuple[float, float, float]  # half axes up, back, left
    skull_mm: float
    scalp_mm: float
    ventricle_mm: float  # added to the radius of the ventricles
    sulcus_mm: float  # half width of the sulci
    cortex_mm: float
    foci: float  # load of white-matter hyperintensities, 0 none, 1 heavy

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Person":
        """A head of ordinary proportions; age shows in ventricles, sulci and foci together."""
        age = float(rng.uniform(0, 1))
        up, back, left = rng.normal(1, 0.035) * rng.normal((69, 85, 67), (2, 3, 2.5))
        return cls(
            brain_mm=(float(up), float(back), float(left)),
            skull_mm=float(rng.uniform(5, 8)),
            scalp_mm=float(rng.uniform(4.5, 8.5)),
            ventricle_mm=float(2.6 * age + rng.normal(-1.2, 0.7)),
            sulcus_mm=float(0.45 + 0.8 * age),
            cortex_mm=float(rng.uniform(3.2, 4.0)),
            foci=float(max(0.0, age + rng.normal(-0.35, 0.25))),
        )


@dataclass(frozen=True)
class Anatomy:
    """Layers from the outside in, and the maps that lesions need to know where they may grow; all (D, H, W)."""

    layers: list[Layer]
    inside: Array  # signed distance to the brain's envelope, positive inside
    tissue: Array  # share of grey or white matter: where a tumour can grow
    white: Array  # share of white matter: where oedema spreads


@dataclass(frozen=True)
class Setting:
    """What every part of the anatomy is built from."""

    person: Person
    frame: Frame
    origin: Array  # (3, D, H, W): where the tissue came from before a tumour displaced it
    mirrored: Array  # (3, D, H, W): the same with the left side folded onto the right, not quite evenly
    inside: Array  # (D, H, W): signed distance to the brain's envelope
    edge_mm: float  # over which a surface is blurred

    def share(self, distance: Real, softness: float = 1.0) -> Array:
        """Share of each voxel inside a surface."""
        return coverage(distance, softness * self.edge_mm)


@dataclass(frozen=True)
class Surfaces:
    """Where fluid, cortex and white matter meet, as signed distances (D, H, W)."""

    pial: Array  # inwards from the nearest pial surface
    ventricle: Array  # positive inside the ventricles
    white: Array  # share of white matter, 0 to 1


def outline(points: Array, person: Person) -> Array:
    """Signed distance to the brain's envelope: an egg, wider at the back and flat at the base."""
    up, back, left = person.brain_mm
    egg = points.copy()
    egg[2] /= 1 + 0.08 * np.clip(points[1] / back, -1, 1)
    egg[0] = np.where(points[0] > 0, points[0], points[0] * np.float32(up / 57))
    return ellipsoid(egg, (0, 0, 0), (up, back, left))


def build(rng: np.random.Generator, person: Person, frame: Frame, inside: Array, origin: Array, edge_mm: float) -> Anatomy:
    """Lay out one head.

    `inside` (D, H, W) is `outline` at the frame's points, `origin` (3, D, H, W) where each voxel's tissue lay before a
    tumour displaced it.
    """
    mirrored = origin.copy()
    mirrored[2] = np.abs(origin[2] + 1.5 * field_on(rng, frame.axes, 70))
    at = Setting(person, frame, origin, mirrored, inside, edge_mm)
    brain, surfaces = _brain(rng, at)
    tissue = at.share(np.minimum(surfaces.pial, -surfaces.ventricle) - np.float32(person.sulcus_mm))
    within = at.share(at.inside)
    layers = [*_shell(rng, at), *((name, share * within) for name, share in brain), *_distractors(rng, at, surfaces)]
    return Anatomy(layers, at.inside, tissue * within, surfaces.white * tissue * within)


def _shell(rng: np.random.Generator, at: Setting) -> list[Layer]:
    """Scalp, skull, face and the fluid around the brain."""
    rough = field_on(rng, at.frame.axes, 22)
    head = _skin(at) + np.float32(0.7) * rough
    depth, skull = -at.inside - np.float32(2.2), np.float32(at.person.skull_mm)
    bone = np.minimum(depth, skull + np.float32(0.5) * rough - depth)
    muscle = np.minimum(np.minimum(head - 3, depth - skull - 1.5), 6 * rough - 12 - at.frame.points[0])
    return [
        ("skin", at.share(head)),
        ("fat", at.share(head - 1.8)),
        ("muscle", at.share(muscle) * coverage(rough + 1.1, 0.8)),
        ("bone", at.share(bone)),
        ("marrow", 0.8 * at.share(bone - 0.31 * skull)),
        *_face(at, rough, head),
        ("csf", at.share(at.inside + 2.2)),
    ]


def _skin(at: Setting) -> Array:
    """Signed distance to the outside of the head, which goes on below the brain and bulges into a face."""
    up, back, left = (r + at.person.skull_mm + at.person.scalp_mm + 2 for r in at.person.brain_mm)
    low = at.frame.points.copy()
    low[0] = np.where(low[0] > 0, low[0], low[0] * np.float32(0.35))
    low[2] /= 1 + 0.06 * np.clip(low[1] / np.float32(back), -1, 1)
    return np.maximum(ellipsoid(low, (0, 0, 0), (up, back, left)), ellipsoid(low, (-18, -52, 0), (15, 55, 60)))


def _face(at: Setting, rough: Array, head: Array) -> list[Layer]:
    """Orbits with their eyes, and the air of the nose and the frontal sinus."""
    half = at.frame.points.copy()
    half[2] = np.abs(half[2])
    orbit = tube(half, (-42, -78, 32), (-40, -50, 20), (17, 6))
    nerve = tube(half, (-41, -68, 30), (-40, -46, 16), (2.4, 2.4))
    nose = ellipsoid(half, (-56, -80, 0), (20, 22, 11)) + 2 * rough
    sinus = ellipsoid(half, (-22, -91, 9), (13, 5, 11)) + 1.5 * rough
    return [
        ("air", at.share(np.minimum(np.maximum(nose, sinus), head - 5))),
        ("fat", at.share(np.minimum(orbit, head - 1.8))),
        ("muscle", at.share(nerve)),
        ("eye", at.share(ellipsoid(half, (-42, -79, 32), (12, 12.5, 12)))),
    ]


def _pial(rng: np.random.Generator, at: Setting) -> Array:
    """Distance inwards from the nearest pial surface: the envelope, the sulci, the midline and the Sylvian fissures."""
    folds = 0.9 * field_at(rng, at.mirrored, 13.5) + 0.45 * field_at(rng, at.origin, 13.5)
    depth = 20 + 7 * field_on(rng, at.frame.axes, 30)
    inside = outline(at.origin, at.person)
    sulci = 3.8 * np.abs(folds) + 0.8 * np.clip(inside - depth, 0, None)
    z, y, x = at.mirrored
    callosum = 1 - np.sqrt(((y - 3) / 46) ** 2 + ((z - 2) / 27) ** 2)
    midline = x + 40 * np.clip(callosum, 0, None) + np.clip(-25 - z, 0, None)
    lateral = tube(at.mirrored, (-2, -20, 66), (4, -18, 44), (0, 0))
    insula = -np.maximum(lateral, tube(at.mirrored, (4, -18, 44), (8, 16, 43), (0, 0))) + np.float32(0.8) * folds
    return np.asarray(np.minimum(np.minimum(inside, sulci), np.minimum(midline, insula - 1)), np.float32)


def _ventricles(at: Setting) -> Array:
    """Signed distance to the lateral and third ventricles."""
    grow, half = at.person.ventricle_mm, at.mirrored
    flat = half.copy()
    flat[0] *= 0.62
    front = tube(flat, (7, -33, 11), (11, -4, 9), (4.8 + grow, 4.2 + grow))
    back = tube(flat, (11, -4, 9), (7.5, 38, 25), (4.2 + grow, 6.2 + 1.2 * grow))
    temporal = tube(half, (10, 38, 26), (-22, 6, 33), (4.5 + grow, 1.6 + 0.4 * grow))
    third = tube(half, (2, -6, 0), (-3, 16, 0), (2.0 + 0.5 * grow, 2.2 + 0.5 * grow))
    return np.maximum(np.maximum(front, back), np.maximum(temporal, third))


def _nuclei(rng: np.random.Generator, at: Setting) -> Array:
    """Signed distance to the caudate, the lentiform nucleus and the thalamus."""
    caudate = ellipsoid(at.mirrored, (9, -19, 14), (14, 12, 5))
    lentiform = ellipsoid(at.mirrored, (1, -5, 25), (12, 17, 6.5))
    thalamus = ellipsoid(at.mirrored, (3, 13, 10), (11, 14, 8))
    return np.maximum(np.maximum(caudate, lentiform), thalamus) + field_on(rng, at.frame.axes, 12)


def _brain(rng: np.random.Generator, at: Setting) -> tuple[list[Layer], Surfaces]:
    """Fluid, grey and white matter, deep nuclei, cerebellum and brain stem."""
    pial, ventricle, nuclei = _pial(rng, at), _ventricles(at), _nuclei(rng, at)
    sulcus = np.float32(at.person.sulcus_mm)
    cortex = at.share(sulcus + np.float32(at.person.cortex_mm) - pial, 1.2)
    deep = at.share(nuclei, 2.5)
    fluid = at.share(np.maximum(sulcus - pial, ventricle))
    white = (1 - np.maximum(np.maximum(cortex, deep), fluid)) * coverage(at.mirrored[0] + 24, 8)
    layers: list[Layer] = [("white", np.ones_like(pial)), ("nuclei", deep), ("grey", cortex), ("csf", fluid)]
    return layers + _hindbrain(rng, at), Surfaces(pial, ventricle, white)


def _hindbrain(rng: np.random.Generator, at: Setting) -> list[Layer]:
    """Cerebellum with its folia, and the brain stem, in their cisterns."""
    bumps = field_on(rng, at.frame.axes, 20)
    cerebellum = ellipsoid(at.mirrored, (-47, 47, 0), (25, 27, 49)) + bumps
    stem = tube(at.mirrored, (-14, 8, 0), (-60, 20, 0), (12, 9)) + 1.2 * bumps
    folia = np.sin(np.hypot(at.mirrored[1] - 20, 1.3 * at.mirrored[0] + 60) / 1.5 + 1.5 * bumps)
    cistern = at.share(np.maximum(cerebellum, stem) + 1.5 + bumps, 1.5) * coverage(bumps + 0.9, 0.8)
    return [
        ("csf", cistern),
        ("grey", at.share(cerebellum)),
        ("white", coverage(cerebellum - 7, 8) * (0.45 + 0.35 * folia)),
        ("white", at.share(stem)),
        ("csf", at.share(ellipsoid(at.mirrored, (-42, 28, 0), (12, 4, 6)))),
    ]


def _distractors(rng: np.random.Generator, at: Setting, surfaces: Surfaces) -> list[Layer]:
    """What shines without being tumour: foci and caps (flair), vessels, venous sinus and choroid plexus (t1c)."""
    load = at.person.foci
    spots = field_on(rng, at.frame.axes, 9)
    foci = coverage(spots - (3.3 - 0.8 * load), 0.5) * surfaces.white
    caps = coverage(1.0 + 2.5 * load + 0.8 * spots + surfaces.ventricle, 3.0) * surfaces.white * min(1.0, 0.3 + load)
    plexus = np.minimum(ellipsoid(at.mirrored, (8, 32, 22), (5, 6, 2.6)), surfaces.ventricle - 0.3)
    return [
        ("foci", np.maximum(foci, caps)),
        ("choroid", at.share(plexus)),
        ("vessel", np.maximum(_branches(rng, at, surfaces), at.share(_trunks(at)))),
    ]


def _branches(rng: np.random.Generator, at: Setting, surfaces: Surfaces) -> Array:
    """Share of the small vessels that run in the sulci, (D, H, W)."""
    chance = field_on(rng, at.frame.axes, 8)
    within = at.share(1.2 - surfaces.pial) * (at.inside > 0)
    return np.asarray(0.6 * coverage(chance - 1.3, 0.4) * within, np.float32)


def _trunks(at: Setting) -> Array:
    """Signed distance to the sagittal sinus, the carotid and the middle cerebral arteries."""
    z, y, x = at.frame.points
    sinus = np.float32(3.2) - np.hypot(x, at.inside - np.float32(0.5))
    sinus = np.where((y > 5) | (z > 0.55 * at.person.brain_mm[0]), sinus, np.float32(-9))
    carotid = tube(at.mirrored, (-40, -14, 13), (-24, -10, 11), (2.4, 2.2))
    cerebral = tube(at.mirrored, (-24, -11, 11), (-14, -22, 40), (2.0, 1.3))
    return np.asarray(np.maximum(np.maximum(carotid, cerebral), sinus), np.float32)
