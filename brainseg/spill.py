"""Spill: more rows than memory should hold, brought into the order of their keys by way of sorted files on local disk.

Rows are gathered until they fill the room there is, sorted, and put aside; at the end the files are merged, a block of each in
memory at a time. The files have no name, so nothing of them is left however the process ends. What fits the room never
touches the disk.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile, gettempdir
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.storage.place import translated

ROOM_BYTES = 64 << 20
BLOCK_ROWS = 2048
"""Rows that are read of a file at a time: of a thousand files, some hundred MB."""


class Spill:
    """Rows of one schema, to be given back in ascending order of some text columns in which no two agree."""

    def __init__(
        self, schema: pa.Schema, keys: Sequence[str], *, room_bytes: int = ROOM_BYTES, block_rows: int = BLOCK_ROWS
    ) -> None:
        self._schema, self._keys, self._room_bytes, self._block_rows = schema, tuple(keys), room_bytes, block_rows
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._files: list[BinaryIO] = []
        self._open = ExitStack()

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.clear()
        self._open.close()

    @property
    def num_files(self) -> int:
        """How many files have been put aside."""
        return len(self._files)

    def add(self, rows: pa.Table) -> None:
        """Take some rows. Raises StorageError where the local disk will not hold them."""
        self._held.append(rows)
        self._held_bytes += rows.nbytes
        if self._held_bytes > self._room_bytes:
            self._put_aside()

    def in_order(self) -> Iterator[pa.Table]:
        """Yield all rows in order, in tables of any size. To be asked for once, inside the block."""
        if not self._files:
            yield self._sorted(self._held)
            return
        self._put_aside()
        with translated("read back from", gettempdir()):
            yield from self._merged([_Aside(file, self._schema, self._keys, self._block_rows) for file in self._files])

    def _put_aside(self) -> None:
        ordered = self._sorted(self._held)
        self._held, self._held_bytes = [], 0
        with translated("put rows aside in", gettempdir()):
            file = self._open.enter_context(TemporaryFile())  # noqa: SIM115 - the stack closes it
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            with pa.ipc.new_stream(file, self._schema, options=options) as stream:
                stream.write_table(ordered, max_chunksize=self._block_rows)
            file.seek(0)
        self._files.append(file)

    def _sorted(self, tables: Sequence[pa.Table]) -> pa.Table:
        table = pa.concat_tables([self._schema.empty_table(), *tables])
        return table.sort_by([(key, "ascending") for key in self._keys])

    def _merged(self, files: Sequence["_Aside"]) -> Iterator[pa.Table]:
        """All rows up to the first key at which one of the files has to be read on, again and again."""
        while sum(file.fill() for file in files):
            ends = [end for file in files if (end := file.end()) is not None]
            yield self._sorted([file.take(min(ends, default=None)) for file in files])


class _Aside:
    """One sorted file, and those of its rows that have been read and not yet been taken."""

    def __init__(self, file: BinaryIO, schema: pa.Schema, keys: Sequence[str], block_rows: int) -> None:
        self._blocks: Iterator[pa.RecordBatch] = iter(pa.ipc.open_stream(file))
        self._rows, self._keys, self._block_rows, self._is_over = schema.empty_table(), keys, block_rows, False

    def fill(self) -> int:
        """Read on where less than a block is left; returns how many rows there are then: none at the end."""
        while self._rows.num_rows < self._block_rows and not self._is_over:
            block = next(self._blocks, None)
            if block is None:
                self._is_over = True
            else:
                self._rows = pa.concat_tables([self._rows, pa.Table.from_batches([block])])
        return int(self._rows.num_rows)

    def end(self) -> tuple[Any, ...] | None:
        """The last key that has been read; None where no row follows it."""
        return None if self._is_over else tuple(self._rows[key][-1].as_py() for key in self._keys)

    def take(self, end: tuple[Any, ...] | None) -> pa.Table:
        """The rows up to a key, which are then gone; None: all of them."""
        number = self._rows.num_rows if end is None else self._num_up_to(end)
        taken, self._rows = self._rows.slice(0, number), self._rows.slice(number)
        return taken

    def _num_up_to(self, end: tuple[Any, ...]) -> int:
        (*first, last), (*before, at) = self._keys, end
        inside = pc.less_equal(self._rows[last], at)
        for key, value in zip(reversed(first), reversed(before), strict=True):
            column = self._rows[key]
            inside = pc.or_(pc.less(column, value), pc.and_(pc.equal(column, value), inside))
        return int(pc.sum(inside).as_py() or 0)
