"""Autoscaler: a cluster that grows on demand is asked for the room of a job before the job is refused for want of it.

Ray's autoscaler goes by what is queued, but a job is checked against the cluster before it queues anything. Whether somebody
would start machines cannot be asked, only seen: where none is on its way soon after asking, the cluster is taken as it is.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ray

from brainseg.session import Cluster, survey

ASK_EVERY_S = 10.0
"""Each asking replaces the last one, whoever's it was: Ray's own jobs ask every 20 s."""
SIGN_S = 30.0
"""Ray's autoscaler looks every 5 s; if no machine is on its way after so long, none will come."""
PATIENCE_S = 1800.0
"""A machine may have to be found, started, and given an image of gigabytes."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Room:
    """Processes that a job runs at once, with CPUs and GPUs of each; a CPU more is for all that is done beside them."""

    processes: int
    cpus: float
    gpus: float = 0

    def bundles(self) -> list[dict[str, float]]:
        """The same as Ray's autoscaler takes it."""
        each = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return [*(dict(each) for _ in range(self.processes)), {"CPU": 1.0}]

    def is_in(self, cluster: Cluster) -> bool:
        """Whether the cluster could hold all of it at once, were it empty."""
        enough = cluster.cpus >= self.processes * self.cpus + 1 and cluster.gpus >= self.processes * self.gpus
        return enough and cluster.room_for(self.cpus, self.gpus) >= self.processes

    def __str__(self) -> str:
        return f"{self.processes} x {self.cpus:g} CPU(s)" + (f" and {self.gpus:g} GPU(s)" if self.gpus else "")


class Autoscaler(Protocol):
    """Whoever may start machines."""

    def ask(self, bundles: list[dict[str, float]]) -> None:
        """Ask for room for all of these at once; for none of them: withdraw."""

    def is_at_it(self) -> bool:
        """Whether a machine is on its way."""

    def look(self) -> Cluster:
        """The cluster as it is now."""


class RayAutoscaler:
    """Ray's own, of either version; where it has no configuration it starts nothing."""

    def ask(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles)

    def is_at_it(self) -> bool:
        from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.experimental.internal_kv import _internal_kv_get

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        if status.pending_launches or status.pending_nodes:
            return True
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report") or {}
        return bool(report.get("pending_launches") or report.get("pending_nodes"))

    def look(self) -> Cluster:
        return survey(local=False)


RAY = RayAutoscaler()


def grown(
    cluster: Cluster,
    room: Room,
    say: Say,
    autoscaler: Autoscaler = RAY,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Cluster:
    """The cluster once it has this room; where nobody brings it, as it is. What was asked for is withdrawn in either case.

    What has come stays for as long as the autoscaler bears idle machines: the job that waited for them takes them.
    """
    if cluster.local or room.is_in(cluster):
        return cluster
    has = f"the cluster has {cluster.cpus:g} CPU(s) and {cluster.gpus:g} GPU(s)"
    say(f"{has}; asking its autoscaler for room for {room}")
    began = last_sign = clock()
    try:
        while clock() - last_sign <= SIGN_S and clock() - began <= PATIENCE_S:
            autoscaler.ask(room.bundles())
            wait(ASK_EVERY_S)
            now = autoscaler.look()
            if now.nodes > cluster.nodes or autoscaler.is_at_it():
                last_sign = clock()
            cluster = now
            if room.is_in(cluster):
                say(f"the cluster has grown to {cluster.cpus:g} CPU(s) and {cluster.gpus:g} GPU(s)")
                return cluster
    finally:
        autoscaler.ask([])
    say("no machine is on its way; going on with what there is")
    return cluster
