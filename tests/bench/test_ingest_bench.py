"""Ingest: a training through Ray Train beside a bare loop over tensors in memory; same network, optimiser, batch, device.

    pytest -n 0 -m bench -s tests/bench/test_ingest_bench.py

The bare loop has its batches ready and does nothing but the steps: no order, no augmentation, no validation. Both sides
are timed over whole epochs, in turns, and their medians compared: a shared machine's pace wanders by a tenth and more.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

from brainseg import manifest
from brainseg.config import AugmentConfig, TrainConfig
from brainseg.learn import Worker, make_learner, train_step
from brainseg.phantom import write_archive
from brainseg.presets import preset
from brainseg.session import connect
from brainseg.train import train_model

SCANS, SHAPE, STEPS, EPOCHS, ROUNDS = 20, (20, 112, 112), 16, 4, 3
FLOOR = 0.95


def recipe(**changes: object) -> TrainConfig:
    """The strong LGG recipe, cut to a few epochs and one validation."""
    whole = preset("lgg-strong").model_dump(mode="json")
    short = {
        "epochs": EPOCHS,
        "samples_per_epoch": STEPS * 16,
        "validate_every": EPOCHS,
        "overlays_every": None,
        "choose": False,
    }
    return TrainConfig.model_validate(whole | short | changes)


def bare_paces(config: TrainConfig, threads: int) -> list[float]:
    """Slices a second of nothing but optimiser steps, of each epoch after the first."""
    torch.set_num_threads(threads)
    learner = make_learner(config, STEPS * config.batch_size, torch.device("cpu"), Worker())
    size, channels = config.prepare.size, len(config.modalities) * (2 * config.network.context_slices + 1)
    images = torch.randn(STEPS, config.batch_size, channels, size, size)
    masks = (torch.rand(STEPS, config.batch_size, 1, size, size) > 0.9).float()
    learner.network.train()
    paces = []
    for _ in range(EPOCHS):
        started = time.perf_counter()
        for step in range(STEPS):
            train_step(learner, images[step], masks[step], step)
        paces.append(STEPS * config.batch_size / (time.perf_counter() - started))
    return paces[1:]


def ray_paces(config: TrainConfig, manifest_uri: str, out: Path) -> list[float]:
    """Slices a second as the training itself reports them, of each epoch after the first."""
    train_model(manifest_uri, str(out), config, workers=1)
    return [float(json.loads(line)["samples_per_s"]) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_a_training_through_ray_is_as_fast_as_a_bare_loop(tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", "lgg", scans=SCANS, broken=0, shape=SHAPE, seed=5)
    uri = str(tmp_path / "manifest.parquet")
    manifest.write_manifest(uri, manifest.index_archive(str(tmp_path / "archive"))[0])
    connect()
    threads = os.cpu_count() or 1
    still = recipe(augment=AugmentConfig().model_dump(mode="json"))
    paces: dict[str, list[float]] = {"bare": bare_paces(still, threads), "plain": [], "whole": []}
    for number in range(ROUNDS):
        paces["plain"] += ray_paces(still, uri, tmp_path / f"plain-{number}")
        paces["whole"] += ray_paces(recipe(), uri, tmp_path / f"whole-{number}")
        paces["bare"] += bare_paces(still, threads)
    bare, plain, whole = (statistics.median(paces[name]) for name in ("bare", "plain", "whole"))
    print(f"\nslices/s, epoch by epoch: { {k: [round(p, 1) for p in v] for k, v in paces.items()} }")
    print(f"bare loop {bare:.1f} slices/s; through Ray Train {plain:.1f} without augmentation")
    print(f"({plain / bare:.3f} of bare), {whole:.1f} with it ({whole / bare:.3f}); {threads} threads")
    assert plain / bare >= FLOOR
