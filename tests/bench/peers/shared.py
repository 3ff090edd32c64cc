"""What every peer of the bench shares: the network that all of them run, and how their seconds are counted.

Runs in a peer's own environment, in which of brainseg nothing but the network itself is imported.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

MODALITIES = ("flair", "t1", "t1ce", "t2")


def network(model: Path) -> nn.Module:
    """The network of a model folder, as it was trained: eager, float32."""
    from safetensors.torch import load_file

    from brainseg.config import NetworkConfig
    from brainseg.unet import UNet

    config = NetworkConfig.model_validate(json.loads((model / "model.json").read_text())["network"])
    net = UNet(config, len(MODALITIES), 3)
    net.load_state_dict(load_file(model / "weights.safetensors"))
    return net.eval()


def cases(archive: Path) -> list[Path]:
    """The folder of each case."""
    return sorted(path for path in archive.iterdir() if path.is_dir())


def image(case: Path, modality: str) -> Path:
    """The file of one modality."""
    return case / f"{case.name}_{modality}.nii.gz"


def measured(segment: Callable[[Path], None], archive: Path, scans: int) -> dict[str, float]:
    """CPU and wall seconds a case, the first one apart: it pays for what is done once."""
    torch.set_num_threads(1)
    chosen = cases(archive)[: scans + 1]
    segment(chosen[0])
    cpu, wall = _cpu_seconds(), time.perf_counter()
    for case in chosen[1:]:
        segment(case)
    number = len(chosen) - 1
    return {"cpu_s": (_cpu_seconds() - cpu) / number, "wall_s": (time.perf_counter() - wall) / number, "scans": number}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main(prepare: Callable[[Path, int, Path], Callable[[Path], None]]) -> None:
    """`python peer.py ARCHIVE MODEL OUT SIZE SCANS`: print the figures as one line of JSON."""
    archive, model, out, size, scans = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:6])
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(measured(prepare(model, size, out), archive, scans)))
