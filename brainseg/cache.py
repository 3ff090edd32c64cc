"""Cache: decoded scans on disk, written once, read by every epoch of a training.

A *shard* is one file of raw voxels of several scans: each scan's crop in its stored type, then its region masks, one bit
a region. Its entries say where; a list of entries is the index. `SampleSet` turns an index into batches on the model
grid, holding prepared slices in memory where they fit and reading through memory maps where they do not.
"""

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainseg import storage
from brainseg.config import TrainConfig
from brainseg.errors import Code, ScanError, StorageError, one_line
from brainseg.geometry import to_canonical
from brainseg.prepare import (
    Plan,
    gather_context,
    model_masks,
    model_slices,
    plan_scan,
    select_modalities,
)
from brainseg.regions import LabelMap, label_map
from brainseg.scans import Scan
from brainseg.uploads import to_tensor

MEMORY_BUDGET_BYTES = 4 << 30
"""Prepared slices are kept in a worker's memory up to this much."""
SHARE_OF_A_GPU = 0.25
"""They are kept in a GPU's own memory up to this share of what is free there: then nothing of an epoch waits for copies."""
CPU = torch.device("cpu")
MASK_SCALE = 255


@dataclass(frozen=True)
class Entry:
    """Where one scan lies in a shard, and how its slices are prepared."""

    scan_id: str
    shard: str
    offset: int
    dtype: str
    shape: tuple[int, int, int, int]  # (C, D, h, w)
    plan: Plan
    foreground: tuple[int, ...]  # slices that hold any region
    digest: str  # sha256 of the shard, so that a copy of an older one is never taken for it

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Entry":
        """Undo `to_json`. StorageError where it is no entry: an index lies where others may write."""
        try:
            c, d, h, w = body["shape"]
            plan, foreground = Plan.from_json(body["plan"]), tuple(body["foreground"])
            entry = cls(**{**body, "shape": (c, d, h, w), "plan": plan, "foreground": foreground})
            is_sound = entry._is_sound()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError("the index of the decoded scans holds what is no entry") from error
        if not is_sound:
            raise StorageError(f"the index of the decoded scans holds an entry that cannot be: {one_line(entry.scan_id)[:100]}")
        return entry

    def _is_sound(self) -> bool:
        """Whether a file can be called by the digest, and voxels be taken from the shard as they are."""
        numbers = (self.offset, *self.foreground, *(n - 1 for n in self.shape))
        plain = all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers) and isinstance(self.shard, str)
        return plain and re.fullmatch("[0-9a-f]{64}", self.digest) is not None and np.dtype(self.dtype).kind in "biuf"


def region_bits(scan: Scan, names: Sequence[str], meaning: LabelMap) -> NDArray[np.uint8]:
    """Return the canonical crop of the label with one bit a region, `(D, h, w)`; ScanError MISSING_FILE without a label."""
    if scan.label is None:
        raise ScanError(Code.MISSING_FILE, f"{scan.scan_id}: no label, expected one to train on")
    inside = scan.label[tuple(slice(a, b) for a, b in scan.box)]
    masks = meaning.masks(to_canonical(inside, scan.grid), names)
    bits = np.zeros(masks.shape[1:], np.uint8)
    for row, mask in enumerate(masks):
        bits |= mask.astype(np.uint8) << np.uint8(row)
    return bits


def write_shard(scans: Sequence[tuple[Scan, str]], uri: str, config: TrainConfig) -> list[Entry]:
    """Write (scan, label map name) pairs as one shard and return their entries. The whole file appears at once."""
    parts: list[bytes] = []
    entries: list[Entry] = []
    offset = 0
    for scan, meaning in scans:
        crop, _ = select_modalities(scan, config.modalities)
        bits = region_bits(scan, config.regions, label_map(meaning))
        c, d, h, w = crop.shape
        entries.append(
            Entry(
                scan_id=scan.scan_id,
                shard=uri,
                offset=offset,
                dtype=crop.dtype.str,
                shape=(c, d, h, w),
                plan=plan_scan(scan, config.modalities, config.prepare, config.network.context_slices),
                foreground=tuple(int(i) for i in np.flatnonzero(bits.any(axis=(1, 2)))),
                digest="",
            )
        )
        parts += [crop.tobytes(), bits.tobytes()]
        offset += crop.nbytes + bits.nbytes
    data = b"".join(parts)
    storage.write_bytes(uri, data)
    digest = hashlib.sha256(data).hexdigest()
    return [replace(entry, digest=digest) for entry in entries]


