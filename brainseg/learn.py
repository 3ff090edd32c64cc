"""Learn: one training as plain torch, without Ray: the order of samples, a step, an epoch, a validation, a checkpoint.

Every random choice is a function of (seed, epoch, step) and of a sample's place in the *global* batch, never of a worker
or of what ran before. So two workers see what one would have seen, and a resumed training what an unbroken one would.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from brainseg.augment import apply, draw, margin
from brainseg.cache import SampleSet
from brainseg.config import OptimiserConfig, TrainConfig
from brainseg.errors import PreflightError, one_line
from brainseg.losses import Share, loss_over_levels, sums_over_batch
from brainseg.patches import cut, draw_places
from brainseg.precision import has_fast_bf16
from brainseg.unet import ChannelDropout, UNet
from brainseg.weights import check_fit

DROPOUT_STREAM = 1
"""Tells what dropout draws in a step from what else is drawn from the same seed."""


@dataclass(frozen=True)
class Worker:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1


@dataclass
class Learner:
    """A network in training: what one step changes."""

    config: TrainConfig
    network: UNet
    stepped: nn.Module
    optimiser: torch.optim.Optimizer
    averaged: dict[str, Tensor]
    device: torch.device
    worker: Worker
    steps_per_epoch: int
    gradient_norm: Tensor | None = None
    """Of the last step, before it was clipped; None where nothing is clipped."""

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    def best_guess(self) -> dict[str, Tensor]:
        """The weights to validate and to ship: the moving average where there is one."""
        return self.averaged if self.config.ema_decay else self.network.state_dict()


def make_learner(config: TrainConfig, samples: int, device: torch.device, worker: Worker) -> Learner:
    """Build network and optimiser from the seed; with several workers, wrapped so that gradients are averaged.

    Raises PreflightError where a worker would be left without a sample.
    """
    if worker.count > config.batch_size:
        raise PreflightError(f"{worker.count} workers cannot share batches of {config.batch_size}; ask for fewer workers")
    torch.manual_seed(config.seed)
    network = UNet(config.network, len(config.modalities), len(config.regions))
    network.to(device, memory_format=network.memory_format)  # type: ignore[call-overload]
    for weight in network.parameters():
        if weight.dim() == 5 and weight[0, 0].numel() == 1:  # of either layout: DDP takes the strides that gradients come with
            weight.data = weight.data.flatten(1).clone().view_as(weight)
    stepped: nn.Module = network
    if worker.count > 1:
        stepped = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    averaged = {k: v.detach().clone() for k, v in network.state_dict().items()}
    optimiser, steps = make_optimiser(config.optimiser, network), steps_per_epoch(config, samples)
    return Learner(config, network, stepped, optimiser, averaged, device, worker, steps)


def begin_with(learner: Learner, weights: Mapping[str, Tensor]) -> None:
    """Put a pretrained network's weights in place of the drawn ones, before the first step."""
    learner.network.load_state_dict(dict(weights))
    for name, value in learner.network.state_dict().items():
        learner.averaged[name].copy_(value)


