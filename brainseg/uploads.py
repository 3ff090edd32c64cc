"""Uploads: how a scan's voxels come to the device that its network is on.

A GPU gets them while it works on other scans: out of pinned memory, which it reads by itself, in a stream of their own. For a
CPU they are where they should be; nothing is copied before it is needed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDENED = {np.dtype(np.uint16): torch.int32, np.dtype(np.uint32): torch.int64}
"""Types that torch cannot calculate with, and the next larger ones with which it can."""


class Uploads:
    """The way to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, array: NDArray[Any]) -> "Upload":
        """Begin to copy an array of any layout to the device, in its stored type; it becomes float there."""
        if self._stream is None:
            return Upload(array, self.device)
        pinned = torch.empty(array.shape, dtype=tensor_type(array.dtype), pin_memory=True)
        np.copyto(pinned.numpy(), array)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self.device, non_blocking=True)
            return Upload(array, self.device, there, self._stream.record_event())


@dataclass(frozen=True)
class Upload:
    """An array, and where it was sent to."""

    array: NDArray[Any]
    device: torch.device
    there: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def tensor(self) -> Tensor:
        """The array on the device; whatever is asked of that from here on waits until it has arrived."""
        if self.there is None or self.arrived is None:
            return to_tensor(self.array, self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.there.record_stream(current)  # its memory is another stream's, who would give it away too early
        return self.there


def to_tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    """Move an array to the device in its stored type; it becomes float there."""
    if array.dtype in WIDENED:
        return torch.from_numpy(array.astype(np.int64 if array.dtype == np.uint32 else np.int32)).to(device)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def tensor_type(dtype: "np.dtype[Any]") -> torch.dtype:
    """What an array of this type becomes as a tensor."""
    return WIDENED.get(dtype) or torch.from_numpy(np.empty(0, dtype)).dtype
