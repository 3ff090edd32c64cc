"""The files of cluster/ as tests read them: which there are, and the Ray clusters and pods that the manifests describe."""

import re
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
SHELL = [line for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
MANIFESTS = ["access.yaml", "raycluster.yaml", "rayjob-report.yaml", "rayjob-segment.yaml", "rayjob-train.yaml"]
JOBS = [name for name in MANIFESTS if name.startswith("rayjob-")]
CLUSTERS = ["raycluster.yaml", *JOBS]
RAY_UP = ["aws.yaml", "on-premises.yaml"]
LOCKS = ["requirements-build.lock", "requirements-cpu.lock", "requirements-cuda.lock"]
OTHERS = ["Dockerfile", "README.md", "grafana.json", "prometheus.yml", "slurm.sh", "who-talks-to-whom.svg"]


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def of_kind(name, kind):
    return [d for d in documents(name) if d["kind"] == kind]


def ray_cluster(name):
    """The spec of a manifest's Ray cluster, standing or a job's own."""
    last = documents(name)[-1]
    return last["spec"]["rayClusterSpec"] if last["kind"] == "RayJob" else last["spec"]


def groups(name):
    """The head's group, then those of the workers."""
    spec = ray_cluster(name)
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def templates(name):
    """Every pod template: head, workers, and a job's submitter."""
    submitters = [d["spec"]["submitterPodTemplate"] for d in of_kind(name, "RayJob")]
    return [group["template"] for group in groups(name)] + submitters


@cache
def words_of_ray_start():
    """The options that `ray start` itself has."""
    from ray.scripts.scripts import start

    return {word.removeprefix("--") for parameter in start.params for word in parameter.opts}
