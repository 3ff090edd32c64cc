"""A model: weights and a JSON card in one folder, from which the network is rebuilt and run on whole scans.

`MODEL/weights.safetensors` holds tensors and nothing else; `MODEL/model.json` is the card. Nothing in either is executed.
"""

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from brainseg import storage, trust
from brainseg.card import CARD, ModelCard, fingerprint_of, load_card, resolved, save_card
from brainseg.config import PrepareConfig, SegmentConfig
from brainseg.errors import Code, PreflightError, ScanError, StorageError
from brainseg.geometry import occupied
from brainseg.postprocess import Smallest, drop_components
from brainseg.precision import decided, exact_float32, in_bf16, inference_dtype
from brainseg.prepare import (
    Plan,
    model_slices,
    native_probabilities,
    plan_scan,
    select_modalities,
    stack_context,
    uncrop,
)
from brainseg.regions import label_map
from brainseg.scans import Scan
from brainseg.shipped import place_of
from brainseg.sliding import Patch, slide
from brainseg.unet import UNet, folded
from brainseg.uploads import Upload, Uploads
from brainseg.weights import MOST_BYTES, blueprint, check_fit, read_limited, tensors_of

WEIGHTS = "weights.safetensors"
PIXELS_PER_FORWARD, PIXELS_PER_FORWARD_ON_A_GPU = 16 * 128 * 128, 512 * 128 * 128
"""How many model-grid pixels go through the network at once: on a CPU what fits its caches, on a GPU what fills it."""

Patients = Sequence[str | None] | None
"""Whose each of several scans is, where known; None where nobody asks."""

OnDevice = Callable[[], AbstractContextManager[Any]]
"""Gives what a thread enters to have the device to itself."""

Shown = tuple[PrepareConfig, int]
"""How a network sees a scan: its preparation, and how many slices on either side."""


@dataclass(frozen=True)
class Prediction:
    """A network's answer for one scan on its native grid: a label volume and how sure it was, per region."""

    label: NDArray[np.uint8]  # (D, H, W) in label-map values
    trust: tuple[trust.Figures, ...]
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """A scan that networks are about to see: its crop, on its way to their device, and how it is shown to them."""

    scan: Scan
    crop: Upload  # (C, D, h, w) in canonical orientation, stored type, modalities as on the card
    background: tuple[float, ...]
    plans: Mapping[Shown, Plan]


Drawn = tuple[NDArray[np.uint8], tuple[trust.Figures, ...]]
"""A label on a scan's crop, and how sure the network was of it, region by region."""


