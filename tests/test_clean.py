"""Clean: what interrupted jobs left goes, what a run is made of stays, and nothing goes while somebody is at work."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from object_stores import BUCKET, moto_store, s3

from brainseg import runs, storage
from brainseg.clean import clean_run, litter_of_run, seconds_of
from brainseg.cli import main
from brainseg.errors import PreflightError, RunError, UsageError
from brainseg.lease import Lease
from brainseg.runs import Identity

HOUR = 3600.0
TEMPORARY = f".tmp-{'0' * 32}"
KEPT = ["run.json", "_SUCCESS.json", "manifest.parquet", "metrics.parquet", "baselines.parquet", "evaluation.json"]
KEPT += ["report.html", "lease.json", "progress.json", "scans/a.parquet", "masks/a.nii.gz", "notes.txt", "scans/.tmp-mine"]
OLD = [f"scans/{TEMPORARY}", TEMPORARY, f".probe-{'1' * 32}"]
LEFT = ["torn/b.parquet", "evaluation/c.parquet", "inflight/block-1.json", "lease-000001.json"]
CLAIM = "lease-000004.json"
"""Whoever cleans takes the lease."""


def make_run(run, *, complete=True):
    """A run folder with everything that may lie in one; what is old is two hours old on disk."""
    for name in [*KEPT, *OLD, *LEFT]:
        if name != "_SUCCESS.json" or complete:
            storage.write_bytes(f"{run}/{name}", b"{}")
    storage.write_json(f"{run}/lease.json", {"released": True, "generation": 3})
    if not storage.is_remote(run):
        for name in OLD:
            os.utime(Path(run, name), (time.time() - 2 * HOUR,) * 2)
    return run


def names(run):
    return {entry.uri.removeprefix(f"{run}/") for entry in storage.list_files(run)}


@pytest.fixture
def run(tmp_path):
    return make_run(str(tmp_path / "run"))


@pytest.mark.parametrize("complete", [True, False])
def test_leftovers_go_and_everything_else_stays(tmp_path, complete):
    run = make_run(str(tmp_path / "run"), complete=complete)
    removed = {one.uri.removeprefix(f"{run}/") for one in clean_run(run, older_than_s=HOUR)}
    notes = {"inflight/block-1.json"}
    assert removed == {*OLD, *LEFT} - (set() if complete else notes)
    assert names(run) - {CLAIM} == ({*KEPT} if complete else {*KEPT, *notes} - {"_SUCCESS.json"})
    assert not Path(run, "torn").exists()
    assert clean_run(run, older_than_s=HOUR) == []


def test_a_dry_run_says_the_same_and_removes_nothing(run):
    before = {name: Path(run, name).read_bytes() for name in names(run)}
    would = clean_run(run, older_than_s=HOUR, dry_run=True)
    assert {name: Path(run, name).read_bytes() for name in names(run)} == before
    assert clean_run(run, older_than_s=HOUR) == would


def test_what_is_young_may_belong_to_a_writer_at_work(run):
    assert not {f"{run}/{name}" for name in OLD} & {one.uri for one in litter_of_run(run, 3 * HOUR)}
    assert {f"{run}/{name}" for name in OLD} <= {one.uri for one in litter_of_run(run, HOUR)}


def test_nothing_goes_while_a_driver_holds_the_run(run):
    hold = f"from brainseg.lease import Lease\nwith Lease({run!r}):\n    print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout.readline() == "held\n"
        before = names(run)
        for dry_run in (False, True):
            with pytest.raises(RunError, match="another driver"):
                clean_run(run, older_than_s=HOUR, dry_run=dry_run)
        assert names(run) == before
        driver.communicate("go\n")
    assert clean_run(run, older_than_s=HOUR)


def test_the_run_can_be_driven_again_afterwards(tmp_path):
    run = str(tmp_path / "run")
    runs.open_run(run, Identity("m", "w", "c"), {})
    clean_run(run, older_than_s=0)
    with Lease(run) as lease:
        lease.check()
        assert runs.open_run(run, Identity("m", "w", "c"), {})["attempt"] == 2


def test_a_folder_that_is_a_link_is_not_followed(run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    (Path(run) / "torn" / "b.parquet").unlink()
    (Path(run) / "torn").rmdir()
    (Path(run) / "torn").symlink_to(mine)
    (Path(run) / "evaluation" / "out").symlink_to(mine / "thesis.txt")
    clean_run(run, older_than_s=0)
    assert (mine / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("what", ["folder", "model", "work"])
def test_a_place_that_is_no_run_is_refused_and_left_alone(tmp_path, what):
    place = tmp_path / ("x.work" if what == "work" else "x")
    storage.write_text(f"{place}/{'model.json' if what == 'model' else TEMPORARY}", "{}")
    with pytest.raises(PreflightError, match="neither a run folder"):
        clean_run(str(place), older_than_s=0)
    assert len(names(str(place))) == 1


class TestWorkOfATraining:
    @pytest.fixture
    def work(self, tmp_path):
        work = tmp_path / "model.work"
        storage.write_json(f"{work}/training.json", {"config": "c", "manifest": "m"})
        storage.write_bytes(f"{work}/ray/checkpoint/state.safetensors", b"x")
        storage.write_text(f"{tmp_path}/model/model.json", "{}")
        return work

    def test_it_goes_where_it_is_named_and_old_and_its_model_stays(self, work, tmp_path):
        for place in work.rglob("*"):
            os.utime(place, (time.time() - 2 * HOUR,) * 2)
        assert len(clean_run(str(work), older_than_s=HOUR, dry_run=True)) == 2
        assert work.exists()
        assert len(clean_run(str(work), older_than_s=HOUR)) == 2
        assert not work.exists()
        assert (tmp_path / "model/model.json").exists()

    def test_a_training_that_wrote_a_moment_ago_is_left_alone(self, work):
        with pytest.raises(RunError, match="may be at work"):
            clean_run(str(work), older_than_s=HOUR)
        assert (work / "training.json").exists()


class TestOnAnObjectStore:
    def test_uploads_that_nobody_ended_go_and_those_of_others_stay(self):
        with moto_store() as bucket:
            run = make_run(f"{bucket}/runs/one")
            for key in ("runs/one/ray/state", "runs/other/state"):
                s3().create_multipart_upload(Bucket=BUCKET, Key=key)
            removed = [one.uri.removeprefix(f"{run}/") for one in clean_run(run, older_than_s=HOUR)]
            assert sorted(removed) == sorted([*LEFT, "ray/state"])  # moto began every upload in 2010
            time.sleep(1.1)  # and counts whole seconds
            assert {one.uri.removeprefix(f"{run}/") for one in clean_run(run, older_than_s=0)} == {*OLD}
            assert names(run) - {CLAIM, "lease-000005.json"} == {*KEPT}
            left = s3().list_multipart_uploads(Bucket=BUCKET)["Uploads"]
            assert [upload["Key"] for upload in left] == ["runs/other/state"]

    def test_the_age_of_a_training_is_not_known_there(self):
        with moto_store() as bucket:
            work = f"{bucket}/model.work"
            storage.write_json(f"{work}/training.json", {"config": "c", "manifest": "m"})
            with pytest.raises(RunError, match="--older-than 0s"):
                clean_run(work, older_than_s=HOUR)
            assert len(clean_run(work, older_than_s=0)) == 1
            assert names(work) == set()


DURATIONS = {"0s": 0, "90s": 90, "30m": 1800, "1h": 3600, "1.5h": 5400, "2d": 172800}


@pytest.mark.parametrize("text", DURATIONS)
def test_durations(text):
    assert seconds_of(text) == DURATIONS[text]


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1 h", "1w", "nan", "1e9d", "1h\n", "١h" * 99])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="such as 90s"):
        seconds_of(text)


def test_the_command_says_what_went_in_words_and_as_json(run, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["brainseg", "clean", run, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr()

    said = call("--dry-run")
    count = len([*OLD, *LEFT])
    assert said.out.startswith(f"would remove {count} leftover(s)")
    assert len(said.err.splitlines()) == count
    body = json.loads(call("--json").out)
    assert {Path(one["uri"]).name for one in body["litter"]} == {Path(name).name for name in [*OLD, *LEFT]}
    assert call().out.startswith("removed 0 leftover(s)")
