"""Augmentation: random changes to training slices, or patches of volumes, on the model grid, drawn first, applied after.

`draw` makes one `Draw` per sample of the *global* batch from a seed, so that the same recipe gives the same samples
however many workers share the batch; `apply` is deterministic and runs on the device, on the whole batch at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from brainseg.config import AugmentConfig

BLUR_KERNEL = (0.25, 0.5, 0.25)
ELASTIC_SPANS = 4
"""A bend is described by so many cubic pieces along each axis: smooth on the scale of a lobe, not of a gyrus."""
MARGIN = 0.25
"""Share of a patch that is read beyond each of its sides, so that turning it brings in what really lies there."""
COARSEST = 2.0
"""Low resolution: at most so many pixels become one."""


@dataclass(frozen=True)
class Draw:
    """Random numbers for `B` samples of `C` modalities in `d` dimensions; row b belongs to sample b."""

    matrix: NDArray[np.float32]  # (B, d, d + 1), output to input coordinates (x, y, z), field of view from -1 to 1
    gain: NDArray[np.float32]  # (B, C)
    offset: NDArray[np.float32]  # (B, C)
    gamma: NDArray[np.float32]  # (B, C)
    noise: NDArray[np.float32]  # (B,) standard deviation
    noise_seed: NDArray[np.int64]  # (B,)
    blur: NDArray[np.bool_]  # (B,)
    source: NDArray[np.int64]  # (B, C): the modality that stands in place c
    bend: NDArray[np.float32]  # (B, d, n, ...): control points of the displacement, in the same coordinates
    coarseness: NDArray[np.float32]  # (B,): width in pixels of the pixels that the image is resampled to; 1: none

    def rows(self, rows: NDArray[np.int64]) -> "Draw":
        """The part of the draw that belongs to some samples."""
        return Draw(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def draw(config: AugmentConfig, samples: int, modalities: int, seed: tuple[int, ...], dimensions: int = 2) -> Draw:
    """Draw for a whole global batch. Equal seeds give equal draws on every machine."""
    rng = np.random.default_rng(seed)
    matrix = _matrices(rng, samples, config, dimensions)
    per_modality = (samples, modalities)
    return Draw(
        matrix=matrix,
        gain=(1 + config.intensity * rng.uniform(-1, 1, per_modality)).astype(np.float32),
        offset=(config.intensity * rng.uniform(-1, 1, per_modality)).astype(np.float32),
        gamma=np.exp(config.gamma * rng.uniform(-1, 1, per_modality)).astype(np.float32),
        noise=(config.noise * rng.uniform(0, 1, samples) * (rng.random(samples) < 0.5)).astype(np.float32),
        noise_seed=rng.integers(0, 2**62, samples),
        blur=rng.random(samples) < config.blur,
        source=_substitutions(rng, samples, modalities, config.modality_dropout),
        bend=_bends(rng, samples, config, dimensions),
        coarseness=_coarsenesses(rng, samples, config.low_resolution),
    )


def _substitutions(rng: np.random.Generator, samples: int, modalities: int, share: float) -> NDArray[np.int64]:
    """In a share of the samples one modality is replaced by another, as archives do where a sequence is missing."""
    source = np.tile(np.arange(modalities), (samples, 1))
    hit = np.flatnonzero(rng.random(samples) < share)
    lost, stand_in = rng.integers(0, modalities, (2, samples))
    source[hit, lost[hit]] = stand_in[hit]
    return source


def _matrices(rng: np.random.Generator, samples: int, config: AugmentConfig, dimensions: int) -> NDArray[np.float32]:
    """Turns (in 3D about each axis in turn), zooms alike along all axes, mirrors left and right, and shifts."""
    angles = np.radians(config.rotate_degrees) * rng.uniform(-1, 1, (samples, 1 if dimensions == 2 else 3))
    zoom = np.exp(config.log_scale * rng.uniform(-1, 1, samples))
    mirror = np.where(rng.random(samples) < 0.5, -1.0, 1.0) if config.flip else np.ones(samples)
    turn = _turn(angles[:, 0], dimensions, (0, 1))
    if dimensions == 3:
        turn = turn @ _turn(angles[:, 1], 3, (0, 2)) @ _turn(angles[:, 2], 3, (1, 2))
    matrix = np.empty((samples, dimensions, dimensions + 1), np.float32)
    matrix[:, :, :-1] = turn / zoom[:, None, None]
    matrix[:, :, 0] *= mirror[:, None]
    matrix[:, :, -1] = 2 * config.shift * rng.uniform(-1, 1, (samples, dimensions))
    return matrix


def _turn(angle: NDArray[np.float64], dimensions: int, plane: tuple[int, int]) -> NDArray[np.float64]:
    """Rotation matrices `(B, d, d)` in the plane of two axes."""
    a, b = plane
    out = np.tile(np.eye(dimensions), (len(angle), 1, 1))
    out[:, a, a] = out[:, b, b] = np.cos(angle)
    out[:, a, b], out[:, b, a] = -np.sin(angle), np.sin(angle)
    return out


def _bends(rng: np.random.Generator, samples: int, config: AugmentConfig, dimensions: int) -> NDArray[np.float32]:
    """Control points of cubic B-splines (free-form deformation, Rueckert et al. 1999).

    Displacements under 0.4 of the distance of the points never fold (Choi & Lee 2000), in two dimensions or three.
    """
    shape = (samples, dimensions, *(ELASTIC_SPANS + 3,) * dimensions)
    reach = 2 * config.elastic_shift * (rng.random(samples) < config.elastic)
    return (reach.reshape(-1, *(1,) * (dimensions + 1)) * rng.uniform(-1, 1, shape)).astype(np.float32)


def _coarsenesses(rng: np.random.Generator, samples: int, share: float) -> NDArray[np.float32]:
    return np.where(rng.random(samples) < share, rng.uniform(1, COARSEST, samples), 1).astype(np.float32)


def _warps(config: AugmentConfig) -> bool:
    return bool(config.rotate_degrees or config.log_scale or config.shift or config.flip or config.elastic)


def margin(config: AugmentConfig, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """How many voxels more than a patch `apply` should be given before and after it, along each axis."""
    d, h, w = (round(MARGIN * side) for side in patch) if _warps(config) else (0, 0, 0)
    return d, h, w


def apply(
    images: Tensor, masks: Tensor, drawn: Draw, config: AugmentConfig, size: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """Return changed images `(B, K*C, H, W)` and masks `(B, R, H, W)` in {0, 1}; neighbouring slices change alike.

    Patches have an axis D before H, and come with their `margin` around `size`; turned, they are cut down to it.
    """
    repeats = images.shape[1] // drawn.gain.shape[1]
    if config.modality_dropout:
        images = _substitute(images, drawn.source)
    if _warps(config):
        images, masks = _warp(images, masks, drawn, size or images.shape[2:])
    if config.gamma:
        images = _gamma(images, _channels(drawn.gamma, repeats, images))
    if config.intensity:
        images = images * _channels(drawn.gain, repeats, images) + _channels(drawn.offset, repeats, images)
    if config.blur and drawn.blur.any():
        images = torch.where(_per_sample(drawn.blur, images), _blurred(images), images)
    if config.low_resolution:
        images = _coarsened(images, drawn.coarseness)
    if config.noise:
        images = images + _noise(images, drawn)
    return images, (masks > 0.5).float()


def _substitute(images: Tensor, source: NDArray[np.int64]) -> Tensor:
    samples, modalities = source.shape
    repeats = images.shape[1] // modalities
    index = np.concatenate([source + k * modalities for k in range(repeats)], axis=1)
    rows = torch.arange(samples, device=images.device).view(-1, 1)
    return images[rows, torch.from_numpy(index).to(images.device)]


def _warp(images: Tensor, masks: Tensor, drawn: Draw, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One resampling for image and mask, bent and turned at once. Outside the image the border's value goes on."""
    both = torch.cat([images, masks], dim=1)
    matrix = torch.from_numpy(_of_pixels(drawn.matrix, size)).to(images.device)
    grid = F.affine_grid(matrix, [*both.shape[:2], *size], align_corners=False)
    if drawn.bend.any():
        bent = _bent(torch.from_numpy(drawn.bend).to(images.device), size)
        grid = grid + torch.einsum("bij,b...j->b...i", matrix[:, :, :-1], bent)
    given = both.shape[2:]
    if tuple(given) != tuple(size):
        grid = grid * torch.tensor([a / b for a, b in zip(size[::-1], given[::-1], strict=True)], device=images.device)
    warped = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped[:, : images.shape[1]], warped[:, images.shape[1] :]


