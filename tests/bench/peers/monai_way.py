"""Peer: MONAI as its tutorials use it: dictionary transforms, SliceInferer, Invertd, SaveImaged, DiceMetric."""

from collections.abc import Callable
from pathlib import Path

import torch
from monai.data import decollate_batch
from monai.inferers import SliceInferer
from monai.metrics import DiceMetric
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    ConcatItemsd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    Resized,
    SaveImaged,
)
from shared import MODALITIES, image, main, network


def prepare(model: Path, size: int, out: Path) -> Callable[[Path], None]:
    """Load the network; returns what segments one case."""
    net = network(model)
    before = Compose(
        [
            LoadImaged([*MODALITIES, "seg"]),
            EnsureChannelFirstd([*MODALITIES, "seg"]),
            ConcatItemsd(MODALITIES, "image"),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            Resized("image", (size, size, -1), mode="trilinear"),
        ]
    )
    after = Compose(
        [
            Activationsd("answer", sigmoid=True),
            Invertd("answer", before, "image", nearest_interp=False),
            AsDiscreted("answer", threshold=0.5),
            SaveImaged("answer", output_dir=out, separate_folder=False, print_log=False),
        ]
    )
    inferer = SliceInferer(spatial_dim=2, roi_size=(size, size), sw_batch_size=16)
    score = DiceMetric(include_background=True)

    def segment(case: Path) -> None:
        item = before({name: str(image(case, name)) for name in (*MODALITIES, "seg")})
        with torch.no_grad():
            item["answer"] = inferer(item["image"][None], net)[0]
        done = after(item)
        label = item["seg"][0]
        truth = torch.stack([label > 0, (label == 1) | (label == 4), label == 4])
        score(decollate_batch(done["answer"][None]), decollate_batch(truth[None].float()))
        score.reset()

    return segment


if __name__ == "__main__":
    main(prepare)
