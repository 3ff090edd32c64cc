"""The code stands in layers, and every import points down. Importing does nothing, and the command line comes up light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "brainseg"

LAYERS = """
    __init__
    errors environment
    regions geometry storage spill tables config versions hardware memory time_limit turns outlines
    events progress telemetry observe heartbeat loggers watch
    unet losses presets precision uploads trust
    formats surfaces lesions postprocess metrics aggregate averaging comparison
    contrasts layouts ahead readers scans prepare thumbnails masks augment sliding cache patches
    weights shipped
    card
    model release
    ensemble
    contents audit folds manifest lease inflight runs verify clean baselines split scoring sweep learn curves overlays
    report
    stages workers session autoscaler plan calibrate held_out course pretrained
    train cross_validation segment export phantom evaluate
    console results
    commands
    specs demo given_away
    job submit submitted
    schemas
    cli_jobs cli_models
    cli
"""
"""From the bottom to the top. A module may import what stands before it, in its own line or in one above."""

ORDER = LAYERS.split()
HEAVY = ("boto3", "matplotlib", "numpy", "pyarrow", "pydantic", "ray", "rich", "scipy", "torch")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path):
    """The layer's word for a source file: its module, or the package that it is part of."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Every top module of brainseg that a file imports, lazily or not, and every other package as its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "brainseg":
                yield from (f"brainseg.{alias.name}" for alias in node.names)


def units_imported(path):
    known = set(ORDER)
    words = [name.split(".") for name in imported(path)]
    return {w[1] for w in words if w[0] == "brainseg" and len(w) > 1 and w[1] in known} - {unit_of(path)}


def test_every_module_has_its_place_in_the_layers():
    assert {unit_of(path) for path in SOURCES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    place = ORDER.index(unit_of(path))
    upwards = {name for name in units_imported(path) if ORDER.index(name) > place}
    assert not upwards, f"{unit_of(path)} imports {', '.join(sorted(upwards))}, which stand above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_package_knows_nothing_of_what_stands_around_it(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"jobs", "cluster", "schemas", "tests", "conftest"}


def test_one_file_talks_to_s3():
    talkers = [p for p in SOURCES if {n.split(".")[0] for n in imported(p)} & {"boto3", "botocore"}]
    assert talkers == [PACKAGE / "storage/attempts.py"]


def test_ray_stays_at_the_rim():
    talkers = {unit_of(p) for p in SOURCES if any(n.split(".")[0] == "ray" for n in imported(p))}
    assert talkers == {"session", "course", "train", "segment", "evaluate", "workers", "submit", "telemetry", "autoscaler"}


def test_the_command_line_comes_up_without_heavy_packages():
    code = "import sys, json, brainseg.cli; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(json.loads(done.stdout)) & set(HEAVY)


def test_importing_everything_starts_and_writes_nothing(tmp_path):
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES]
    code = f"import sys, importlib\nsys.path.insert(0, {str(ROOT)!r})\n"
    code += f"for name in {modules!r}: importlib.import_module(name)\n"
    code += "import ray, torch, logging\n"
    code += "print(ray.is_initialized(), torch.cuda.is_initialized(), logging.getLogger('brainseg').handlers)\n"
    code += "from brainseg import config, unet, weights\n"
    code += "weights.blueprint(lambda: unet.UNet(config.NetworkConfig(), 1, 1), 'here')\n"
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    started, compiler = done.stdout.split("\n")[:2]
    assert started == "False False []"
    assert compiler == "False", "the shapes of a network cost the import of torch's compiler: two seconds in each process"
    assert not list(tmp_path.iterdir())
