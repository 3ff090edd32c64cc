"""Plan: how a bulk run uses what its cluster has, and how long it will take.

Where the network runs on CPUs an actor a core does everything; where it runs on GPUs, decode and metrics are tasks on CPUs,
of which there have to be enough that no GPU waits. What a scan costs is measured (`calibrate`), not guessed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from brainseg.config import How
from brainseg.session import Cluster, require, require_room

Mode = Literal["fused", "apart"]
MOST_SCANS_PER_PART = 32
MOST_PARTS_CUT = 2_000
"""Of more parts, each a small object of its own, the driver lets Ray do the cutting; the last one then matters less."""
PART_S = 20.0
"""A part should take an actor about so long: what a kill costs, and how often there is news."""
BLOCK_BYTES = 256 << 20
"""Decoded voxels that travel together between processes, where they do."""
DECODE_CPUS, FINISH_CPUS = 0.5, 0.25
"""Reservations of the tasks around a GPU. Unequal, or Ray would fuse them; small, since half of their time is waiting."""
BLOCKS_AT_ONCE = 3
"""Blocks that a process with a GPU works on: one has the network, the others what is before and after it. In a mock-up
(`tests/bench/slow_notes.py`) of blocks of 8 scans, 10 ms of network a scan and a store that answers three times a block after
50 ms, the network had work for 0.30 of the time with one block, for 0.61 with two and for 0.82 with three or four."""
HEADROOM = 1.5
"""Decode tasks beyond those that would keep the GPUs busy if every scan took as long as the measured ones."""


@dataclass(frozen=True)
class Costs:
    """What a scan takes of one process, in seconds a stage, and the bytes of its decoded voxels; the mean over a few."""

    scans: int
    decode_s: float
    predict_s: float
    finish_s: float
    voxel_bytes: float
    device_s: float | None = None
    """What of `predict_s` happens on the network's device, where others wait for it; None: all of it."""

    @property
    def total_s(self) -> float:
        return self.decode_s + self.predict_s + self.finish_s

    @property
    def apart_s(self) -> float:
        """From one scan to the next in a process that has the network alone and works on several blocks."""
        return self.predict_s if self.device_s is None else max(self.device_s, self.predict_s / BLOCKS_AT_ONCE)

    def describe(self) -> str:
        """For a person."""
        parts = f"decode {self.decode_s:.2f} s, network {self.predict_s:.2f} s, metrics {self.finish_s:.2f} s"
        return f"measured on {self.scans} scan(s): {parts} a scan"


