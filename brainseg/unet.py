"""The network: a U-Net (Ronneberger et al. 2015) rebuilt from its config, with one sigmoid head per region; 2D, or 3D with
the same words (Cicek et al. 2016).

Each level holds a block of two convolutions 3 wide; levels are joined by max pooling, 2 wide, on the way down, by a
transposed convolution, 2 wide, and a skip connection on the way up. With deep supervision (Lee et al. 2015) some coarser
levels of the way up have a head of their own, which is asked in training alone.
"""

import copy
import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from brainseg.config import NetworkConfig


@dataclass(frozen=True)
class Layers:
    """The layers of a network of so many dimensions."""

    convolution: type[nn.Conv2d] | type[nn.Conv3d]
    lift: type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]
    pool: type[nn.MaxPool2d] | type[nn.MaxPool3d]
    batch_norm: type[nn.BatchNorm2d] | type[nn.BatchNorm3d]
    instance_norm: type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]
    memory_format: torch.memory_format


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.BatchNorm2d, nn.InstanceNorm2d, torch.channels_last),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.BatchNorm3d, nn.InstanceNorm3d, torch.channels_last_3d),
}
GROUPS = 8
LEAK = 0.01
PRIOR_LOGIT = -2.0
"""Tumour is rare: an untrained head starts by believing so, which saves the first hundred steps."""


class ChannelDropout(nn.Module):
    """Leave whole channels of a sample out in training (Tompson et al. 2015), as `nn.Dropout2d` does; which ones can be said.

    `kept` `(B, C)` is what the next batch is multiplied by; None: drawn anew. So what a sample loses need not depend on
    the samples or the worker it goes through with.
    """

    kept: Tensor | None = None

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.channels = channels
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = self.factors(torch.rand(x.shape[:2])) if self.kept is None else self.kept
        return x * kept.to(x.device, x.dtype).view(*kept.shape, *[1] * (x.dim() - 2))

    def factors(self, uniform: Tensor) -> Tensor:
        """What to multiply channels by, 0 or what makes up for the others, of numbers drawn evenly from 0 to 1."""
        return (uniform >= self.rate).float() / (1 - self.rate)


