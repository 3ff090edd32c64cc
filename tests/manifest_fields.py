"""The fields that cluster/ may use of KubeRay's and Kubernetes' objects, with their types; whatever is not here is a mistake.

Narrower than the real schemas on purpose: what a manifest newly needs is looked up there and added here. Sources: KubeRay's
API reference for `ray.io/v1` as of 1.6.2, the Kubernetes API reference for `v1` and `networking.k8s.io/v1`. Fields that would
undo the manifests' promises (`hostNetwork`, `hostPath`, `privileged`) are left out although Kubernetes knows them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Check = Callable[[Any, str], Iterator[str]]


@dataclass(frozen=True)
class Object:
    """A mapping with fixed keys."""

    fields: dict[str, Any]
    needs: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: found {value!r}, expected a mapping"
            return
        yield from (f"{path}: unknown key '{key}'" for key in value.keys() - self.fields.keys())
        yield from (f"{path}: '{key}' is missing" for key in self.needs - value.keys())
        for key in value.keys() & self.fields.keys():
            yield from self.fields[key](value[key], f"{path}.{key}")


def obj(needs: str = "", /, **fields: Check) -> Object:
    return Object(fields, frozenset(needs.split()))


def several(inner: Check, least: int = 1) -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, list) or len(value) < least:
            yield f"{path}: found {value!r}, expected a list of at least {least}"
            return
        for number, one in enumerate(value):
            yield from inner(one, f"{path}[{number}]")

    return check


def mapping(inner: Check) -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: found {value!r}, expected a mapping"
            return
        yield from (f"{path}: the key {key!r} is no text" for key in value if not isinstance(key, str))
        for key, one in value.items():
            yield from inner(one, f"{path}.{key}")

    return check


def text(pattern: str = r".+") -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.DOTALL):
            yield f"{path}: found {value!r}, expected text like {pattern}"

    return check


def number(low: int = 0, high: int = 2**31 - 1) -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if type(value) is not int or not low <= value <= high:
            yield f"{path}: found {value!r}, expected a whole number from {low} to {high}"

    return check


def exactly(*allowed: Any) -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if not any(type(value) is type(one) and value == one for one in allowed):
            yield f"{path}: found {value!r}, expected one of {allowed}"

    return check


def quantity(value: Any, path: str) -> Iterator[str]:
    if type(value) is not int and not (isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?", value)):
        yield f"{path}: found {value!r}, expected a quantity such as 500m or 8Gi"


string, boolean, port = text(), exactly(True, False), number(1, 65535)
name = text(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
path = text(r"/[^\s]+")
labels = mapping(text(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"))
metadata = obj("name", name=name, namespace=name, labels=labels, annotations=mapping(string))

# ---- pods ---------------------------------------------------------------------------------------------------------------

locked = obj(
    "allowPrivilegeEscalation readOnlyRootFilesystem capabilities",
    allowPrivilegeEscalation=exactly(False),
    readOnlyRootFilesystem=exactly(True),
    capabilities=obj("drop", drop=exactly(["ALL"])),
)
nobody = obj(
    "runAsNonRoot runAsUser seccompProfile",
    runAsNonRoot=exactly(True),
    runAsUser=number(1),
    runAsGroup=number(1),
    fsGroup=number(1),
    seccompProfile=obj("type", type=exactly("RuntimeDefault")),
)
from_secret = obj("secretKeyRef", secretKeyRef=obj("name key", name=name, key=text(r"[-._a-zA-Z0-9]+")))
variable = obj("name", name=text(r"[A-Za-z_][A-Za-z0-9_]*"), value=text(r".*"), valueFrom=from_secret)
mount = obj("name mountPath", name=name, mountPath=path, readOnly=boolean)
amounts = mapping(quantity)
resources = obj("requests limits", requests=amounts, limits=amounts)
probe = obj(
    "httpGet",
    httpGet=obj("path port", path=path, port=port),
    initialDelaySeconds=number(),
    periodSeconds=number(1),
    timeoutSeconds=number(1),
    failureThreshold=number(1),
)
container = obj(
    "name image resources securityContext volumeMounts",
    name=name,
    image=text(r"[a-z0-9.:/-]+:[\w.-]+"),
    imagePullPolicy=exactly("Always", "IfNotPresent", "Never"),
    securityContext=locked,
    env=several(variable),
    ports=several(obj("name containerPort", name=name, containerPort=port, protocol=exactly("TCP", "UDP"))),
    resources=resources,
    startupProbe=probe,
    readinessProbe=probe,
    livenessProbe=probe,
    lifecycle=obj("preStop", preStop=obj("exec", exec=obj("command", command=several(string)))),
    volumeMounts=several(mount),
)
volume = obj(
    "name",
    name=name,
    emptyDir=obj("sizeLimit", sizeLimit=quantity),
    configMap=obj("name", name=name),
    persistentVolumeClaim=obj("claimName", claimName=name),
)
toleration = obj("key operator effect", key=string, operator=exactly("Exists", "Equal"), value=string, effect=string)
pod = obj(
    "containers serviceAccountName securityContext terminationGracePeriodSeconds restartPolicy",
    serviceAccountName=name,
    automountServiceAccountToken=boolean,
    enableServiceLinks=boolean,
    restartPolicy=exactly("Never"),
    terminationGracePeriodSeconds=number(1),
    securityContext=nobody,
    nodeSelector=labels,
    tolerations=several(toleration),
    containers=several(container),
    volumes=several(volume),
)
submitter = Object(pod.fields, pod.needs - {"terminationGracePeriodSeconds"})
pod_metadata = obj("labels", labels=labels, annotations=mapping(string))


def template(spec: Check) -> Object:
    return obj("metadata spec", metadata=pod_metadata, spec=spec)


# ---- KubeRay ------------------------------------------------------------------------------------------------------------

start = mapping(string)  # the test holds the keys against `ray start` itself
head_group = obj(
    "rayStartParams template",
    serviceType=exactly("ClusterIP"),
    rayStartParams=start,
    template=template(pod),
)
worker_group = obj(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=name,
    replicas=number(),
    minReplicas=number(),
    maxReplicas=number(1),
    numOfHosts=number(1),
    idleTimeoutSeconds=number(1),
    rayStartParams=start,
    template=template(pod),
)
autoscaler = obj(
    "version securityContext resources",
    version=exactly("v2"),
    idleTimeoutSeconds=number(1),
    upscalingMode=exactly("Default", "Aggressive", "Conservative"),
    imagePullPolicy=exactly("Always", "IfNotPresent", "Never"),
    resources=resources,
    securityContext=locked,
    env=several(variable),
    volumeMounts=several(mount),
)
ray_cluster = obj(
    "rayVersion authOptions headGroupSpec",
    rayVersion=text(r"\d+\.\d+\.\d+"),
    authOptions=obj("mode secretName", mode=exactly("token"), secretName=name),
    enableInTreeAutoscaling=boolean,
    autoscalerOptions=autoscaler,
    headGroupSpec=head_group,
    workerGroupSpecs=several(worker_group),
)
ray_job = obj(
    "entrypoint rayClusterSpec backoffLimit activeDeadlineSeconds shutdownAfterJobFinishes ttlSecondsAfterFinished",
    entrypoint=string,
    submissionMode=exactly("K8sJobMode"),
    backoffLimit=number(),
    activeDeadlineSeconds=number(1),
    shutdownAfterJobFinishes=exactly(True),
    ttlSecondsAfterFinished=number(),
    submitterConfig=obj(backoffLimit=number()),
    submitterPodTemplate=template(submitter),
    rayClusterSpec=ray_cluster,
)

# ---- the network and the rest ---------------------------------------------------------------------------------------------

selector = obj("matchLabels", matchLabels=labels)
peer = obj(
    podSelector=selector,
    namespaceSelector=selector,
    ipBlock=obj("cidr", cidr=text(r"[\d.]+/\d+"), **{"except": several(text(r"[\d.]+/\d+"))}),
)
ports = several(obj("protocol port", protocol=exactly("TCP", "UDP"), port=port))
policy = obj(
    "podSelector policyTypes ingress egress",
    podSelector=selector,
    policyTypes=exactly(["Ingress", "Egress"]),
    ingress=several(obj("from", ports=ports, **{"from": several(peer)})),
    egress=several(obj("to", to=several(peer), ports=ports)),
)


def document(version: str, kind: str, **fields: Check) -> Object:
    head = {"apiVersion": exactly(version), "kind": exactly(kind), "metadata": metadata}
    return Object({**head, **fields}, frozenset(head) | frozenset(fields))


KINDS = {
    "Namespace": document("v1", "Namespace"),
    "ServiceAccount": document("v1", "ServiceAccount", automountServiceAccountToken=exactly(False)),
    "ConfigMap": document("v1", "ConfigMap", data=mapping(string)),
    "NetworkPolicy": document("networking.k8s.io/v1", "NetworkPolicy", spec=policy),
    "RayCluster": document("ray.io/v1", "RayCluster", spec=ray_cluster),
    "RayJob": document("ray.io/v1", "RayJob", spec=ray_job),
}


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with one document; [] where nothing is."""
    kind = manifest.get("kind")
    return sorted(KINDS[kind](manifest, kind)) if kind in KINDS else [f"unknown kind {kind!r}"]


# ---- Prometheus -----------------------------------------------------------------------------------------------------------

duration = text(r"\d+(s|m)")
relabelling = obj(
    "source_labels",
    source_labels=several(text(r"\w+")),
    regex=string,
    action=exactly("keep", "drop", "replace"),
    target_label=text(r"\w+"),
)
scrape = obj(
    "job_name",
    job_name=name,
    kubernetes_sd_configs=several(obj("role", role=exactly("pod"), namespaces=obj("names", names=several(name)))),
    static_configs=several(obj("targets", targets=several(text(r"[\d.]+:\d+")), labels=labels)),
    relabel_configs=several(relabelling),
)
PROMETHEUS = obj(
    "global scrape_configs",
    scrape_configs=several(scrape),
    **{"global": obj(scrape_interval=duration, scrape_timeout=duration)},
)
