"""Loggers: asked for by name, refused in one line where they cannot be, and never imported unasked."""

import importlib.util
import subprocess
import sys

import pytest

from brainseg.errors import UsageError
from brainseg.loggers import KINDS, Target, flat, numbers, targets

ROW = {"epoch": 2, "epochs": 9, "loss": 0.5, "validation_dice": None, "best": True, "device": "cpu"}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def test_an_unknown_logger_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"tensorboard\[:DIR\] or mlflow\[:URI\]"):
        targets(["wandb"])


@pytest.mark.parametrize("kind", [k for k in KINDS if importlib.util.find_spec(k) is None])
def test_a_logger_that_is_not_installed_is_refused_with_what_to_install(kind):
    with pytest.raises(UsageError, match=f"pip install {kind}"):
        targets([kind])


@needs("tensorboard")
@needs("mlflow")
def test_words_name_kind_and_place_repeated_or_with_commas():
    asked = targets(["tensorboard:/a/b,mlflow:http://host:5000", "tensorboard"])
    assert asked == (Target("tensorboard", "/a/b"), Target("mlflow", "http://host:5000"), Target("tensorboard"))
    assert targets([]) == ()


@needs("tensorboard")
def test_event_files_on_an_object_store_are_refused():
    with pytest.raises(UsageError, match="local folder"):
        targets(["tensorboard:s3://bucket/logs"])


def test_only_figures_are_logged():
    assert dict(numbers(ROW)) == {"loss": 0.5, "best": 1.0}


def test_nested_values_are_logged_by_dotted_key():
    assert dict(flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_no_logger_is_imported_unasked():
    code = "import sys, brainseg.watch, brainseg.loggers; brainseg.loggers.targets([])\n"
    code += "print([m for m in sys.modules if m.split('.')[0] in ('mlflow', 'tensorboard', 'torch')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@needs("tensorboard")
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = KINDS["tensorboard"](str(tmp_path), "model", {"epochs": 9})
    for epoch in range(3):
        logger.epoch({**ROW, "epoch": epoch, "loss": 1 / (epoch + 1)})
    logger.finish({"held_out.tumor.dice_mean": 0.75})
    found = EventAccumulator(str(tmp_path / "model")).Reload()
    assert [(e.step, round(e.value, 3)) for e in found.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.333)]
    assert found.Scalars("held_out/tumor/dice_mean")[0].value == 0.75


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mlflow by sqlalchemy
@needs("mlflow")
@needs("sqlalchemy")
def test_mlflow_reads_what_was_written(tmp_path):
    from mlflow.tracking import MlflowClient

    place = f"sqlite:///{tmp_path}/mlflow.db"
    logger = KINDS["mlflow"](place, "model", {"epochs": 9, "network": {"norm": "batch"}})
    logger.epoch(ROW)
    logger.finish({"held_out.tumor.dice_mean": 0.75})
    client = MlflowClient(tracking_uri=place)
    [run] = client.search_runs([client.get_experiment_by_name("brainseg").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 0.5, "best": 1.0, "held_out.tumor.dice_mean": 0.75}
    assert run.data.params["network.norm"] == "batch"
