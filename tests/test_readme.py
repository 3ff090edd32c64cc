"""The README is true: the commands it prints run, its query gives the report's figures, its tables and its tree are the code's.

The commands are run as printed, line by line, in one folder. Three things are put in their place: `.venv/bin/` is this
environment, `/path/to/archive` is the demo's, and `train` is given a recipe small enough for a test.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from brainseg.errors import Code, ExitCode
from brainseg.manifest import LAYOUTS
from brainseg.presets import PRESETS

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
        return [f"`{p.name}`", str(p.prepare.size), modalities, regions, p.loss.kind, learning, str(p.batch_size), str(p.epochs)]

    assert [cells[:8] for cells in rows("Presets")[2:]] == [row(p) for p in PRESETS.values()]


def test_the_table_of_layouts_is_the_code():
    named = {cells[0].strip("`") for cells in rows("Your own data")[2:]}
    assert named == set(LAYOUTS)


def test_the_table_of_exit_codes_is_the_code():
    named = [int(cells[0]) for cells in rows("What happens when things break") if cells[0].isdigit()]
    assert named == [int(code) for code in ExitCode]


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


pytestmark = pytest.mark.timeout(12 * MINUTES)


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
    import duckdb

    from brainseg.report import summary

    table = duckdb.sql(QUERY.replace("run/metrics.parquet", str(walk / run / "metrics.parquet"))).arrow()
    queried = {(row["split"], row["region"]): row for row in table.read_all().to_pylist()}
    reported = {(g["split"], r["region"]): r for g in summary([str(walk / run)])["groups"] for r in g["regions"]}
    assert queried.keys() == reported.keys()
    for key, row in queried.items():
        assert row == pytest.approx({"split": key[0], "region": key[1], **in_the_querys_words(reported[key])}, nan_ok=True)


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