def _of_pixels(matrix: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """Matrices that turn pixels, however unlike the sides of the field of view are."""
    sides = np.array(size[::-1], np.float32)
    out = matrix.copy()
    out[:, :, :-1] *= sides[None, :] / sides[:, None]
    return out


def _bent(points: Tensor, shape: Sequence[int]) -> Tensor:
    """Displacement of each pixel, `(B, ..., d)`, from control points `(B, d, ...)`; nowhere larger than the largest of them."""
    for size in shape:
        weights = _splines(size).to(points.device)
        points = torch.tensordot(points, weights, dims=([2], [0]))  # the axis goes to the end, and the next one is up
    return points.movedim(1, -1)


def _splines(size: int) -> Tensor:
    """Weights `(n, size)` of the control points in each pixel: uniform cubic B-splines, which add up to 1 everywhere."""
    place = (torch.arange(size) + 0.5) / size * ELASTIC_SPANS
    distance = (place - torch.arange(-1, ELASTIC_SPANS + 2)[:, None]).abs()
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def _gamma(images: Tensor, exponent: Tensor) -> Tensor:
    """Raise each channel's values, scaled to 0..1 over the slice or patch, to a power, and scale back."""
    inner = tuple(range(2, images.dim()))
    low, high = images.amin(dim=inner, keepdim=True), images.amax(dim=inner, keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((images - low) / span).pow(exponent) * span + low


def _blurred(images: Tensor) -> Tensor:
    """Smooth by a binomial kernel along every axis."""
    channels, axes = images.shape[1], images.dim() - 2
    line = torch.tensor(BLUR_KERNEL, device=images.device)
    kernel = line
    for _ in range(axes - 1):
        kernel = kernel[..., None] * line
    weight = kernel.expand(channels, 1, *kernel.shape)
    convolve = F.conv2d if axes == 2 else F.conv3d
    return convolve(F.pad(images, (1, 1) * axes, mode="replicate"), weight, groups=channels)


def _coarsened(images: Tensor, coarseness: NDArray[np.float32]) -> Tensor:
    """Average the image over wider pixels, then interpolate between them."""
    out, linear = images.clone(), "bilinear" if images.dim() == 4 else "trilinear"
    for row in np.flatnonzero(coarseness > 1):
        size = [max(1, round(n / float(coarseness[row]))) for n in images.shape[2:]]
        small = F.interpolate(images[row : row + 1], size=size, mode="area")
        out[row : row + 1] = F.interpolate(small, size=images.shape[2:], mode=linear, align_corners=False)
    return out


def _noise(images: Tensor, drawn: Draw) -> Tensor:
    """Gaussian noise from each sample's own seed, so that a sample is the same on any worker."""
    out = torch.zeros_like(images)
    for row in np.flatnonzero(drawn.noise):
        generator = torch.Generator(device=images.device).manual_seed(int(drawn.noise_seed[row]) % (2**63 - 1))
        out[row].normal_(0, math.fabs(float(drawn.noise[row])), generator=generator)
    return out


def _channels(values: NDArray[np.float32], repeats: int, like: Tensor) -> Tensor:
    return _per_sample(np.tile(values, (1, repeats)), like)


def _per_sample(values: NDArray[Any], like: Tensor) -> Tensor:
    """Values `(B,)` or `(B, C)` that fit every pixel of images."""
    x = torch.from_numpy(values).to(like.device)
    return x.view(*x.shape, *(1,) * (like.dim() - x.dim()))
