"""Specs and jobs: every spec in jobs/ can be submitted as it is, and one that cannot work is refused in one clear line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import factory
import pytest
import yaml
from heads import ray_head
from rows_as_runs import typical_rows, write_run

from brainseg.errors import ConfigError, ExitCode, UsageError
from brainseg.job import report as report_job
from brainseg.phantom import write_archive
from brainseg.presets import PRESETS
from brainseg.specs import ReportSpec, SegmentSpec, TrainSpec, made_by, read_spec, run

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs"
KINDS = {"train": TrainSpec, "segment": SegmentSpec, "report": ReportSpec}
SPECS = sorted(JOBS.glob("*.yaml"))
PLACES = {"manifest": "/a/m.parquet", "model": "/a/model", "out": "s3://bucket/run"}


def write_spec(folder, **keys):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_a_published_spec_is_valid_and_says_how_to_submit_it(path):
    kind = path.name.split("-")[0]
    spec = read_spec(KINDS[kind], str(path))
    assert f"python jobs/{kind}.py jobs/{path.name}" in path.read_text()
    if kind == "train":
        assert spec.preset in PRESETS
    if kind == "segment":
        assert spec.source


def test_every_set_has_its_three_specs():
    sets = ("lgg", "figshare", "brats", "my-archive")
    assert {p.name for p in SPECS} == {f"{job}-{name}.yaml" for job in KINDS for name in sets}


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_what_a_spec_offers_in_a_comment_can_be_taken(tmp_path, path):
    kind = path.name.split("-")[0]
    text = path.read_text()
    for offered in re.findall(r"^# (\w+: .+)$", text, re.MULTILINE):
        if offered.partition(":")[0] in KINDS[kind].model_fields:
            (tmp_path / "spec.yaml").write_text(f"{text}\n{offered}\n")
            assert read_spec(KINDS[kind], str(tmp_path / "spec.yaml"))
    words = re.findall(r"^# (\w+): ", text, re.MULTILINE)
    assert {word for word in words if word.islower()} <= KINDS[kind].model_fields.keys()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, spec in KINDS.items() for name in spec.model_fields])
def test_the_readme_of_the_jobs_names_every_key(kind, name):
    row = next(line for line in (JOBS / "README.md").read_text().splitlines() if line.startswith(f"| `{kind}.py`"))
    assert f"`{name}`" in row


def test_an_unknown_key_is_refused_and_the_valid_ones_are_listed(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'max_failure'; valid here: archive, manifest, model, out, max_fail"):
        read_spec(SegmentSpec, write_spec(tmp_path, **PLACES, max_failure=5))


@pytest.mark.parametrize("place", ["run", "./run", "~/run", "gs://bucket/run", ""])
def test_a_place_that_other_machines_do_not_know_is_refused(tmp_path, place):
    with pytest.raises(ConfigError, match=re.escape(f"out: found '{place}', expected an absolute path or s3://")):
        read_spec(SegmentSpec, write_spec(tmp_path, **{**PLACES, "out": place}))


@pytest.mark.parametrize("given", [{}, {"archive": "/a", "manifest": "/m.parquet"}])
def test_segment_wants_an_archive_or_a_manifest(tmp_path, given):
    spec = read_spec(SegmentSpec, write_spec(tmp_path, model="/m", out="/r", **given))
    with pytest.raises(ConfigError, match="give one"):
        _ = spec.source


@pytest.mark.parametrize("limit", [50, "5%"])
def test_a_failure_limit_is_a_number_or_a_share(tmp_path, limit):
    assert read_spec(SegmentSpec, write_spec(tmp_path, **PLACES, max_failures=limit)).max_failures == limit


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="runs"):
        read_spec(ReportSpec, write_spec(tmp_path, runs=[]))


def test_a_report_job_heeds_every_word_of_its_spec(tmp_path):
    run, other = (write_run(tmp_path / name, typical_rows()) for name in ("run", "other"))
    words = {"rule": "brats", "where": "fold = 0", "compare": other, "reference": other, "format": "json"}
    spec = read_spec(ReportSpec, write_spec(tmp_path, runs=[run], **words))
    assert set(words) | {"runs", "out"} == ReportSpec.model_fields.keys()
    assert report_job(spec) is ExitCode.OK
    summary = json.loads(Path(made_by(spec)).read_text())
    assert (summary["rule"], summary["where"]) == ("brats", "fold = 0")
    assert summary["comparison"]
    assert summary["drift"]


def test_a_spec_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="there is no such spec"):
        read_spec(ReportSpec, str(tmp_path / "none.yaml"))


def test_a_job_gives_its_own_exit_code_back(tmp_path):
    path = write_spec(tmp_path, runs=["/r"])
    assert run(ReportSpec, lambda _: ExitCode.SOME_FAILED, [path]) == ExitCode.SOME_FAILED


def test_a_job_turns_our_errors_into_one_line_and_their_exit_code(tmp_path, capsys):
    def fails(_):
        raise ConfigError("two\nlines")

    assert run(ReportSpec, fails, [write_spec(tmp_path, runs=["/r"])]) == ExitCode.USAGE
    assert capsys.readouterr().err == "brainseg: two lines\n"


@pytest.mark.parametrize("words", [[], ["a.yaml", "b.yaml"]])
def test_a_job_takes_one_spec(words, capsys):
    assert run(ReportSpec, lambda _: ExitCode.OK, words) == ExitCode.USAGE
    assert "expected one word" in capsys.readouterr().err


def job(name, spec, cwd):
    command = [sys.executable, str(JOBS / f"{name}.py"), spec]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=env)


@pytest.mark.parametrize("name", KINDS)
def test_a_job_whose_data_is_not_there_ends_with_2(tmp_path, name):
    gone = str(tmp_path / "gone.parquet")
    keys = {
        "report": {"runs": [gone]},
        "train": {"manifest": gone, "out": gone},
        "segment": {"manifest": gone, "model": gone, "out": gone},
    }
    done = job(name, write_spec(tmp_path, **keys[name]), tmp_path)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert done.stderr.startswith("brainseg: ")
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]


def test_a_dry_run_of_segment_needs_no_cluster(tmp_path):
    write_archive(tmp_path / "archive", "lgg", scans=3, shape=(2, 32, 32))
    factory.make_model(tmp_path / "model", factory.make_card(factory.tiny_config(modalities=("flair",))))
    spec = write_spec(tmp_path, archive=f"{tmp_path}/archive", model=f"{tmp_path}/model", out=f"{tmp_path}/run", dry_run=True)
    done = job("segment", spec, tmp_path)
    assert done.returncode == ExitCode.OK, done.stderr
    assert "would segment 3 scans" in done.stderr
    assert "measured on 2 scan(s): decode" in done.stderr
    assert "once it has started" in done.stderr
    assert not (tmp_path / "run").exists()


# ---- submitted -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_submitted_job_segments_an_archive_and_its_exit_code_can_be_read(tmp_path):
    from ray.job_submission import JobSubmissionClient

    write_archive(tmp_path / "archive", "lgg", scans=6, broken=1, shape=(2, 32, 32))
    factory.make_model(tmp_path / "model", factory.make_card(factory.tiny_config(modalities=("flair",))))
    spec = write_spec(tmp_path, archive=f"{tmp_path}/archive", model=f"{tmp_path}/model", out=f"{tmp_path}/run")
    with ray_head() as address:
        client = JobSubmissionClient(address)
        submission = client.submit_job(entrypoint=f"python jobs/segment.py {spec}", runtime_env={"working_dir": str(ROOT)})
        until = time.monotonic() + 300
        while not client.get_job_status(submission).is_terminal() and time.monotonic() < until:
            time.sleep(1)
        log = client.get_job_logs(submission)
        assert client.get_job_info(submission).driver_exit_code == ExitCode.SOME_FAILED, log
    assert "5 of 6 scans segmented, 1 failed" in log
    assert (tmp_path / "run" / "_SUCCESS.json").is_file()
