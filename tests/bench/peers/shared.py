"""What every peer of the bench shares: the network that all of them run, and how their seconds are counted.

Runs in a peer's own environment, in which of brainseg nothing but the network itself is imported.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

MODALITIES = ("flair", "t1", "t1ce", "t2")
REGIONS = ((1, 2, 4), (1, 4), (4,))
"""The labels of WT, TC and ET."""


def network(model: Path) -> Any:
    """The network of a model folder, as it was trained: eager, float32, in torch, which gets one thread."""
    import torch
    from safetensors.torch import load_file

    from brainseg.config import NetworkConfig
    from brainseg.unet import UNet

    torch.set_num_threads(1)
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


def loaded(case: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The modalities (4, H, W, S) as people read them, each with mean 0 and deviation 1 where it is not 0; and the affine."""
    volumes = [nib.load(image(case, name)) for name in MODALITIES]
    voxels = np.stack([volume.get_fdata() for volume in volumes])
    for channel in voxels:
        inside = channel != 0
        channel[inside] = (channel[inside] - channel[inside].mean()) / channel[inside].std()
    return voxels, volumes[0].affine


def finished(regions: np.ndarray[Any, Any], affine: np.ndarray[Any, Any], case: Path, out: Path) -> None:
    """Write the masks of WT, TC and ET (3, H, W, S) as one label map, and work out the Dice of each."""
    label = np.zeros(regions.shape[1:], np.uint8)
    for region, value in zip(regions, (2, 1, 4), strict=True):
        label[region] = value
    nib.save(nib.Nifti1Image(label, affine), out / f"{case.name}.nii.gz")
    truth = nib.load(image(case, "seg")).get_fdata()
    for values in REGIONS:
        a, b = np.isin(label, values), np.isin(truth, values)
        2 * (a & b).sum() / max(1, a.sum() + b.sum())


def measured(segment: Callable[[Path], None], archive: Path, scans: int) -> dict[str, float]:
    """CPU and wall seconds a case, the first one apart: it pays for what is done once."""
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
