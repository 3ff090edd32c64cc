"""Training on a local Ray: a model folder from a manifest, the same from one worker and from two."""

import json
from pathlib import Path

import pytest

from brainseg import manifest, storage
from brainseg.card import load_card
from brainseg.config import (
    AugmentConfig,
    LossConfig,
    NetworkConfig,
    OptimiserConfig,
    PrepareConfig,
    SegmentConfig,
    TrainConfig,
    read_crew,
)
from brainseg.errors import PreflightError, UsageError
from brainseg.model import load_model
from brainseg.phantom import write_archive
from brainseg.session import Cluster
from brainseg.train import cost, scaling, train_model
from brainseg.watch import Price

pytestmark = pytest.mark.usefixtures("local_ray")

RECIPE = TrainConfig(
    name="tiny",
    precision="fp32",
    network=NetworkConfig(widths=(8, 16), norm="group", context_slices=1),
    prepare=PrepareConfig(size=32),
    augment=AugmentConfig(rotate_degrees=10, flip=True, intensity=0.1, noise=0.1, blur=0.3, modality_dropout=0.2),
    loss=LossConfig(kind="bce_dice", dice_over="batch"),
    optimiser=OptimiserConfig(learning_rate=3e-3, warmup_steps=3),
    epochs=20,
    batch_size=6,
    samples_per_epoch=6,
    validate_every=20,
    ema_decay=0.9,
    validation_share=0.2,
)


@pytest.fixture(scope="module")
def manifest_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("train")
    write_archive(place / "archive", "lgg", scans=14, broken=0, shape=(6, 48, 48), seed=11)
    table, _ = manifest.index_archive(str(place / "archive"))
    manifest.write_manifest(str(place / "manifest.parquet"), table)
    return str(place / "manifest.parquet")


def losses(model: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (model / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(manifest_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "model"
    train_model(manifest_uri, str(out), RECIPE, workers=1)
    return out


def test_training_leaves_a_model_folder_that_says_what_it_is(alone: Path) -> None:
    card = load_card(str(alone))
    assert card.modalities == ("t1", "flair", "t1c")
    assert card.split.test
    assert not set(card.split.train) & set(card.split.test)
    assert not card.selection_biased
    assert card.metrics["held_out"]["tumor"]["num_scans"] > 0
    assert {"nothing", "nearest_training_mask"} == set(card.baselines)
    assert (alone / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_model(str(alone), SegmentConfig()).fingerprint
    assert not Path(f"{alone}.work").exists()


def test_every_epoch_has_a_line_that_says_how_fast_it_was_and_on_what(alone: Path) -> None:
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["train_s"] > 0
        assert line["samples_per_s"] == pytest.approx(RECIPE.batch_size / line["train_s"])
        assert line["gradient_norm"] > 0
        assert line["device"] == "cpu"
        assert line["peak_rss_bytes"] > 100 << 20
    assert all(line["checkpoint_s"] > 0 for line in lines)
    parts = ("train_s", "validate_s", "checkpoint_s")
    assert sum(line[part] for line in lines for part in parts) <= lines[-1]["elapsed_s"] + lines[-1]["checkpoint_s"] + 1


def test_a_training_leaves_its_page_and_the_picture_of_its_only_validation(alone: Path) -> None:
    assert [p.name for p in (alone / "overlays").iterdir()] == ["epoch-020.png"]
    assert "Epoch 20, the best" in (alone / "training.html").read_text()
    training = load_card(str(alone)).training
    assert training["workers"] == 1
    assert training["wall_s"] >= training["seconds"]
    assert training["core_hours"] == pytest.approx(training["wall_s"] * training["cpus"] / 3600, rel=0.01)
    assert "price" not in training
    assert sum(line["scans"] for line in training["scans"]) == 14


@pytest.mark.parametrize(("gpus", "price"), [(0, None), (2, Price(2.5, "CHF"))])
def test_what_a_training_costs_is_its_hours_times_what_somebody_stated(gpus: int, price: Price | None) -> None:
    body = cost(7200, {"cpus": 8, "gpus": gpus}, price)
    assert (body["core_hours"], body["gpu_hours"]) == (16, 2 * gpus)
    assert (body.get("price"), body.get("currency")) == ((5.0, "CHF") if price else (None, None))


def test_two_workers_take_the_same_twenty_steps_as_one(alone: Path, manifest_uri: str, tmp_path: Path) -> None:
    train_model(manifest_uri, str(tmp_path / "pair"), RECIPE, workers=2)
    assert losses(tmp_path / "pair") == pytest.approx(losses(alone), rel=2e-4)
    assert len(losses(alone)) == 20


def test_the_same_command_again_does_nothing_and_another_recipe_is_refused(alone: Path, manifest_uri: str) -> None:
    before = (alone / "model.json").read_bytes()
    train_model(manifest_uri, str(alone), RECIPE)
    assert (alone / "model.json").read_bytes() == before
    with pytest.raises(UsageError, match="another model"):
        train_model(manifest_uri, str(alone), RECIPE.model_copy(update={"epochs": 3}))


def test_a_manifest_without_labels_is_refused_before_anything_is_written(manifest_uri: str, tmp_path: Path) -> None:
    table = storage.read_table(manifest_uri)
    bare = table.set_column(
        table.schema.get_field_index("has_label"), table.schema.field("has_label"), [[False] * table.num_rows]
    )
    manifest.write_manifest(str(tmp_path / "bare.parquet"), bare)
    with pytest.raises(PreflightError, match="label"):
        train_model(str(tmp_path / "bare.parquet"), str(tmp_path / "m"), RECIPE)
    assert not (tmp_path / "m.work").exists()


@pytest.mark.parametrize(("gpus", "strategy"), [(0.0, "SPREAD"), (4.0, "PACK")])
def test_workers_share_a_machine_for_the_sake_of_its_gpus_alone(gpus: float, strategy: str) -> None:
    from ray.train import ScalingConfig

    cluster = Cluster(8.0, gpus, 7, 2, False, shapes=((4.0, gpus / 2),) * 2)
    config = ScalingConfig(**scaling(read_crew(2), 1, cluster))
    assert config.placement_strategy == strategy
    assert config.use_gpu is (gpus > 0)
