"""What starts Ray without Kubernetes, and what watches it: `ray up` files by Ray's own validator, the Slurm script run with
stand-ins for Slurm and Ray, Prometheus' and Grafana's files against what Ray exports.
"""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import manifest_fields as known
import pytest
import yaml
from cluster_files import CLUSTER, CLUSTERS, RAY_UP, README, ROOT, templates, words_of_ray_start

from brainseg.telemetry import METERS, exported

# ---- ray up, by Ray's own validator ----------------------------------------------------------------------------------


@cache
def prepared(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_would_take_it_and_installs_nothing_on_its_own(name):
    config = prepared(name)
    assert config["cluster_name"] == "brainseg"
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["file_mounts"] == {}


def test_a_misspelt_word_of_ray_up_is_found():
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    config["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_starts_a_head_without_work_and_every_node_with_the_token(name):
    config = prepared(name)
    assert "--head --num-cpus=0 --num-gpus=0" in config["head_start_ray_commands"][-1]
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    place = next(o for o in options if "RAY_AUTH_TOKEN_PATH=" in o).partition("=")[2]
    mounted = [o.split(":")[1] for o in options if o.startswith("--volume ")]
    assert any(Path(place).is_relative_to(folder) for folder in mounted)
    assert "/spill" in mounted


def test_workers_on_aws_are_on_spot_from_zero_and_the_head_is_not():
    types = prepared("aws.yaml")["available_node_types"]
    head = types.pop("head")
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    for one in types.values():
        assert one["min_workers"] == 0
        assert one["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_nothing_on_aws_is_public_or_unencrypted_and_rights_come_by_role():
    config = prepared("aws.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for one in config["available_node_types"].values():
        node = one["node_config"]
        assert node["IamInstanceProfile"]["Name"] in {"brainseg-head", "brainseg-worker"}
        assert f"`{node['IamInstanceProfile']['Name']}`" in README
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_starts_ray_with_words_that_ray_start_knows(name):
    text = " ".join(command for key in STARTS for command in prepared(name)[key])
    words = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    assert {"head", "num-cpus", "address", "object-manager-port"} <= words <= words_of_ray_start()


# ---- Slurm -----------------------------------------------------------------------------------------------------------

STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\nnode3\\n"',
    "getent": 'echo "127.0.1.1 STREAM node1"; echo "192.0.2.21 STREAM node1"',
    "srun": 'echo "$RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH") $*" >>"$SEEN/steps"; echo $$ >>"$SEEN/pids"; exec sleep 60',
    "python": """case "$1" in
        -c) exec "$REAL_PYTHON" "$@" ;;
        -) cat >/dev/null; echo "await $2" >>"$SEEN/waits"
            until [ -f "$SEEN/pids" ] && [ "$(wc -l <"$SEEN/pids")" -ge "$(wc -l <"$SEEN/waits")" ]; do sleep 0.02; done ;;
        *) echo "$RAY_ADDRESS $(cat "$RAY_AUTH_TOKEN_PATH") $*" >>"$SEEN/driver"; echo $$ >>"$SEEN/pids"; eval "$DRIVER" ;;
    esac""",
}


@pytest.fixture
def slurm(tmp_path):
    """A way to run the script as Slurm would, on three nodes that are none; gives its process."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    allocation = {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
    }
    places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path), "BRAINSEG_SHARED": str(tmp_path)}
    mine = {"REAL_PYTHON": sys.executable, "RAY_AUTH_TOKEN": "somebody else's"}

    def run(*words, driver="exit 0", **more):
        env = {**os.environ, **allocation, **places, **mine, "DRIVER": driver, **more}
        command = ["bash", str(CLUSTER / "slurm.sh"), *words]
        heard = signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore it, and so would the script
        try:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        finally:
            signal.signal(signal.SIGINT, heard)

    return run


def seen(folder, name):
    return (folder / name).read_text().splitlines()


def is_alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_slurm_job_ends_with_the_jobs_own_exit_code_and_leaves_nothing(tmp_path, slurm, code):
    job = slurm("segment", "/share/spec.yaml", driver=f"exit {code}")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert not any(is_alive(pid) for pid in seen(tmp_path, "pids"))
    assert list(tmp_path.glob(".brainseg-*")) == []
    assert seen(tmp_path, "driver")[0].endswith("jobs/segment.py /share/spec.yaml")


def test_one_token_is_known_to_head_workers_and_driver_and_stands_on_no_command_line(tmp_path, slurm):
    slurm("segment", "/share/spec.yaml").communicate(timeout=60)
    nodes = [line.split(" ", 2) for line in seen(tmp_path, "steps")]
    driver = seen(tmp_path, "driver")[0].split(" ")
    assert {mode for mode, _, _ in nodes} == {"token"}
    tokens = {token for _, token, _ in nodes} | {driver[1]}
    assert len(tokens) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", tokens.pop())
    assert not any(nodes[0][1] in words for _, _, words in nodes)


def test_a_slurm_job_has_a_head_without_work_and_a_worker_on_every_node(tmp_path, slurm):
    slurm("train", "/share/spec.yaml").communicate(timeout=60)
    head, workers = sorted((line.split(" ", 2)[2] for line in seen(tmp_path, "steps")), key=lambda words: "--head" not in words)
    assert "--nodes=1 --ntasks=1" in head
    assert "--num-cpus=0 --num-gpus=0" in head
    assert "--nodes=3 --ntasks=3 --cpus-per-task=8" in workers
    address = seen(tmp_path, "driver")[0].split(" ")[0]
    assert address == "192.0.2.21:24680"
    assert f"--address={address} --num-cpus=8" in workers
    assert seen(tmp_path, "waits") == ["await 1", "await 4"]
    for words in (head, workers):
        started = words.partition(" start ")[2]
        assert set(re.findall(r"--([a-z][a-z-]+)", started)) <= words_of_ray_start()
    ports = re.findall(r"-port=(\d+)", head + workers)
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_slurm_job_that_is_told_to_stop_ends_all_that_it_started(tmp_path, slurm, signal_, code):
    job = slurm("segment", "/share/spec.yaml", driver="exec sleep 60")
    until = time.monotonic() + 60
    while not (tmp_path / "pids").is_file() or len(seen(tmp_path, "pids")) < 3:
        assert time.monotonic() < until, "head, workers and driver did not start"
        time.sleep(0.05)
    job.send_signal(signal_)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert not any(is_alive(pid) for pid in seen(tmp_path, "pids"))
    assert list(tmp_path.glob(".brainseg-*")) == []


@pytest.mark.parametrize("words", [[], ["segment"], ["segment", "a.yaml", "b.yaml"]])
def test_a_slurm_job_takes_a_kind_and_a_spec(tmp_path, slurm, words):
    job = slurm(*words)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "usage: sbatch" in said
    assert not (tmp_path / "steps").exists()


def test_a_head_that_nobody_reaches_is_said_before_anything_starts(tmp_path, slurm):
    (tmp_path / "getent").write_text('#!/bin/bash\necho "127.0.1.1 STREAM node1"\n')
    job = slurm("segment", "/share/spec.yaml")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "BRAINSEG_INTERFACE" in said
    assert not (tmp_path / "steps").exists()


def test_the_linter_of_shell_scripts_finds_nothing():
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], check=False).returncode == 0
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("shellcheck is not installed; the test extra brings it")
    done = subprocess.run([linter, CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ---- what watches it -------------------------------------------------------------------------------------------------


def test_prometheus_asks_the_hosts_that_there_are():
    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    assert list(known.PROMETHEUS(config, "prometheus")) == []
    provider = yaml.safe_load((CLUSTER / "on-premises.yaml").read_text())["provider"]
    asked = {t.split(":")[0] for job in config["scrape_configs"] for s in job.get("static_configs", []) for t in s["targets"]}
    assert asked == {provider["head_ip"], *provider["worker_ips"]}
    names = {p["name"] for name in CLUSTERS for t in templates(name) for p in t["spec"]["containers"][0].get("ports", [])}
    kept = next(r["regex"] for r in config["scrape_configs"][0]["relabel_configs"] if "port_name" in r["source_labels"][0])
    assert set(kept.split("|")) <= names


@cache
def metrics_of_ray():
    """Every metric that Ray's own dashboards and its autoscaler know by name."""
    folder = Path(metadata.distribution("ray").locate_file("ray"))
    texts = [p.read_text() for p in (folder / "dashboard/modules/metrics/dashboards").glob("*_panels.py")]
    autoscaler = (folder / "autoscaler/_private/prom_metrics.py").read_text()
    return set(re.findall(r"\bray_\w+", " ".join(texts))) | {
        f"autoscaler_{m}" for m in re.findall(r'"([a-z_]+)",\n', autoscaler)
    }


def panels():
    return json.loads((CLUSTER / "grafana.json").read_text())["panels"]


OURS = {name for meter in METERS for name in exported(meter)}


def test_every_panel_shows_metrics_that_ray_exports():
    for panel in (p for p in panels() if p["type"] != "row"):
        assert panel["description"]
        for target in panel["targets"]:
            used = re.findall(r"\b(?:ray|autoscaler)_\w+(?=\{)", target["expr"])
            assert used, panel["title"]
            assert set(used) <= metrics_of_ray() | OURS
            assert target["expr"].count("{") == target["expr"].count('ray_io_cluster=~"$cluster"')
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_dashboard_knows_its_variables_and_no_panel_lies_on_another():
    board = json.loads((CLUSTER / "grafana.json").read_text())
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "cluster"}
    assert len({p["id"] for p in panels()}) == len(panels())
    taken = [
        (x, y)
        for p in panels()
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24
