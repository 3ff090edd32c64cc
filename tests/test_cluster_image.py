"""The image's recipe: pinned, small, nobody's root, and every package in its lock files with version and hash.

The rules that matter here are checked by reading the Dockerfile; hadolint checks the rest of them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from cluster_files import CLUSTER, CLUSTERS, RAY_UP, README, ROOT, ray_cluster
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import brainseg
from brainseg.environment import FOR_WORKERS

# ---- the image -------------------------------------------------------------------------------------------------------


def instructions():
    """(word, rest) for every instruction of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages():
    """Stage -> its instructions, its parent's first."""
    found, name = {}, None
    for word, rest in instructions():
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = list(found.get(parent, [(word, parent)]))
        elif name:
            found[name].append((word, rest))
    return found


IMAGES = ("node", "ray-up", "brainseg")


def test_the_base_is_pinned_and_every_stage_stands_on_it():
    first, base = instructions()[0]
    assert first == "ARG"
    assert re.fullmatch(r"PYTHON=python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert all(steps[0] == ("FROM", "${PYTHON}") for steps in stages().values())
    version = re.search(r"python:(\S+?)@", base).group(1)
    assert f" python:{version} \\\n        pip install" in README


def test_nodes_of_the_image_and_of_slurm_find_what_a_ray_on_one_machine_finds():
    image = " ".join(rest for word, rest in stages()["brainseg"] if word == "ENV").split()
    slurm = re.findall(r"^export (.*)$", (CLUSTER / "slurm.sh").read_text(), flags=re.MULTILINE)
    for where in (image, " ".join(slurm).split()):
        assert {f"{name}={value}" for name, value in FOR_WORKERS.items()} <= set(where)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_ends_as_nobody_and_can_be_started_with_any_command(name):
    steps = stages()[name]
    assert [rest for word, rest in steps if word == "USER"][-1] == "1000:1000"
    assert "ENTRYPOINT" not in dict(steps)
    assert json.loads([rest for word, rest in steps if word == "CMD"][-1])
    assert [rest for word, rest in steps if word == "HEALTHCHECK"] == ["NONE"]
    assert "org.opencontainers.image.licenses" in dict(steps)["LABEL"]


def test_what_is_installed_is_what_the_lock_says():
    runs = [rest for word, rest in instructions() if word == "RUN"]
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 3
    assert all("--require-hashes --only-binary :all:" in run or "--no-deps --no-index" in run for run in installs)
    assert "ADD" not in {word for word, _ in instructions()}
    assert not any(re.search(r"curl|wget|git clone", run) for run in runs)
    for run in (run for run in runs if "apt-get install" in run):
        assert "--no-install-recommends" in run
        assert "rm -rf /var/lib/apt/lists/*" in run


def test_a_login_shell_such_as_that_of_ray_up_finds_ray_too():
    steps = stages()["ray-up"]
    found = re.search(r"PATH=(\S+?):\$PATH", dict(steps)["ENV"]).group(1)
    assert f"echo 'PATH={found}:$PATH' >/etc/profile.d/" in steps[-2][1]
    assert any(f"--from=dependencies {found.removesuffix('/bin')} " in rest for _, rest in steps)


def test_dependencies_are_laid_down_before_the_code():
    assert not any("brainseg " in rest for word, rest in stages()["dependencies"] if word == "COPY")
    copied = [rest for word, rest in stages()["node"] if word in {"COPY", "RUN"}]
    where = {
        text: next(i for i, rest in enumerate(copied) if text in rest) for text in ("from=dependencies", "from=wheel", "jobs")
    }
    assert sorted(where, key=where.get) == ["from=dependencies", "from=wheel", "jobs"]


def test_what_the_image_copies_is_there_and_is_let_through():
    sources = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    expanded = {s.replace("${TORCH}", torch) for group in sources for s in group for torch in ("cpu", "cuda")}
    assert {"brainseg", "jobs", "pyproject.toml", "cluster/requirements-cuda.lock"} <= expanded
    assert [s for s in expanded if not (ROOT / s).exists() or ignored(s)] == []


@pytest.mark.parametrize("path", [".git", "tests", "data", "runs", ".venv", "cluster/aws.yaml", ".brainseg-token", "demo"])
def test_what_lies_about_does_not_reach_the_image(path):
    assert ignored(path)


def ignored(path):
    """Whether .dockerignore keeps a path out of the build: the last line that fits decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").strip()
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern):
            verdict = not line.startswith("!")
    return verdict


def built():
    """Images that README builds, without the registry."""
    return set(re.findall(r"-t \S+/(brainseg:\S+)", README))


@pytest.mark.parametrize("name", CLUSTERS + RAY_UP)
def test_an_image_that_is_named_is_one_that_the_readme_builds(name):
    named = set(re.findall(r"image: \S+/(\S+)", (CLUSTER / name).read_text()))
    assert named
    assert named <= built()
    assert all(image.startswith(f"brainseg:{brainseg.__version__}-") for image in named)


def test_the_readme_builds_and_pushes_every_image_from_a_stage_that_exists():
    assert {i.rpartition(":")[2] for i in built()} == {f"{brainseg.__version__}-{kind}" for kind in ("cpu", "cuda", "ray-up")}
    assert built() == set(re.findall(r"docker push \S+/(brainseg:\S+)", README))
    assert set(re.findall(r"--target (\S+)", README)) <= stages().keys()
    assert dict(instructions())["FROM"].endswith(" AS brainseg")
    assert f'org.opencontainers.image.version="{brainseg.__version__}"' in (CLUSTER / "Dockerfile").read_text()


def test_the_linter_of_dockerfiles_finds_nothing():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed; the test extra brings it")
    done = subprocess.run([linter, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ---- the locks -------------------------------------------------------------------------------------------------------


def lock(name):
    """Package -> version. Every line is a package with its hash, but for comments and the index of CPU wheels."""
    lines = [x for x in (CLUSTER / name).read_text().splitlines() if not x.startswith(("#", "--extra-index-url "))]
    found = [re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found), name
    assert len({f[1] for f in found}) == len(found)
    return {canonicalize_name(f[1]): f[2] for f in found}


def needed(requirements, pinned, done):
    """Names of all that these requirements bring with them, as far as the very versions of the lock are installed here."""
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        for extra in sorted(requirement.extras) or [""]:
            if (name, extra) not in done:
                done.add((name, extra))
                if pinned.get(name) == metadata.version(name):
                    needed([r for r in map(Requirement, metadata.requires(name) or []) if applies(r, extra)], pinned, done)
    return {name for name, _ in done}


def applies(requirement, extra):
    image = {"python_version": "3.11", "python_full_version": "3.11.15", "sys_platform": "linux", "platform_machine": "x86_64"}
    return requirement.marker is None or any(requirement.marker.evaluate({**image, "extra": e}) for e in ("", extra))


@pytest.mark.parametrize("name", ["requirements-cpu.lock", "requirements-cuda.lock"])
def test_a_lock_holds_all_that_brainseg_needs(name):
    pinned = lock(name)
    direct = [r for r in map(Requirement, metadata.requires("brainseg")) if applies(r, "")]
    assert len(direct) > 10
    assert needed(direct, pinned, set()) - pinned.keys() == set()
    for requirement in direct:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(requirement)


def test_both_images_run_the_same_versions_but_for_what_cuda_brings():
    cpu, cuda = lock("requirements-cpu.lock"), lock("requirements-cuda.lock")
    assert cpu.pop("torch") == f"{cuda.pop('torch')}+cpu"
    extra = {name for name in cuda.keys() - cpu.keys() if not name.startswith(("nvidia-", "cuda-"))}
    assert extra == {"triton"}
    assert cpu.items() <= cuda.items()


@pytest.mark.parametrize("name", CLUSTERS)
def test_manifest_and_image_agree_on_the_version_of_ray(name):
    assert ray_cluster(name)["rayVersion"] == lock("requirements-cpu.lock")["ray"]
