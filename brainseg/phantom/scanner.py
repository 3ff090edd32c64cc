"""Scanner: from tissues to MR intensities, with what a scanner adds: bias field, ghosts, thick slices, Rician noise.

Channels are always (flair, t1, t1c, t2). Tissue brightness is relative to fat in t1 and schematic: the order of the
tissues within a modality is right, the numbers belong to no sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainseg.phantom.anatomy import Layer
from brainseg.phantom.fields import Array, Frame, field_on

TISSUES: Mapping[str, tuple[float, float, float, float]] = {
    #            flair  t1    t1c   t2
    "air": (0.00, 0.00, 0.00, 0.00),
    "skin": (0.42, 0.45, 0.50, 0.40),
    "fat": (0.78, 0.95, 0.92, 0.75),
    "muscle": (0.30, 0.36, 0.42, 0.22),
    "bone": (0.05, 0.06, 0.06, 0.05),
    "marrow": (0.26, 0.38, 0.40, 0.28),
    "eye": (0.10, 0.14, 0.15, 0.95),
    "csf": (0.09, 0.13, 0.14, 0.92),
    "grey": (0.49, 0.35, 0.38, 0.55),
    "white": (0.37, 0.50, 0.52, 0.36),
    "nuclei": (0.43, 0.41, 0.44, 0.42),
    "foci": (0.70, 0.38, 0.40, 0.66),
    "choroid": (0.46, 0.36, 0.84, 0.55),
    "vessel": (0.14, 0.20, 0.98, 0.14),
    "oedema": (0.74, 0.36, 0.38, 0.72),
    "core": (0.66, 0.31, 0.36, 0.70),
    "enhancing": (0.62, 0.38, 0.90, 0.58),
    "necrosis": (0.42, 0.22, 0.24, 0.80),
}


@dataclass(frozen=True)
class Protocol:
    """How one patient was scanned, drawn before anything is made."""

    tissues: Mapping[str, tuple[float, ...]]
    gain: tuple[float, ...]  # brightness of fat in t1 in stored units, per channel
    noise: tuple[float, ...]
    bias: float
    coil: float  # brighter towards the surface
    ghost: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Protocol":
        """A protocol of ordinary quality; contrast and brightness differ between patients and between channels."""
        gamma = np.exp(rng.normal(0, 0.12, 4))
        spread = {name: np.array(v) ** gamma * np.exp(rng.normal(0, 0.05, 4)) for name, v in TISSUES.items()}
        lesions = ("oedema", "core", "enhancing", "necrosis")
        faint = rng.uniform(0.55, 1.0)  # how far a tumour's brightness departs from that of white matter
        for name in lesions:
            spread[name] = spread["white"] + faint * (spread[name] - spread["white"])
        return cls(
            tissues={name: tuple(float(x) for x in v) for name, v in spread.items()},
            gain=tuple(np.exp(rng.uniform(np.log(250), np.log(1800), 4)).tolist()),
            noise=tuple(rng.uniform(0.012, 0.035, 4).tolist()),
            bias=float(rng.uniform(0.05, 0.16)),
            coil=float(rng.uniform(0.0, 0.25)),
            ghost=float(rng.choice((0.0, 0.0, rng.uniform(0.02, 0.06)))),
        )


def render(layers: Sequence[Layer], tissues: Mapping[str, Sequence[float]]) -> Array:
    """Lay tissues over one another: brightness (4, D, H, W) before the scanner has touched it."""
    image = np.zeros((4, *layers[0][1].shape), np.float32)
    for name, share in layers:
        covered = np.flatnonzero(share.any(axis=(1, 2)))
        if not covered.size:
            continue
        part = slice(covered[0], covered[-1] + 1)
        value = np.array(tissues[name], np.float32).reshape(4, 1, 1, 1)
        image[:, part] += share[part].astype(np.float32) * (value - image[:, part])
    return image


def acquire(rng: np.random.Generator, image: Array, frame: Frame, inside: Array, protocol: Protocol) -> NDArray[np.int16]:
    """Scan a rendered head: stored intensities (4, D, H, W) as int16; where there is air, noise."""
    noise = np.random.default_rng(rng.integers(2**63))  # the only draws whose number depends on the voxels
    texture = 1 + np.float32(0.035) * field_on(rng, frame.axes, 16)
    texture *= np.exp(np.float32(protocol.coil) * np.exp(np.clip(inside, 0, None) / np.float32(-22)))
    stored = np.empty(image.shape, np.int16)
    for channel, brightness in enumerate(image):
        field = texture * np.exp(np.float32(protocol.bias) * field_on(rng, frame.axes, 160))
        signal = _sampled(noise, brightness * field, protocol.ghost)
        real, imaginary = protocol.noise[channel] * noise.standard_normal((2, *signal.shape), dtype=np.float32)
        stored[channel] = np.clip(np.hypot(signal + real, imaginary) * protocol.gain[channel], 0, 32767)
    return stored


def _sampled(noise: np.random.Generator, signal: Array, ghost: float) -> Array:
    """Blur by the voxel's own size, let slices differ a little, and lay a faint ghost half a picture away."""
    signal = ndimage.gaussian_filter(signal, (0.3, 0.35, 0.35), truncate=3)
    signal *= noise.normal(1, 0.012, (len(signal), 1, 1)).astype(np.float32)
    return np.asarray(signal + np.float32(ghost) * np.roll(signal, signal.shape[1] // 2, axis=1), np.float32)