@dataclass(frozen=True)
class Plan:
    """How the cluster's resources are used. `costs` is None where nothing was measured."""

    mode: Mode
    actors: int
    actor_cpus: float
    actor_gpus: float
    scans_per_part: int
    decode_tasks: int | None = None
    """How many decode at once at most, where they are tasks of their own; None: as many as Ray finds room for."""
    costs: Costs | None = None
    other_cpus: float = 0.0
    """CPUs that the tasks around the actors may fill."""
    tapers: bool = False
    """Whether parts become smaller towards the end: not where somebody has said how large they are."""

    def part_sizes(self, scans: int) -> list[int] | None:
        """How many scans each part holds, in order; None where all but the last hold as many.

        An actor that is done while others still have a part each waits for them. So a part takes no more than half of what an
        actor can expect of the rest (guided self-scheduling, Polychronopoulos & Kuck 1987): at the end they hold one scan.
        """
        if not self.tapers or scans > MOST_PARTS_CUT * self.scans_per_part:
            return None
        sizes: list[int] = []
        while scans:
            sizes.append(min(self.scans_per_part, -(-scans // (2 * self.actors))))
            scans -= sizes[-1]
        return sizes

    def describe(self) -> str:
        """One line for a person."""
        kind = "GPU" if self.actor_gpus else "CPU"
        if self.mode == "fused":
            what = "one process each for decode, network and metrics"
        else:
            most = f"at most {self.decode_tasks} " if self.decode_tasks else ""
            what = f"decode and metrics in {most}CPU tasks around them"
        line = f"plan: {self.actors} {kind} actor(s), {what}; {self.scans_per_part} scans a part"
        line += ", fewer towards the end" if self.tapers and self.scans_per_part > 1 else ""
        pace = self.scans_per_s
        return line if pace is None else f"{line}; about {pace:.3g} scans/s, {self.bound}"

    @property
    def scans_per_s(self) -> float | None:
        """The pace to expect once all actors are up; None where nothing was measured."""
        if self.costs is None:
            return None
        if self.mode == "fused":
            return self.actors / max(self.costs.total_s, 1e-9)
        return min(self._network_pace, self._cpu_pace)

    @property
    def bound(self) -> str:
        """What limits the pace."""
        if self.mode == "fused" or self._network_pace <= self._cpu_pace:
            return "bound by the network"
        needed = self._network_pace * self._around_s
        return f"bound by {self.other_cpus:g} CPUs around the network, which could use {math.ceil(needed)}"

    @property
    def _around_s(self) -> float:
        return 0.0 if self.costs is None else self.costs.decode_s + self.costs.finish_s

    @property
    def _network_pace(self) -> float:
        return math.inf if self.costs is None else self.actors / max(self.costs.apart_s, 1e-9)

    @property
    def _cpu_pace(self) -> float:
        return self.other_cpus / max(self._around_s, 1e-9)


def mode_of(cluster: Cluster, how: How) -> Mode:
    """Where decoding happens: as asked, else by whether the cluster has GPUs."""
    return "apart" if how.mode == "apart" or (how.mode is None and cluster.gpus) else "fused"


def make_plan(cluster: Cluster, scans: int, how: How, costs: Costs | None = None) -> Plan:
    """Choose actors, tasks and part size; what `how` says goes first. PreflightError where Ray would wait for ever."""
    chosen = mode_of(cluster, how)
    gpus = 1.0 if cluster.gpus and chosen == "apart" else 0.0
    wanted = how.actors or int(cluster.gpus if gpus else cluster.cores if chosen == "fused" else max(1, cluster.cores // 2))
    wanted = max(1, min(wanted, scans))
    what = f"segmenting with {wanted} actors"
    require(cluster, cpus=wanted + 1, gpus=wanted * gpus, what=what)
    require_room(cluster, wanted, cpus=1.0, gpus=gpus, what=what)
    around = cluster.cpus - wanted
    tasks = how.decode_tasks or _decode_tasks(chosen, wanted, around, costs)
    part = how.scans_per_part or _part(chosen, wanted, scans, costs)
    return Plan(chosen, wanted, 1.0, gpus, part, tasks, costs, around, tapers=how.scans_per_part is None)


def _part(mode: Mode, actors: int, scans: int, costs: Costs | None) -> int:
    """Scans a part: four parts an actor at least, none longer than PART_S, and decoded blocks that fit the object store."""
    most = min(MOST_SCANS_PER_PART, -(-scans // (4 * actors)))
    if costs is not None:
        most = min(most, round(PART_S / max(costs.total_s, 1e-9)) or 1)
        if mode == "apart":
            most = min(most, int(BLOCK_BYTES // max(costs.voxel_bytes, 1)))
    return max(1, most)


def _decode_tasks(mode: Mode, actors: int, around: float, costs: Costs | None) -> int | None:
    """Enough that the network never waits, and no more: other jobs, and the metrics, want CPUs too."""
    if mode == "fused" or costs is None:
        return None
    needed = math.ceil(HEADROOM * actors * costs.decode_s / max(costs.apart_s, 1e-9))
    return max(1, min(needed, int(around / DECODE_CPUS)))


def forecast(plan: Plan, scans: int, size_bytes: int, price_per_hour: float | None, currency: str) -> dict[str, Any]:
    """What a run will take: scans, bytes, and, where a pace was measured, seconds, process hours and price."""
    found: dict[str, Any] = {"found": scans, "size_bytes": size_bytes, "actors": plan.actors, "mode": plan.mode}
    pace = plan.scans_per_s
    if pace is None or plan.costs is None:
        return found
    seconds = scans / pace
    found |= {"scans_per_s": pace, "seconds": seconds, "actor_hours": plan.actors * seconds / 3600}
    found |= {f"seconds_{s}": getattr(plan.costs, f"{s}_s") for s in ("decode", "predict", "finish")}
    if price_per_hour is not None:
        found |= {"price": seconds / 3600 * price_per_hour, "currency": currency}
    return found


def describe_forecast(body: dict[str, Any]) -> str:
    """One line for a person."""
    if "seconds" not in body:
        return "nothing could be measured: how long it takes is not known"
    seconds, hours = float(body["seconds"]), float(body["actor_hours"])
    long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    price = f", {body['price']:,.2f} {body['currency']}" if "price" in body else ""
    return f"about {long} once it has started ({hours:.2g} actor hours){price}"
