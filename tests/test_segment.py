"""Bulk segmentation on a local Ray: every scan one row, whatever the plan, whatever was killed on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch

from brainseg import manifest, runs, segment, storage
from brainseg.card import ModelCard, Split
from brainseg.clean import clean_run
from brainseg.cli import main
from brainseg.config import How, NetworkConfig, PrepareConfig, SegmentConfig, TrainConfig
from brainseg.errors import ClusterError, ExitCode, FailureLimitError, PreflightError, RunError
from brainseg.model import save_model
from brainseg.phantom import write_archive
from brainseg.session import connect
from brainseg.tables import METRICS, SCANS
from brainseg.unet import UNet
from brainseg.versions import versions

SCANS_MADE, BROKEN = 14, 3
pytestmark = pytest.mark.usefixtures("local_ray")


def untrained_model(folder: Path, modalities: tuple[str, ...] = ("t1", "flair", "t1c"), seed: int = 0) -> str:
    """A model folder with random weights: what it answers is nonsense, but always the same nonsense."""
    torch.manual_seed(seed)
    recipe = TrainConfig(
        name="random", modalities=modalities, network=NetworkConfig(widths=(4, 8)), prepare=PrepareConfig(size=48)
    )
    network = UNet(recipe.network, len(modalities), 1)
    torch.nn.init.zeros_(network.head.bias)
    card = ModelCard(
        name="random",
        network=recipe.network,
        prepare=recipe.prepare,
        modalities=modalities,
        regions=("tumor",),
        label_map="binary",
        dataset="none",
        manifest_fingerprint="",
        split=Split(),
        selection_biased=False,
        accept_leakage=False,
        metrics={},
        train=recipe,
        versions=versions(),
        created_at="2026-01-01T00:00:00+00:00",
        weights_sha256="",
    )
    save_model(str(folder), card, network.state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("archive")
    write_archive(place, "lgg", scans=SCANS_MADE, broken=BROKEN, shape=(6, 64, 64), seed=3)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return untrained_model(tmp_path_factory.mktemp("model") / "m")


def rows_of(run: str) -> dict[str, dict[str, object]]:
    """Every row of a run by scan_id; fails if a scan stands twice."""
    rows = [row for part in runs.parts(run) for row in storage.read_table(part).to_pylist()]
    assert len({r["scan_id"] for r in rows}) == len(rows)
    return {str(r["scan_id"]): r for r in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, archive: Path, model: str) -> str:
    run = str(tmp_path_factory.mktemp("run") / "r")
    segment.segment_archive(str(archive), model, run, SegmentConfig())
    return run


def test_every_scan_of_the_archive_is_one_row_ok_or_failed(finished: str) -> None:
    rows = rows_of(finished)
    assert len(rows) == SCANS_MADE
    failed = [r for r in rows.values() if r["status"] == "failed"]
    assert len(failed) == BROKEN
    assert all(r["error_code"] and r["error_message"] and r["error_stage"] for r in failed)
    assert all(r["mask"] and r["regions"] for r in rows.values() if r["status"] == "ok")


def test_the_tables_follow_their_published_schemas(finished: str) -> None:
    for part in runs.parts(finished):
        assert storage.read_table(part).schema.equals(SCANS)
    assert storage.read_table(storage.join(finished, "metrics.parquet")).schema.equals(METRICS)


def test_a_finished_run_verifies_and_a_second_command_redoes_nothing(finished: str, archive: Path, model: str) -> None:
    assert segment.verify_run(finished) == []
    before = {s: r["finished_at"] for s, r in rows_of(finished).items()}
    said: list[str] = []
    segment.segment_archive(str(archive), model, finished, SegmentConfig(), ear=segment.Ear(said.append))
    assert {s: r["finished_at"] for s, r in rows_of(finished).items()} == before
    assert any(f"{SCANS_MADE} of {SCANS_MADE} scans are done" in line for line in said)


def test_a_part_whose_figures_cannot_be_read_is_set_aside_and_done_again(
    finished: str, archive: Path, model: str, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    shutil.copytree(finished, run)
    part = Path(runs.parts(run)[0])
    table = storage.read_table(str(part))
    storage.write_table(str(part), table.drop_columns(["regions"]))  # its keys are there, its figures are not
    said: list[str] = []
    segment.segment_archive(str(archive), model, run, SegmentConfig(), ear=segment.Ear(said.append))
    assert [line for line in said if "damaged" in line] == [
        "1 part(s) of this run are damaged and were set aside; their scans are done again"
    ]
    assert segment.verify_run(run) == []
    kept, again = rows_of(finished), rows_of(run)
    assert {s: r["mask_sha256"] for s, r in again.items()} == {s: r["mask_sha256"] for s, r in kept.items()}
    assert {s for s in kept if kept[s]["finished_at"] != again[s]["finished_at"]} == set(table["scan_id"].to_pylist())


def test_decoding_apart_or_in_the_actor_gives_the_same_masks_and_metrics(
    finished: str, archive: Path, model: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "apart")
    segment.segment_archive(str(archive), model, other, SegmentConfig(), How(mode="apart", actors=1))
    mine, theirs = rows_of(finished), rows_of(other)
    assert mine.keys() == theirs.keys()
    for scan_id, row in mine.items():
        assert row["mask_sha256"] == theirs[scan_id]["mask_sha256"]
        for here, there in zip(row["regions"] or (), theirs[scan_id]["regions"] or (), strict=True):
            for name, value in here.items():  # convolutions round by how many slices go through together
                assert there[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
        assert row["error_code"] == theirs[scan_id]["error_code"]


def test_another_model_in_the_same_folder_is_refused_and_nothing_is_lost(finished: str, archive: Path, tmp_path: Path) -> None:
    before = storage.read_bytes(storage.join(finished, "run.json"))
    with pytest.raises(RunError, match="another model"):
        segment.segment_archive(str(archive), untrained_model(tmp_path / "other", seed=1), finished, SegmentConfig())
    assert storage.read_bytes(storage.join(finished, "run.json")) == before
    assert segment.verify_run(finished) == []


def test_a_model_that_wants_other_modalities_is_refused_before_anything_is_written(archive: Path, tmp_path: Path) -> None:
    run = tmp_path / "never"
    with pytest.raises(PreflightError, match="needs t2"):
        segment.segment_archive(str(archive), untrained_model(tmp_path / "m", ("t2",)), str(run), SegmentConfig())
    assert not run.exists()


def test_the_failure_limit_stops_the_run_and_keeps_what_is_done(archive: Path, model: str, tmp_path: Path) -> None:
    run = str(tmp_path / "limited")
    with pytest.raises(FailureLimitError, match="the limit is 1"):
        segment.segment_archive(str(archive), model, run, SegmentConfig(), How(max_failures="1"))
    assert not storage.exists(storage.join(run, "_SUCCESS.json"))
    assert storage.read_json(storage.join(run, "progress.json"))["state"] == "stopped"
    counts = segment.segment_archive(str(archive), model, run, SegmentConfig(), How(max_failures="50%"))
    assert counts["failed"] == BROKEN
    assert segment.verify_run(run) == []
    progress = storage.read_json(storage.join(run, "progress.json"))
    assert [progress[name] for name in ("state", "attempt", "done", "failed")] == ["finished", 2, SCANS_MADE, BROKEN]
    assert sum(progress["failed_by_code"].values()) == BROKEN
    assert clean_run(run, older_than_s=0) == []


@pytest.mark.slow  # test_kills.py kills a driver too
def test_a_killed_driver_loses_nothing_and_the_next_one_redoes_nothing(model: str, tmp_path: Path) -> None:
    place, run = tmp_path / "archive", str(tmp_path / "run")
    write_archive(place, "lgg", scans=40, broken=2, shape=(12, 128, 128), seed=5)
    words = [sys.executable, "-m", "brainseg.cli", "segment", str(place), "--model", model, "--out", run, "--actors", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(
        words, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 180
    while not runs.parts(run):
        assert driver.poll() is None, "the driver ended before its first part"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = {s: r["finished_at"] for s, r in rows_of(run).items()}
    assert done
    if len(done) == 40:
        pytest.skip("this machine finished all parts before the kill")
    again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 3, again.stderr
    rows = rows_of(run)
    assert len(rows) == 40
    assert all(rows[s]["finished_at"] == when for s, when in done.items())
    assert segment.verify_run(run) == []


def test_a_driver_that_is_overtaken_while_it_works_stops_and_spoils_nothing(archive: Path, model: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    place = storage.join(run, "lease.json")

    def overtake(_: segment.Progress) -> None:
        known = storage.read_json(place)
        storage.write_json(place, {**known, "generation": known["generation"] + 1, "pid": 1, "host": "elsewhere"})

    with pytest.raises(RunError, match=r"process 1 on elsewhere\) has taken over this run"):
        segment.segment_archive(str(archive), model, run, SegmentConfig(), How(actors=1), segment.Ear(tick=overtake))
    assert not storage.exists(storage.join(run, "_SUCCESS.json"))
    assert len(rows_of(run)) < SCANS_MADE
    storage.write_json(place, {**storage.read_json(place), "released": True})
    segment.segment_archive(str(archive), model, run, SegmentConfig())
    assert segment.verify_run(run) == []


@contextmanager
def hogged(left: int) -> Iterator[None]:
    """While inside, somebody else holds all CPUs of the cluster but so many."""

    @ray.remote
    class Hog:
        def has_begun(self) -> bool:
            return True

    connect()  # lets go of what failed jobs before this one held
    hog = Hog.options(num_cpus=ray.cluster_resources()["CPU"] - left).remote()  # type: ignore[attr-defined]
    assert ray.get(hog.has_begun.remote(), timeout=120)
    try:
        yield
    finally:
        ray.kill(hog)


def test_a_cluster_without_room_ends_in_one_error_and_not_in_silence(
    archive: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "STANDSTILL_S", 3.0)
    said: list[str] = []
    how, ear = How(actors=1, scan_seconds=0.1), segment.Ear(said.append)
    with hogged(left=0), pytest.raises(ClusterError, match="nothing has moved for too long"):
        segment.segment_archive(str(archive), model, str(tmp_path / "run"), SegmentConfig(), how, ear)
    assert any("CPUs are free now; waiting for other jobs" in line for line in said)


def test_room_for_one_actor_is_room_enough_for_a_run_of_one(archive: Path, model: str, tmp_path: Path) -> None:
    with hogged(left=1):
        segment.segment_archive(str(archive), model, str(tmp_path / "run"), SegmentConfig(), How(actors=1))
    assert segment.verify_run(str(tmp_path / "run")) == []


def test_every_exit_code_says_what_it_means(
    archive: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def brainseg(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["brainseg", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    run = str(tmp_path / "run")
    words = ("segment", str(archive), "--model", model, "--out", run)
    code, said = brainseg(*words, "--max-failures", "10%")
    assert (code, said.splitlines()[-1].split(";")[0]) == (ExitCode.FAILURE_LIMIT, "brainseg: 2 scans failed, the limit is 1")
    assert brainseg(*words, "--max-failures", str(BROKEN))[0] == ExitCode.SOME_FAILED
    assert brainseg("verify", run)[0] == ExitCode.OK
    other = untrained_model(tmp_path / "other", seed=1)
    assert brainseg("segment", str(archive), "--model", other, "--out", run)[0] == ExitCode.USAGE
    part = Path(runs.parts(run)[0])
    part.write_bytes(part.read_bytes()[:-9])
    assert brainseg("verify", run)[0] == ExitCode.CRASH
    assert brainseg(*words)[0] == ExitCode.SOME_FAILED
    assert brainseg("verify", run)[0] == ExitCode.OK


def test_a_manifest_and_its_archive_are_the_same_source(finished: str, archive: Path, model: str, tmp_path: Path) -> None:
    table, _ = manifest.index_archive(str(archive))
    manifest.write_manifest(str(tmp_path / "m.parquet"), table)
    counts = segment.segment_archive(str(tmp_path / "m.parquet"), model, finished, SegmentConfig())
    assert counts["found"] == SCANS_MADE
