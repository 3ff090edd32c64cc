"""Ingest: a training through Ray Train beside a bare loop over tensors in memory; same network, optimiser, batch, device.

    pytest -n 0 -m bench -s tests/bench/test_ingest_bench.py

The bare loop has its batches ready and does nothing but the steps: no order, no augmentation, no validation. Both sides
are timed over whole epochs, bare, Ray, bare, so that a machine that slows down meanwhile shows.
"""

import json
import os
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

SCANS, SHAPE, STEPS, EPOCHS = 20, (20, 112, 112), 24, 4
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


def bare_pace(config: TrainConfig, threads: int) -> float:
    """Slices a second of nothing but optimiser steps."""
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
    return max(paces[1:])


def ray_pace(config: TrainConfig, folder: Path) -> float:
    """Slices a second as the training itself reports them, of its best epoch after the first."""
    train_model(str(folder / "manifest.parquet"), str(folder / config.fingerprint()[:8]), config, workers=1)
    log = (folder / config.fingerprint()[:8] / "metrics.jsonl").read_text().splitlines()
    return max(float(json.loads(line)["samples_per_s"]) for line in log[1:])


@pytest.mark.bench
@pytest.mark.timeout(1800)
def test_a_training_through_ray_is_as_fast_as_a_bare_loop(tmp_path: Path) -> None:
    write_archive(tmp_path / "archive", "lgg", scans=SCANS, broken=0, shape=SHAPE, seed=5)
    manifest.write_manifest(str(tmp_path / "manifest.parquet"), manifest.index_archive(str(tmp_path / "archive"))[0])
    connect()
    threads = os.cpu_count() or 1
    before = bare_pace(recipe(), threads)
    whole = ray_pace(recipe(), tmp_path)
    plain = ray_pace(recipe(augment=AugmentConfig().model_dump(mode="json")), tmp_path)
    after = bare_pace(recipe(), threads)
    bare = max(before, after)
    print(f"\nbare loop {before:.1f} and {after:.1f} slices/s; through Ray Train {plain:.1f} without augmentation")
    print(f"({plain / bare:.3f} of bare), {whole:.1f} with it ({whole / bare:.3f}); {threads} threads")
    assert plain / bare >= FLOOR
