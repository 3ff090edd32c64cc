"""Runs: the bookkeeping of a run folder. The row is the commit; what a run folder claims can be proven.

RUN/run.json              what was run, with what, on what; counts and timings at the end
RUN/lease.json            who is driving it now (`lease`); RUN/inflight/ what has been begun (`inflight`)
RUN/scans/<part>.parquet  the fact table; a part appears whole and is named by the scans it holds
RUN/metrics.parquet       scan x region, flat, derived from the parts
RUN/evaluation.json       by `evaluate`: with whose labels metrics.parquet was made anew; RUN/baselines.parquet beside it
RUN/_SUCCESS.json         written last: every scan of the manifest exactly once; size and sha256 of every file above
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainseg import storage
from brainseg.card import Split
from brainseg.errors import Code, RunError, StorageError
from brainseg.spill import ROOM_BYTES, Spill
from brainseg.storage.place import translated
from brainseg.tables import METRICS, SCANS

RUN_FILE, SUCCESS_FILE, METRICS_FILE = "run.json", "_SUCCESS.json", "metrics.parquet"
BASELINES_FILE, EVALUATION_FILE, EVALUATION = "baselines.parquet", "evaluation.json", "evaluation"
MANIFEST_FILE = "manifest.parquet"
PARTS = "scans"
TORN = "torn"
TRANSIENT = frozenset({Code.UNREADABLE, Code.OUT_OF_MEMORY, Code.TIMEOUT, Code.WORKER_DIED, Code.INTERNAL})
"""Failures that the store, the machine or brainseg may be at fault for: the next attempt tries such scans again."""
KEYS = (
    "scan_id",
    "status",
    "error_code",
    "content_tag",
    "model_fingerprint",
    "config_fingerprint",
    "finished_at",
)
FILES_AT_ONCE = 8
"""How many files are read side by side: a store answers slowly, and neither Arrow nor a hash holds Python's lock."""
SCANS_AT_ONCE = 4096
"""Rows of a manifest that are in memory as Python objects: all of a million would take a gigabyte."""
_SHARED = tuple(name for name in SCANS.names if name in METRICS.names)
MEASURED = (*_SHARED, "sources", "regions")
"""Columns of the `scans` table from which `metrics.parquet` is made."""
Seal = Mapping[str, Any]
"""What tells a file's bytes from any others: `size_bytes` and `sha256`."""


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same run: rows of one may stand beside rows of the other."""

    manifest_fingerprint: str
    model_fingerprint: str
    config_fingerprint: str


@dataclass(frozen=True, slots=True)
class Kept:
    """One row that a part holds, without its mask; `place` is its position there."""

    scan_id: str
    part: str
    place: int
    status: str
    error_code: str | None
    content_tag: str
    finished_at: datetime

    @property
    def is_final(self) -> bool:
        """Whether doing the scan again could not end otherwise: it is done, or its files are at fault."""
        return self.status == "ok" or self.error_code not in TRANSIENT


def content_tag(row: Mapping[str, Any]) -> str:
    """sha256 over the uri, size and tag of a manifest row's sources: changes when a file does."""
    seen = [[s["uri"], s["role"], s["modality"], s["size_bytes"], s["tag"]] for s in row["sources"]]
    return hashlib.sha256(json.dumps([row["scan_id"], row["label_map"], seen]).encode()).hexdigest()


def is_finished(run: str, identity: Identity) -> bool:
    """Whether the folder holds this very run, finished. RunError where it holds another one."""
    _check_identity(run, identity)
    return storage.exists(storage.join(run, SUCCESS_FILE))


def _check_identity(run: str, identity: Identity) -> dict[str, Any] | None:
    """The run.json that is there, or None; RunError where model, config or manifest are not the ones asked for."""
    place = storage.join(run, RUN_FILE)
    if not storage.exists(place):
        return None
    body: dict[str, Any] = storage.read_json(place)
    for name, mine in identity.__dict__.items():
        if body.get(name) != mine:
            what, theirs = name.removesuffix("_fingerprint"), _short(body.get(name))
            raise RunError(f"{run} holds a run with another {what} ({theirs}, now {_short(mine)}); choose another --out")
    return body


def open_run(run: str, identity: Identity, description: Mapping[str, Any]) -> dict[str, Any]:
    """Create the run folder, or take up one that holds the same run; returns `run.json` with the attempt counted up.

    Raises RunError where the folder holds a run of another model, config or manifest. Nothing is changed then.
    """
    place = storage.join(run, RUN_FILE)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    body = _check_identity(run, identity)
    if body is None:
        made = {"run_id": _run_id(identity, now), "created_at": now, "finished_at": None, "attempt": 1}
        body = {**made, **identity.__dict__, **description}
        storage.write_json(place, body)
        return body
    body |= {**description, "attempt": int(body["attempt"]) + 1, "created_at": body["created_at"], "finished_at": None}
    storage.write_json(place, body)
    return dict(body)


