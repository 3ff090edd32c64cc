"""The unhappy ways into brainseg: one clear line, exit code 2, nothing written, nothing lost, and no Ray started for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import factory
import pytest

from brainseg import runs
from brainseg.card import fingerprint_of, load_card
from brainseg.cli import main
from brainseg.config import SegmentConfig
from brainseg.errors import ExitCode
from brainseg.manifest import fingerprint, index_archive, write_manifest
from brainseg.phantom import write_archive

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """An archive of six phantoms and its manifest, never changed by a test."""
    folder = tmp_path_factory.mktemp("heads")
    write_archive(folder / "archive", "lgg", scans=6, shape=(3, 32, 32), seed=1)
    write_manifest(str(folder / "manifest.parquet"), index_archive(str(folder / "archive"))[0])
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model(out, *, modalities=("t1", "flair", "t1c"), name="small", seed=0):
    """A model folder with untrained weights; returns its place."""
    factory.make_model(out, factory.make_card(factory.tiny_config(name=name, modalities=modalities)), seed=seed)
    return str(out)


def contents(folder):
    """Every file below a folder with its bytes, and every folder."""
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(place, monkeypatch, capsys):
    """Call the command line in `place`; assert that it ends with 2 and every file is as it was; return its one line."""

    def call(*words):
        before, ray_before = contents(place), ray_runs()
        monkeypatch.setattr(sys, "argv", ["brainseg", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == ExitCode.USAGE, err
        assert contents(place) == before
        assert out == ""
        line, *hint = err.strip().splitlines()
        assert line.startswith("brainseg: ")
        assert hint in ([], ["Run with --help for the words it knows."])
        assert "Traceback" not in err
        assert ray_runs() == ray_before
        return line

    return call


def ray_runs():
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


# ---- places that hold nothing of use -----------------------------------------------------------------------------------


def test_an_archive_that_is_not_there(refused):
    assert "no such folder" in refused("index", "nowhere", "--out", "m.parquet")


def test_an_archive_that_is_empty(refused, place):
    (place / "empty").mkdir()
    assert "holds no file" in refused("index", "empty", "--out", "m.parquet")
    assert "holds no file" in refused("segment", "empty", "--model", make_model(place / "model"), "--out", "run")


def test_an_archive_of_holiday_pictures_says_what_was_looked_for(refused, place):
    (place / "pictures").mkdir()
    (place / "pictures" / "beach.jpg").write_bytes(b"\xff\xd8")
    line = refused("index", "pictures", "--out", "m.parquet")
    assert "no scan was recognised among 1 files" in line
    assert all(layout in line for layout in ("lgg", "figshare", "brats", "h5slices"))


def test_an_archive_that_is_a_file(refused, place):
    (place / "archive.zip").write_bytes(b"PK")
    assert "this is a file" in refused("index", "archive.zip", "--out", "m.parquet")


def test_an_unknown_layout_lists_the_known_ones(refused, heads):
    line = refused("index", heads / "archive", "--layout", "nrrd", "--out", "m.parquet")
    assert "unknown layout 'nrrd'; known: lgg, figshare, brats, h5slices, dicom" in line


@pytest.mark.parametrize(
    "words", [("train", "no.parquet", "--out", "m"), ("segment", "no.parquet", "--model", "m", "--out", "r")]
)
def test_a_manifest_that_is_not_there(refused, words):
    assert "no.parquet" in refused(*words)


def test_a_parquet_that_is_no_manifest(refused, place):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"age": [1]}), place / "other.parquet")
    assert "is not a manifest: it lacks the columns scan_id" in refused("train", "other.parquet", "--out", "model")


def test_a_model_that_is_not_there(refused, heads):
    line = refused("segment", heads / "manifest.parquet", "--model", "nowhere", "--out", "run")
    assert "nowhere" in line


@pytest.mark.parametrize("words", [("report", "nowhere"), ("verify", "nowhere"), ("export", "nowhere", "--out", "masks")])
def test_a_run_that_is_not_there_and_a_folder_that_is_none(refused, heads, words):
    assert "no such folder" in refused(*words)
    assert "no run.json" in refused(*(heads if word == "nowhere" else word for word in words))


# ---- data that cannot serve --------------------------------------------------------------------------------------------


def test_a_manifest_without_labels_cannot_be_trained_on(refused, place):
    write_archive(place / "archive", "lgg", scans=4, shape=(2, 32, 32))
    for mask in (place / "archive").rglob("*_mask.tif"):
        mask.unlink()
    write_manifest("m.parquet", index_archive("archive")[0])
    line = refused("train", "m.parquet", "--out", "model")
    assert "none of the manifest's 4 scans has a usable label" in line


def test_patients_that_nobody_knows_are_not_split(refused, place):
    write_archive(place / "archive", "figshare", scans=10, shape=(3, 32, 32))
    for table in (place / "archive").glob("*.csv"):
        table.unlink()
    write_manifest("m.parquet", index_archive("archive")[0])
    line = refused("train", "m.parquet", "--out", "model")
    assert "neither a patient nor a fold" in line
    assert "--accept-leakage" in line


def test_a_fold_that_nobody_is_in(refused, heads):
    assert "fold 77" in refused("train", heads / "manifest.parquet", "--out", "model", "--fold", "77")


def test_a_recipe_for_modalities_that_the_manifest_lacks(refused, heads):
    line = refused("train", heads / "manifest.parquet", "--preset", "brats2020-128", "--out", "model")
    assert "wants flair, t1, t1c, t2; the manifest's scans have t1, flair, t1c" in line


def test_a_model_whose_modalities_the_archive_lacks(refused, place, heads):
    model = make_model(place / "model", modalities=("flair", "t2"), name="wants-t2")
    line = refused("segment", heads / "manifest.parquet", "--model", model, "--out", "run")
    assert "model 'wants-t2' needs flair, t2; no scan of the archive has them all (found t1, flair, t1c)" in line


# ---- words and keys that are not known ---------------------------------------------------------------------------------


def test_a_misspelt_key_of_a_recipe_lists_the_valid_ones(refused, place, heads):
    (place / "recipe.yaml").write_text("optimiser:\n  learning_rte: 0.1\n")
    line = refused("train", heads / "manifest.parquet", "--config", "recipe.yaml", "--out", "model")
    assert "recipe.yaml: unknown key 'optimiser.learning_rte'; valid here: kind, learning_rate" in line


def test_a_misspelt_override_lists_the_valid_ones(refused, place, heads):
    line = refused("train", heads / "manifest.parquet", "--set", "epocs=3", "--out", "model")
    assert "unknown key 'epocs'" in line
    assert "epochs" in line
    line = refused(
        "segment", heads / "manifest.parquet", "--model", make_model(place / "m"), "--out", "r", "--set", "treshold=0.4"
    )
    assert "unknown key 'treshold'; valid here: threshold" in line


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("epochs", "expected KEY=VALUE"),
        ("epochs=many", "epochs: "),
        ("epochs=0", "epochs: "),
        ("epochs=[1", "--set epochs=[1"),
        ("epochs.first=1", "'epochs' is a value"),
    ],
)
def test_an_override_that_makes_no_sense(refused, heads, assignment, says):
    assert says in refused("train", heads / "manifest.parquet", "--set", assignment, "--out", "model")


@pytest.mark.parametrize(("text", "says"), [("a: [", "not YAML"), ("- a\n- b\n", "expected a mapping")])
def test_a_recipe_that_is_no_mapping(refused, place, heads, text, says):
    (place / "recipe.yaml").write_text(text)
    assert says in refused("train", heads / "manifest.parquet", "--config", "recipe.yaml", "--out", "model")


def test_a_recipe_that_is_not_there(refused, heads):
    assert "recipe.yaml" in refused("train", heads / "manifest.parquet", "--config", "recipe.yaml", "--out", "model")


def test_an_unknown_preset_lists_the_known_ones(refused, heads):
    line = refused("train", heads / "manifest.parquet", "--preset", "nnunet", "--out", "model")
    assert "unknown preset 'nnunet'; known: lgg-128, lgg-strong" in line


@pytest.mark.parametrize("limit", ["some", "-1", "5%%", "nan"])
def test_a_failure_limit_that_is_no_number(refused, place, heads, limit):
    model = make_model(place / "model")
    line = refused("segment", heads / "manifest.parquet", "--model", model, "--out", "run", "--max-failures", limit)
    assert f"--max-failures {limit}" in line


# ---- places that hold something else -----------------------------------------------------------------------------------


def test_an_out_that_holds_a_run_of_another_model(refused, place, heads):
    manifest, table = str(heads / "manifest.parquet"), index_archive(str(heads / "archive"))[0]
    first, second = make_model(place / "first"), make_model(place / "second", seed=1)
    identity = runs.Identity(fingerprint(table), fingerprint_of(load_card(first)), SegmentConfig().fingerprint())
    runs.open_run(str(place / "run"), identity, {})
    assert "holds a run with another model" in refused("segment", manifest, "--model", second, "--out", "run")
    for words in (["--set", "threshold=0.4"], ["--precision", "bf16"]):
        assert "holds a run with another config" in refused("segment", manifest, "--model", first, "--out", "run", *words)


def test_an_out_that_holds_another_model(refused, place, heads):
    make_model(place / "model")
    assert "holds another model" in refused("train", heads / "manifest.parquet", "--out", "model")


def test_a_demo_does_not_move_into_a_folder_in_use(refused, place):
    (place / "thesis.txt").write_text("all of it")
    assert "holds other things, such as thesis.txt" in refused("demo", "--out", ".")


# ---- the words themselves ----------------------------------------------------------------------------------------------


def brainseg(*words, cwd=None):
    command = [sys.executable, "-m", "brainseg.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, check=False)


def test_every_command_explains_itself(monkeypatch, capsys):
    from brainseg.cli import app

    for command in app.registered_commands:
        monkeypatch.setattr(sys, "argv", ["brainseg", command.name or command.callback.__name__, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert command.callback.__doc__.split(".")[0].split(":")[0][:40] in " ".join(capsys.readouterr().out.split())


def test_a_misspelt_command_is_a_usage_error():
    done = brainseg("segmnt")
    assert done.returncode == ExitCode.USAGE
    assert "Traceback" not in done.stderr


def test_a_new_process_maps_an_error_to_its_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "brainseg.cli", "index", "nowhere", "--out", "m.parquet"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith("brainseg: ")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_would_do_and_does_nothing(place, heads, monkeypatch, capsys):
    words = ["segment", str(heads / "archive"), "--model", make_model(place / "model"), "--out", "run", "--dry-run"]
    before, ray_before = contents(place), ray_runs()
    monkeypatch.setattr(sys, "argv", ["brainseg", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.OK
    assert "would segment 6 scans" in capsys.readouterr().err
    assert contents(place) == before
    assert ray_runs() == ray_before


def test_index_says_as_json_what_it_says_in_words(place, heads, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["brainseg", "index", str(heads / "archive"), "--out", "m.parquet", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["layout"], body["scans"], body["patients"], body["labelled"], body["problems"]) == ("lgg", 6, 6, 6, [])
