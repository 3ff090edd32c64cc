"""Events: every line is one JSON object with the same fields, whatever a scan is called and whatever a message says."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone

import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.cli import main
from brainseg.console import Voice
from brainseg.errors import ConfigError, UsageError
from brainseg.events import FIELDS, LOG_FORMAT, Event, choose_log_format, json_line, last_words, log_format, said, utc

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Whatever a test chooses is forgotten after it."""
    monkeypatch.setenv(LOG_FORMAT, "text")


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@FEW
@given(scan=st.text(max_size=30), message=st.text(max_size=80))
def test_any_scan_and_any_message_make_one_line_of_ascii_that_says_the_same(scan, message):
    line = json_line(Event("scan_failed", message, "warning", "r", scan, "decode", "CORRUPT", {"part": 3}), NOON)
    body = json.loads(line)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert tuple(body) == (*FIELDS, "part")
    assert (body["scan_id"], body["stage"], body["code"], body["part"]) == (scan, "decode", "CORRUPT", 3)
    assert body["message"].isprintable()


def test_a_moment_is_said_in_utc_wherever_the_driver_stands():
    elsewhere = timezone(timedelta(hours=5, minutes=30))
    assert utc(NOON.astimezone(elsewhere)) == utc(NOON) == "2026-01-31T12:00:00.000Z"


def test_a_figure_that_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        json_line(Event("said", "", counts={"share": float("nan")}), NOON)


def test_a_warning_is_known_by_its_first_word():
    assert [said(text).level for text in ("warning: a", "WARNING: b", "problem: c", "no warning: d")] == [
        "warning",
        "warning",
        "warning",
        "info",
    ]


def test_an_unknown_format_is_refused_with_the_ones_there_are(monkeypatch):
    monkeypatch.setenv(LOG_FORMAT, "xml")
    with pytest.raises(UsageError, match="BRAINSEG_LOG_FORMAT=xml: expected text or json"):
        log_format()


def test_what_the_command_line_chooses_counts_and_nothing_chosen_changes_nothing():
    choose_log_format(None)
    assert log_format() == "text"
    choose_log_format("json")
    assert log_format() == "json"


def test_the_last_words_of_a_command_are_a_sentence_or_a_line_of_json():
    error = ConfigError("two\nlines")
    assert last_words(error, "\nhint") == "brainseg: two lines\nhint\n"
    choose_log_format("json")
    (body,) = lines(last_words(error, "\nhint"))
    assert (body["event"], body["level"], body["code"], body["message"]) == ("failed", "error", "ConfigError", "two lines")


class TestVoice:
    def test_sentences_are_for_a_person_and_events_are_not(self, capsys):
        voice = Voice()
        voice.note(Event("part_written", "p", run_id="r"))
        voice.say("plan: this")
        assert capsys.readouterr().err == "plan: this\n"

    def test_everything_is_a_line_of_json_that_knows_its_run(self, capsys):
        voice = Voice(lines="json")
        voice.say("before")
        voice.note(Event("begun", "b", run_id="r"))
        voice.say("warning: two\nlines")
        voice.result({"any": 1}, "done\n  well")
        out, err = capsys.readouterr()
        assert out == ""
        heard = [(b["event"], b["level"], b["run_id"], b["message"]) for b in lines(err)]
        assert heard == [
            ("said", "info", None, "before"),
            ("begun", "info", "r", "b"),
            ("said", "warning", "r", "warning: two lines"),
            ("said", "info", "r", "done well"),
        ]

    def test_a_result_that_was_asked_for_as_json_stays_what_it_is(self, capsys):
        Voice(as_json=True, lines="json").result({"any": 1}, "text")
        assert json.loads(capsys.readouterr().out) == {"any": 1}

    def test_the_quiet_one_still_warns(self, capsys):
        voice = Voice(quiet=True, lines="json")
        voice.say("plan: this")
        voice.note(Event("scan_failed", "f", "warning"))
        assert [b["event"] for b in lines(capsys.readouterr().err)] == ["scan_failed"]

    def test_a_bar_says_nothing_that_events_say_already(self, capsys):
        voice = Voice(lines="json")
        with voice.bar("segment") as bar:
            bar.update(1, 1, "1/1 scans")
        assert not voice.has_bars
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chosen", ["option", "environment"])
def test_a_command_that_fails_ends_in_json_too(tmp_path, monkeypatch, capsys, chosen):
    words = ["brainseg", "segment", str(tmp_path / "none"), "--model", "m", "--out", str(tmp_path / "run")]
    if chosen == "environment":
        monkeypatch.setenv(LOG_FORMAT, "json")
    monkeypatch.setattr(sys, "argv", [*words, *(["--log-format", "json"] if chosen == "option" else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert [(b["level"], b["code"]) for b in lines(capsys.readouterr().err)] == [("error", "PreflightError")]


def test_a_job_takes_the_format_from_its_spec(tmp_path):
    (tmp_path / "spec.yaml").write_text(f"archive: {tmp_path}/none\nmodel: /m\nout: {tmp_path}/run\nlog_format: json\n")
    environment = {k: v for k, v in os.environ.items() if k != LOG_FORMAT}
    command = [sys.executable, "-m", "brainseg.job", "segment", str(tmp_path / "spec.yaml")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert [b["level"] for b in lines(done.stderr)] == ["error"]
