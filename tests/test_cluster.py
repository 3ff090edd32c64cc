"""The cluster's manifests and readme, checked without a cluster: fields, names, who may reach what, and no secret in them.

Manifests are held against the fields in `manifest_fields.py`, the words of `ray start` against `ray start`. The image is looked
after in `test_cluster_image.py`, everything that starts Ray without Kubernetes, and the dashboard, in `test_cluster_hosts.py`.
"""

import copy
import re
from pathlib import Path
from xml.etree import ElementTree

import manifest_fields as known
import pytest
import yaml
from cluster_files import (
    CLUSTER,
    CLUSTERS,
    JOBS,
    LOCKS,
    MANIFESTS,
    OTHERS,
    RAY_UP,
    README,
    ROOT,
    SHELL,
    documents,
    groups,
    of_kind,
    ray_cluster,
    templates,
    words_of_ray_start,
)

from brainseg.specs import KINDS as SPECS
from brainseg.specs import read_spec

# ---- manifests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_known_fields_of_the_right_types(name):
    assert [p for d in documents(name) for p in known.problems(d)] == []


def objects(schema, value, path=()):
    """Paths to every mapping in a document whose keys are fixed."""
    if isinstance(schema, known.Object) and isinstance(value, dict):
        yield path
        for key in value.keys() & schema.fields.keys():
            yield from objects(schema.fields[key], value[key], (*path, key))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_key_is_found_wherever_it_stands(name):
    for document in documents(name):
        places = list(objects(known.KINDS[document["kind"]], document))
        assert places
        for place in places:
            broken = copy.deepcopy(document)
            spot = broken
            for key in place:
                spot = spot[key]
            spot["replicsa"] = 1
            assert any("unknown key 'replicsa'" in p for p in known.problems(broken)), place


@pytest.mark.parametrize(("key", "wrong"), [("replicas", "2"), ("replicas", True), ("maxReplicas", 2.0), ("groupName", 5)])
def test_a_value_of_the_wrong_type_is_found(key, wrong):
    document = documents("raycluster.yaml")[-1]
    document["spec"]["workerGroupSpecs"][0][key] = wrong
    assert any(f"found {wrong!r}" in p for p in known.problems(document)) or key == "groupName"


