"""Spill: whatever the room, the same rows in the same order; what fits never touches the disk, and nothing stays there."""

import tempfile

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.errors import StorageError
from brainseg.spill import Spill

KEYS = ("scan", "region")
SCHEMA = pa.schema([("scan", pa.string()), ("region", pa.string()), ("dice", pa.float64()), ("shape", pa.list_(pa.int32()))])
PAIRS = st.lists(st.tuples(st.text(max_size=3), st.sampled_from(("ET", "TC", "WT"))), unique=True, max_size=60)


def table(pairs):
    rows = [
        {"scan": s, "region": r, "dice": n / 7 if n % 5 else None, "shape": [n] * (n % 4)} for n, (s, r) in enumerate(pairs)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def spilled(rows, part_rows, room_bytes, block_rows=3):
    """The rows as a spill gives them back that takes them part by part, and how many files it needed."""
    with Spill(SCHEMA, KEYS, room_bytes=room_bytes, block_rows=block_rows) as spill:
        for start in range(0, rows.num_rows, part_rows):
            spill.add(rows.slice(start, part_rows))
        tables = list(spill.in_order())
        return pa.concat_tables([SCHEMA.empty_table(), *tables]), spill.num_files


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(1, 20), st.sampled_from((0, 100, 1000)), st.integers(1, 5))
def test_rows_come_back_in_order_whatever_the_room(pairs, part_rows, room_bytes, block_rows):
    rows = table(pairs)
    found, _ = spilled(rows, part_rows, room_bytes, block_rows)
    assert found.equals(rows.take(pa.array(sorted(range(len(pairs)), key=pairs.__getitem__), pa.int64())))


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Where this process keeps its temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_fits_never_touches_the_disk(local):
    local.rmdir()
    found, num_files = spilled(table([("b", "WT"), ("a", "WT")]), 1, 1 << 20)
    assert (found["scan"].to_pylist(), num_files) == (["a", "b"], 0)
    with pytest.raises(StorageError, match="put rows aside"):
        spilled(found, 1, 0)


def test_nothing_stays_on_the_disk_after_an_error_either(local):
    def parts():
        yield table([("a", "WT")])
        yield table([("b", "WT")])
        raise StorageError("a part is torn")

    def gathered():
        with Spill(SCHEMA, KEYS, room_bytes=0) as spill:
            for part in parts():
                spill.add(part)

    with pytest.raises(StorageError, match="torn"):
        gathered()
    assert list(local.iterdir()) == []


def test_a_large_spill_is_given_back_in_few_large_tables():
    rows = table([(f"s{n * 7919 % 6000:05d}", "WT") for n in range(6000)])
    with Spill(SCHEMA, KEYS, room_bytes=rows.nbytes // 10, block_rows=100) as spill:
        for start in range(0, rows.num_rows, 50):
            spill.add(rows.slice(start, 50))
        tables = list(spill.in_order())
        assert spill.num_files >= 10
    assert max(t.num_rows for t in tables) <= 2 * 100 * spill.num_files
    assert len(tables) < 20
    assert pa.concat_tables(tables)["scan"].to_pylist() == sorted(rows["scan"].to_pylist())