def make_optimiser(config: OptimiserConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW in one pass over all weights (`fused`): on a CPU a small network's step is a third faster by it."""
    kind = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def steps_per_epoch(config: TrainConfig, samples: int) -> int:
    """Optimiser steps in one epoch over a training set of so many slices."""
    return max(1, (config.samples_per_epoch or samples) // config.batch_size)


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant or a half cosine down to 1 % (Loshchilov & Hutter 2017)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def epoch_order(foreground: NDArray[np.bool_], config: TrainConfig, epoch: int) -> NDArray[np.int64]:
    """Slice numbers of an epoch's global batches, `(steps, batch_size)`; each batch holds its share of tumour slices."""
    rng = np.random.default_rng([config.seed, epoch])
    steps = steps_per_epoch(config, len(foreground))
    tumour, empty = np.flatnonzero(foreground), np.flatnonzero(~foreground)
    if not config.foreground_share or not len(tumour) or not len(empty):
        return _endless(rng, np.arange(len(foreground)), steps * config.batch_size).reshape(steps, -1)
    wanted = round(config.batch_size * config.foreground_share)
    return np.concatenate(
        [
            _endless(rng, tumour, steps * wanted).reshape(steps, -1),
            _endless(rng, empty, steps * (config.batch_size - wanted)).reshape(steps, -1),
        ],
        axis=1,
    )


def _endless(rng: np.random.Generator, items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """As many items as asked for, shuffled pass after pass."""
    passes = [rng.permutation(items) for _ in range(-(-count // len(items)))]
    return np.concatenate(passes)[:count] if passes else np.empty(0, np.int64)


def batches(learner: Learner, samples: SampleSet, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share of each global batch of an epoch: images `(b, K*C, S, S)`, masks `(b, R, S, S)`.

    S is smaller in coarse epochs (progressive resizing, Howard & Gugger 2020). In 3D they are patches `(b, C, D, H, W)` around
    the slices of those numbers.
    """
    config, worker = learner.config, learner.worker
    dimensions, patch = config.network.dimensions, config.prepare.patch
    for step, numbers in enumerate(epoch_order(samples.foreground, config, epoch)):
        mine, seed = np.arange(worker.rank, len(numbers), worker.count), (config.seed, epoch, step)
        drawn = draw(config.augment, len(numbers), len(config.modalities), seed, dimensions)
        if patch is None:
            images, masks = (shrunk(x, config.size_in(epoch)) for x in samples.batch(numbers[mine], learner.device))
        else:
            places = draw_places(len(numbers), seed)[mine]
            images, masks = cut(samples, numbers[mine], places, patch, margin(config.augment, patch), learner.device)
        yield apply(images, masks, drawn.rows(mine), config.augment, patch)


def shrunk(slices: Tensor, size: int) -> Tensor:
    """Slices `(B, C, S, S)` in so many pixels a side, each the weighted mean of those under it; untouched where that is S."""
    if slices.shape[-1] == size:
        return slices
    return functional.interpolate(slices, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def train_step(learner: Learner, images: Tensor, masks: Tensor, step: int) -> Tensor:
    """One optimiser step; returns this worker's loss, detached, scaled so that the workers' mean is the batch's."""
    config = learner.config
    for group in learner.optimiser.param_groups:
        group["lr"] = learning_rate(config.optimiser, step, learner.total_steps)
    learner.optimiser.zero_grad(set_to_none=True)
    loss = accumulate(learner, images, masks, step)
    if config.optimiser.clip_norm:
        learner.gradient_norm = nn.utils.clip_grad_norm_(learner.network.parameters(), config.optimiser.clip_norm)
    learner.optimiser.step()
    _average(learner, step)
    return loss


def accumulate(learner: Learner, images: Tensor, masks: Tensor, step: int) -> Tensor:
    """Leave the gradient of the global batch's loss on the weights, at most `micro_batch` slices at a time; returns the loss.

    What goes through together is spread over the share, which has its tumour slices first. Batch norm normalises by it, and
    so differs from one large batch; the other norms do not.
    """
    config, workers = learner.config, learner.worker.count
    largest_share = -(-config.batch_size // workers)
    most = config.micro_batch or largest_share
    share, count = Share(config.batch_size, workers), -(-len(images) // most)
    kept = _draw_kept(learner, step)
    parts = [_Part(images[n::count], masks[n::count], [layer[n::count] for layer in kept]) for n in range(count)]
    if largest_share > most and sums_over_batch(config.loss):  # all workers or none: they meet in the same order
        return _accumulate_in_two_passes(learner, parts, share)
    total = torch.zeros((), device=learner.device)
    for number, part in enumerate(parts):
        with _gradients_shared(learner, last=number == count - 1):
            loss = loss_over_levels(config.loss, _levels(learner, learner.stepped, part), part.masks, share)
            torch.autograd.backward(loss)
        total = total + loss.detach()
    return total


@dataclass(frozen=True)
class _Part:
    """Samples that go through the network together, and what each layer of dropout leaves of their channels: `(b, C)`."""

    images: Tensor
    masks: Tensor
    kept: Sequence[Tensor]


def _dropouts(network: UNet) -> list[ChannelDropout]:
    return [layer for layer in network.modules() if isinstance(layer, ChannelDropout)]


def _draw_kept(learner: Learner, step: int) -> list[Tensor]:
    """What each layer of dropout leaves of this worker's share: drawn for the whole batch, so that nobody draws otherwise."""
    config, worker = learner.config, learner.worker
    rng = np.random.default_rng([config.seed, 0, step, DROPOUT_STREAM])
    drawn = [(layer, rng.random((config.batch_size, layer.channels), np.float32)) for layer in _dropouts(learner.network)]
    return [layer.factors(torch.from_numpy(n[worker.rank :: worker.count])).to(learner.device) for layer, n in drawn]


def _accumulate_in_two_passes(learner: Learner, parts: Sequence[_Part], share: Share) -> Tensor:
    """The same for a loss that is no sum over samples: its slope at the logits, taken over all of them, then theirs.

    By the chain rule this is exact, and logits are small beside what the way back needs (Gao et al. 2021, gradient cache).
    The first pass moves no running average.
    """
    buffers = {name: value.clone() for name, value in learner.network.named_buffers()}
    with torch.no_grad():
        answers = [_levels(learner, partial(functional_call, learner.network, buffers), part) for part in parts]
    whole = [torch.cat(level).requires_grad_() for level in zip(*answers, strict=True)]
    loss = loss_over_levels(learner.config.loss, whole, torch.cat([part.masks for part in parts]), share)
    torch.autograd.backward(loss)
    sizes = [len(part.images) for part in parts]
    slopes = zip(*(torch.split(level.grad, sizes) for level in whole if level.grad is not None), strict=True)
    for number, (part, slope) in enumerate(zip(parts, slopes, strict=True)):
        with _gradients_shared(learner, last=number == len(parts) - 1):
            torch.autograd.backward(_levels(learner, learner.stepped, part), slope)
    return loss.detach()


def _levels(learner: Learner, network: Callable[[Tensor], Tensor | list[Tensor]], part: _Part) -> list[Tensor]:
    """What a network in training answers on each of its levels, finest first."""
    for layer, kept in zip(_dropouts(learner.network), part.kept, strict=True):
        layer.kept = kept
    with torch.autocast(learner.device.type, torch.bfloat16, enabled=uses_bf16(learner.config, learner.device)):
        answer = network(part.images.contiguous(memory_format=learner.network.memory_format))
    return answer if isinstance(answer, list) else [answer]


def _gradients_shared(learner: Learner, *, last: bool) -> AbstractContextManager[None]:
    """Workers average their gradients once a step: with the last backward pass."""
    if last or not isinstance(learner.stepped, DistributedDataParallel):
        return nullcontext()
    held_back: AbstractContextManager[None] = learner.stepped.no_sync()
    return held_back


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and has_fast_bf16(device))


@torch.no_grad()
def _average(learner: Learner, step: int) -> None:
    """Move the average towards the weights; slowly only once there is something to average."""
    if not learner.config.ema_decay:
        return
    keep = min(learner.config.ema_decay, (1 + step) / (10 + step))
    now = learner.network.state_dict()
    moving = [name for name, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([learner.averaged[name] for name in moving], [now[name] for name in moving], 1 - keep)
    for name in now.keys() - set(moving):
        learner.averaged[name].copy_(now[name])


def train_epoch(learner: Learner, samples: SampleSet, epoch: int) -> float:
    """Train one epoch; returns its mean loss over this worker's steps."""
    learner.network.train()
    first = epoch * learner.steps_per_epoch
    losses = [train_step(learner, x, y, first + i) for i, (x, y) in enumerate(batches(learner, samples, epoch))]
    _agree(learner)
    return float(torch.stack(losses).mean())


def _agree(learner: Learner) -> None:
    """Give every worker the first one's running statistics, so that all of them validate the network that is shipped."""
    if learner.worker.count == 1:
        return
    for name, value in learner.network.named_buffers():
        torch.distributed.broadcast(value, 0)
        torch.distributed.broadcast(learner.averaged[name], 0)


def state_tensors(learner: Learner, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a resumed training needs, as named tensors: network, average, best, optimiser."""
    out = {f"network.{k}": v for k, v in learner.network.state_dict().items()}
    out |= {f"averaged.{k}": v for k, v in learner.averaged.items()}
    out |= {f"best.{k}": v for k, v in best.items()}
    for number, state in learner.optimiser.state_dict()["state"].items():
        out |= {f"optimiser.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return {k: v.detach().cpu().clone().contiguous() for k, v in out.items()}


def restore(learner: Learner, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a saved state back; returns the best weights so far. PreflightError, and nothing put back, where it does not fit."""
    part, wanted = _parts(tensors), learner.network.state_dict()
    for name in ("network", "averaged", "best"):
        check_fit(part.get(name, {}), wanted, name)
    state = _optimiser_state(learner, part.get("optimiser", {}))
    learner.network.load_state_dict(part["network"])
    for name, value in part["averaged"].items():
        learner.averaged[name].copy_(value)
    learner.optimiser.load_state_dict({**learner.optimiser.state_dict(), "state": state})
    return part["best"]


def _optimiser_state(learner: Learner, named: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Tensors `N.key` by parameter: moments are shaped as their parameter, the count of steps is one number."""
    parameters = list(learner.network.parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in named.items():
        number, _, key = name.partition(".")
        fits = number.isdecimal() and int(number) < len(parameters) and key in ("step", "exp_avg", "exp_avg_sq")
        if not fits or value.shape != (parameters[int(number)].shape if key != "step" else ()):
            raise PreflightError(f"optimiser: {one_line(name)[:100]} {list(value.shape)} belongs to no parameter")
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise PreflightError(f"optimiser: {one_line(name)[:100]} holds what is no number")
        moment = value if key == "step" else torch.empty_like(parameters[int(number)], dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[key] = moment  # laid out as its parameter: the fused optimiser asks no strides
    return state


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        out.setdefault(part, {})[rest] = value
    return out