class Block(nn.Module):
    """Two convolutions, 3 wide, each followed by norm and activation; optionally with a residual path."""

    def __init__(self, channels_in: int, channels_out: int, config: NetworkConfig, dropout: float) -> None:
        super().__init__()
        bias, layers = config.norm == "none", LAYERS[config.dimensions]
        self.conv1: Any = layers.convolution(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm1 = _norm(config, channels_out)
        self.conv2: Any = layers.convolution(channels_out, channels_out, 3, padding=1, bias=bias)
        self.norm2 = _norm(config, channels_out)
        self.act1: nn.Module = _activation(config)
        self.act2: nn.Module = _activation(config)
        self.drop: nn.Module = ChannelDropout(channels_out, dropout) if dropout else nn.Identity()
        self.shortcut = layers.convolution(channels_in, channels_out, 1, bias=False) if config.residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        out: Tensor = self.drop(self.act2(y))
        return out


def _activation(config: NetworkConfig) -> nn.Module:
    return nn.ReLU(inplace=True) if config.activation == "relu" else nn.LeakyReLU(LEAK, inplace=True)


def _norm(config: NetworkConfig, channels: int) -> nn.Module:
    if config.norm == "batch":
        return LAYERS[config.dimensions].batch_norm(channels)
    if config.norm == "instance":
        return LAYERS[config.dimensions].instance_norm(channels, affine=True)
    if config.norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    return nn.Identity()


class UNet(nn.Module):
    """Map slices `(B, C, H, W)` to region logits `(B, R, H, W)`, in 3D patches `(B, C, D, H, W)` to `(B, R, D, H, W)`.

    D, H and W must be multiples of `stride`. In training with deep supervision the answer is a list: those logits, then each
    coarser level's, half as large along every axis as the one before.
    """

    def __init__(self, config: NetworkConfig, num_modalities: int, num_regions: int) -> None:
        super().__init__()
        widths, layers = config.widths, LAYERS[config.dimensions]
        channels = num_modalities * (2 * config.context_slices + 1)
        lower_half = len(widths) // 2
        dropout = [config.dropout if level >= lower_half else 0.0 for level in range(len(widths))]
        self.stride = 2 ** (len(widths) - 1)
        self.memory_format = layers.memory_format
        self.down = nn.ModuleList(
            Block(a, b, config, rate) for (a, b), rate in zip(pairwise((channels, *widths)), dropout, strict=True)
        )
        self.pool = layers.pool(2)
        self.lift = nn.ModuleList(layers.lift(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Block(2 * a, a, config, rate) for a, rate in zip(widths[:-1], dropout[:-1], strict=True))
        self.head = layers.convolution(widths[0], num_regions, 1)
        self.coarse_heads = nn.ModuleList(
            layers.convolution(a, num_regions, 1) for a in widths[1 : 1 + config.deep_supervision]
        )
        self.apply(_initialise)
        for head in (self.head, *self.coarse_heads):
            nn.init.constant_(head.bias, PRIOR_LOGIT)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        levels: list[Tensor] = []  # of the way down first, then replaced by those of the way up
        for number, block in enumerate(self.down):
            x = block(_pooled(self.pool, x) if number else x)
            levels.append(x)
        for number in reversed(range(len(self.up))):
            x = self.up[number](torch.cat([levels[number], _lifted(self.lift[number], x)], dim=1))
            levels[number] = x
        logits: Tensor = self.head(x)
        if not (self.training and len(self.coarse_heads)):
            return logits
        return [logits, *(head(level) for head, level in zip(self.coarse_heads, levels[1:], strict=False))]


def _pooled(pool: nn.Module, x: Tensor) -> Tensor:
    """The largest of each two pixels along every axis. For inference on a CPU axis by axis, in half of the time: torch
    writes down where the largest stood, whether anybody will ask or not."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        y: Tensor = pool(x)
        return y
    for dim in range(2, x.dim()):
        before = (slice(None),) * dim
        x = torch.maximum(x[*before, 0::2], x[*before, 1::2])
    return x


def _lifted(lift: Any, x: Tensor) -> Tensor:
    """A transposed convolution. In bf16 on a CPU torch takes most of its way back for the bias alone, fifty times as long as to
    sum the same numbers: added by itself, a training step is a twentieth shorter (Zen 5). In float32 it is none."""
    y: Tensor
    if torch.is_grad_enabled() and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        convolve = functional.conv_transpose2d if x.dim() == 4 else functional.conv_transpose3d
        y = convolve(x, lift.weight, stride=lift.stride)
        y = y + lift.bias.to(y.dtype).view(-1, *[1] * (x.dim() - 2))
    else:
        y = lift(x)
    return y


class Activated(nn.Module):
    """A convolution and the activation after it, for inference: on a CPU oneDNN does both in one pass, to the same bits (what a
    leaky one lets through in bf16 is rounded once, not twice). It is called as torch's own compiler calls it, and done without
    where that is not there. So that not every batch lays out the weights anew as oneDNN reads them, that is done once, with
    the first: they must not change afterwards. Its bias stays as it is given here when the network becomes one in bf16: oneDNN
    takes it so, at no cost, and rounded it would be wrong by the same number in every voxel."""

    def __init__(self, convolution: nn.Conv2d | nn.Conv3d, activation: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.activation = activation
        self._bias = None if convolution.bias is None else convolution.bias.detach().clone()
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if x.device.type == "cpu" and not torch.is_grad_enabled() and _activates_in_one_pass(x.dtype):
            c, leaks = self.convolution, isinstance(self.activation, nn.LeakyReLU)
            layout = (c.padding, c.stride, c.dilation, c.groups)
            if self._packed is None or self._packed.dtype != x.dtype:
                self._packed = torch.ops.mkldnn._reorder_convolution_weight(c.weight, *layout, x.shape)
            how = (*layout, "leaky_relu" if leaks else "relu", [LEAK] if leaks else [], "")
            y = torch.ops.mkldnn._convolution_pointwise(x, self._packed, self._bias, *how)
        else:
            y = self.activation(self.convolution(x))
        return y

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its weights out by itself: what oneDNN reads cannot be copied."""
        return self.__dict__ | {"_packed": None}


@functools.cache
def _activates_in_one_pass(dtype: torch.dtype) -> bool:
    """Whether this CPU can: asked for bf16 on one without AVX-512, oneDNN refuses, where torch itself only takes its time."""
    needed = ("_convolution_pointwise", "_reorder_convolution_weight")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in needed)):  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def folded(trained: UNet) -> UNet:
    """A copy for inference in which batch norms are part of the convolutions before them, and activations done along with
    these: the same answers, to rounding."""
    network = copy.deepcopy(trained)
    network.eval()
    for block in network.modules():
        if isinstance(block, Block):
            block.conv1, block.norm1 = _joined(block.conv1, block.norm1)
            block.conv2, block.norm2 = _joined(block.conv2, block.norm2)
            if isinstance(block.norm1, nn.Identity):
                block.conv1, block.act1 = Activated(block.conv1, block.act1), nn.Identity()
            if isinstance(block.norm2, nn.Identity) and block.shortcut is None:
                block.conv2, block.act2 = Activated(block.conv2, block.act2), nn.Identity()
    return network


def _joined(convolution: Any, norm: nn.Module) -> tuple[Any, nn.Module]:
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
        return convolution, norm
    return fuse_conv_bn_eval(convolution, norm), nn.Identity()


def _initialise(module: nn.Module) -> None:
    """He initialisation (He et al. 2015) for what feeds a rectifier; of weights that are shapes alone torch would import its
    compiler to do nothing, for two seconds."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Conv3d | nn.ConvTranspose3d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_parameters(network: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in network.parameters())
