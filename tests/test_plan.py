"""The plan of a bulk run: no GPU starves, no process hoards, every number can be overridden, and the forecast adds up."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainseg.config import How
from brainseg.plan import BLOCK_BYTES, DECODE_CPUS, PART_S, Costs, Plan, describe_forecast, forecast, make_plan
from brainseg.session import Cluster

seconds = st.floats(1e-3, 100)
costs = st.builds(Costs, st.just(3), seconds, seconds, seconds, st.floats(1e3, 1e9))
scans = st.integers(1, 10**6)


def cluster(cpus, gpus=0):
    return Cluster(cpus, gpus, cpus - 1, 1, False, cpus, ((cpus, gpus),))


@given(costs=costs, scans=scans, cpus=st.integers(4, 200), gpus=st.integers(0, 2))
def test_a_part_is_short_small_and_one_of_several_of_its_actor(costs, scans, cpus, gpus):
    plan = make_plan(cluster(cpus, gpus), scans, How(), costs)
    assert 1 <= plan.scans_per_part <= 32
    if plan.scans_per_part > 1:
        assert plan.scans_per_part * costs.total_s <= PART_S + costs.total_s / 2
        assert (plan.scans_per_part - 1) * 4 * plan.actors < scans
        assert plan.mode == "fused" or plan.scans_per_part * costs.voxel_bytes <= BLOCK_BYTES


@given(scans=st.integers(1, 2_000), most=st.integers(1, 32), actors=st.integers(1, 20))
def test_parts_hold_every_scan_once_and_less_and_less_towards_the_end(scans, most, actors):
    sizes = Plan("fused", actors, 1.0, 0.0, most, tapers=True).part_sizes(scans)
    assert sum(sizes) == scans
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] <= most
    left = [sum(sizes[number:]) for number in range(len(sizes))]
    assert all(size == 1 or size * actors < rest for size, rest in zip(sizes, left, strict=True))
    assert len(sizes) <= scans / most + 2 * actors * (1 + math.log(most)) + 2 * actors


def ends(sizes, actors, late=0):
    """When each actor is done, if whoever is free takes the next part and a scan takes a second; one begins later."""
    free = [0.0] * (actors - 1) + [late]
    for size in sizes:
        free[free.index(min(free))] += size
    return free


@pytest.mark.parametrize("scans", [9, 36, 40, 200, 1001])
@pytest.mark.parametrize("actors", [2, 3, 8])
def test_all_actors_end_at_about_the_same_time(scans, actors):
    plan = make_plan(cluster(actors + 1), scans, How(actors=actors))
    done = ends(plan.part_sizes(scans), actors, late=0.4 * scans / actors)
    assert max(done) - min(done) <= 1


def test_of_36_scans_two_actors_take_18_each():
    plan = make_plan(cluster(3), 36, How(actors=2))
    assert ends(plan.part_sizes(36), 2) == [18, 18]
    assert sorted(ends([5] * 7 + [1], 2)) == [16, 20]


def test_parts_are_as_large_as_somebody_says_and_large_archives_are_left_to_ray():
    assert make_plan(cluster(3), 100, How(scans_per_part=7)).part_sizes(100) is None
    assert make_plan(cluster(3), 10**6, How()).part_sizes(10**6) is None


@given(costs=costs, cpus=st.integers(4, 200), gpus=st.integers(1, 2))
def test_as_many_decode_as_keep_the_gpus_busy_if_there_is_room(costs, cpus, gpus):
    plan = make_plan(cluster(cpus, gpus), 10_000, How(), costs)
    room = int((cpus - gpus) / DECODE_CPUS)
    assert 1 <= plan.decode_tasks <= room
    if plan.decode_tasks < room:
        assert plan.decode_tasks / costs.decode_s >= plan.actors / costs.predict_s


@given(costs=costs, scans=scans, cpus=st.integers(4, 200), gpus=st.integers(0, 2))
def test_the_pace_is_that_of_the_slowest_stage_and_the_forecast_follows_from_it(costs, scans, cpus, gpus):
    plan = make_plan(cluster(cpus, gpus), scans, How(), costs)
    body = forecast(plan, scans, 123, 2.0, "EUR")
    if plan.mode == "fused":
        assert plan.scans_per_s == pytest.approx(plan.actors / costs.total_s)
    else:
        around = (cpus - plan.actors) / (costs.decode_s + costs.finish_s)
        assert plan.scans_per_s == pytest.approx(min(plan.actors / costs.predict_s, around))
    assert body["seconds"] * plan.scans_per_s == pytest.approx(scans)
    assert body["price"] == pytest.approx(2.0 * body["seconds"] / 3600)
    assert body["found"] == scans
    assert body["size_bytes"] == 123


def test_what_somebody_says_goes_before_what_was_measured():
    how = How(actors=3, decode_tasks=7, scans_per_part=11, mode="apart")
    plan = make_plan(cluster(16, 4), 1000, how, Costs(3, 9.0, 0.1, 0.1, 1e6))
    assert (plan.actors, plan.decode_tasks, plan.scans_per_part, plan.mode) == (3, 7, 11, "apart")


def test_cpus_that_cannot_feed_a_gpu_are_named_with_how_many_could():
    line = make_plan(cluster(9, 1), 1000, How(), Costs(3, 1.5, 0.1, 0.5, 1e6)).describe()
    assert "1 GPU actor(s)" in line
    assert "about 4 scans/s, bound by 8 CPUs around the network, which could use 20" in line


@pytest.mark.parametrize(("device_s", "pace"), [(None, 1 / 0.6), (0.1, 1 / 0.2), (0.3, 1 / 0.3)])
def test_what_several_blocks_do_at_once_is_counted_once(device_s, pace):
    """Of 0.6 s a scan, so much with the network alone; the rest three blocks do side by side."""
    plan = make_plan(cluster(200, 1), 1000, How(), Costs(3, 1.0, 0.6, 0.1, 1e6, device_s))
    assert plan.scans_per_s == pytest.approx(pace)
    assert plan.decode_tasks == math.ceil(1.5 * pace)


def test_where_nothing_was_measured_nothing_is_promised():
    plan = make_plan(cluster(4), 100, How())
    assert plan.scans_per_s is None
    assert "scans/s" not in plan.describe()
    assert describe_forecast(forecast(plan, 100, 1, 5.0, "EUR")) == "nothing could be measured: how long it takes is not known"
    assert not any(math.isnan(v) for v in forecast(plan, 100, 1, 5.0, "EUR").values() if isinstance(v, float))
