"""Presets: training recipes by name.

Three reproduce what people train on these sets today; the `-strong` ones are what we would use ourselves, the `-large` ones
where Dice is worth more than time. All are plain `TrainConfig`s: `brainseg train --preset NAME --set epochs=10` starts from one
and changes it.

Norms and batches: with batch norm a step depends on how the batch is split over workers, since every worker normalises
by its own share (running averages follow worker 0). The batch-wise Dice does not: its sums are taken over all workers.
"""

from collections.abc import Mapping

from brainseg.config import (
    AugmentConfig,
    LossConfig,
    NetworkConfig,
    OptimiserConfig,
    PrepareConfig,
    TrainConfig,
)
from brainseg.errors import ConfigError

FULL_WIDTHS = (16, 32, 64, 128, 256, 512)
STRONG_AUGMENT = AugmentConfig(
    rotate_degrees=25, log_scale=0.25, shift=0.05, flip=True, intensity=0.25, gamma=0.2, noise=0.15, blur=0.15
)
STRONG_OPTIMISER = OptimiserConfig(kind="adamw", learning_rate=2e-3, weight_decay=1e-2, schedule="cosine", warmup_steps=150)
TODAYS_OPTIMISER = OptimiserConfig(
    kind="adam", learning_rate=1e-4, weight_decay=0, schedule="constant", warmup_steps=0, clip_norm=0
)

LGG_STRONG = TrainConfig(
    name="lgg-strong",
    modalities=("t1", "flair", "t1c"),
    network=NetworkConfig(context_slices=1),
    prepare=PrepareConfig(size=112, frame="head", normalise="zscore"),
    augment=STRONG_AUGMENT.model_copy(update={"modality_dropout": 0.1}),
    optimiser=STRONG_OPTIMISER,
    epochs=16,
    batch_size=16,
    ema_decay=0.998,
    choose=True,
)
FIGSHARE_STRONG = TrainConfig(
    name="figshare-strong",
    modalities=("t1c",),
    network=NetworkConfig(dropout=0.2),
    prepare=PrepareConfig(size=96, frame="head", normalise="zscore"),
    augment=STRONG_AUGMENT.model_copy(update={"elastic": 0.2, "low_resolution": 0.15}),
    loss=LossConfig(kind="bce_dice", dice_over="sample"),
    optimiser=STRONG_OPTIMISER,
    epochs=60,
    batch_size=16,
    foreground_share=0,
    ema_decay=0.998,
    choose=True,
)


def _larger(
    strong: TrainConfig, *, name: str, size: int, dropout: float, learning_rate: float, epochs: int, batch_size: int
) -> TrainConfig:
    """The same recipe for a network one level deeper on larger slices; the first six tenths of its epochs are at 128 pixels."""
    parts = {
        "network": strong.network.model_copy(update={"widths": FULL_WIDTHS, "dropout": dropout}),
        "prepare": strong.prepare.model_copy(update={"size": size}),
        "optimiser": strong.optimiser.model_copy(update={"learning_rate": learning_rate}),
    }
    numbers = {"epochs": epochs, "batch_size": batch_size, "coarse_size": 128, "coarse_share": 0.6}
    return TrainConfig.model_validate(dict(strong) | parts | numbers | {"name": name})


PRESETS: Mapping[str, TrainConfig] = {
    p.name: p
    for p in (
        TrainConfig(
            name="lgg-128",
            modalities=("t1", "flair", "t1c"),
            network=NetworkConfig(widths=FULL_WIDTHS),
            prepare=PrepareConfig(size=128, normalise="slice_max"),
            loss=LossConfig(kind="bce_dice"),
            optimiser=TODAYS_OPTIMISER,
            epochs=100,
            batch_size=4,
            foreground_share=0,
            patience=10,
        ),
        LGG_STRONG,
        _larger(LGG_STRONG, name="lgg-large", size=160, dropout=0.1, learning_rate=2e-3, epochs=32, batch_size=16),
        TrainConfig(
            name="figshare-256",
            modalities=("t1c",),
            network=NetworkConfig(widths=FULL_WIDTHS, dropout=0.1),
            prepare=PrepareConfig(size=256, normalise="slice_max"),
            loss=LossConfig(kind="dice", dice_over="sample"),
            optimiser=TODAYS_OPTIMISER,
            epochs=100,
            batch_size=8,
            foreground_share=0,
        ),
        FIGSHARE_STRONG,
        _larger(FIGSHARE_STRONG, name="figshare-large", size=192, dropout=0.2, learning_rate=1e-3, epochs=44, batch_size=8),
        TrainConfig(
            name="brats2020-128",
            modalities=("flair", "t1", "t1c", "t2"),
            regions=("WT", "TC", "ET"),
            network=NetworkConfig(widths=FULL_WIDTHS),
            prepare=PrepareConfig(size=128, normalise="slice_max"),
            loss=LossConfig(kind="dice"),
            optimiser=TODAYS_OPTIMISER.model_copy(update={"learning_rate": 1e-3}),
            epochs=35,
            batch_size=8,
            foreground_share=0,
        ),
        TrainConfig(
            name="brats-strong",
            modalities=("flair", "t1", "t1c", "t2"),
            regions=("WT", "TC", "ET"),
            network=NetworkConfig(widths=FULL_WIDTHS, context_slices=1),
            prepare=PrepareConfig(size=192, frame="head", normalise="zscore"),
            augment=STRONG_AUGMENT.model_copy(update={"modality_dropout": 0.1}),
            optimiser=STRONG_OPTIMISER,
            epochs=40,
            batch_size=32,
            ema_decay=0.999,
            choose=True,
        ),
        TrainConfig(
            name="brats-3d",
            modalities=("flair", "t1", "t1c", "t2"),
            regions=("WT", "TC", "ET"),
            network=NetworkConfig(dimensions=3, widths=(16, 32, 64, 128), norm="group", deep_supervision=2),
            prepare=PrepareConfig(size=160, frame="head", normalise="zscore", patch=(64, 64, 64)),
            augment=STRONG_AUGMENT.model_copy(update={"rotate_degrees": 15, "elastic": 0.2, "modality_dropout": 0.1}),
            optimiser=STRONG_OPTIMISER,
            epochs=25,
            batch_size=2,
            samples_per_epoch=120,
            ema_decay=0.99,
        ),
        TrainConfig(
            name="demo",
            network=NetworkConfig(widths=(12, 24, 48, 96)),
            prepare=PrepareConfig(size=64, normalise="zscore"),
            augment=AugmentConfig(rotate_degrees=15, log_scale=0.15, flip=True, intensity=0.2),
            optimiser=OptimiserConfig(learning_rate=4e-3, warmup_steps=20),
            epochs=6,
            batch_size=16,
            validation_share=0.15,
            ema_decay=0.98,
        ),
    )
}


def preset(name: str) -> TrainConfig:
    """Look a preset up by name; ConfigError lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    return PRESETS[name]
