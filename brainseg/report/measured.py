"""Measured: the scan x region figures of a cohort, of which only those columns are in memory that are being looked at.

A million rows of all columns are 300 MB, a column is 8. Each is read when it is first asked for and forgotten when others
need its room; a small cohort is read once, whole. Rows come in the order of the scans, whatever order the files have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainseg.tables import REGION

FIGURES = tuple(figure.name for figure in REGION)
ROOM_BYTES = 32_000_000
"""What columns that are kept for the next look may take."""


def give_back() -> None:
    """Let the machine have again what is free, and what Arrow would keep for the next time."""
    pa.default_memory_pool().release_unused()


@dataclass(frozen=True)
class Piece:
    """The figures of one run: `read` gives columns of its table, `places` which rows of that count, in order (None: all)."""

    read: Callable[[list[str]], pa.Table]
    rows: NDArray[np.int64]
    """For each row that counts the position of its scan in `Cohort.scans`."""
    size: int
    """Rows of the table, whether they count or not."""
    places: NDArray[np.int64] | None = None

    def columns(self, names: list[str]) -> pa.Table:
        """Some figures, each as one chunk."""
        found = self.read(names).replace_schema_metadata(None).select(names)
        return (found if self.places is None else found.take(pa.array(self.places))).combine_chunks()

    def moved(self, first_row: int) -> "Piece":
        """The same with the scans counted from `first_row`."""
        return replace(self, rows=self.rows + first_row)

    def filtered(self, keep: NDArray[np.bool_]) -> "Piece":
        """The rows that are true."""
        places = np.flatnonzero(keep) if self.places is None else self.places[keep]
        return replace(self, rows=self.rows[keep], places=places)


@dataclass(frozen=True)
class Measured:
    """A table with the columns of `tables.REGION` and `row`, the position in `Cohort.scans`, that reads columns as needed."""

    pieces: tuple[Piece, ...]
    _kept: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return sum(piece.rows.size for piece in self.pieces)

    @property
    def column_names(self) -> tuple[str, ...]:
        return (*FIGURES, "row")

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if name == "row":
            return pa.chunked_array([piece.rows for piece in self.pieces], pa.int64())
        if name not in self._kept:
            self._keep(self._read(FIGURES if self.is_small else [name]))
        return self._kept[name]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, as of an Arrow table."""
        return self[name]

    def select(self, names: Sequence[str]) -> pa.Table:
        """Some columns as a table in memory."""
        return pa.table({name: self[name] for name in names})

    def where(self, keep: Any, names: Sequence[str]) -> pa.Table:
        """The rows that are true, with some of their columns, as a table in memory."""
        return pa.table({name: self[name].filter(keep) for name in names})

    def table(self) -> pa.Table:
        """All columns in memory."""
        return self.select(self.column_names)

    def filter(self, keep: NDArray[np.bool_]) -> "Measured":
        """The rows that are true."""
        ends = np.cumsum([piece.rows.size for piece in self.pieces])[:-1]
        return Measured(tuple(p.filtered(k) for p, k in zip(self.pieces, np.split(keep, ends), strict=True)))

    def renumbered(self, positions: NDArray[np.int64]) -> "Measured":
        """The same where the scan at position i has become that at `positions[i]`."""
        return Measured(tuple(replace(piece, rows=positions[piece.rows]) for piece in self.pieces))

    @property
    def is_small(self) -> bool:
        """Whether all columns of the tables behind it may be in memory at once."""
        return sum(piece.size for piece in self.pieces) * len(FIGURES) * 8 <= ROOM_BYTES

    def _read(self, names: Iterable[str]) -> pa.Table:
        wanted = list(names)
        empty = pa.schema([REGION.field(name) for name in wanted]).empty_table()
        return pa.concat_tables([piece.columns(wanted) for piece in self.pieces] or [empty])

    def _keep(self, found: pa.Table) -> None:
        """Keep columns; where room is short the oldest go, and with them all else that is free by now."""
        for name in found.column_names:
            self._kept[name] = found[name]
        sizes: dict[str, Any] = {name: column.nbytes for name, column in self._kept.items()}
        for name in list(self._kept)[: -found.num_columns]:
            if sum(sizes[kept] for kept in self._kept) <= ROOM_BYTES:
                return
            del self._kept[name]
            give_back()
