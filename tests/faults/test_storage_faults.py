"""Storage under fire: objects written, replaced, created, listed, read and deleted through a proxy that commits faults.

Nothing may be lost, doubled, torn or wrong, whatever share of the requests goes wrong. Run all of it, and see its counts, with
`pytest -n 0 -m slow -s tests/faults/test_storage_faults.py`; a small one runs always.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pyarrow as pa
import pytest
from fault_proxy import FaultProxy, faulty_store, some
from object_stores import BUCKET, SWIFT_KEYS

from brainseg import storage

HOME = f"s3://{BUCKET}/fire"


def content(name: str, version: int = 0) -> bytes:
    """Bytes that belong to one name and version only: some none, some 40 kB of them."""
    seed = hashlib.sha256(f"{name} {version}".encode()).digest()
    return seed * (seed[0] * 5) if seed[0] > 10 else b""


def part(name: str) -> pa.Table:
    """A small part: what is asked for, and masks that should not travel with it."""
    return pa.table({"scan_id": [f"{name}-{n}" for n in range(8)], "mask": [content(f"{name} {n}") for n in range(8)]})


def at_once(action, names):
    """The results of an action on every name, eight at a time, in their order."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(action, names))


def work(count: int) -> dict[str, bytes]:
    """Everything a job does with storage, on about `count` objects; returns what must lie there afterwards."""
    names = [f"{n % 7}/{n:04d}" for n in range(count)]
    at_once(lambda n: storage.write_bytes(f"{HOME}/{n}", content(n)), names)
    expected = {n: content(n) for n in names}
    replaced = names[::4]
    at_once(lambda n: storage.write_bytes(f"{HOME}/{n}", content(n, 1)), replaced)
    expected |= {n: content(n, 1) for n in replaced}
    made = [f"leases/{n:03d}" for n in range(count // 8)]
    assert all(at_once(lambda n: storage.create_bytes(f"{HOME}/{n}", content(n)), made))
    assert not any(at_once(lambda n: storage.create_bytes(f"{HOME}/{n}", b"another's"), made))
    expected |= {n: content(n) for n in made}
    parts = [f"parts/{n:03d}.parquet" for n in range(count // 8)]
    at_once(lambda n: storage.write_table(f"{HOME}/{n}", part(n)), parts)
    for columns in (["scan_id"], ["scan_id", "mask"]):
        tables = at_once(lambda n, columns=columns: storage.read_table(f"{HOME}/{n}", columns), parts)
        assert tables == [part(n).select(columns) for n in parts]
    assert at_once(lambda n: storage.read_table(f"{HOME}/{n}"), parts) == [part(n) for n in parts]
    storage.delete_tree(f"{HOME}/parts")
    storage.delete_tree(f"{HOME}/6")
    return {name: data for name, data in expected.items() if not name.startswith("6/")}


def check(expected: dict[str, bytes]) -> dict[str, int]:
    """What is wrong with what lies there, in counts."""
    listed = [entry.uri.removeprefix(f"{HOME}/") for entry in storage.list_files(HOME)]
    sizes = {entry.uri.removeprefix(f"{HOME}/"): entry.size_bytes for entry in storage.list_files(HOME)}
    found = dict(zip(listed, at_once(lambda n: storage.read_bytes(f"{HOME}/{n}"), listed), strict=True))
    both = found.keys() & expected.keys()
    return {
        "lost": len(expected.keys() - found.keys()),
        "doubled or foreign": len(listed) - len(both),
        "of another size": sum(sizes[n] != len(expected[n]) for n in both),
        "wrong": sum(found[n] != expected[n] for n in both),
    }


@contextmanager
def under_fire(kind: str, share: float, request: pytest.FixtureRequest) -> Iterator[FaultProxy]:
    """A proxy that commits faults at a share of the requests, before moto or Swift."""
    upstream, keys = (request.getfixturevalue("swift"), SWIFT_KEYS) if kind == "swift" else (None, {})
    with faulty_store(upstream, **keys) as proxy:
        storage.delete_tree(HOME)
        proxy.choose = some(share, seed=int(share * 100))
        yield proxy


@pytest.mark.parametrize(
    ("kind", "share", "count"),
    [
        ("moto", 0.2, 40),
        *(pytest.param(kind, share, 400, marks=pytest.mark.slow) for kind in ("moto", "swift") for share in (0.05, 0.2)),
    ],
)
def test_nothing_is_lost_doubled_torn_or_wrong(request: pytest.FixtureRequest, kind: str, share: float, count: int) -> None:
    with under_fire(kind, share, request) as proxy:
        expected = work(count)
        under = check(expected)
        seen = proxy.count
        print(f"\n{kind}, {share:.0%} faults: {seen.requests} requests, {seen.faults.total()} faults, {dict(seen.faults)}")
        print(f"{seen.faults.total() - seen.faults['delay']} answers spoilt or lost, and asked for again")
        proxy.choose = lambda number, request: None
        after = check(expected)
        print(f"{len(expected)} objects: {after}")
    assert set(under.values()) == set(after.values()) == {0}
    assert seen.faults.total() > seen.requests * share / 2
    assert len(seen.faults) >= 8
