"""How much slower storage is when every twentieth request goes wrong. The goal is a factor of two."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fault_proxy import faulty_store, some
from object_stores import BUCKET, SWIFT_KEYS

from brainseg import storage

pytestmark = pytest.mark.bench

COUNT = 400
GOAL = 2.0


def way_there_and_back(run: str) -> float:
    """Seconds to write and read objects of 20 kB, eight at a time."""
    places = [f"s3://{BUCKET}/{run}/{n:04d}" for n in range(COUNT)]
    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b"x" * 20_000), places))
        list(pool.map(storage.read_bytes, places))
    return time.perf_counter() - started


@pytest.mark.parametrize("kind", ["moto", "swift"])
def test_faults_at_every_twentieth_request_cost_at_most_the_time_again(kind: str, request: pytest.FixtureRequest) -> None:
    upstream, keys = (request.getfixturevalue("swift"), SWIFT_KEYS) if kind == "swift" else (None, {})
    seconds: dict[float, list[float]] = {0.0: [], 0.05: []}
    with faulty_store(upstream, **keys) as proxy:
        way_there_and_back("warm")
        for turn in range(3):
            for share, taken in seconds.items():
                proxy.choose = some(share, seed=turn)
                taken.append(way_there_and_back(f"{share} {turn}"))
    healthy_s, faulty_s = (min(taken) for taken in seconds.values())
    slower = faulty_s / healthy_s
    print(f"\n{kind}, {COUNT} objects: {healthy_s:.1f} s healthy, {faulty_s:.1f} s at 5 % faults: {slower:.2f} times")
    assert slower <= GOAL
