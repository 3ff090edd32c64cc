"""Facts: the fact tables of one or more runs, read without masks and pictures: a row a scan, and the figures of its regions.

Arrow rather than dicts, and figures a column at a time (`measured.py`), so that a million rows take hardly more memory than
a few; whoever wants a part of a cohort can filter both before anything is counted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainseg import storage, tables
from brainseg.errors import StorageError, UsageError
from brainseg.report.measured import FIGURES, Measured, Piece, give_back

SCAN_COLUMNS = [
    "scan_id",
    "patient_id",
    "dataset",
    "fold",
    "attributes",
    "status",
    "warnings",
    "modalities_missing",
    "modalities_duplicated",
    "seconds_decode",
    "seconds_predict",
    "seconds_finish",
    "attempt",
    "finished_at",
    "shape",
    "spacing_mm",
    "node",
]
OF_FAILED = ["error_code", "error_stage", "error_message"]
"""Read only where a scan has failed, as `sources` are: each column of each of ten thousand parts costs."""

FILES_AT_ONCE = 4
"""Parts read side by side: a store answers slowly, and Arrow does not hold Python's lock."""

PARTS_TOGETHER = 256
"""Parts whose rows are joined before others are read: ten thousand small tables weigh more than what is in them."""

SPLITS = ("test", "outside", "validation", "train")
"""Where the model's recorded split puts a scan's patient, the most telling first; `outside` is nowhere."""


@dataclass(frozen=True)
class Run:
    """One run folder: its address, its `run.json`, the addresses of its parts, and those that could not be read."""

    uri: str
    info: Mapping[str, Any]
    parts: tuple[str, ...]
    torn: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] | None = None
    """`evaluation.json`, where the run was evaluated anew: its `metrics.parquet` then has the figures that count."""

    finished: bool = False
    """Whether `_SUCCESS.json` proves that `metrics.parquet` holds what the parts hold: one file instead of thousands."""

    @property
    def is_flat(self) -> bool:
        """Whether the figures are taken from `metrics.parquet` rather than from the parts."""
        return self.finished or self.evaluation is not None

    @property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.info.get("model") or {}
        return model

    def places(self) -> tuple[str, dict[str, str]]:
        """The column that the model's split is about, and for each of its ids the side: one of `SPLITS`.

        As `card.Split.part_of`, which is not imported: a report needs no torch.
        """
        split = self.model.get("split") or {}
        column = "scan_id" if split.get("unit") == "scan" else "patient_id"
        return column, {who: side for side in ("train", "validation", "test") for who in split.get(side) or ()}


@dataclass(frozen=True)
class Cohort:
    """All scans of some runs.

    `scans`: `SCAN_COLUMNS`, `OF_FAILED`, `run` and `part` (positions in `runs` and in its parts), `split`, `labelled`,
    `evaluated`; in order of `scan_id` within a run.
    `regions`: the columns of `tables.REGION` and `row`, the position in `scans`; read when looked at.
    `baselines`: rows of `baselines.parquet` with `side`, one of `SPLITS`; none where no run was evaluated anew.
    """

    runs: tuple[Run, ...]
    scans: pa.Table
    regions: Measured
    doubled: int
    baselines: pa.Table
    where: str | None = None
    """The condition that picked these scans out of all; None where nobody asked for a part."""


def load(run_uris: Sequence[str]) -> Cohort:
    """Read the fact tables of the runs, without `mask` and `thumbnail`. Raises UsageError where a place is no run."""
    if not run_uris:
        raise UsageError("a report needs at least one run folder")
    runs: list[Run] = []
    scans: list[pa.Table] = []
    regions: list[Piece] = []
    baselines: list[pa.Table] = []
    doubled = first_row = 0
    for number, uri in enumerate(run_uris):
        run, table = _read_run(storage.absolute(uri))
        num_read, table = table.num_rows, _latest(table)
        doubled += num_read - table.num_rows
        measured = _flat(run, table) if run.is_flat else _nested(table)
        flat = table.select([n for n in table.column_names if n != "regions"])
        flat = flat.append_column("evaluated", _scored(measured, table.num_rows))
        scans.append(_placed(flat, run, number))
        regions.append(measured.moved(first_row))
        baselines.append(_baselines(run))
        runs.append(run)
        first_row += table.num_rows
        del table, flat
        give_back()
    return Cohort(
        tuple(runs), pa.concat_tables(scans).combine_chunks(), Measured(tuple(regions)), doubled, pa.concat_tables(baselines)
    )


