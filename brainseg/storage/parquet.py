"""Tables: Parquet, written whole and read by column, or in pieces where a table is larger than memory should have to be."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from brainseg.errors import StorageError
from brainseg.storage.place import Store, translated
from brainseg.storage.ranges import RangedFile

RAW_COLUMNS = ("mask", "thumbnail")
"""Parquet columns that hold files: already compressed, so neither dictionary nor statistics are worth their bytes."""

FEW_ROWS = 4096
"""Up to so many, threads for the columns cost more than they save: a part of 32 rows takes half as long without."""


def read_table(store: Store, uri: str, columns: list[str] | None) -> pa.Table:
    """Return a Parquet table, or only some of its columns. Raises StorageError when torn, or when a column is absent."""
    with translated("read as Parquet", uri), store.open_table(uri, columns) as source, _opened(source) as file:
        if isinstance(source, RangedFile) and columns is not None:
            source.prefetch(_chunks(file.metadata, frozenset(columns), range(file.metadata.num_row_groups)))
        table = file.read(columns=columns, use_threads=file.metadata.num_rows > FEW_ROWS)
        there = frozenset(table.column_names)
        missing = [c for c in columns or () if c not in there]
        if missing:
            raise StorageError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
        return table


def read_pieces(store: Store, uri: str) -> Iterator[pa.Table]:
    """Yield an empty table, then row group by row group, of which one is in memory. Raises StorageError when torn."""
    with translated("read as Parquet", uri), store.open_table(uri, []) as source, _opened(source) as file:
        columns = frozenset(file.schema_arrow.names)
        yield file.schema_arrow.empty_table()
        for number in range(file.metadata.num_row_groups):
            if isinstance(source, RangedFile):
                source.forget()
                source.prefetch(_chunks(file.metadata, columns, [number]))
            yield file.read_row_group(number)


def _opened(source: Any) -> pq.ParquetFile:
    return pq.ParquetFile(source, page_checksum_verification=True)


def _chunks(metadata: pq.FileMetaData, columns: frozenset[str], groups: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where the chunks of these columns in these row groups lie, as [start, end) in the file."""
    for group in (metadata.row_group(i) for i in groups):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.path_in_schema.split(".")[0] in columns:
                start = min(p for p in (chunk.dictionary_page_offset, chunk.data_page_offset) if p is not None)
                yield start, start + chunk.total_compressed_size


def write_table(store: Store, uri: str, table: pa.Table, row_group_rows: int) -> None:
    """Write a Parquet table whole: zstd, page checksums, row groups small enough to fetch a few masks without the rest."""
    sink = pa.BufferOutputStream()
    with translated("write as Parquet", uri):
        pq.write_table(table, sink, row_group_size=row_group_rows, **_how(table.schema))
    store.write_bytes(uri, sink.getvalue().to_pybytes())


def write_pieces(store: Store, uri: str, schema: pa.Schema, pieces: Iterable[pa.Table], row_group_rows: int) -> None:
    """Write a Parquet table that comes in pieces, one row group of it in memory at a time; it appears whole, as any other."""
    with store.writing(uri) as sink, pq.ParquetWriter(sink, schema, **_how(schema)) as writer:
        for group in _of_equal_size(pieces, row_group_rows):
            writer.write_table(group, row_group_size=row_group_rows)


def _of_equal_size(pieces: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of this many, the last one of fewer."""
    held: list[pa.Table] = []
    for piece in pieces:
        held.append(piece)
        while sum(table.num_rows for table in held) >= rows:
            together = pa.concat_tables(held)
            yield together.slice(0, rows)
            held = [together.slice(rows)]
    if any(table.num_rows for table in held):
        yield pa.concat_tables(held)


def _how(schema: pa.Schema) -> dict[str, Any]:
    small = _leaf_columns(schema)
    return {"compression": "zstd", "use_dictionary": small, "write_statistics": small, "write_page_checksum": True}


@lru_cache(maxsize=16)
def _leaf_columns(schema: pa.Schema) -> list[str]:
    """Parquet's own paths of all leaves, such as `regions.list.element.dice`, but those below `RAW_COLUMNS`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    leaves = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    paths = (str(leaves.column(i).path) for i in range(len(leaves)))
    return [path for path in paths if path.split(".")[0] not in RAW_COLUMNS]
