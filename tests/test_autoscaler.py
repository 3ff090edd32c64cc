"""The autoscaler: a cluster that grows is asked for the room of a job, waited for while it grows, and let go of in any case."""

import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.autoscaler import ASK_EVERY_S, PATIENCE_S, SIGN_S, RayAutoscaler, Room, grown
from brainseg.session import Cluster


def cluster(*shapes, local=False):
    cpus, gpus = (float(sum(s[n] for s in shapes)) for n in (0, 1))
    return Cluster(cpus, gpus, max(1, int(cpus) - 1), len(shapes), local, cpus, tuple(shapes))


class Cloud:
    """An autoscaler and a clock: from a time on, machines are on their way; at another they have joined."""

    def __init__(self, before, after, *, sign_s=1e9, joins_s=1e9):
        self.before, self.after, self.sign_s, self.joins_s = before, after, sign_s, joins_s
        self.now, self.asked = 0.0, []

    def ask(self, bundles):
        self.asked.append(bundles)

    def is_at_it(self):
        return self.sign_s <= self.now < self.joins_s

    def look(self):
        return self.after if self.now >= self.joins_s else self.before

    def wait(self, seconds):
        self.now += seconds


HEAD = cluster((0, 0))
ROOM = Room(4, 1.0, 1.0)
GROWN = cluster((0, 0), *[(8, 1)] * 4)


def grow(cloud, start=HEAD, room=ROOM):
    said = []
    return grown(start, room, said.append, cloud, clock=lambda: cloud.now, wait=cloud.wait), said


@FEW
@given(joins_s=st.floats(0, PATIENCE_S - 2 * ASK_EVERY_S))
def test_machines_that_are_on_their_way_are_waited_for(joins_s):
    cloud = Cloud(HEAD, GROWN, sign_s=0, joins_s=joins_s)
    found, said = grow(cloud)
    assert found is GROWN
    assert cloud.now <= joins_s + ASK_EVERY_S
    assert said[0] == "the cluster has 0 CPU(s) and 0 GPU(s); asking its autoscaler for room for 4 x 1 CPU(s) and 1 GPU(s)"
    assert said[1] == "the cluster has grown to 32 CPU(s) and 4 GPU(s)"


def test_what_is_asked_for_is_one_bundle_a_process_and_a_cpu_and_is_withdrawn_at_the_end():
    cloud = Cloud(HEAD, GROWN, sign_s=0, joins_s=35)
    grow(cloud)
    wanted = [{"CPU": 1.0, "GPU": 1.0}] * 4 + [{"CPU": 1.0}]
    assert cloud.asked == [wanted] * 4 + [[]]


def test_where_nobody_brings_machines_the_job_goes_on_soon_with_what_there_is():
    cloud = Cloud(HEAD, HEAD)
    found, said = grow(cloud)
    assert found is HEAD
    assert SIGN_S < cloud.now <= SIGN_S + 2 * ASK_EVERY_S
    assert "no machine is on its way" in said[-1]
    assert cloud.asked[-1] == []


def test_machines_that_never_come_are_not_waited_for_without_an_end():
    cloud = Cloud(HEAD, HEAD, sign_s=0)
    assert grow(cloud)[0] is HEAD
    assert PATIENCE_S < cloud.now <= PATIENCE_S + 2 * ASK_EVERY_S


def test_a_cluster_that_came_half_way_is_taken_as_it_is():
    half = cluster((0, 0), (8, 1))
    cloud = Cloud(HEAD, half, sign_s=0, joins_s=20)
    cloud.look = lambda: half if cloud.now >= 20 else HEAD
    assert grow(cloud)[0] is half


@pytest.mark.parametrize("start", [GROWN, cluster((2, 0), local=True)])
def test_nobody_is_asked_where_there_is_room_or_on_this_machine_alone(start):
    cloud = Cloud(start, start)
    assert grow(cloud, start) == (start, [])
    assert cloud.asked == []


def test_an_error_while_waiting_withdraws_too():
    cloud = Cloud(HEAD, HEAD)

    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grown(HEAD, ROOM, print, cloud, clock=lambda: cloud.now, wait=interrupted)
    assert cloud.asked[-1] == []


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ([(0, 0), (8, 4)], True),
        ([(8, 1)] * 4, True),
        ([(8, 1)] * 3, False),
        ([(4, 4)], False),  # the CPU besides is missing
        ([(0, 4), (32, 0)], False),  # no node has both
    ],
)
def test_room_is_judged_node_by_node(shapes, fits):
    assert ROOM.is_in(cluster(*shapes)) is fits


def test_rays_own_takes_what_it_is_asked_and_lets_go_of_it(local_ray):
    import json

    from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    def asked():
        return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or b"[]")

    autoscaler = RayAutoscaler()
    autoscaler.ask(ROOM.bundles())
    try:
        assert asked() == ROOM.bundles()
        assert autoscaler.is_at_it() is False
        assert autoscaler.look().nodes == 1
    finally:
        autoscaler.ask([])
    assert asked() == []
