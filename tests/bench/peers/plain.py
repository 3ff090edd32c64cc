"""Peer: the loop that people write: nibabel, numpy, torch, slice batches of 16, nib.save, Dice by numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from shared import finished, loaded, main, network
from torch.nn import functional


def prepare(model: Path, size: int, out: Path) -> Callable[[Path], None]:
    """Load the network; returns what segments one case."""
    net = network(model)

    def segment(case: Path) -> None:
        voxels, affine = loaded(case)
        slices = torch.from_numpy(voxels.astype(np.float32)).permute(3, 0, 1, 2)
        answers = []
        with torch.no_grad():
            for batch in slices.split(16):
                small = functional.interpolate(batch, (size, size), mode="bilinear")
                probability = torch.sigmoid(net(small))
                answers.append(functional.interpolate(probability, batch.shape[2:], mode="bilinear") > 0.5)
        finished(torch.cat(answers).permute(1, 2, 3, 0).numpy(), affine, case, out)

    return segment


if __name__ == "__main__":
    main(prepare)
