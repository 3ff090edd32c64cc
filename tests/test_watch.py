"""Watching a training: every line of its log is said once and in order, and nothing that fails beside it is heard but once."""

import json
import time

import pytest

from brainseg.heartbeat import Progress
from brainseg.loggers import Loggers
from brainseg.watch import Watcher, epoch_line, watching

OLD = {
    "epoch": 0,
    "epochs": 16,
    "loss": 1.0595,
    "validation_dice": 0.3494,
    "best": True,
    "learning_rate": 0.0015,
    "samples_per_s": 12.66,
    "elapsed_s": 154.8,
}
NEW = {
    **OLD,
    "epoch": 1,
    "best": False,
    "gradient_norm": 0.4,
    "train_s": 100.0,
    "validate_s": 50.0,
    "checkpoint_s": None,
    "device": "cpu",
    "peak_rss_bytes": 1 << 30,
    "peak_cuda_bytes": None,
}


class Deaf:
    """A logger that raises whatever is said to it."""

    def epoch(self, row):
        raise ConnectionError("nobody there")

    def finish(self, figures):
        raise AssertionError("it was given up")


class Listener:
    def __init__(self):
        self.heard = []

    def epoch(self, row):
        self.heard.append(row["epoch"])

    def finish(self, figures):
        self.heard.append(dict(figures))


def append(work, *rows):
    with (work / "metrics.jsonl").open("a") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_line_of_an_older_version_reads_as_one_of_today():
    assert epoch_line(OLD) == "epoch   1/16  loss 1.0595  validation Dice 0.3494 *  12.7 slices/s  155 s"
    assert epoch_line({**NEW, "validation_dice": None}) == "epoch   2/16  loss 1.0595  12.7 slices/s  155 s"


def test_every_line_is_said_once_and_those_of_the_end_before_leaving(tmp_path):
    said, listener = [], Listener()
    with Loggers({"ear": lambda: listener}, said.append) as loggers:
        with watching(str(tmp_path), Watcher(), loggers, said.append):
            append(tmp_path, OLD)
            until = time.monotonic() + 20
            while not said and time.monotonic() < until:
                time.sleep(0.02)
            append(tmp_path, NEW)
        loggers.finish({"held_out.tumor.dice_mean": 0.8})
    assert said == [epoch_line(OLD), epoch_line(NEW)]
    assert listener.heard == [0, 1, {"held_out.tumor.dice_mean": 0.8}]


def test_a_training_that_fails_ends_the_watch_and_keeps_its_error(tmp_path):
    said = []

    def train():
        with Loggers({}, said.append) as loggers, watching(str(tmp_path), Watcher(), loggers, said.append):
            append(tmp_path, OLD)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train()
    assert said == [epoch_line(OLD)]


def test_a_logger_that_fails_costs_one_warning_and_the_others_go_on(tmp_path):
    said, listener = [], Listener()
    with Loggers({"deaf": Deaf, "ear": lambda: listener}, said.append) as loggers:
        for row in (OLD, NEW):
            loggers.epoch(row)
        loggers.finish({})
    assert len(said) == 1
    assert said[0].startswith("warning: logging to deaf failed")
    assert "nobody there" in said[0]
    assert listener.heard == [0, 1, {}]


def test_the_bar_is_shown_what_the_heartbeat_says(tmp_path):
    progress = Progress("train", 3, 9, 4, 8, 600.0)
    (tmp_path / "progress.json").write_text(json.dumps(progress.__dict__))
    shown = []
    with Loggers({}, print) as loggers, watching(str(tmp_path), Watcher(show=shown.append), loggers, print):
        pass
    assert shown == [progress]
