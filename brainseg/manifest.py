"""Manifest: from an archive to the table of its scans. The only way data enters a job.

An archive is listed once; the layout whose names most files bear turns the files into scans; folds are dealt by patient.
Every scan becomes a row, an unusable one with its problem. A job reads the table alone and never lists an archive again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.audit import Audit
from brainseg.errors import PreflightError, StorageError, UsageError
from brainseg.folds import FoldPlan, deal
from brainseg.layouts import (
    FoundScan,
    Inventory,
    Layout,
    Source,
    brats,
    dicom,
    figshare,
    h5slices,
    id_fault,
    lgg,
    pictures,
    sliced,
)
from brainseg.regions import label_map as look_up_label_map
from brainseg.storage import Entry, absolute, exists, is_dir, is_remote, list_files, name_of, read_table, write_table
from brainseg.tables import MANIFEST, SOURCE, flat_sources, nested_sources

LAYOUTS: Mapping[str, Layout] = {m.NAME: cast(Layout, m) for m in (lgg, figshare, brats, h5slices, dicom, pictures)}
CLEAR_LEAD = 10
"""A layout is the archive's own when ten times as many files bear its names as those of any other."""

ROW_GROUP_ROWS = 65_536
AUDIT_KEY = b"brainseg.audit"
"""Where the Parquet file's own metadata holds the leakage audit of its folds, as JSON."""

Unit = Literal["scan", "slice"]


@dataclass(frozen=True)
class Stock:
    """What was found in an archive: its manifest (schema `tables.MANIFEST`), what was left aside, how its folds came about.

    `stratified_by` is the attribute over whose values the folds are even, or None.
    """

    manifest: pa.Table
    inventory: Inventory
    folds: str
    stratified_by: str | None


def take_stock(
    root: str,
    plan: FoldPlan,
    *,
    layout: str | None = None,
    dataset: str | None = None,
    label_map: str | None = None,
    unit: Unit = "scan",
) -> Stock:
    """List an archive and deal its folds.

    `dataset` and `label_map` override what the layout declares. With the unit `slice` every slice of a stack is a scan of
    its own, of the same patient.

    Raises UsageError where the place holds nothing, or nothing that is recognised, or where the plan of the folds cannot
    be followed; LeakageError where folds share a patient.
    """
    if label_map is not None:
        look_up_label_map(label_map)
    root, entries = _listed(root)
    inventory = _layout_of(entries, root, layout).find(entries, root)
    if unit == "slice":
        inventory = sliced(inventory)
    dealt = deal(_table(inventory.scans, dataset, label_map), plan)
    return Stock(dealt.manifest, inventory, dealt.how, dealt.stratified_by)


def index_archive(root: str, plan: FoldPlan | None = None, **options: Any) -> tuple[pa.Table, Inventory]:
    """Return the manifest of an archive and what was left aside; `take_stock` in short, with its options."""
    stock = take_stock(root, plan or FoldPlan(), **options)
    return stock.manifest, stock.inventory


def _listed(root: str) -> tuple[str, list[Entry]]:
    """Return the archive's absolute place and its files, one or more."""
    try:
        place = absolute(root)
        entries = list(list_files(place))
        if not entries:
            raise UsageError(f"{place}: {_why_nothing(place)}")
    except StorageError as error:
        raise PreflightError(str(error)) from error
    return place, entries


def _why_nothing(root: str) -> str:
    if is_remote(root):
        return "no object lies under this prefix"
    if exists(root):
        return "this is a file; expected the folder of an archive (unpack it first if it is packed)"
    return "this folder holds no file" if is_dir(root) else "there is no such folder"


def _layout_of(entries: Sequence[Entry], root: str, wanted: str | None) -> Layout:
    """Return the layout asked for, or the clear winner of the count."""
    if wanted is not None and wanted not in LAYOUTS:
        raise UsageError(f"unknown layout '{wanted}'; known: {', '.join(LAYOUTS)}")
    counts = {name: layout.matches(entries) for name, layout in LAYOUTS.items() if wanted in (None, name)}
    (best, most), *others = sorted(counts.items(), key=lambda item: -item[1])
    if most == 0:
        raise UsageError(_nothing_recognised(entries, root, counts))
    if others and others[0][1] * CLEAR_LEAD > most:
        raise UsageError(
            f"{root}: {most} files are named as in layout '{best}' and {others[0][1]} as in '{others[0][0]}'; "
            "index each part on its own, or say which with --layout"
        )
    return LAYOUTS[best]


