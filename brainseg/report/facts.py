"""Facts: the fact tables of one or more runs, read without masks and pictures into two flat Arrow tables.

Arrow rather than dicts, so that a million scans stay some hundred MB, and so that whoever wants a part of a cohort can
filter the tables before anything is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
]
SPLITS = ("test", "outside", "validation", "train")
"""Where the model's recorded split puts a scan's patient, the most telling first; `outside` is nowhere."""


@dataclass(frozen=True)
class Run:
    """One run folder: its address, its `run.json`, the addresses of its parts, and those that could not be read."""

    uri: str
    info: Mapping[str, Any]
    parts: tuple[str, ...]
    torn: tuple[str, ...] = ()

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
    """

    runs: tuple[Run, ...]
    scans: pa.Table
    regions: pa.Table
    doubled: int


def load(run_uris: Sequence[str]) -> Cohort:
    """Read the fact tables of the runs, without `mask` and `thumbnail`. Raises UsageError where a place is no run."""
    if not run_uris:
        raise UsageError("a report needs at least one run folder")
    runs: list[Run] = []
    scans: list[pa.Table] = []
    regions: list[pa.Table] = []
    doubled = 0
    for number, uri in enumerate(run_uris):
        run, table = _read_run(storage.absolute(uri))
        latest = _latest(table)
        doubled += table.num_rows - latest.num_rows
        flat, rows = _flatten(latest, first_row=sum(t.num_rows for t in scans))
        scans.append(_placed(flat, run, number))
        regions.append(rows)
        runs.append(run)
    return Cohort(tuple(runs), pa.concat_tables(scans), pa.concat_tables(regions), doubled)


def _read_run(uri: str) -> tuple[Run, pa.Table]:
    info_uri = storage.join(uri, "run.json")
    if not storage.exists(info_uri):
        raise UsageError(f"{uri} is not a run: it has no run.json; expected a folder that `brainseg segment` wrote")
    parts: list[str] = []
    torn: list[str] = []
    pieces: list[pa.Table] = []
    for entry in storage.list_files(storage.join(uri, "scans")):
        if not entry.uri.endswith(".parquet"):
            continue
        try:
            pieces.append(_read_part(entry.uri, part=len(parts)))
            parts.append(entry.uri)
        except StorageError:
            torn.append(entry.uri)
    return Run(uri, storage.read_json(info_uri), tuple(parts), tuple(torn)), pa.concat_tables(pieces or [_no_rows()])


def _read_part(uri: str, part: int) -> pa.Table:
    """One part's rows and two columns more: `part`, and `label_listed`, which is read only where a scan has failed."""
    table = storage.read_table(uri, [*SCAN_COLUMNS, "regions"]).select([*SCAN_COLUMNS, "regions"])
    table = table.replace_schema_metadata(None)
    listed = pa.array(np.zeros(table.num_rows, bool))
    if pc.any(pc.equal(table["status"], "failed")).as_py():
        listed = _lists_a_label(storage.read_table(uri, ["sources"])["sources"])
    table = table.append_column("part", pa.array(np.full(table.num_rows, part, np.int32)))
    return table.append_column("label_listed", listed)


def _no_rows() -> pa.Table:
    fields = [tables.SCANS.field(name) for name in (*SCAN_COLUMNS, "regions")]
    return pa.schema([*fields, ("part", pa.int32()), ("label_listed", pa.bool_())]).empty_table()


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


def _flatten(table: pa.Table, first_row: int) -> tuple[pa.Table, pa.Table]:
    """Split off the nested `regions` as a table of its own, scan x region, with `row` counted from `first_row`."""
    nested = table["regions"].combine_chunks()
    parents = pc.list_parent_indices(nested).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = nested.flatten()
    columns = {field.name: flat.field(field.name) for field in tables.REGION}
    rows = pa.table({**columns, "row": pa.array(parents + first_row)})
    scored = np.zeros(table.num_rows, bool)
    scored[parents[pc.not_equal(flat.field("state"), "no_label").to_numpy(zero_copy_only=False)]] = True
    return table.drop_columns(["regions"]).append_column("evaluated", pa.array(scored)), rows


def _placed(table: pa.Table, run: Run, number: int) -> pa.Table:
    """Add which run a scan is of, where the model's split has its patient, and whether it has a label."""
    column, places = run.places()
    split = pa.array([places.get(who, "outside") for who in table[column].to_pylist()], pa.string())
    labelled = pc.or_(table["evaluated"], table["label_listed"])
    table = table.drop_columns(["label_listed"]).append_column("labelled", labelled)
    return table.append_column("split", split).append_column("run", pa.array(np.full(table.num_rows, number, np.int32)))