class SampleSet:
    """All slices of a training set, by number, as the network eats them."""

    def __init__(
        self,
        entries: Sequence[Entry],
        num_regions: int,
        memory_bytes: int = MEMORY_BUDGET_BYTES,
        device: torch.device = CPU,
    ) -> None:
        """`device`: where batches will be asked for."""
        if not entries:
            raise ValueError("a sample set needs at least one scan")
        self.entries = list(entries)
        self.num_regions = num_regions
        depths = [e.shape[1] for e in self.entries]
        self.first = np.concatenate([[0], np.cumsum(depths)])  # number of each scan's first slice
        self.scan_of = np.repeat(np.arange(len(depths)), depths)
        self.foreground = np.zeros(len(self), np.bool_)
        for start, entry in zip(self.first, self.entries, strict=False):
            self.foreground[start + np.asarray(entry.foreground, np.int64)] = True
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._images: Tensor | None = None
        self._masks: Tensor | None = None
        if self._prepared_bytes() <= memory_bytes:
            place = device if self._prepared_bytes() <= SHARE_OF_A_GPU * free_bytes(device) else CPU
            self._images, self._masks = (x.to(place) for x in self._prepared())

    def __len__(self) -> int:
        return int(self.first[-1])

    def batch(self, numbers: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images `(B, K*C, S, S)` and masks `(B, R, S, S)` (0..1) of the slices with these numbers."""
        if self._images is None or self._masks is None:
            pairs = [self._prepare(int(self.scan_of[n]), [int(n - self.first[self.scan_of[n]])]) for n in numbers]
            return torch.cat([p[0] for p in pairs]).to(device), torch.cat([p[1] for p in pairs]).to(device)
        scan = self.scan_of[numbers]
        context = self.entries[0].plan.context
        wanted = numbers[:, None] + np.arange(-context, context + 1)[None, :]
        wanted = np.clip(wanted, self.first[scan][:, None], self.first[scan + 1][:, None] - 1)
        images = _picked(self._images, wanted).to(device)  # (B, K, C, S, S)
        masks = _picked(self._masks, numbers).to(device)
        return images.flatten(1, 2).float(), masks.float() / MASK_SCALE

    def mask(self, scan: int, number: int) -> Tensor:
        """Masks `(R, S, S)` (0..1) of one slice of a scan."""
        everything = np.arange(self.entries[scan].plan.size)
        return self.block(scan, np.array([number]), everything, everything)[1][0]

    def block(
        self, scan: int, slices: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Return images `(D, C, H, W)`, in the precision they are kept in, and masks `(D, R, H, W)` (0..1) of these of a scan's
        slices, rows and columns on the model grid."""
        if self._images is None or self._masks is None:
            images, masks = self._prepare(scan, [int(n) for n in slices], context=0)
        else:
            images, masks = (_picked(x, slices + self.first[scan]) for x in (self._images, self._masks))
        images, masks = (_picked(_picked(x, rows, 2), columns, 3) for x in (images, masks))
        return images, masks if masks.is_floating_point() else masks.float() / MASK_SCALE

    def _prepared_bytes(self) -> int:
        plan, channels = self.entries[0].plan, self.entries[0].shape[0]
        return len(self) * plan.size**2 * (2 * channels + self.num_regions)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        """Every slice, prepared once: float16 images without context, masks in 1/255."""
        size, channels = self.entries[0].plan.size, self.entries[0].shape[0]
        held = torch.empty(len(self), channels, size, size, dtype=torch.float16)
        covered = torch.empty(len(self), self.num_regions, size, size, dtype=torch.uint8)
        for number, entry in enumerate(self.entries):
            images, masks = self._prepare(number, range(entry.shape[1]), context=0)
            where = slice(int(self.first[number]), int(self.first[number + 1]))
            held[where] = images.half()
            covered[where] = (masks * MASK_SCALE).round().to(torch.uint8)
        self._maps.clear()
        return held, covered

    def _prepare(self, number: int, slices: Sequence[int], context: int | None = None) -> tuple[Tensor, Tensor]:
        entry = self.entries[number]
        crop, bits = self._voxels(entry)
        raw = gather_context(crop, slices, entry.plan.context if context is None else context)
        planes = np.stack([(bits[list(slices)] >> r) & 1 for r in range(self.num_regions)], axis=1)
        return model_slices(to_tensor(raw, CPU), entry.plan), model_masks(to_tensor(planes, CPU).float(), entry.plan)

    def _voxels(self, entry: Entry) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Views into the shard: crop `(C, D, h, w)` and region bits `(D, h, w)`."""
        raw = self._map(entry)
        stop = entry.offset + entry.image_bytes
        crop = raw[entry.offset : stop].view(np.dtype(entry.dtype)) if _aligned(entry) else _copied(raw, entry, stop)
        bits = raw[stop : stop + int(np.prod(entry.shape[1:]))]
        return crop.reshape(entry.shape), bits.reshape(entry.shape[1:])

    def _map(self, entry: Entry) -> NDArray[np.uint8]:
        if entry.shard not in self._maps:
            self._maps[entry.shard] = np.memmap(local_copy(entry.shard, entry.digest), np.uint8, mode="r")
        return self._maps[entry.shard]


def _picked(x: Tensor, numbers: NDArray[np.int64], axis: int = 0) -> Tensor:
    """What has these numbers along an axis, where the tensor is."""
    return x[(slice(None),) * axis + (torch.from_numpy(numbers).to(x.device),)]


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; nothing of a CPU's, where everything is already."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def _aligned(entry: Entry) -> bool:
    return entry.offset % np.dtype(entry.dtype).itemsize == 0


def _copied(raw: NDArray[np.uint8], entry: Entry, stop: int) -> NDArray[Any]:
    return np.frombuffer(raw[entry.offset : stop].tobytes(), np.dtype(entry.dtype))


def local_copy(uri: str, digest: str) -> Path:
    """A path on this node that holds the shard: itself on a disk, fetched once into the temporary folder from S3."""
    if not storage.is_remote(uri):
        return Path(uri)
    target = Path(tempfile.gettempdir()) / "brainseg-cache" / f"{digest}.bin"
    if not target.exists():
        data = storage.read_bytes(uri)
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(f"{uri}: the decoded scans are not those that the index names")
        storage.write_bytes(str(target), data)
    return target
