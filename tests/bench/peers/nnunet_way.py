"""Peer: nnU-Net v2's own predictor in 2D, given the same network by `manual_initialization`; no mirroring, Gaussian tiles.

Its plan resamples 240 mm to the size of the bench, so that a slice is one tile, as for everybody else.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from shared import MODALITIES, image, main, network

FIELD_OF_VIEW_MM = 240.0
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


def plans(size: int) -> PlansManager:
    """The few entries of a plans file that prediction reads."""
    flat = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 16,
        "patch_size": [size, size],
        "median_image_size_in_voxels": [size, size],
        "spacing": [FIELD_OF_VIEW_MM / size] * 2,
        "normalization_schemes": ["ZScoreNormalization"] * len(MODALITIES),
        "use_mask_for_norm": [True] * len(MODALITIES),
        "batch_dice": True,
        "architecture": {"network_class_name": "given", "arch_kwargs": {}, "_kw_requires_import": ()},
    }
    for name, changes in (("data", {}), ("seg", {"is_seg": True, "order": 1}), ("probabilities", {"order": 1})):
        flat[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        flat[f"resampling_fn_{name}_kwargs"] = RESAMPLING | changes
    return PlansManager(
        {
            "dataset_name": "bench",
            "plans_name": "bench",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(n): {} for n in range(len(MODALITIES))},
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "configurations": {"2d": flat},
        }
    )


def prepare(model: Path, size: int, out: Path) -> Callable[[Path], None]:
    """Load the network; returns what segments one case."""
    dataset = {
        "channel_names": {str(number): name for number, name in enumerate(MODALITIES)},
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        "regions_class_order": [1, 2, 3],
        "file_ending": ".nii.gz",
    }
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    found, net = plans(size), network(model)
    predictor.manual_initialization(net, found, found.get_configuration("2d"), [net.state_dict()], dataset, "bench", None)

    def segment(case: Path) -> None:
        files = [str(image(case, name)) for name in MODALITIES]
        predictor.predict_from_files_sequential([files], [str(out / case.name)])

    return segment


if __name__ == "__main__":
    main(prepare)
