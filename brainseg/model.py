"""A model: weights and a JSON card in one folder, from which the network is rebuilt and run on whole scans.

`MODEL/weights.safetensors` holds tensors and nothing else; `MODEL/model.json` is the card. Nothing in either is executed.
"""

import functools
import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from brainseg import storage
from brainseg.card import CARD, ModelCard, fingerprint_of, load_card, resolved, save_card
from brainseg.config import SegmentConfig
from brainseg.errors import Code, PreflightError, ScanError, StorageError
from brainseg.geometry import occupied
from brainseg.postprocess import Smallest, drop_components
from brainseg.precision import decided, in_bf16, inference_dtype
from brainseg.prepare import (
    Plan,
    canonical_box,
    model_slices,
    native_probabilities,
    plan_scan,
    select_modalities,
    stack_context,
    to_tensor,
    uncrop,
)
from brainseg.regions import label_map
from brainseg.scans import Scan
from brainseg.shipped import place_of
from brainseg.sliding import Patch, slide
from brainseg.unet import UNet, folded
from brainseg.weights import MOST_BYTES, blueprint, check_fit, read_limited, tensors_of

WEIGHTS = "weights.safetensors"
PIXELS_PER_FORWARD = {"cpu": 16 * 128 * 128, "cuda": 512 * 128 * 128}
"""How many model-grid pixels go through the network at once: on a CPU what fits its caches, on a GPU what fills it."""
ENTROPIES_TOGETHER = 1 << 15
"""Voxels whose entropies a CPU works out at once, in its cache."""
ALMOST_SURE = 1e-6
"""Probabilities nearer to 0 or 1 count as this far from it where a logarithm is taken."""


Patients = Sequence[str | None] | None
"""Whose each of several scans is, where known; None where nobody asks."""


@dataclass(frozen=True)
class Prediction:
    """A network's answer for one scan on its native grid: a label volume and how sure it was, per region."""

    label: NDArray[np.uint8]  # (D, H, W) in label-map values
    trust: tuple[dict[str, float | None], ...]  # per region: mean_probability, mean_entropy, outside_head_fraction
    seconds: float


class Segmenter(ABC):
    """Whatever turns scans into predictions: one network, or several whose probabilities are averaged (`ensemble`)."""

    card: ModelCard
    settings: SegmentConfig
    fingerprint: str

    @abstractmethod
    def probabilities(self, scans: Sequence[Scan], patients: Patients = None) -> Iterator[Tensor]:
        """Yield each scan's region probabilities `(R, D, h, w)` on its crop in canonical orientation, one scan at a time.

        Raises ScanError MISSING_MODALITY, before the first, when a scan lacks what is needed.
        """

    @torch.inference_mode()
    def predict(self, scans: Sequence[Scan], patients: Patients = None) -> list[Prediction]:
        """Segment scans together, their slices sharing batches; `patients` says whose they are, where that matters.

        Raises ScanError MISSING_MODALITY when a scan lacks what the network needs.
        """
        started = time.perf_counter()
        answers = self.probabilities(scans, patients)
        out = [self._finish(scan, probability) for scan, probability in zip(scans, answers, strict=True)]
        seconds = (time.perf_counter() - started) / max(len(scans), 1)
        return [Prediction(p.label, p.trust, seconds) for p in out]

    def paint(self, probability: Tensor, threshold: float) -> NDArray[np.uint8]:
        """Threshold region probabilities `(R, ...)` and write them as one label in the values of the model's label map."""
        masks = (probability > threshold).cpu().numpy()
        return label_map(self.card.label_map).paint_label(masks, self.card.regions)

    def drop_components(self, painted: NDArray[np.uint8], smallest: Smallest) -> NDArray[np.uint8]:
        """A painted label `(D, h, w)` without the components that a rule drops."""
        return drop_components(painted, label_map(self.card.label_map), self.card.regions, smallest)

    def _finish(self, scan: Scan, probability: Tensor) -> Prediction:
        """Threshold `(R, D, h, w)`, paint, and put back on the native grid.

        ScanError NON_FINITE where an answer is no number: over no threshold, it would look like a scan without a tumour.
        """
        if not math.isfinite(float(probability.sum())):
            raise ScanError(Code.NON_FINITE, f"{scan.scan_id}: the network answered with what is no number")
        threshold, smallest = self.settings.threshold, self.settings.smallest_component
        assert isinstance(threshold, float), "`resolved` comes before"
        assert smallest != "chosen", "`resolved` comes before"
        painted = self.drop_components(self._painted(probability, threshold), smallest)
        head = torch.from_numpy(_head(scan, self.card.modalities)).to(probability.device)
        box = occupied(painted)  # nothing else is in any mask
        kept = torch.from_numpy(label_map(self.card.label_map).masks(painted[box], self.card.regions)).to(probability.device)
        inside, entropies = zip(probability[:, *box], kept, strict=True), _mean_entropies(probability, head)
        trust = tuple(_trust(p, m, head[box], e) for (p, m), e in zip(inside, entropies, strict=True))
        return Prediction(uncrop(painted, scan.grid, scan.box), trust, 0.0)

    def _painted(self, probability: Tensor, threshold: float) -> NDArray[np.uint8]:
        """`paint` for volumes `(R, D, h, w)`, of which most is background: it is only gone over once."""
        over = (probability > threshold).cpu().numpy()
        box = occupied(*over)
        painted = np.zeros(over.shape[1:], np.uint8)
        painted[box] = label_map(self.card.label_map).paint_label(over[:, *box], self.card.regions)
        return painted


