"""Precision: a network that computes in bf16 and answers, to a thousandth of every mask, what it would in float32.

bf16 keeps 8 bits of a number. What that does to an answer comes mostly from three places, and each has its remedy: the image
itself is rounded (the first convolution stays float32, which costs nothing measurable); the errors of a kernel's weights add
up over tissue that is smooth (they are rounded so that they cancel); and where a network is undecided the last bits decide
(such slices are answered once more, in float32). Measured on the 74 patients of the LGG set with `lgg-flair`: figures in the
README.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from brainseg.unet import UNet

NEAR = 0.02
"""A probability nearer to the threshold is undecided; bf16 seldom moves one by more there."""
MOST_UNDECIDED = 0.008
"""Undecided pixels as a share of a region's: beyond it bf16 might change more than a thousandth of a mask."""


def inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where it was asked for, or where `auto` finds hardware that gains by it; float32 otherwise."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.bfloat16
    return torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    """CUDA from Ampere on; CPUs with avx512_bf16 or amx. Elsewhere bf16 is emulated, over ten times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Precise(nn.Module):
    """A layer that stays float32 in a network that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.to(torch.bfloat16)


def in_bf16(network: UNet) -> UNet:
    """A copy for inference that takes float32 slices, computes in bf16 but for its first convolution, and answers in bf16."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.weight.data = rounded(layer.weight.data)
    first = network.down[0]
    kept = {name: copy.deepcopy(layer) for name in ("conv1", "shortcut") if (layer := getattr(first, name)) is not None}
    network.to(torch.bfloat16)
    for name, layer in kept.items():
        setattr(first, name, Precise(layer))
    return network


def rounded(weights: Tensor) -> Tensor:
    """Weights `(out, in, *kernel)` at values that bf16 has, so that the errors within each kernel add up to next to nothing.

    Error diffusion (Floyd & Steinberg 1976) over a kernel's taps: neighbouring voxels resemble each other, so what matters
    most is a kernel's sum.
    """
    taps = weights.flatten(2).clone()
    carried = torch.zeros_like(taps[..., 0])
    for number in range(taps.shape[-1]):
        wanted = taps[..., number] + carried
        taps[..., number] = wanted.to(torch.bfloat16).to(taps.dtype)
        carried = wanted - taps[..., number]
    return taps.view_as(weights)


def undecided(probability: Tensor, threshold: float) -> Tensor:
    """Numbers of the slices of a scan's `(D, R, S, S)` that float32 should answer; none where bf16 cannot have mattered."""
    pixels = probability.flatten(2)
    reached = pixels.amax(dim=2) > threshold - NEAR  # (D, R): elsewhere nothing is near, nor inside
    again = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    for region in range(pixels.shape[1]):
        slices = torch.nonzero(reached[:, region]).flatten()
        here = pixels[slices, region]
        near = ((here - threshold).abs_() < NEAR).sum(dim=1)
        if int(near.sum()) > MOST_UNDECIDED * int((here > threshold).sum()):
            again[slices] |= near > 0
    return torch.nonzero(again).flatten()
