"""Peer: the loop that people write: nibabel, numpy, torch, slice batches of 16, nib.save, Dice by numpy."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from shared import MODALITIES, image, main, network
from torch.nn import functional


def prepare(model: Path, size: int, out: Path) -> Callable[[Path], None]:
    """Load the network; returns what segments one case."""
    net = network(model)

    def segment(case: Path) -> None:
        volumes = [nib.load(image(case, name)) for name in MODALITIES]
        voxels = np.stack([volume.get_fdata() for volume in volumes])
        for channel in voxels:
            inside = channel != 0
            channel[inside] = (channel[inside] - channel[inside].mean()) / channel[inside].std()
        slices = torch.from_numpy(voxels.astype(np.float32)).permute(3, 0, 1, 2)
        answers = []
        with torch.no_grad():
            for batch in slices.split(16):
                small = functional.interpolate(batch, (size, size), mode="bilinear")
                probability = torch.sigmoid(net(small))
                answers.append(functional.interpolate(probability, batch.shape[2:], mode="bilinear") > 0.5)
        regions = torch.cat(answers).permute(1, 2, 3, 0).numpy()
        label = np.zeros(regions.shape[1:], np.uint8)
        for region, value in zip(regions, (2, 1, 4), strict=True):
            label[region] = value
        nib.save(nib.Nifti1Image(label, volumes[0].affine), out / f"{case.name}.nii.gz")
        truth = nib.load(image(case, "seg")).get_fdata()
        for values in ((1, 2, 4), (1, 4), (4,)):
            a, b = np.isin(label, values), np.isin(truth, values)
            2 * (a & b).sum() / max(1, a.sum() + b.sum())

    return segment


if __name__ == "__main__":
    main(prepare)