def _read_run(uri: str) -> tuple[Run, pa.Table]:
    info_uri = storage.join(uri, "run.json")
    if not storage.exists(info_uri):
        raise UsageError(f"{uri} is not a run: it has no run.json; expected a folder that `brainseg segment` wrote")
    anew, metrics = storage.join(uri, "evaluation.json"), storage.join(uri, "metrics.parquet")
    evaluation = storage.read_json(anew) if storage.exists(anew) else None
    finished = storage.exists(storage.join(uri, "_SUCCESS.json")) and storage.exists(metrics)
    columns = SCAN_COLUMNS if finished or evaluation else [*SCAN_COLUMNS, "regions"]
    listed = [entry.uri for entry in storage.list_files(storage.join(uri, "scans")) if entry.uri.endswith(".parquet")]
    parts: list[str] = []
    torn: list[str] = []
    joined = [_no_rows(columns)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for some in _batches(listed, PARTS_TOGETHER):
            read = dict(zip(some, pool.map(partial(_read_part, columns=columns), some), strict=True))
            torn += [part for part, table in read.items() if table is None]
            whole = {part: table for part, table in read.items() if table is not None}
            joined += [_joined(list(whole.values()), len(parts))] if whole else []
            parts += whole
    run = Run(uri, storage.read_json(info_uri), tuple(parts), tuple(torn), evaluation, finished)
    return run, pa.concat_tables(joined)


def _batches(names: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some


def _read_part(uri: str, columns: list[str]) -> pa.Table | None:
    """One part's rows with `OF_FAILED` and `label_listed`, which stay null and false where no scan failed; None if torn."""
    try:
        table = storage.read_table(uri, columns).select(columns)
        if pc.any(pc.equal(table["status"], "failed")).as_py():
            more = storage.read_table(uri, [*OF_FAILED, "sources"])
            for name in OF_FAILED:
                table = table.append_column(name, more[name])
            table = table.append_column("label_listed", _lists_a_label(more["sources"]))
    except StorageError:
        return None
    return table.replace_schema_metadata(None)


def _joined(tables_: Sequence[pa.Table], first: int) -> pa.Table:
    """The rows of some parts with `part`, the number of each, counted from `first`; null is what a part did not read."""
    numbers = np.repeat(np.arange(first, first + len(tables_), dtype=np.int32), [table.num_rows for table in tables_])
    found = pa.concat_tables([_ALWAYS.empty_table(), *tables_], promote_options="default").combine_chunks()
    return found.append_column("part", pa.array(numbers))


_ALWAYS = pa.schema([*((name, pa.string()) for name in OF_FAILED), ("label_listed", pa.bool_())])


def _no_rows(columns: Sequence[str]) -> pa.Table:
    fields = [tables.SCANS.field(name) for name in columns]
    return pa.schema([*_ALWAYS, *fields, ("part", pa.int32())]).empty_table()


def _lists_a_label(sources: pa.ChunkedArray) -> pa.Array:
    """For each scan, whether one of its files holds a label."""
    column = sources.combine_chunks()
    roles = column.flatten().field("role")
    rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    holds = pc.is_in(roles, value_set=pa.array(["label", "both"])).to_numpy(zero_copy_only=False)
    found = np.zeros(len(column), bool)
    found[rows[holds]] = True
    return pa.array(found)


def _latest(table: pa.Table) -> pa.Table:
    """The rows in order of `scan_id`, whatever parts they came in; one a scan, the last written: a kill may leave two."""
    keys = [("scan_id", "ascending"), ("attempt", "ascending"), ("finished_at", "ascending")]
    order = pc.sort_indices(table.select([name for name, _ in keys]), keys)
    ids = table["scan_id"].take(order).combine_chunks()
    last = np.ones(len(ids), bool)
    last[:-1] = pc.not_equal(ids[:-1], ids[1:]).to_numpy(zero_copy_only=False)
    return table.take(order.filter(pa.array(last)))


def _nested(table: pa.Table) -> Piece:
    """The column `regions` taken apart, scan x region; it is in memory already."""
    nested = table["regions"].combine_chunks()
    parents = pc.list_parent_indices(nested).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = nested.flatten()
    found = pa.table({name: flat.field(name) for name in FIGURES})
    return Piece(found.select, parents, parents.size)


def _flat(run: Run, table: pa.Table) -> Piece:
    """The figures in `metrics.parquet`, in the order of the scans, and each scan's regions as the model names them."""
    place = storage.join(run.uri, "metrics.parquet")
    keys = storage.read_table(place, ["scan_id", "region"])
    rows = pc.index_in(keys["scan_id"], value_set=table["scan_id"].combine_chunks())
    regions = [name for name in run.model.get("regions") or () if name]
    ranks = pc.fill_null(pc.index_in(keys["region"], value_set=pa.array(regions, pa.string())), len(regions))
    order = np.lexsort((ranks.to_numpy(), pc.fill_null(rows, len(table)).to_numpy()))[: len(rows) - rows.null_count]
    in_order = len(order) == len(rows) and bool(np.all(order[1:] > order[:-1]))
    whose = pc.drop_null(rows).to_numpy() if in_order else rows.take(pa.array(order)).to_numpy()
    return Piece(partial(storage.read_table, place), whose.astype(np.int64), len(keys), None if in_order else order)


def _scored(measured: Piece, num_scans: int) -> pa.Array:
    """For each scan whether any of its regions was measured against a label."""
    scored = np.zeros(num_scans, bool)
    scored[measured.rows[pc.not_equal(measured.columns(["state"])["state"], "no_label").to_numpy()]] = True
    return pa.array(scored)


def _baselines(run: Run) -> pa.Table:
    """A run's `baselines.parquet` with the side of the model's split."""
    table = tables.BASELINES.empty_table()
    if run.evaluation is not None:
        table = storage.read_table(storage.join(run.uri, "baselines.parquet"))
    return table.append_column("side", pc.fill_null(table["split"], "outside")).replace_schema_metadata(None)


def _placed(table: pa.Table, run: Run, number: int) -> pa.Table:
    """Add which run a scan is of, where the model's split has its patient, and whether it has a label."""
    column, places = run.places()
    split = pa.array([places.get(who, "outside") for who in table[column].to_pylist()], pa.string())
    labelled = pc.or_(table["evaluated"], pc.fill_null(table["label_listed"], False))
    table = table.drop_columns(["label_listed"]).append_column("labelled", labelled)
    return table.append_column("split", split).append_column("run", pa.array(np.full(table.num_rows, number, np.int32)))
