"""Factory: small synthetic scans, and the rows, recipes and models that go with them. Shared by many tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import settings

from brainseg.card import ModelCard, Split
from brainseg.config import AugmentConfig, NetworkConfig, OptimiserConfig, PrepareConfig, SegmentConfig, TrainConfig
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid, from_canonical
from brainseg.model import Model, load_model, save_model
from brainseg.scans import Scan
from brainseg.tables import MANIFEST
from brainseg.unet import UNet

torch.set_num_threads(1)  # what the tests compute is too small to be shared out
CPU = torch.device("cpu")
FEW = settings(max_examples=30, deadline=None)
"""For laws whose examples cost milliseconds, on machines that may be busy."""


def affine(order="LPS", spacing=(1.0, 1.0, 1.0)):
    """A 4x4 affine whose axes i, j, k run towards the named sides, with voxels of `spacing` mm along (i, j, k)."""
    matrix = np.eye(4)
    matrix[:3, :3] = 0
    for axis, (side, size) in enumerate(zip(order, spacing, strict=True)):
        world = next(n for n, pair in enumerate(("LR", "PA", "IS")) if side in pair)
        matrix[world, axis] = size if side in "RAS" else -size
    return matrix


def make_scan(
    shape=(6, 40, 36), modalities=("flair", "t1c"), order="LPS", spacing=(1.0, 1.0, 1.0), seed=0, name="scan", **changes
):
    """A head with a bright round tumour, cropped to the head as `load_scan` delivers it.

    `shape` is (slices, rows, columns) of the *canonical* volume; it is stored in the orientation `order`, or without
    an affine where `order` is None. Background is 0, voxels are int16, the label is 0/1.
    """
    rng = np.random.default_rng(seed)
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    # Off the middle along every axis, so that a flip is never mistaken for none
    head = (0.7 * (d - 0.5)) ** 2 + ((h - 0.1) / 0.8) ** 2 + ((w + 0.15) / 0.7) ** 2 < 1
    row, column = rng.uniform(-0.25, 0.25, 2)
    tumour = head & ((h - row) ** 2 + (w - column) ** 2 + d**2 < 0.14)
    volumes = [np.where(head, 300 + 40 * c + 500 * tumour + rng.integers(0, 60, shape), 0) for c in range(len(modalities))]
    grid = Grid.of(shape)
    if order is not None:
        matrix = affine(order, spacing)
        i, j, k = (shape["ISPALR".index(side) // 2] for side in order)
        grid = Grid.of((k, j, i), matrix)
    image = from_canonical(np.stack(volumes).astype(np.int16), grid)
    label = from_canonical(tumour.astype(np.uint8), grid)
    box = tuple(_span(image.any(axis=0), axis) for axis in range(3))
    scan = Scan(
        scan_id=name,
        modalities=tuple(modalities),
        image=np.ascontiguousarray(image[:, *(slice(a, b) for a, b in box)]),
        background=(0.0,) * len(modalities),
        grid=grid,
        box=box,
        label=np.ascontiguousarray(label),
        duplicated=(),
        warnings=(),
    )
    return replace(scan, **changes)


def _span(used, axis):
    places = np.flatnonzero(used.any(axis=tuple(a for a in range(3) if a != axis)))
    return int(places[0]), int(places[-1]) + 1


def make_row(scan_id="scan", patient_id="patient", fold=0, sources=(), modalities=("flair", "t1c"), **changes):
    """A manifest row as a dict, labelled unless told otherwise."""
    return {
        "scan_id": scan_id,
        "patient_id": patient_id,
        "dataset": "synthetic",
        "layout": "brats",
        "reader": "volumes",
        "label_map": "binary",
        "modalities": list(modalities),
        "sources": list(sources),
        "has_label": True,
        "size_bytes": 0,
        "fold": fold,
        "attributes": [("site", "here")],
        "problem_code": None,
        "problem": None,
        **changes,
    }


def cohort(patients, grades=None, **columns):
    """A manifest of bare scans s0, s1, ...: whose each is, its grade, and any other column as a list."""
    rows = [make_row(f"s{n}", patient, fold=None, has_label=False, size_bytes=n) for n, patient in enumerate(patients)]
    for n, row in enumerate(rows):
        file = {"uri": f"/a/{n}", "role": "image", "modality": "t1", "index": None, "size_bytes": n, "tag": "t"}
        row |= {"sources": [file], "attributes": [("grade", grades[n])] if grades else []}
        row |= {name: values[n] for name, values in columns.items()}
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def write_scan(folder: Path, scan: Scan, **changes):
    """Write a scan's volumes and label as NIfTI files; return the manifest row that leads to them."""
    whole = np.zeros((len(scan.modalities), *scan.grid.shape), scan.image.dtype)
    whole[:, *(slice(a, b) for a, b in scan.box)] = scan.image
    sources = []
    for volume, modality, role in [
        *zip(whole, scan.modalities, ["image"] * len(whole), strict=True),
        (scan.label, None, "label"),
    ]:
        path = folder / f"{scan.scan_id}-{modality or 'label'}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_nifti(volume, scan.grid))
        size, tag = path.stat().st_size, str(path.stat().st_mtime_ns)
        sources.append({"uri": str(path), "role": role, "modality": modality, "index": None, "size_bytes": size, "tag": tag})
    return make_row(scan.scan_id, patient_id=f"of-{scan.scan_id}", sources=sources, modalities=scan.modalities, **changes)


def tiny_config(**changes) -> TrainConfig:
    """A recipe that trains in a blink: two levels, four channels, 16 x 16 pixels, no augmentation."""
    plain = {
        "modalities": ("flair", "t1c"),
        "network": NetworkConfig(widths=(8, 8), norm="group"),
        "prepare": PrepareConfig(size=16),
        "augment": AugmentConfig(),
        "optimiser": OptimiserConfig(warmup_steps=2),
        "epochs": 2,
        "batch_size": 4,
        "samples_per_epoch": 12,
        "precision": "fp32",  # where a processor has bf16, `auto` would take it, and its rounding is no law
    }
    return TrainConfig(**{**plain, **changes})


def make_card(config: TrainConfig | None = None, **changes) -> ModelCard:
    """The card of a model made by `config` on a set of 0/1 labels."""
    config = config or tiny_config()
    plain = {
        "name": config.name,
        "network": config.network,
        "prepare": config.prepare,
        "modalities": config.modalities,
        "regions": config.regions,
        "label_map": "binary",
        "dataset": "synthetic",
        "manifest_fingerprint": "m",
        "split": Split(train=("a",), validation=("b",), test=("c",)),
        "selection_biased": False,
        "accept_leakage": False,
        "metrics": {},
        "train": config,
        "versions": {},
        "created_at": "2026-01-01T00:00:00+00:00",
        "weights_sha256": "",
    }
    return ModelCard(**{**plain, **changes})


def make_network(card: ModelCard, seed=0) -> UNet:
    """The card's network with the random weights of a seed."""
    torch.manual_seed(seed)
    return UNet(card.network, len(card.modalities), len(card.regions))


def make_model(folder: Path, card: ModelCard | None = None, settings: SegmentConfig | None = None, seed=0) -> Model:
    """Save an untrained model in `folder` and load it again."""
    card = card or make_card()
    save_model(str(folder), card, make_network(card, seed).state_dict())
    return load_model(str(folder), settings or SegmentConfig(), CPU)


def iou(one, other):
    """Intersection over union of two boolean arrays; 1 where both are empty."""
    union = np.logical_or(one, other).sum()
    return 1.0 if union == 0 else float(np.logical_and(one, other).sum() / union)