def _run_id(identity: Identity, now: str) -> str:
    seed = "|".join([*identity.__dict__.values(), now])
    return f"{now[:10]}-{hashlib.sha256(seed.encode()).hexdigest()[:8]}"


def _short(fingerprint: object) -> str:
    return str(fingerprint)[:12]


def part_uri(run: str, scan_ids: Sequence[str]) -> str:
    """Where the part with these scans belongs: named by them, so that a retried task overwrites itself."""
    digest = hashlib.sha256("\n".join(sorted(scan_ids)).encode()).hexdigest()[:24]
    return storage.join(run, PARTS, f"{digest}.parquet")


def write_part(run: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write finished rows as one part, all or nothing; returns where."""
    uri = part_uri(run, [r["scan_id"] for r in rows])
    storage.write_table(uri, pa.Table.from_pylist(list(rows), schema=SCANS))
    return uri


def parts(run: str) -> list[str]:
    """The parts of a run, in order of their names."""
    folder = storage.join(run, PARTS)
    if not storage.is_dir(folder):
        return []
    return [e.uri for e in storage.list_files(folder) if e.uri.endswith(".parquet")]


def kept_rows(run: str, *, set_aside: bool) -> Iterator[Kept]:
    """Every row that a readable part holds. Torn parts are moved to RUN/torn if `set_aside`, else StorageError."""
    for uri in parts(run):
        try:
            rows = _key_rows(uri)
        except StorageError:
            if not set_aside:
                raise
            _set_aside(run, uri)
            continue
        for place, row in enumerate(rows):
            yield Kept(row["scan_id"], uri, place, row["status"], row["error_code"], row["content_tag"], row["finished_at"])


def _set_aside(run: str, part: str) -> None:
    """Move a part to RUN/torn: what it holds counts no longer."""
    storage.write_bytes(storage.join(run, TORN, storage.name_of(part)), storage.read_bytes(part))
    storage.delete(part)


def set_damaged_aside(run: str) -> int:
    """Move the parts of which a column that the figures come from cannot be read to RUN/torn; returns how many went."""
    damaged = []
    for uri in parts(run):
        try:
            _measured(uri)
        except StorageError:
            damaged.append(uri)
    for uri in damaged:
        _set_aside(run, uri)
    return len(damaged)


def _key_rows(uri: str) -> list[dict[str, Any]]:
    """The columns `KEYS` of a part. A damaged footer may give them other types, under which values cannot be taken out."""
    table = storage.read_table(uri, list(KEYS)).select(list(KEYS))
    if table.schema.types != [SCANS.field(name).type for name in KEYS]:
        raise StorageError(f"{uri}: its columns are not those of a `{PARTS}` table")
    return _values(table, uri)


def _values(table: pa.Table, uri: str) -> list[dict[str, Any]]:
    with translated("read as Parquet", uri):
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def finished_rows(run: str, expected: Mapping[str, str]) -> dict[str, Kept]:
    """What need not be done again, by scan_id: rows of the right content whose outcome is final."""
    rows = kept_rows(run, set_aside=True)
    return {k.scan_id: k for k in rows if k.is_final and expected.get(k.scan_id) == k.content_tag}


def settle(run: str, expected: Mapping[str, str]) -> dict[str, int]:
    """Bring the parts to exactly one row per expected scan (scan_id -> content_tag); returns counts.

    A retry may have regrouped scans, and a file may have changed between attempts: of several rows for one scan with the
    right content an `ok` one stays before a failed one, then the first. Raises RunError where a scan is missing.
    """
    chosen: dict[str, Kept] = {}
    surplus: dict[str, set[int]] = {}
    for row in sorted(kept_rows(run, set_aside=True), key=lambda k: (k.status != "ok", k.finished_at)):
        if row.scan_id in chosen or expected.get(row.scan_id) != row.content_tag:
            surplus.setdefault(row.part, set()).add(row.place)
        else:
            chosen[row.scan_id] = row
    _drop_rows(run, surplus)
    missing = expected.keys() - chosen.keys()
    if missing:
        raise RunError(f"{len(missing)} scans of the manifest have no row, such as {min(missing)}; run the same command again")
    failed = sum(1 for k in chosen.values() if k.status == "failed")
    removed = sum(len(places) for places in surplus.values())
    return {"found": len(expected), "ok": len(chosen) - failed, "failed": failed, "duplicates_removed": removed}


def _drop_rows(run: str, surplus: Mapping[str, set[int]]) -> None:
    """Replace each part by one that lacks the rows at these places; the new one stands before the old one goes.

    Parts of which nothing stays go first: a replacement is named by its scans and may take the place of one of them.
    """
    left = {part: _others(part, places) for part, places in surplus.items()}
    for part, keep in sorted(left.items(), key=lambda item: len(item[1]) > 0):
        if keep:
            table = storage.read_table(part).take(keep)
            storage.write_table(part_uri(run, table["scan_id"].to_pylist()), table)
        storage.delete(part)


def _others(part: str, places: set[int]) -> list[int]:
    """The places of a part's rows but the named ones."""
    return [place for place in range(storage.read_table(part, ["scan_id"]).num_rows) if place not in places]


def write_metrics(run: str, split: Split, *, room_bytes: int = ROOM_BYTES) -> dict[str, int]:
    """Derive RUN/metrics.parquet from the parts; returns how many scans have a label and how many were evaluated.

    More rows than `room_bytes` holds are put in order by way of local disk.
    """
    labelled = evaluated = 0
    with Spill(METRICS, ("scan_id", "region"), room_bytes=room_bytes) as rows:
        for part in storage.ahead(_measured, parts(run), FILES_AT_ONCE):
            flat, scored, with_label = _flattened(part, split)
            rows.add(flat)
            evaluated += scored
            labelled += with_label
        storage.write_pieces(storage.join(run, METRICS_FILE), METRICS, rows.in_order(), row_group_rows=65536)
    return {"labelled": labelled, "evaluated": evaluated}


def _measured(uri: str) -> pa.Table:
    """The columns `MEASURED` of a part, every value looked at. StorageError where one cannot be read."""
    table = storage.read_table(uri, list(MEASURED)).select(list(MEASURED)).combine_chunks()
    with translated("read as Parquet", uri):
        table.validate(full=True)
    return table


def _flattened(part: pa.Table, split: Split) -> tuple[pa.Table, int, int]:
    """What `metrics_of` makes of every row of a part, column by column; how many rows are evaluated, and have a label."""
    regions, sources = (_one_chunk(part[name]) for name in ("regions", "sources"))
    parents, entries = pc.list_parent_indices(regions), pc.list_flatten(regions)
    whose = zip(part["patient_id"].to_pylist(), part["scan_id"].to_pylist(), strict=True)
    sides = pa.array([split.part_of(patient, scan) for patient, scan in whose], pa.string())
    columns = {name: _one_chunk(part[name]).take(parents) for name in _SHARED} | {"split": sides.take(parents)}
    columns |= {name: pc.struct_field(entries, name) for name in METRICS.names if name not in columns}
    scored = pc.unique(parents.filter(pc.not_equal(pc.struct_field(entries, "state"), "no_label")))
    roles = pc.struct_field(pc.list_flatten(sources), "role")
    listed = pc.list_parent_indices(sources).filter(pc.is_in(roles, pa.array(["label", "both"])))
    labelled = {*scored.to_pylist(), *listed.to_pylist()}
    return pa.table([columns[name] for name in METRICS.names], schema=METRICS), len(scored), len(labelled)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def metrics_of(row: Mapping[str, Any], split: Split) -> Iterator[dict[str, Any]]:
    """The rows of the `metrics` table that a row of the `scans` table makes; it needs the columns `MEASURED`."""
    side = split.part_of(row["patient_id"], row["scan_id"])
    for entry in row["regions"] or ():
        yield {**{name: row[name] for name in _SHARED}, "split": side, **entry}


def forget_evaluation(run: str) -> None:
    """Remove what `evaluate` left: it is about rows that have changed since."""
    for name in (EVALUATION_FILE, BASELINES_FILE):
        storage.delete(storage.join(run, name))


def finish_run(run: str, body: Mapping[str, Any], counts: Mapping[str, int], timings: Mapping[str, float]) -> None:
    """Write counts and timings into run.json and then, last of all, _SUCCESS.json with the seal of every file of the run."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    done = {"finished_at": now, "counts": dict(counts)}
    storage.write_json(storage.join(run, RUN_FILE), {**body, **done, "timings": dict(timings)})
    there = [n for n in (RUN_FILE, MANIFEST_FILE, METRICS_FILE) if storage.exists(storage.join(run, n))]
    files = seals(run, [*there, *(f"{PARTS}/{storage.name_of(uri)}" for uri in parts(run))])
    storage.write_json(storage.join(run, SUCCESS_FILE), {"run_id": body["run_id"], **done, "files": files})


def seals(run: str, names: Iterable[str]) -> dict[str, Seal]:
    """The seal of each file, named as it lies below the run."""
    wanted = list(names)
    found = storage.ahead(seal_of_file, [storage.join(run, name) for name in wanted], FILES_AT_ONCE)
    return dict(zip(wanted, found, strict=True))


def seal_of_file(uri: str) -> Seal:
    """The seal of a file, of which a piece is in memory at a time."""
    size_bytes, sha256 = storage.digest(uri)
    return {"size_bytes": size_bytes, "sha256": sha256}


def seal_of(data: bytes) -> Seal:
    """The seal of a file with these bytes."""
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def expected_tags(table: pa.Table) -> dict[str, str]:
    """scan_id -> content_tag of every scan that a run over this manifest must hold exactly once."""
    batches = table.select(["scan_id", "label_map", "sources"]).to_batches(max_chunksize=SCANS_AT_ONCE)
    return {row["scan_id"]: content_tag(row) for batch in batches for row in batch.to_pylist()}