def _nothing_recognised(entries: Sequence[Entry], root: str, tried: Iterable[str]) -> str:
    """What a person needs to see the difference between their names and those known."""
    endings = Counter(_ending(entry.uri) for entry in entries).most_common(5)
    seen = ", ".join(f"{count} {ending}" for ending, count in endings)
    known = "\n".join(f"  {name:9} {LAYOUTS[name].EXAMPLE}" for name in tried)
    example = entries[len(entries) // 2].uri.removeprefix(root).lstrip("/")
    return (
        f"{root}: no scan was recognised among {len(entries)} files ({seen}; for example {example[:120]!a}).\n"
        f"Layouts tried, by the names they know:\n{known}"
    )


def _ending(uri: str) -> str:
    name = name_of(uri).lower()
    dot = name.rfind(".", 0, -3) if name.endswith(".gz") else name.rfind(".")
    return name[dot:][:20] if dot >= 0 else "without extension"


# ---- the table -------------------------------------------------------------------------------------------------------


def _table(scans: Sequence[FoundScan], dataset: str | None, label_map: str | None) -> pa.Table:
    """Build the manifest column by column: nested ones from flat arrays, so that a million rows stay cheap."""

    def column(value: Callable[[FoundScan], Any]) -> list[Any]:
        return [value(scan) for scan in scans]

    columns = {
        "scan_id": column(lambda s: s.scan_id),
        "patient_id": column(lambda s: s.patient_id),
        "dataset": column(lambda s: dataset or s.dataset),
        "layout": column(lambda s: s.layout),
        "reader": column(lambda s: s.reader),
        "label_map": column(lambda s: label_map or s.label_map),
        "modalities": column(lambda s: s.modalities),
        "has_label": column(lambda s: s.has_label),
        "size_bytes": column(lambda s: s.size_bytes),
        "fold": column(lambda s: s.fold),
        "problem_code": column(lambda s: s.problem_code),
        "problem": column(lambda s: s.problem),
    }
    arrays = {name: pa.array(values, MANIFEST.field(name).type) for name, values in columns.items()}
    arrays["sources"] = _sources(scans)
    arrays["attributes"] = _attributes(scans)
    return pa.Table.from_arrays([arrays[name] for name in MANIFEST.names], schema=MANIFEST)


def _sources(scans: Sequence[FoundScan]) -> pa.Array:
    flat = [source for scan in scans for source in scan.sources]
    parts = {f.name: pa.array([getattr(s, f.name) for s in flat], SOURCE.field(f.name).type) for f in fields(Source)}
    return nested_sources((len(scan.sources) for scan in scans), parts)


def _attributes(scans: Sequence[FoundScan]) -> pa.Array:
    pairs = [pair for scan in scans for pair in scan.attributes.items()]
    keys, values = (pa.array([pair[i] for pair in pairs], pa.string()) for i in (0, 1))
    return pa.MapArray.from_arrays(_offsets(len(scan.attributes) for scan in scans), keys, values)


def _offsets(lengths: Iterable[int]) -> pa.Array:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return pa.array(ends, pa.int32())


# ---- reading and writing ---------------------------------------------------------------------------------------------


def write_manifest(uri: str, table: pa.Table, audit: Audit | None = None) -> None:
    """Write a manifest, with the audit of its folds where there is one. Raises UsageError when it is none."""
    checked = _checked(table, uri)
    if audit is not None:
        noted = json.dumps({"of": _digest_of_sides(checked), "audit": audit.to_json()}, ensure_ascii=False)
        checked = checked.replace_schema_metadata({**MANIFEST.metadata, AUDIT_KEY: noted.encode()})
    write_table(uri, checked, row_group_rows=ROW_GROUP_ROWS)


def recorded_audit(uri: str) -> Audit | None:
    """Return the leakage audit that stands in a manifest, or None: there is none, or scans or folds have changed since."""
    try:
        table = read_table(uri, ["scan_id", "patient_id", "fold"])
    except StorageError as error:
        raise UsageError(f"not a manifest: {error}") from error
    noted = (table.schema.metadata or {}).get(AUDIT_KEY)
    try:
        body = json.loads(noted or b"null")
        return Audit.from_json(body["audit"]) if body and body["of"] == _digest_of_sides(table) else None
    except (ValueError, TypeError, KeyError):
        return None


def _digest_of_sides(table: pa.Table) -> str:
    """sha256 over whose scan lies in which fold: what an audit is of."""
    columns = [table[name].to_pylist() for name in ("scan_id", "patient_id", "fold")]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def read_manifest(uri: str) -> pa.Table:
    """Read a manifest, also one that DuckDB or pandas has filtered; further columns are dropped.

    Raises UsageError when columns are missing, of another type or null where they may not be, or when ids are not unique
    or could not safely name a file.
    """
    try:
        table = read_table(uri)
    except StorageError as error:
        raise UsageError(f"not a manifest: {error}") from error
    return _checked(table, uri)


def _checked(table: pa.Table, uri: str) -> pa.Table:
    """Return the table in exactly the schema `tables.MANIFEST`, or say why it is no manifest."""
    missing = [name for name in MANIFEST.names if name not in table.column_names]
    if missing:
        raise UsageError(f"{uri} is not a manifest: it lacks the columns {', '.join(missing)}; `brainseg index` writes one")
    arrays = [_conformed(table[field.name], field, uri) for field in MANIFEST]
    checked = pa.Table.from_arrays(arrays, schema=MANIFEST)
    _check_ids(checked["scan_id"], uri)
    return checked


def _conformed(column: pa.ChunkedArray, field: pa.Field, uri: str) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    try:
        array = _cast_sources(array) if field.name == "sources" else array.cast(field.type)
    except (pa.ArrowException, KeyError, AttributeError) as error:
        found = f"column '{field.name}' is {column.type}, expected {field.type}"
        raise UsageError(f"{uri} is not a manifest: {' '.join(found.split())[:300]}") from error
    if not field.nullable and array.null_count:
        raise UsageError(f"{uri} is not a manifest: column '{field.name}' is null in {array.null_count} rows")
    return array


def _cast_sources(array: pa.Array) -> pa.Array:
    """Cast field by field: other writers declare every field nullable, and earlier versions knew fewer of them."""
    if array.type == MANIFEST.field("sources").type:
        return array
    if array.null_count:
        return array  # refused by the caller, which counts nulls
    flat = array.flatten()
    there = {flat.type.field(i).name for i in range(flat.type.num_fields)}
    parts = {name: pc.struct_field(flat, name) for name in SOURCE.names if name in there or not SOURCE.field(name).nullable}
    return nested_sources(pc.list_value_length(array).to_pylist(), parts)


def _check_ids(ids: pa.ChunkedArray, uri: str) -> None:
    if pc.count_distinct(ids).as_py() != len(ids):
        twice = Counter(ids.to_pylist()).most_common(1)[0]
        raise UsageError(f"{uri} is not a manifest: scan id '{twice[0]}' stands in {twice[1]} rows")
    for scan_id in ids.to_pylist():
        fault = id_fault(scan_id)
        if fault:
            raise UsageError(f"{uri} is not a manifest: scan id {scan_id[:60]!a} cannot name a file: {fault}")


def fingerprint(table: pa.Table) -> str:
    """Return the sha256 over every scan's id and its sources' uri, size and tag, in the table's order."""
    digest = hashlib.sha256()
    for words in _fingerprinted(table):
        digest.update("\0".join(words).encode("utf-8", "backslashreplace"))
        digest.update(b"\0\0")
    return digest.hexdigest()


def _fingerprinted(table: pa.Table) -> Iterator[list[str]]:
    _, files = flat_sources(table["sources"])
    yield table["scan_id"].to_pylist()
    yield [str(n) for n in pc.list_value_length(table["sources"]).to_pylist()]
    for name in ("uri", "size_bytes", "tag"):
        yield ["" if value is None else str(value) for value in files.field(name).to_pylist()]
