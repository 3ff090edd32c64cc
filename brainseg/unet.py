"""The network: a 2D U-Net (Ronneberger et al. 2015) rebuilt from its config, with one sigmoid head per region.

Each level holds a block of two 3x3 convolutions; levels are joined by 2x2 max pooling on the way down, by a 2x2
transposed convolution and a skip connection on the way up.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from brainseg.config import NetworkConfig

GROUPS = 8
PRIOR_LOGIT = -2.0
"""Tumour is rare: an untrained head starts by believing so, which saves the first hundred steps."""


class Block(nn.Module):
    """Two 3x3 convolutions, each followed by norm and activation; optionally with a residual path."""

    def __init__(self, channels_in: int, channels_out: int, config: NetworkConfig, dropout: float) -> None:
        super().__init__()
        bias = config.norm == "none"
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm1 = _norm(config.norm, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)
        self.norm2 = _norm(config.norm, channels_out)
        self.act = nn.ReLU(inplace=True) if config.activation == "relu" else nn.LeakyReLU(0.01, inplace=True)
        self.drop: nn.Module = nn.Dropout2d(dropout) if dropout else nn.Identity()
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False) if config.residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        out: Tensor = self.drop(self.act(y))
        return out


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(GROUPS, channels)
    return nn.Identity()


class UNet(nn.Module):
    """Map slices `(B, C, H, W)` to region logits `(B, R, H, W)`; H and W must be multiples of `stride`."""

    def __init__(self, config: NetworkConfig, num_modalities: int, num_regions: int) -> None:
        super().__init__()
        widths = config.widths
        channels = num_modalities * (2 * config.context_slices + 1)
        lower_half = len(widths) // 2
        dropout = [config.dropout if level >= lower_half else 0.0 for level in range(len(widths))]
        self.stride = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList(
            Block(a, b, config, rate) for (a, b), rate in zip(pairwise((channels, *widths)), dropout, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.lift = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(Block(2 * a, a, config, rate) for a, rate in zip(widths[:-1], dropout[:-1], strict=True))
        self.head = nn.Conv2d(widths[0], num_regions, 1)
        self.apply(_initialise)
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([skips[level], self.lift[level](x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _initialise(module: nn.Module) -> None:
    """He initialisation (He et al. 2015) for what feeds a rectifier."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def num_parameters(network: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in network.parameters())
