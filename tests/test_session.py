"""A session: what a job needs is compared with what the cluster has before it waits; what Ray says is put in our words."""

import contextlib

import pytest

from brainseg import session
from brainseg.config import How
from brainseg.errors import ClusterError, PreflightError, RunError
from brainseg.plan import make_plan
from brainseg.session import Cluster, plain_words, require, require_room

LAPTOP = Cluster(cpus=4, gpus=0, cores=2, nodes=1, local=True, free_cpus=4, shapes=((4, 0),))


def cluster(*shapes):
    """A joined cluster of nodes with these CPUs and GPUs."""
    cpus, gpus = (sum(s[n] for s in shapes) for n in (0, 1))
    return Cluster(cpus, gpus, max(1, int(cpus) - 1), len(shapes), False, cpus, tuple(shapes))


class TestPreflight:
    def test_what_fits_passes(self):
        require(LAPTOP, cpus=4, what="this")
        require_room(LAPTOP, 4, cpus=1, gpus=0, what="this")

    def test_more_than_there_is_would_wait_for_ever_in_silence(self):
        with pytest.raises(PreflightError, match="this needs 5 CPUs and 0 GPUs at once; the cluster has 4 and 0"):
            require(LAPTOP, cpus=5, what="this")
        with pytest.raises(PreflightError, match="1 GPUs"):
            require(LAPTOP, cpus=1, gpus=1, what="this")

    @pytest.mark.parametrize("shapes", [(), ((0, 0),)])
    def test_a_head_without_cpus_whose_nodes_have_not_joined_is_told_to_wait(self, shapes):
        with pytest.raises(PreflightError, match=r"the cluster has 0 and 0\. Wait until its nodes have joined"):
            make_plan(cluster(*shapes), 10, How())

    def test_a_head_without_cpus_counts_once_others_have_joined(self):
        plan = make_plan(cluster((0, 0), (4, 0)), 100, How())
        assert (plan.actors, plan.mode) == (3, "fused")

    @pytest.mark.parametrize("actors", [4, 100])
    def test_more_actors_than_cpus_are_refused(self, actors):
        with pytest.raises(PreflightError, match=f"segmenting with {actors} actors needs {actors + 1} CPUs"):
            make_plan(LAPTOP, 1000, How(actors=actors))

    def test_crumbs_on_many_nodes_are_not_room(self):
        crumbs = cluster(*[(0.5, 0)] * 8)
        with pytest.raises(PreflightError, match=r"needs 1 CPUs each on one node; the 8 .* room for 0"):
            make_plan(crumbs, 100, How(actors=2))

    def test_a_gpu_without_a_cpu_beside_it_is_not_room(self):
        with pytest.raises(PreflightError, match=r"needs 1 CPUs and 1 GPUs each on one node; the 2 .* room for 0"):
            make_plan(cluster((0, 1), (8, 0)), 100, How())

    def test_every_gpu_gets_an_actor_and_cpus_are_left_for_the_rest(self):
        plan = make_plan(cluster((8, 2), (8, 2)), 1000, How())
        assert (plan.mode, plan.actors, plan.actor_gpus) == ("apart", 4, 1.0)

    def test_there_are_never_more_actors_than_scans(self):
        assert make_plan(LAPTOP, 1, How()).actors == 1


class FarAway(Exception):  # noqa: N818
    """What Ray raises around an exception of a worker: it holds it as `cause`."""

    def __init__(self, cause):
        super().__init__("a long story with a traceback")
        self.cause = cause


class TestPlainWords:
    @pytest.mark.parametrize("ours", [RunError("another driver"), PreflightError("no model")])
    def test_an_error_of_ours_in_a_worker_arrives_as_itself(self, ours):
        with pytest.raises(type(ours)) as caught, plain_words():
            raise FarAway(ours)
        assert caught.value is ours

    def test_it_is_found_however_deep_it_lies(self):
        far = RuntimeError("actor died")
        far.__cause__ = FarAway(ClusterError("the model kills"))
        with pytest.raises(ClusterError, match="the model kills"), plain_words():
            raise far

    def test_it_is_found_in_the_words_of_a_worker_that_could_not_start(self):
        words = "The actor died because of an error raised in its creation task, ray::MapWorker()\n  File x, line 1\n"
        with pytest.raises(PreflightError, match=r"^the weights do not fit$"), plain_words():
            raise RuntimeError(words + "brainseg.errors.PreflightError: the weights do not fit\n")

    def test_a_death_is_one_line_and_tells_what_to_do(self):
        import ray

        with (
            pytest.raises(ClusterError, match=r"Ray gave up \(WorkerCrashedError\).*same command goes on from there"),
            plain_words(),
        ):
            raise ray.exceptions.WorkerCrashedError

    def test_a_standstill_is_one_line(self):
        import ray

        with pytest.raises(ClusterError, match="nothing has moved for too long"), plain_words():
            raise ray.exceptions.GetTimeoutError

    def test_a_fault_of_ours_keeps_its_traceback(self):
        with pytest.raises(ZeroDivisionError), plain_words():
            print(1 / 0)

    def test_a_circle_of_causes_ends(self):
        one, other = FarAway(None), FarAway(None)
        one.cause, other.cause = other, one
        with pytest.raises(FarAway), plain_words():
            raise one

    def test_nothing_raised_is_nothing_said(self):
        with plain_words():
            pass


def test_a_ray_that_does_not_come_up_is_one_line(monkeypatch):
    def fails(**_: object) -> None:
        raise RuntimeError("The current node timed out\nduring startup.")

    monkeypatch.setattr(session.ray, "init", fails)
    with pytest.raises(ClusterError, match=r"did not come up.*Ray says: The current node timed out during startup\.$"):
        session._start_local()


@pytest.mark.parametrize(("slow_starts", "comes_up"), [(0, True), (session.STARTS - 1, True), (session.STARTS, False)])
def test_a_ray_that_gave_itself_too_little_time_is_started_again(monkeypatch, slow_starts, comes_up):
    tried = []

    def starts(**_: object) -> None:
        tried.append(1)
        if len(tried) <= slow_starts:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(session.ray, "init", starts)
    with contextlib.nullcontext() if comes_up else pytest.raises(ClusterError, match="did not come up"):
        session._start_local()
    assert len(tried) == min(slow_starts + 1, session.STARTS)
