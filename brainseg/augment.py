"""Augmentation: random changes to training slices on the model grid, drawn first, applied after.

`draw` makes one `Draw` per sample of the *global* batch from a seed, so that the same recipe gives the same samples
however many workers share the batch; `apply` is deterministic and runs on the device, one kernel for the whole batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from brainseg.config import AugmentConfig

BLUR_KERNEL = (0.25, 0.5, 0.25)


@dataclass(frozen=True)
class Draw:
    """Random numbers for `B` samples of `C` modalities; row b belongs to sample b."""

    matrix: NDArray[np.float32]  # (B, 2, 3), output to input coordinates
    gain: NDArray[np.float32]  # (B, C)
    offset: NDArray[np.float32]  # (B, C)
    gamma: NDArray[np.float32]  # (B, C)
    noise: NDArray[np.float32]  # (B,) standard deviation
    noise_seed: NDArray[np.int64]  # (B,)
    blur: NDArray[np.bool_]  # (B,)
    source: NDArray[np.int64]  # (B, C): the modality that stands in place c

    def rows(self, rows: NDArray[np.int64]) -> "Draw":
        """The part of the draw that belongs to some samples."""
        return Draw(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def draw(config: AugmentConfig, samples: int, modalities: int, seed: tuple[int, ...]) -> Draw:
    """Draw for a whole global batch. Equal seeds give equal draws on every machine."""
    rng = np.random.default_rng(seed)
    angle = np.radians(config.rotate_degrees) * rng.uniform(-1, 1, samples)
    zoom = np.exp(config.log_scale * rng.uniform(-1, 1, samples))
    mirror = np.where(rng.random(samples) < 0.5, -1.0, 1.0) if config.flip else np.ones(samples)
    shift = 2 * config.shift * rng.uniform(-1, 1, (samples, 2))
    matrix = np.empty((samples, 2, 3), np.float32)
    matrix[:, 0] = np.stack([mirror * np.cos(angle) / zoom, -np.sin(angle) / zoom, shift[:, 0]], axis=1)
    matrix[:, 1] = np.stack([mirror * np.sin(angle) / zoom, np.cos(angle) / zoom, shift[:, 1]], axis=1)
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
    )


def _substitutions(rng: np.random.Generator, samples: int, modalities: int, share: float) -> NDArray[np.int64]:
    """In a share of the samples one modality is replaced by another, as archives do where a sequence is missing."""
    source = np.tile(np.arange(modalities), (samples, 1))
    hit = np.flatnonzero(rng.random(samples) < share)
    lost, stand_in = rng.integers(0, modalities, (2, samples))
    source[hit, lost[hit]] = stand_in[hit]
    return source


def apply(images: Tensor, masks: Tensor, drawn: Draw, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Return changed images `(B, K*C, H, W)` and masks `(B, R, H, W)` in {0, 1}; neighbouring slices change alike."""
    repeats = images.shape[1] // drawn.gain.shape[1]
    if config.modality_dropout:
        images = _substitute(images, drawn.source)
    if config.rotate_degrees or config.log_scale or config.shift or config.flip:
        images, masks = _warp(images, masks, drawn.matrix)
    if config.gamma:
        images = _gamma(images, _channels(drawn.gamma, repeats, images))
    if config.intensity:
        images = images * _channels(drawn.gain, repeats, images) + _channels(drawn.offset, repeats, images)
    if config.blur and drawn.blur.any():
        images = torch.where(torch.from_numpy(drawn.blur).to(images.device).view(-1, 1, 1, 1), _blurred(images), images)
    if config.noise:
        images = images + _noise(images, drawn)
    return images, (masks > 0.5).float()


def _substitute(images: Tensor, source: NDArray[np.int64]) -> Tensor:
    samples, modalities = source.shape
    repeats = images.shape[1] // modalities
    index = np.concatenate([source + k * modalities for k in range(repeats)], axis=1)
    rows = torch.arange(samples, device=images.device).view(-1, 1)
    return images[rows, torch.from_numpy(index).to(images.device)]


def _warp(images: Tensor, masks: Tensor, matrix: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """One resampling for image and mask. Outside the image the border's value goes on."""
    both = torch.cat([images, masks], dim=1)
    grid = F.affine_grid(torch.from_numpy(matrix).to(images.device), list(both.shape), align_corners=False)
    warped = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped[:, : images.shape[1]], warped[:, images.shape[1] :]


def _gamma(images: Tensor, exponent: Tensor) -> Tensor:
    """Raise each channel's values, scaled to 0..1 over the slice, to a power, and scale back."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    span = (high - low).clamp_min(1e-6)
    return ((images - low) / span).pow(exponent) * span + low


def _blurred(images: Tensor) -> Tensor:
    """Smooth by a binomial kernel along rows and columns."""
    channels = images.shape[1]
    kernel = torch.tensor(BLUR_KERNEL, device=images.device)
    weight = (kernel[:, None] * kernel[None, :]).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=channels)


def _noise(images: Tensor, drawn: Draw) -> Tensor:
    """Gaussian noise from each sample's own seed, so that a sample is the same on any worker."""
    out = torch.zeros_like(images)
    for row in np.flatnonzero(drawn.noise):
        generator = torch.Generator(device=images.device).manual_seed(int(drawn.noise_seed[row]) % (2**63 - 1))
        out[row].normal_(0, math.fabs(float(drawn.noise[row])), generator=generator)
    return out


def _channels(values: NDArray[np.float32], repeats: int, like: Tensor) -> Tensor:
    return torch.from_numpy(np.tile(values, (1, repeats))).to(like.device)[:, :, None, None]
