"""Hardware: what a training ran on, for its log, its card and its page. Nothing here decides anything."""

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of a unit of `ru_maxrss`: getrusage(2) counts kibibytes on Linux, bytes on macOS."""


def machine() -> dict[str, Any]:
    """This node: CPU model, logical cores, memory in bytes, names of its GPUs; None for what the system does not tell."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "memory_bytes": _memory_bytes(), "gpus": gpus}


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU by its maker's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """The most memory that this process has held so far, and that it has held on its GPU; in bytes."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MEMORY_UNIT
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_rss_bytes": resident, "peak_cuda_bytes": on_gpu}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name and name != "unknown"), platform.processor() or platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
