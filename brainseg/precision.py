"""Precision: a network that computes in bf16 and answers, to a thousandth of every mask, what it would in float32.

bf16 keeps 8 bits of a number. What that does to an answer comes mostly from three places, and each has its remedy: half of the
noise is what is rounded first, the image and what the first block makes of it (on a CPU that block stays float32; on a GPU, on
paper 15 times slower in float32 than bf16, its first convolution alone); the errors of a kernel's weights add up over tissue
that is smooth (they are rounded so that they cancel, and biases not at all on a CPU); and where a network is undecided the last
bits decide (such slices are answered once more, in float32; a scan of one slice is at once: of 300 images with a tumour 288
would have been answered twice). Measured on the 74 patients of the LGG set with `lgg-flair`: figures in the README. The third
is for 2D networks, and for each by itself: what several of them say on average may hang on more than that.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from brainseg.unet import UNet

NEAR = 0.02
"""A probability nearer to the threshold is undecided; bf16 moves one by some 0.003 to 0.005 there, seldom by more than this."""
USUALLY_CHANGE, WORTH = 0.12, 8
"""What share of the undecided voxels float32 is taken to put on the other side before any was looked at, and how many voxels
that guess weighs as much as."""
TOLERATED = 0.002
"""Voxels that may still be on the wrong side, as share of a region's: a Dice to float32's mask of 0.999."""
TOGETHER = 4
"""Slices that are answered once more before it is asked again whether that is enough."""


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


def exact_float32() -> None:
    """Let float32 be that in this process: CUDA's convolutions round what goes in to the 10 bits of TF32 unless told not to.

    The same network would answer otherwise there than on a CPU.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


class Precise(nn.Module):
    """A layer or block that stays float32 in a network that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.to(torch.bfloat16)


def in_bf16(network: UNet, *, first_block: bool) -> UNet:
    """A copy for inference that takes float32 slices, computes in bf16 but for its first block, or of that the first
    convolution alone, and answers in bf16."""
    low = copy.deepcopy(network)
    for layer in low.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.weight.data = rounded(layer.weight.data)
    low.to(torch.bfloat16)
    first = copy.deepcopy(network.down[0])
    if first_block:
        low.down[0] = Precise(first)
    else:
        for name in ("conv1", "shortcut"):
            if (layer := getattr(first, name)) is not None:
                setattr(low.down[0], name, Precise(layer))
    return low


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


def decided(answer: Tensor, threshold: float, answer_again: Callable[[Tensor], Tensor]) -> Tensor:
    """A scan's probabilities `(R, D, h, w)` by bf16, changed where it may have decided: there `answer_again` of the slices with
    these numbers is float32's. On the scan's own grid: a voxel between two pixels that are sure of themselves may be undecided.

    Region by region, slices with most undecided voxels first. How many voxels change sides there tells how many of the others
    would, and it ends once they are too few to matter: for most scans before it has begun.
    """
    exact = torch.zeros(answer.shape[1], dtype=torch.bool, device=answer.device)
    for region, probability in enumerate(answer):
        near, inside = _undecided(probability, threshold)
        near[exact] = 0
        seen = changed = 0
        while _at_most(int(near.sum()) * (changed + USUALLY_CHANGE * WORTH) / (seen + WORTH)) > TOLERATED * inside:
            most, numbers = near.topk(min(TOGETHER, int(torch.count_nonzero(near))))
            better = answer_again(numbers)
            seen += int(most.sum())
            changed += int(((better[region] > threshold) != (probability[numbers] > threshold)).sum())
            answer[:, numbers], exact[numbers], near[numbers] = better, True, 0
    return answer


def _at_most(expected: float) -> float:
    """As many as may well be there of what so many are expected of: two standard deviations of a count more."""
    return expected + 2 * math.sqrt(expected)


def _undecided(probability: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Of one region's `(D, h, w)`: undecided voxels of each slice, and how many lie inside in all."""
    near = torch.zeros(len(probability), dtype=torch.int64, device=probability.device)
    reached = torch.nonzero(probability.amax(dim=(1, 2)) > threshold - NEAR).flatten()  # nothing is near elsewhere, nor inside
    voxels = probability[reached].flatten(1)
    near[reached] = ((voxels - threshold).abs() < NEAR).sum(dim=1)
    return near, int(torch.count_nonzero(voxels > threshold))
