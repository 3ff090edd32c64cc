"""Facts: the fact tables of one or more runs, read without masks and pictures into two flat Arrow tables.

Arrow rather than dicts, so that a million scans stay some hundred MB, and so that whoever wants a part of a cohort can
filter the tables before anything is counted.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainseg import storage, tables
from brainseg.errors import StorageError, UsageError

SCAN_COLUMNS = [
    "scan_id",
    "patient_id",
    "dataset",
    "label_map",
    "fold",
    "attributes",
    "status",
    "error_code",
    "error_stage",
    "error_message",
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
FILES_AT_ONCE = 8
"""Parts read side by side: a store answers slowly, and Arrow does not hold Python's lock."""

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

        As `model.Split.part_of`, which is not imported: a report needs no torch.
        """
        split = self.model.get("split") or {}
        column = "scan_id" if split.get("unit") == "scan" else "patient_id"
        return column, {who: side for side in ("train", "validation", "test") for who in split.get(side) or ()}


@dataclass(frozen=True)
class Cohort:
    """All scans of some runs.

    `scans`: `SCAN_COLUMNS` and `run`, `part` (positions in `runs` and its parts), `split`, `labelled`, `evaluated`.
    `regions`: the columns of `tables.REGION` and `row`, the position in `scans`.
    `baselines`: rows of `baselines.parquet` with `side`, one of `SPLITS`; none where no run was evaluated anew.
    """

    runs: tuple[Run, ...]
    scans: pa.Table
    regions: pa.Table
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
    regions: list[pa.Table] = []
    baselines: list[pa.Table] = []
    doubled = first_row = 0
    for number, uri in enumerate(run_uris):
        run, table = _read_run(storage.absolute(uri))
        latest = _latest(table)
        doubled += table.num_rows - latest.num_rows
        measured = _flat(run, latest) if run.is_flat else _nested(latest)
        flat = latest.select([n for n in latest.column_names if n != "regions"])
        flat = flat.append_column("evaluated", _scored(measured, latest.num_rows))
        scans.append(_placed(flat, run, number))
        regions.append(_moved(measured, first_row))
        baselines.append(_baselines(run))
        runs.append(run)
        first_row += latest.num_rows
    return Cohort(tuple(runs), pa.concat_tables(scans), pa.concat_tables(regions), doubled, pa.concat_tables(baselines))


def _read_run(uri: str) -> tuple[Run, pa.Table]:
    info_uri = storage.join(uri, "run.json")
    if not storage.exists(info_uri):
        raise UsageError(f"{uri} is not a run: it has no run.json; expected a folder that `brainseg segment` wrote")
    anew, metrics = storage.join(uri, "evaluation.json"), storage.join(uri, "metrics.parquet")
    evaluation = storage.read_json(anew) if storage.exists(anew) else None
    finished = storage.exists(storage.join(uri, "_SUCCESS.json")) and storage.exists(metrics)
    columns = SCAN_COLUMNS if finished or evaluation else [*SCAN_COLUMNS, "regions"]
    listed = [entry.uri for entry in storage.list_files(storage.join(uri, "scans")) if entry.uri.endswith(".parquet")]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        read = list(pool.map(partial(_read_part, columns=columns), listed))
    parts = [part for part, table in zip(listed, read, strict=True) if table is not None]
    torn = [part for part, table in zip(listed, read, strict=True) if table is None]
    pieces = [_numbered(table, part) for part, table in enumerate(table for table in read if table is not None)]
    run = Run(uri, storage.read_json(info_uri), tuple(parts), tuple(torn), evaluation, finished)
    return run, pa.concat_tables(pieces or [_no_rows(columns)])


def _read_part(uri: str, columns: list[str]) -> pa.Table | None:
    """One part's rows and `label_listed`, which is read only where a scan has failed; None where it cannot be read."""
    try:
        table = storage.read_table(uri, columns).select(columns)
        listed = pa.array(np.zeros(table.num_rows, bool))
        if pc.any(pc.equal(table["status"], "failed")).as_py():
            listed = _lists_a_label(storage.read_table(uri, ["sources"])["sources"])
    except StorageError:
        return None
    return table.replace_schema_metadata(None).append_column("label_listed", listed)


def _numbered(table: pa.Table, part: int) -> pa.Table:
    return table.append_column("part", pa.array(np.full(table.num_rows, part, np.int32)))


def _no_rows(columns: Sequence[str]) -> pa.Table:
    fields = [tables.SCANS.field(name) for name in columns]
    return pa.schema([*fields, ("label_listed", pa.bool_()), ("part", pa.int32())]).empty_table()


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
    """Keep one row a scan, the last one written: a killed driver may have left two."""
    if pc.count_distinct(table["scan_id"]).as_py() == table.num_rows:
        return table
    order = pc.sort_indices(table, [("attempt", "ascending"), ("finished_at", "ascending")]).to_pylist()
    ids = table["scan_id"].to_pylist()
    keep = {ids[row]: row for row in order}
    return table.take(sorted(keep.values()))


def _nested(table: pa.Table) -> pa.Table:
    """The column `regions` as a table of its own, scan x region, with `row`, the scan's position in the given one."""
    nested = table["regions"].combine_chunks()
    parents = pc.list_parent_indices(nested).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = nested.flatten()
    columns = {field.name: flat.field(field.name) for field in tables.REGION}
    return pa.table({**columns, "row": pa.array(parents)})


def _flat(run: Run, table: pa.Table) -> pa.Table:
    """The same from `metrics.parquet`, in the order of the scans."""
    names = [field.name for field in tables.REGION]
    found = storage.read_table(storage.join(run.uri, "metrics.parquet"), ["scan_id", *names]).replace_schema_metadata(None)
    rows = pc.index_in(found["scan_id"], value_set=table["scan_id"].combine_chunks()).cast(pa.int64())
    found = found.select(names).append_column("row", rows)
    found = pa.table(found.columns, names=[*names, "row"])
    found = found if rows.null_count == 0 else found.filter(pc.is_valid(found["row"]))
    return _in_model_order(found, list(run.model.get("regions") or ()))


def _in_model_order(found: pa.Table, regions: list[str]) -> pa.Table:
    """Each scan's regions as the model names them, from the widest on; the flat table has them by the alphabet."""
    if pc.unique(found["region"]).to_pylist() == [name for name in regions if name]:
        return found
    ranks = pc.fill_null(pc.index_in(found["region"], value_set=pa.array(regions, pa.string())), len(regions))
    order = pc.sort_indices(pa.table({"row": found["row"], "rank": ranks}), [("row", "ascending"), ("rank", "ascending")])
    columns = {}
    for name in found.column_names:  # one column at a time: the table of a large cohort must not stand twice
        columns[name] = found[name].take(order)
        found = found.drop_columns([name])
    return pa.table(columns)


def _scored(measured: pa.Table, num_scans: int) -> pa.Array:
    """For each scan whether any of its regions was measured against a label."""
    scored = np.zeros(num_scans, bool)
    scored[measured["row"].to_numpy()[pc.not_equal(measured["state"], "no_label").to_numpy()]] = True
    return pa.array(scored)


def _moved(measured: pa.Table, first_row: int) -> pa.Table:
    """Rows counted over all runs."""
    place = measured.schema.get_field_index("row")
    return measured.set_column(place, "row", pa.array(measured["row"].to_numpy() + first_row))


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
    labelled = pc.or_(table["evaluated"], table["label_listed"])
    table = table.drop_columns(["label_listed"]).append_column("labelled", labelled)
    return table.append_column("split", split).append_column("run", pa.array(np.full(table.num_rows, number, np.int32)))
