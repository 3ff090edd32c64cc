"""The README is true: the commands it prints run, its query gives the report's figures, its tables and its tree are the code's.

The commands are run as printed, line by line, in one folder. Three things are put in their place: `.venv/bin/` is this
environment, `/path/to/archive` is the demo's, and `train` is given a recipe small enough for a test.
"""

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from brainseg import runs, storage
from brainseg.card import Split
from brainseg.errors import Code, ExitCode
from brainseg.geometry import Grid
from brainseg.manifest import LAYOUTS
from brainseg.metrics import score_scan
from brainseg.presets import PRESETS
from brainseg.regions import label_map
from brainseg.report import summary
from brainseg.tables import SCANS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
QUERY = next(text for kind, text in BLOCKS if kind == "sql")
SETUP, OWN, ELSEWHERE = (
    [line for line in SHELL if line.startswith(start)] for start in ("python3 -m venv", "brainseg ", "ray job submit")
)
SMALL_RECIPE = " --set epochs=1 --set samples_per_epoch=32 --set prepare.size=32 --set 'network.widths=[4,8]'"
MINUTES = 60


# ---- what it says --------------------------------------------------------------------------------------------------------


def test_two_commands_do_all_the_setting_up():
    assert SETUP == [
        "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/brainseg demo",
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest",
    ]


def test_every_printed_command_is_run_or_looked_at():
    assert sorted(SHELL) == sorted(SETUP + OWN + ELSEWHERE)
    assert {line.split()[1] for line in OWN} == {"index", "train", "segment", "report", "export", "verify"}


def test_it_opens_with_a_picture_that_is_there():
    alt, target = re.search(r"!\[(.+?)\]\((.+?)\)", README).groups()
    assert len(alt) > 40
    assert README.index("![") < README.index("## ")
    assert (ROOT / target).read_bytes().startswith(b"\x89PNG")


def test_its_links_lead_somewhere():
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    assert [t for t in targets if t and not (ROOT / t).exists()] == []


@pytest.mark.parametrize("line", ELSEWHERE)
def test_a_command_for_a_cluster_names_files_that_exist(line):
    files = [word for word in line.split() if word.startswith("jobs/")]
    assert len(files) == 2
    assert all((ROOT / name).is_file() for name in files)


def tree():
    """Path below the root -> its description, read from the indentation of the tree."""
    found, folders = {}, []
    text = next(text for kind, text in BLOCKS if not kind and text.startswith("brainseg/"))
    for line in text.splitlines():
        name, _, says = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        found["".join(folders)] = says.strip()
    return found


def test_the_tree_has_a_line_for_every_module():
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "brainseg").rglob("*.py") if p.name != "__init__.py"}
    assert {name for name in tree() if name.endswith(".py")} == modules
    assert all(tree().values())


def test_the_tree_has_a_line_for_every_folder():
    packages = {f"{p.parent.relative_to(ROOT)}/" for p in (ROOT / "brainseg").rglob("__init__.py")}
    assert {name for name in tree() if name.endswith("/")} == {*packages, "jobs/", "cluster/", "schemas/", "tests/"}


def rows(title):
    """The cells of every row of the tables below a heading."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]


def test_the_table_of_presets_is_the_code():
    def row(p):
        learning = f"{p.optimiser.kind} {p.optimiser.learning_rate:.0e}".replace("e-0", "e-")
        modalities, regions = ", ".join(p.modalities) or "any", ", ".join(p.regions)
        cells = [f"`{p.name}`", p.prepare.size, modalities, regions, p.loss.kind, learning, p.batch_size, p.epochs]
        return " | ".join(str(cell) for cell in cells)

    printed = "\n".join(" | ".join(cells[:8]) for cells in rows("Presets")[2:])
    assert printed == "\n".join(row(p) for p in PRESETS.values())


def test_the_table_of_layouts_is_the_code():
    named = {cells[0].strip("`") for cells in rows("Your own data")[2:]}
    assert named == set(LAYOUTS)


def test_the_table_of_exit_codes_is_the_code():
    named = [int(cells[0]) for cells in rows("What happens when things break") if cells[0].isdigit()]
    assert named == [int(code) for code in ExitCode]


def test_every_line_of_what_happens_when_names_tests_that_exist():
    table = README[README.index("| when | then |") : README.index("What was counted")]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 15
    for line in lines:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", line.split("|")[-2])
        assert named, line
        for file, test in named:
            text = (ROOT / "tests" / file).read_text()
            assert f"def {test or 'test_'}" in text, (file, test)


def test_the_codes_it_names_exist():
    named = set(re.findall(r"`([A-Z]+_?[A-Z_]*)`", README.split("## What happens when things break")[1]))
    assert named - {"BRAINSEG_DATA"} <= set(Code)


# ---- what it prints, run ---------------------------------------------------------------------------------------------------


class Walk:
    """One folder in which the printed commands are run once, in their order."""

    def __init__(self, folder):
        self.folder = folder
        self.codes = {}
        self.said = {}

    def run(self, line):
        """Run a line as a person would in an active environment; remember its exit code and what it said."""
        shims = self.folder / ".shims"
        shims.mkdir(exist_ok=True)
        for name, command in (("python", ""), ("brainseg", " -m brainseg.cli")):
            (shims / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
            (shims / name).chmod(0o755)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(shims)])
        env = {**os.environ, "PATH": path}
        done = subprocess.run(["bash", "-c", line], cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        word = line.split()[1]
        self.codes[word] = done.returncode
        self.said[word] = f"$ {line}\n{done.stdout}\n{done.stderr}"

    def __truediv__(self, name):
        return self.folder / name


def as_run_here(line):
    small = SMALL_RECIPE if line.startswith("brainseg train") else ""
    return line.replace(".venv/bin/", "").replace("/path/to/archive", "demo/archive") + small


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The demo, then the way of one's own data."""
    made = Walk(tmp_path_factory.mktemp("readme"))
    made.run(as_run_here(SETUP[0].rpartition("&&")[2].strip()))
    for line in OWN:
        made.run(as_run_here(line))
    return made


