"""Precision: a network that computes in bf16 and answers, to a thousandth of every mask, what it would in float32.

bf16 keeps 8 bits of a number. What that does to an answer comes mostly from three places, and each has its remedy: the image
itself is rounded (the first convolution stays float32, which costs nothing measurable); the errors of a kernel's weights add
up over tissue that is smooth (they are rounded so that they cancel); and where a network is undecided the last bits decide
(such slices are answered once more, in float32). Measured on the 74 patients of the LGG set with `lgg-flair`: figures in the
README. The third is for 2D networks, and for each by itself: what several of them say on average may hang on more than that.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from brainseg.unet import UNet

NEAR = 0.02
"""A probability nearer to the threshold is undecided; bf16 seldom moves one by more there."""
USUALLY_CHANGE, WORTH = 1 / 8, 8
"""What share of the undecided pixels float32 is taken to put on the other side before any was looked at, and how many pixels
that guess weighs as much as."""
TOLERATED = 0.001
"""Pixels that may still be on the wrong side, as share of a region's: if the guess is right, a Dice to float32's mask of
about 0.9995."""
TOGETHER = 8
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


def decided(answer: Tensor, threshold: float, answer_again: Callable[[Tensor], Tensor]) -> Tensor:
    """A scan's probabilities `(D, R, S, S)` by bf16, changed where it may have decided: there `answer_again` of the slices with
    these numbers is float32's.

    Region by region, slices with most undecided pixels first. How many pixels change sides there tells how many of the others
    would, and it ends once they are too few to matter: for most scans before it has begun.
    """
    exact = torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
    for region in range(answer.shape[1]):
        near, inside = _undecided(answer[:, region], threshold)
        near[exact] = 0
        seen = changed = 0
        while int(near.sum()) * (changed + USUALLY_CHANGE * WORTH) / (seen + WORTH) > TOLERATED * inside:
            most, numbers = near.topk(min(TOGETHER, int(torch.count_nonzero(near))))
            better = answer_again(numbers)
            seen += int(most.sum())
            changed += int(((better[:, region] > threshold) != (answer[numbers, region] > threshold)).sum())
            answer[numbers], exact[numbers], near[numbers] = better, True, 0
    return answer


def _undecided(probability: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Of one region's `(D, S, S)`: undecided pixels of each slice, and how many lie inside in all."""
    near = torch.zeros(len(probability), dtype=torch.int64, device=probability.device)
    reached = torch.nonzero(probability.amax(dim=(1, 2)) > threshold - NEAR).flatten()  # nothing is near elsewhere, nor inside
    pixels = probability[reached].flatten(1)
    near[reached] = ((pixels - threshold).abs() < NEAR).sum(dim=1)
    return near, int(torch.count_nonzero(pixels > threshold))