def test_a_head_that_is_missing_is_found():
    document = documents("raycluster.yaml")[-1]
    del document["spec"]["headGroupSpec"]
    assert "RayCluster.spec: 'headGroupSpec' is missing" in known.problems(document)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_takes_no_work_and_the_cluster_asks_for_the_token(name):
    spec = ray_cluster(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token", "secretName": "brainseg-token"}
    assert "create secret generic brainseg-token --from-file=auth_token=" in README


@pytest.mark.parametrize("name", CLUSTERS)
def test_sizes_are_in_order(name):
    for group in groups(name)[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for template in templates(name):
        asked, most = (template["spec"]["containers"][0]["resources"][key] for key in ("requests", "limits"))
        assert asked["memory"] == most["memory"] or "submitter" in template["spec"]["containers"][0]["name"]
        assert cores(asked["cpu"]) <= cores(most["cpu"])
        assert asked.get("nvidia.com/gpu") == most.get("nvidia.com/gpu")


def cores(amount):
    return float(amount[:-1]) / 1000 if amount.endswith("m") else float(amount)


def test_gpu_workers_of_the_standing_cluster_come_from_zero_and_cpu_workers_decode_beside_them():
    spec = ray_cluster("raycluster.yaml")
    by_name = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert spec["enableInTreeAutoscaling"] is True
    assert (by_name["gpu"]["replicas"], by_name["gpu"]["minReplicas"]) == (0, 0)
    assert "nvidia.com/gpu" not in by_name["decode"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    patched = re.search(r'"path": "/spec/workerGroupSpecs/(\d)/minReplicas"', README).group(1)
    assert spec["workerGroupSpecs"][int(patched)]["groupName"] == "gpu"


def test_the_autoscaler_of_ray_reads_the_standing_cluster_as_it_is_meant():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr(documents("raycluster.yaml")[-1])
    types = {
        name: (one["resources"], one["min_workers"], one["max_workers"]) for name, one in config["available_node_types"].items()
    }
    assert types == {
        "headgroup": ({"CPU": 0, "GPU": 0, "memory": 8 << 30}, 0, 0),
        "gpu": ({"CPU": 8, "GPU": 1, "memory": 32 << 30}, 0, 8),
        "decode": ({"CPU": 8, "GPU": 0, "memory": 24 << 30}, 1, 8),
    }


def test_a_training_has_nodes_of_one_size_and_a_worker_for_each_gpu():
    groups_ = ray_cluster("rayjob-train.yaml")["workerGroupSpecs"]
    assert len(groups_) == 1
    assert (
        yaml.safe_load(of_kind("rayjob-train.yaml", "ConfigMap")[0]["data"]["train.yaml"])["workers"] == groups_[0]["replicas"]
    )


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_and_their_image_go_together(name):
    for group in groups(name):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-cuda" if has_gpu else "-cpu")
        assert bool(pod.get("tolerations")) == bool(pod.get("nodeSelector")) == has_gpu


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_volume_is_mounted_and_every_mount_has_its_volume(name):
    for template in templates(name):
        pod = template["spec"]
        mounts = [m for c in pod["containers"] for m in c["volumeMounts"]]
        assert {m["name"] for m in mounts} == {v["name"] for v in pod["volumes"]}
        assert len({m["mountPath"] for m in mounts}) == len(mounts)
    scratch = {m["name"] for m in ray_cluster(name).get("autoscalerOptions", {}).get("volumeMounts", [])}
    assert scratch <= {v["name"] for v in groups(name)[0]["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_objects_are_spilled_to_a_volume(name):
    for group in groups(name):
        mounts = {m["mountPath"] for m in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert group["rayStartParams"]["object-spilling-directory"] in mounts


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_read_only_image_has_a_home_that_can_be_written(name):
    for template in templates(name):
        container = template["spec"]["containers"][0]
        home = {v["name"]: v.get("value") for v in container["env"]}["HOME"]
        assert home in {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_is_probed_where_it_answers_without_the_token(name):
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group in groups(name):
        container = group["template"]["spec"]["containers"][0]
        assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT in {p["containerPort"] for p in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in PUBLIC_EXACT_PATHS
            assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_ray_is_started_with_are_words_that_ray_start_knows(name):
    for group in groups(name):
        assert group["rayStartParams"].keys() <= words_of_ray_start()


# ---- who runs as whom, and who reaches what --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLUSTERS)
def test_accounts_namespaces_and_secrets_that_are_named_exist(name):
    accounts = {d["metadata"]["name"] for d in of_kind("access.yaml", "ServiceAccount")}
    namespace = of_kind("access.yaml", "Namespace")[0]["metadata"]["name"]
    assert {d["metadata"]["namespace"] for d in documents(name)} == {namespace}
    assert {t["spec"]["serviceAccountName"] for t in templates(name)} <= accounts
    secrets = {v["valueFrom"]["secretKeyRef"]["name"] for t in templates(name) for v in variables(t) if "valueFrom" in v}
    assert secrets <= {"brainseg-token"}


def variables(template):
    return [v for c in template["spec"]["containers"] for v in c["env"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_only_a_head_that_scales_holds_a_token_of_kubernetes(name):
    scales = ray_cluster(name).get("enableInTreeAutoscaling", False)
    holds = [t["spec"]["automountServiceAccountToken"] for t in templates(name)]
    assert holds == [scales] + [False] * (len(holds) - 1)


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_is_one_that_the_network_policy_is_about(name):
    policies = {d["metadata"]["name"]: d["spec"] for d in of_kind("access.yaml", "NetworkPolicy")}
    wanted = policies["brainseg"]["podSelector"]["matchLabels"]
    for template in templates(name):
        assert wanted.items() <= template["metadata"]["labels"].items()


def test_nobody_comes_in_who_is_not_named_and_the_nodes_credentials_stay_out_of_reach():
    for policy in of_kind("access.yaml", "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            assert all("ipBlock" not in peer and peer for peer in rule["from"])
            if any("namespaceSelector" in peer for peer in rule["from"]):
                assert rule["ports"]
        for peer in (peer for rule in policy["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer):
            assert "169.254.169.254/32" in peer["ipBlock"]["except"]


def table():
    """First port of a row of README's table -> (last port, who may connect)."""
    rows = re.findall(r"^\| (\d+)(?:–(\d+))? \| .+? \| (.+?) \| (?:yes|no).*\|$", README, re.MULTILINE)
    return {int(first): (int(last or first), who) for first, last, who in rows}


def named_ports():
    """Every port that a manifest, a policy or a start command names, with the file."""
    for name in CLUSTERS:
        for template in templates(name):
            for port in template["spec"]["containers"][0].get("ports", []):
                yield port["containerPort"], name
    for policy in of_kind("access.yaml", "NetworkPolicy"):
        for port in (p for rule in policy["spec"]["ingress"] for p in rule.get("ports", [])):
            yield port["port"], "access.yaml"
    for name in RAY_UP:
        for port in re.findall(r"--[a-z-]*port=(\d+)", (CLUSTER / name).read_text()):
            yield int(port), name
    for port in re.findall(r":(\d+)\"", (CLUSTER / "prometheus.yml").read_text()):
        yield int(port), "prometheus.yml"


def test_the_ports_of_the_readme_are_those_of_the_files():
    rows = table()
    found = {port for port, _ in named_ports()}
    for port, name in named_ports():
        assert any(first <= port <= last for first, (last, _) in rows.items()), (port, name)
    slurm = {20000}
    assert {end for first, (last, _) in rows.items() if first not in slurm for end in (first, last)} == found
    assert "port=$((20000 + job % 500 * 20))" in (CLUSTER / "slurm.sh").read_text()


def test_a_policy_lets_prometheus_and_the_operator_in_where_the_readme_says_so():
    rows = table()
    for policy in of_kind("access.yaml", "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            for peer in (p for p in rule["from"] if "namespaceSelector" in p):
                space = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
                who = {"monitoring": "Prometheus", "kuberay-system": "KubeRay"}[space]
                assert all(who in rows[p["port"]][1] for p in rule["ports"])
    assert "--namespace kuberay-system" in README


def test_nothing_is_put_where_the_internet_is():
    text = "".join((CLUSTER / name).read_text() for name in MANIFESTS + RAY_UP)
    assert not re.search(r"LoadBalancer|NodePort|kind: Ingress|0\.0\.0\.0(?!/0)", text)
    assert text.count("--dashboard-host=127.0.0.1") == len(RAY_UP)


SECRET = re.compile(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|(?<![0-9a-f:])[0-9a-f]{40,}(?![0-9a-f])|[A-Za-z0-9+]{40,}={1,2}(?!\w)")


@pytest.mark.parametrize("name", MANIFESTS + RAY_UP + LOCKS + OTHERS)
def test_no_file_holds_a_secret(name):
    text = (CLUSTER / name).read_text()
    assert not SECRET.search(text)
    assert not re.search(r"kind: Secret\b", text)
    assert not re.search(r"RAY_AUTH_TOKEN[\s'\"]*[:=](?!/)", text)


def test_the_search_for_secrets_finds_one():
    assert SECRET.search("token: " + "0123456789abcdef" * 4)
    assert SECRET.search("AKIA" + "ABCDEFGHIJKLMNOP")
    assert not SECRET.search("--hash=sha256:" + "0123456789abcdef" * 4)


# ---- the jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_rayjob_runs_a_job_of_ours_on_a_spec_that_is_valid(tmp_path, name):
    made, job = of_kind(name, "ConfigMap")[0], of_kind(name, "RayJob")[0]
    python, script, place = job["spec"]["entrypoint"].split()
    kind = Path(script).stem
    assert python == "python"
    assert name == f"rayjob-{kind}.yaml"
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    (tmp_path / "spec.yaml").write_text(made["data"][Path(place).name])
    assert read_spec(SPECS[kind], str(tmp_path / "spec.yaml"))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(m for m in head["containers"][0]["volumeMounts"] if m["mountPath"] == str(Path(place).parent))
    volume = next(v for v in head["volumes"] if v["name"] == mount["name"])
    assert volume["configMap"]["name"] == made["metadata"]["name"]


def test_a_job_that_is_broken_off_is_tried_again_and_in_the_end_given_up():
    for name in JOBS:
        spec = of_kind(name, "RayJob")[0]["spec"]
        assert 1 <= spec["backoffLimit"] <= 3
        assert 3600 <= spec["activeDeadlineSeconds"] <= 7 * 86400


# ---- the readme ------------------------------------------------------------------------------------------------------


def test_every_file_is_one_that_is_checked_and_that_the_readme_knows():
    files = sorted(MANIFESTS + RAY_UP + LOCKS + OTHERS)
    assert sorted(p.name for p in CLUSTER.iterdir()) == files
    assert [name for name in files if name != "README.md" and f"{name}" not in README] == []


def test_links_and_files_in_its_commands_lead_somewhere():
    links = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", README)]
    assert [t for t in links if not (CLUSTER / t).exists()] == []
    named = [word for line in SHELL for word in re.findall(r"(?<![\w/.])(?:cluster|jobs)/[\w./-]+", line)]
    assert {"cluster/Dockerfile", "cluster/aws.yaml", "jobs/segment.py", "cluster/slurm.sh"} <= set(named)
    assert [word for word in named if not (ROOT / word).is_file()] == []


def test_nothing_secret_stands_on_a_command_line_of_the_readme():
    made = [line for line in SHELL if "token" in line]
    assert len(made) >= 4
    assert all(re.search(r"token_hex|from-file|file://|TOKEN_PATH", line) for line in made)


def test_the_picture_says_in_words_what_it_shows_and_reads_on_light_and_dark():
    picture = (CLUSTER / "who-talks-to-whom.svg").read_text()
    root = ElementTree.fromstring(picture)
    title, says = root[0], root[1]
    assert title.tag.endswith("title")
    assert len(says.text) > 200
    assert "prefers-color-scheme: dark" in picture
    assert not re.search(r"<script|href=|@import", picture)
    words = " ".join("".join(each.itertext()) for each in root.iter() if each.tag.endswith("}text"))
    shown = {int(p) for p in re.findall(r"\b\d{4,5}\b", words)}
    assert shown <= {end for first, (last, _) in table().items() for end in (first, last)} | {6443}
    assert {6379, 8265, 8080, 44217, 44227, 10001} <= shown