pytestmark = pytest.mark.timeout(20 * MINUTES)


def test_the_demo_ends_with_3_and_says_why(walk):
    assert walk.codes["demo"] == ExitCode.SOME_FAILED, walk.said["demo"]
    assert "Exit code 3 says that some scans failed" in walk.said["demo"]


def test_the_demo_leaves_what_it_promises(walk):
    for name in ("archive", "manifest.parquet", "model/weights.safetensors", "model/model.json", "run/_SUCCESS.json"):
        assert (walk / "demo" / name).exists()
    assert (walk / "demo/run/report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    counts = json.loads((walk / "demo/run/run.json").read_text())["counts"]
    assert counts["found"] >= 40
    assert 0 < counts["failed"] < 10
    assert counts["ok"] + counts["failed"] == counts["found"]


def test_the_demos_network_has_learnt_something(walk):
    card = json.loads((walk / "demo/model/model.json").read_text())
    learnt = card["metrics"]["held_out"]["tumor"]["dice_mean"]
    assert learnt > max(b["tumor"]["dice_mean"] for b in card["baselines"].values())
    assert learnt < 0.99


@pytest.mark.parametrize("word", [line.split()[1] for line in OWN])
def test_a_command_on_ones_own_data_runs(walk, word):
    expected = ExitCode.SOME_FAILED if word == "segment" else ExitCode.OK
    assert walk.codes[word] == expected, walk.said[word]


def test_the_own_run_has_a_mask_for_every_segmented_scan(walk):
    counts = json.loads((walk / "run/run.json").read_text())["counts"]
    assert len(list((walk / "masks").glob("*.nii.gz"))) == counts["ok"] > 0


@pytest.mark.parametrize("run", ["demo/run", "run"])
def test_the_query_gives_the_figures_of_the_report(walk, run):
    assert queried(walk / run) == pytest.approx(reported(walk / run))


def test_the_query_gives_the_figures_of_the_report_on_any_run(tmp_path):
    write_random_run(tmp_path, scans=60, seed=5)
    found = queried(tmp_path)
    assert found == pytest.approx(reported(tmp_path))
    assert {key[0] for key in found} == {"train", "validation", "test", "outside"}
    for column in ("missed", "spurious", "both_empty", "hd95_px_infinite"):
        assert any(value > 0 for key, value in found.items() if key[2] == column)


def write_random_run(folder, *, scans, seed):
    """A run of labelled and unlabelled scans without spacing, some without tumour, some without answer, some failed."""
    rng = np.random.default_rng(seed)
    rows = [random_row(number, rng) for number in range(scans)]
    names = [f"p{number:03d}" for number in range(scans // 2)]
    split = Split(train=names[:4], validation=names[4:7], test=names[7:20])
    body = {"model": {"split": split.model_dump(mode="json")}, "counts": {"found": scans}}
    storage.write_json(str(folder / "run.json"), body)
    for start in range(0, scans, 16):
        runs.write_part(str(folder), rows[start : start + 16])
    runs.write_metrics(str(folder), split)


def random_row(number, rng):
    row = dict.fromkeys(SCANS.names) | {"scan_id": f"s{number:03d}", "patient_id": f"p{number // 2:03d}", "dataset": "made"}
    row |= {"label_map": "binary", "sources": [], "warnings": [], "attempt": 1, "run_id": "r", "content_tag": "t"}
    row |= {"model_fingerprint": "m", "config_fingerprint": "c", "finished_at": datetime.now(UTC), "status": "failed"}
    if number % 10 == 0:
        return row
    label = (rng.random((2, 12, 12)) < rng.choice([0, 0.3, 0.6])).astype(np.uint8)
    answer = (rng.random((2, 12, 12)) < rng.choice([0, 0.4])).astype(np.uint8)
    given = None if number % 11 == 0 else label
    scored = score_scan(given, answer, label_map("binary"), ("tumor",), Grid.of(label.shape))
    return row | {"status": "ok", "regions": scored}


def queried(run):
    """(split, region, column) -> value, as the printed query finds it in the run's metrics."""
    import duckdb

    table = duckdb.sql(QUERY.replace("run/metrics.parquet", str(run / "metrics.parquet")))
    found = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    figures = [(row.pop("split"), row.pop("region"), row) for row in found]
    return {(split, region, name): value for split, region, row in figures for name, value in row.items()}


def reported(run):
    """The same from the report's own summary."""
    groups = summary([str(run)])["groups"]
    return {
        (group["split"], figures["region"], name): value
        for group in groups
        for figures in group["regions"]
        for name, value in in_the_querys_words(figures).items()
    }


def in_the_querys_words(figures):
    """A region's entry of the report's summary under the names of the query's columns."""
    distances = figures["hd95_px"]
    return {
        "labelled": figures["num_labelled"],
        "scored": figures["num_scored"],
        **{state: figures["states"][state] for state in ("missed", "spurious", "both_empty")},
        **{f"dice_{name}": figures["dice"][name] for name in ("mean", "median", "q1", "q3")},
        "pooled_dice": figures["pooled_dice"],
        "recall_mean": figures["recall"]["mean"],
        "precision_mean": figures["precision"]["mean"],
        "hd95_px_mean_finite": distances["mean_finite"],
        "hd95_px_infinite": distances["num_infinite"],
    }