class Model(Segmenter):
    """A network on a device, with the card that says what it eats and what it answers."""

    def __init__(self, card: ModelCard, network: UNet, fingerprint: str, device: torch.device, settings: SegmentConfig) -> None:
        """A float32 network becomes one in bf16 where settings and device ask for it, and stays at hand for its doubts."""
        self.card = card
        self.fingerprint = fingerprint
        self.device = device
        self.settings = settings
        self.memory_format = network.memory_format
        self.network: UNet = self._ready(network)
        self.precise: UNet | None = None
        if inference_dtype(settings.precision, device) == torch.bfloat16:
            self.network, self.precise = self._ready(in_bf16(network)), self.network
        self.pixels_per_forward = PIXELS_PER_FORWARD[device.type]

    def _ready(self, network: UNet) -> UNet:
        ready: UNet = network.eval().to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return ready

    def probabilities(self, scans: Sequence[Scan], patients: Patients = None) -> Iterator[Tensor]:
        """Yield each scan's region probabilities `(R, D, h, w)` on its crop in canonical orientation, one scan at a time.

        Raises ScanError MISSING_MODALITY, before the first, when a scan lacks what the network needs.
        """
        context = self.card.network.context_slices
        plans = [plan_scan(s, self.card.modalities, self.card.prepare, context) for s in scans]
        for scan, plan, answer in zip(scans, plans, self._answers(scans, plans), strict=True):
            _, height, width = _crop_shape(scan)
            with torch.inference_mode():
                probability = native_probabilities(answer.transpose(0, 1), plan, height, width)
            yield probability

    def _answers(self, scans: Sequence[Scan], plans: Sequence[Plan]) -> Iterable[Tensor]:
        """Each scan's region probabilities `(D, R, S, S)` on the model grid: slices together, or volumes one by one."""
        if self.card.prepare.patch is not None:
            return (self._slid(scan, plan, self.card.prepare.patch) for scan, plan in zip(scans, plans, strict=True))
        with torch.inference_mode():
            stacks = [self._slices(scan, plan) for scan, plan in zip(scans, plans, strict=True)]
            together = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
            answers = torch.split(self._forward(together), [len(s) for s in stacks])
            return [self._decided(stack, answer) for stack, answer in zip(stacks, answers, strict=True)]

    def _decided(self, slices: Tensor, answer: Tensor) -> Tensor:
        """A scan's answer `(D, R, S, S)` with what bf16 may have decided answered by float32."""
        if self.precise is None:
            return answer
        assert isinstance(self.settings.threshold, float), "`resolved` comes before"
        return decided(answer, self.settings.threshold, lambda numbers: self._forward(slices[numbers], self.precise))

    @torch.inference_mode()
    def _slid(self, scan: Scan, plan: Plan, patch: Patch) -> Tensor:
        together = max(1, self.pixels_per_forward // math.prod(patch))
        return slide(self._slices(scan, plan), patch, len(self.card.regions), self._forward, together)

    def _slices(self, scan: Scan, plan: Plan) -> Tensor:
        crop, _ = select_modalities(scan, self.card.modalities)
        slices = model_slices(to_tensor(crop, self.device).transpose(0, 1), plan)
        return stack_context(slices, range(len(slices)), plan.context)

    def _forward(self, slices: Tensor, network: UNet | None = None) -> Tensor:
        """Region probabilities `(N, R, ...)` of model slices or patches `(N, K*C, ...)`; halves the batch when memory runs out.

        What fitted is remembered, so that the next scans do not run out of memory first.
        """
        size = math.prod(slices.shape[2:])
        while True:
            step = max(1, min(self.pixels_per_forward // size, len(slices)))
            try:
                return self._answered(slices, step, network or self.network)
            except torch.OutOfMemoryError:
                if step == 1:
                    raise
                self.pixels_per_forward = step // 2 * size
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _answered(self, slices: Tensor, step: int, network: UNet) -> Tensor:
        """The same, so many at a time; region by region in memory, as they are read from here on."""
        out = torch.empty((len(slices), len(self.card.regions), *slices.shape[2:]), device=slices.device)
        for chunk, target in zip(torch.split(slices, step), torch.split(out, step), strict=True):
            target.copy_(self._probabilities(chunk, network))
        return out

    def _probabilities(self, chunk: Tensor, network: UNet) -> Tensor:
        chunk = chunk.contiguous(memory_format=self.memory_format)
        probability = torch.sigmoid(network(chunk).float())
        if self.settings.flip:
            mirrored = torch.sigmoid(network(chunk.flip(-1)).float()).flip(-1)
            probability = (probability + mirrored) / 2
        return probability


def _crop_shape(scan: Scan) -> tuple[int, int, int]:
    box, _ = canonical_box(scan.grid, scan.box)
    (a, b), (c, d), (e, f) = box
    return b - a, d - c, f - e


def _head(scan: Scan, modalities: Sequence[str]) -> NDArray[np.bool_]:
    """Voxels `(D, h, w)` of the canonical crop where any modality shows something."""
    crop, background = select_modalities(scan, modalities)
    head = np.zeros(crop.shape[1:], np.bool_)
    if crop.dtype.kind in "iu" and not any(background):
        return np.not_equal(np.bitwise_or.reduce(crop, axis=0), 0, out=head)
    for volume, empty in zip(crop, background, strict=True):
        head |= volume != empty
    return head


def _trust(probability: Tensor, mask: Tensor, head: Tensor, entropy: float | None) -> dict[str, float | None]:
    """Label-free figures of one region: how sure inside the mask, how undecided over the head, how much outside it."""
    inside = int(torch.count_nonzero(mask))
    return {
        "mean_probability": float(probability[mask].mean()) if inside else None,
        "mean_entropy": entropy,
        "outside_head_fraction": int(torch.count_nonzero(mask & ~head)) / inside if inside else None,
    }


def _mean_entropies(probability: Tensor, head: Tensor) -> list[float | None]:
    """Mean binary entropy in bits over the head `(D, h, w)`, of each region of `(R, D, h, w)`; None without a head."""
    return [_mean_entropy(_under(head, volume)) for volume in probability] if head.any() else [None] * len(probability)


def _under(mask: Tensor, volume: Tensor) -> Tensor:
    """Values `(n,)` of a volume where a mask is; on a CPU numpy takes a fifth of torch's time."""
    return volume[mask] if volume.is_cuda else torch.from_numpy(volume.numpy()[mask.numpy()])


def _mean_entropy(probability: Tensor) -> float:
    """Of probabilities `(n,)`, read off a table: two logarithms of each take twice as long.

    A float16 of 11 bits is near enough for how far a probability is from 0 or 1, whichever is nearer.
    """
    table, total = _entropies().to(probability.device), torch.zeros((), dtype=torch.float64, device=probability.device)
    for p in torch.split(probability, len(probability) if probability.is_cuda else ENTROPIES_TOGETHER):
        doubt = torch.minimum(p, 1 - p).clamp_(0).half()
        total += table.index_select(0, doubt.view(torch.int16).int()).sum()
    return float(total) / len(probability)


@functools.cache
def _entropies() -> Tensor:
    """Binary entropy in bits of each float16 from 0 to 1/2, in the order of their bit patterns."""
    p = torch.arange(torch.tensor(0.5, dtype=torch.float16).view(torch.int16).item() + 1, dtype=torch.int16)
    p = p.view(torch.float16).double().clamp_(ALMOST_SURE)
    return -(p * p.log2() + (1 - p) * (1 - p).log2()).float()


def save_model(uri: str, card: ModelCard, weights: dict[str, Tensor]) -> ModelCard:
    """Write the folder, the card last; returns the card with the hash of the weights in it."""
    data = save_tensors({k: v.detach().cpu().contiguous() for k, v in weights.items()})
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    storage.write_bytes(storage.join(uri, WEIGHTS), data)
    save_card(uri, card)
    return card


def load_weights(uri: str, card: ModelCard) -> dict[str, Tensor]:
    """The tensors of a model's network. PreflightError where they are not those that the card is about."""
    where = f"{uri}/{WEIGHTS}"
    wanted = blueprint(lambda: UNet(card.network, len(card.modalities), len(card.regions)), f"{uri}/{CARD}")
    try:
        data = read_limited(storage.join(place_of(uri), WEIGHTS), MOST_BYTES)
    except StorageError as error:
        raise PreflightError(f"{uri}: its weights cannot be read ({error})") from error
    if hashlib.sha256(data).hexdigest() != card.weights_sha256:
        raise PreflightError(f"{where}: its sha256 is not the one that {CARD} names; the folder is damaged or mixed")
    tensors = tensors_of(data, where)
    check_fit(tensors, wanted, where)
    return tensors


def load_model(uri: str, settings: SegmentConfig, device: torch.device | None = None) -> Model:
    """Rebuild a network from its folder. PreflightError when weights and card do not belong together."""
    card = load_card(uri)
    tensors = load_weights(uri, card)
    network = UNet(card.network, len(card.modalities), len(card.regions))
    network.load_state_dict(tensors)
    chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Model(card, folded(network), fingerprint_of(card), chosen, resolved(settings, card))