class Segmenter(ABC):
    """Whatever turns scans into predictions: one network, or several whose probabilities are averaged (`ensemble`)."""

    card: ModelCard
    settings: SegmentConfig
    fingerprint: str
    uploads: Uploads

    @abstractmethod
    def ways(self) -> set[Shown]:
        """Every way in which a network of this one sees scans."""

    @abstractmethod
    def answers(self, loaded: Sequence[Loaded], patients: Patients = None) -> Iterator[Tensor]:
        """Yield each loaded scan's region probabilities `(R, D, h, w)`, as `probabilities` does."""

    def load(self, scans: Sequence[Scan]) -> list[Loaded]:
        """All that comes before the device is needed, and the way there.

        Raises ScanError MISSING_MODALITY when a scan lacks what the networks need.
        """
        return [self._load(scan) for scan in scans]

    def _load(self, scan: Scan) -> Loaded:
        crop, background = select_modalities(scan, self.card.modalities)
        plans = {(prepare, n): plan_scan(scan, self.card.modalities, prepare, n) for prepare, n in self.ways()}
        return Loaded(scan, self.uploads.send(crop), background, plans)

    def probabilities(self, scans: Sequence[Scan], patients: Patients = None) -> Iterator[Tensor]:
        """Return an iterator over each scan's region probabilities `(R, D, h, w)` on its crop in canonical orientation.

        Raises ScanError MISSING_MODALITY when a scan lacks what is needed.
        """
        return self.answers(self.load(scans), patients)

    @torch.inference_mode()
    def predict(self, scans: Sequence[Scan], patients: Patients = None, on_device: OnDevice = nullcontext) -> list[Prediction]:
        """Segment scans together, their slices sharing batches; `patients` says whose they are, where that matters.

        What the device does happens inside `on_device()`; what comes before and after it other threads may do meanwhile.
        Raises ScanError MISSING_MODALITY when a scan lacks what the network needs.
        """
        began = time.perf_counter()
        loaded = self.load(scans)
        waits = time.perf_counter()
        with on_device():
            waited = time.perf_counter() - waits
            drawn = [self._drawn(*both) for both in zip(loaded, self.answers(loaded, patients), strict=True)]
        labels = [uncrop(label, scan.grid, scan.box) for scan, (label, _) in zip(scans, drawn, strict=True)]
        seconds = (time.perf_counter() - began - waited) / max(len(scans), 1)
        return [Prediction(label, figures, seconds) for label, (_, figures) in zip(labels, drawn, strict=True)]

    def paint(self, probability: Tensor, threshold: float) -> NDArray[np.uint8]:
        """Threshold region probabilities `(R, ...)` and write them as one label in the values of the model's label map."""
        masks = (probability > threshold).cpu().numpy()
        return label_map(self.card.label_map).paint_label(masks, self.card.regions)

    def drop_components(self, painted: NDArray[np.uint8], smallest: Smallest) -> NDArray[np.uint8]:
        """A painted label `(D, h, w)` without the components that a rule drops."""
        return drop_components(painted, label_map(self.card.label_map), self.card.regions, smallest)

    def _drawn(self, one: Loaded, probability: Tensor) -> Drawn:
        """Threshold `(R, D, h, w)` and paint: a label on the crop, and how sure the network was of it.

        ScanError NON_FINITE where an answer is no number: over no threshold, it would look like a scan without a tumour.
        """
        drawn = self._drawn_here if probability.is_cpu else self._drawn_there
        found = drawn(one, probability)
        if found is None:
            raise ScanError(Code.NON_FINITE, f"{one.scan.scan_id}: the network answered with what is no number")
        return found

    def _drawn_here(self, one: Loaded, probability: Tensor) -> Drawn | None:
        """On a CPU: most of a volume is background, which is only gone over once. None where an answer is no number."""
        if not math.isfinite(float(probability.sum())):
            return None
        painted = self._without_small(self._painted(probability, self._threshold))
        box = occupied(painted)  # nothing else is in any mask
        kept = label_map(self.card.label_map).masks(painted[box], self.card.regions)
        head = trust.head_of(one.crop.array, one.background)
        return painted, trust.figures(probability, torch.from_numpy(kept), torch.from_numpy(head), box)

    def _drawn_there(self, one: Loaded, probability: Tensor) -> Drawn | None:
        """On a GPU: all of it is done there, and a byte a voxel comes home with a few figures."""
        meaning = label_map(self.card.label_map)
        over = probability > self._threshold
        painted = trust.painted_there(over, meaning, self.card.regions)
        if self.settings.smallest_component not in (0, 1):
            home = self._without_small(painted.cpu().numpy())
            painted = torch.from_numpy(home).to(painted.device)
        masks = trust.masks_there(painted, meaning, self.card.regions)
        figures = trust.figures_there(probability, masks, trust.head_there(one.crop.tensor(), one.background))
        return None if figures is None else (painted.cpu().numpy(), figures)

    @property
    def _threshold(self) -> float:
        assert isinstance(self.settings.threshold, float), "`resolved` comes before"
        return self.settings.threshold

    def _without_small(self, painted: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert self.settings.smallest_component != "chosen", "`resolved` comes before"
        return self.drop_components(painted, self.settings.smallest_component)

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
        exact_float32()
        self.card = card
        self.fingerprint = fingerprint
        self.device = device
        self.uploads = Uploads(device)
        self.settings = settings
        self.memory_format = network.memory_format
        self.network: UNet = self._ready(network)
        self.precise: UNet | None = None
        if inference_dtype(settings.precision, device) == torch.bfloat16:
            self.network, self.precise = self._ready(in_bf16(network, first_block=device.type == "cpu")), self.network
        self.pixels_per_forward = PIXELS_PER_FORWARD if device.type == "cpu" else PIXELS_PER_FORWARD_ON_A_GPU

    def _ready(self, network: UNet) -> UNet:
        ready: UNet = network.eval().to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return ready

    def ways(self) -> set[Shown]:
        return {self.shown}

    @property
    def shown(self) -> Shown:
        """How this network sees scans."""
        return self.card.prepare, self.card.network.context_slices

    def answers(self, loaded: Sequence[Loaded], patients: Patients = None) -> Iterator[Tensor]:
        """Yield each scan's region probabilities `(R, D, h, w)` on its crop in canonical orientation, one scan at a time."""
        if self.card.prepare.patch is not None:
            yield from (self._on_crop(one, self._slid(one, self.card.prepare.patch)) for one in loaded)
            return
        for one, slices, answer in self._answered_together(loaded):
            yield self._decided(one, slices, self._on_crop(one, answer))

    @torch.inference_mode()
    def _answered_together(self, loaded: Sequence[Loaded]) -> list[tuple[Loaded, Tensor | None, Tensor]]:
        """Each scan, its slices if there may be doubts about them, and the answer `(D, R, S, S)` on the model grid.

        A scan of one slice float32 answers at once: after bf16 hardly one would be left without a doubt.
        """
        stacks = [self._slices(one) for one in loaded]
        kept = [stack if self.precise is not None and len(stack) > 1 else None for stack in stacks]
        exact = [stack for stack, doubted in zip(stacks, kept, strict=True) if doubted is None]
        quickly = iter(self._answer([stack for stack in kept if stack is not None], self.network))
        exactly = iter(self._answer(exact, self.precise or self.network))
        answers = [next(exactly if stack is None else quickly) for stack in kept]
        return list(zip(loaded, kept, answers, strict=True))

    def _answer(self, stacks: list[Tensor], network: UNet) -> Sequence[Tensor]:
        """Of each stack of slices the answer, in batches shared by all of them."""
        if not stacks:
            return ()
        together = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
        return torch.split(self._forward(together, network), [len(stack) for stack in stacks])

    @torch.inference_mode()
    def _on_crop(self, one: Loaded, answer: Tensor) -> Tensor:
        """Answers `(D, R, S, S)` on the model grid as `(R, D, h, w)` on the scan's crop."""
        return native_probabilities(answer.transpose(0, 1), one.plans[self.shown], *one.crop.array.shape[2:])

    @torch.inference_mode()
    def _decided(self, one: Loaded, slices: Tensor | None, probability: Tensor) -> Tensor:
        """A scan's answer `(R, D, h, w)` with what bf16 may have decided answered by float32."""
        if slices is None:
            return probability

        def again(numbers: Tensor) -> Tensor:
            return self._on_crop(one, self._forward(slices[numbers], self.precise))

        return decided(probability, self._threshold, again)

    @torch.inference_mode()
    def _slid(self, one: Loaded, patch: Patch) -> Tensor:
        together = max(1, self.pixels_per_forward // math.prod(patch))
        return slide(self._slices(one), patch, len(self.card.regions), self._forward, together)

    def _slices(self, one: Loaded) -> Tensor:
        plan = one.plans[self.shown]
        slices = model_slices(one.crop.tensor().transpose(0, 1), plan)
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
