"""Manifest: from an archive to the table of its scans. The only way data enters a job.

An archive is listed once; the layout whose names most files bear turns the files into scans; folds are dealt by patient.
Every scan becomes a row, an unusable one with its problem. A job reads the table alone and never lists an archive again.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.errors import LeakageError, PreflightError, StorageError, UsageError
from brainseg.layouts import FoundScan, Inventory, Layout, brats, figshare, h5slices, id_fault, lgg
from brainseg.regions import label_map as look_up_label_map
from brainseg.storage import Entry, absolute, exists, is_dir, is_remote, list_files, name_of, read_table, write_table
from brainseg.tables import MANIFEST, SOURCE

LAYOUTS: Mapping[str, Layout] = {m.NAME: cast(Layout, m) for m in (lgg, figshare, brats, h5slices)}
CLEAR_LEAD = 10
"""A layout is the archive's own when ten times as many files bear its names as those of any other."""

ROW_GROUP_ROWS = 65_536


def index_archive(
    root: str,
    *,
    layout: str | None = None,
    dataset: str | None = None,
    label_map: str | None = None,
    folds: int = 5,
    seed: int = 0,
    stratify: str | None = None,
) -> tuple[pa.Table, Inventory]:
    """List an archive and return its manifest (schema `tables.MANIFEST`) and what was left aside.

    `dataset` and `label_map` override what the layout declares. Folds declared by the set's own table are kept; otherwise
    patients are dealt into `folds`, evenly within each value of the attribute `stratify` where one is named.

    Raises UsageError where the place holds nothing, or nothing that is recognised; LeakageError where declared folds
    share a patient.
    """
    if label_map is not None:
        look_up_label_map(label_map)
    root, entries = _listed(root)
    inventory = _layout_of(entries, root, layout).find(entries, root)
    table = _table(inventory.scans, dataset, label_map)
    declared = any(scan.fold is not None for scan in inventory.scans)
    if declared:
        check_no_shared_patients(table)
        return table, inventory
    return assign_folds(table, folds=folds, seed=seed, stratify=stratify), inventory


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


# ---- folds -----------------------------------------------------------------------------------------------------------


def patient_fold(patient_id: str, folds: int, seed: int) -> int:
    """Return a patient's fold 0..folds-1 from a hash alone: the same in any archive, but only roughly balanced."""
    return int(_hash(patient_id, seed)[:15], 16) % folds


def assign_folds(
    table: pa.Table, *, folds: int = 5, seed: int = 0, stratify: str | None = None, by_scan: bool = False
) -> pa.Table:
    """Deal patients into folds 0..folds-1, and every scan with its patient; replaces the column `fold`.

    Patients are taken in the order of a hash of seed and id, stratum by stratum, and dealt in turn, so folds differ by at
    most one patient. Scans of unknown patients get null, or with `by_scan` are dealt as if each were a patient of its
    own: such folds may share patients. Raises UsageError for an attribute that no scan has.
    """
    if folds < 2:
        raise UsageError(f"{folds} folds were asked for, expected 2 or more")
    owners = _owners(table, by_scan=by_scan)
    strata = _strata(table, owners, stratify)
    order = sorted({o for o in owners if o is not None}, key=lambda o: (strata.get(o, ""), _hash(o, seed)))
    fold_of = {owner: turn % folds for turn, owner in enumerate(order)}
    column = pa.array([None if o is None else fold_of[o] for o in owners], pa.int32())
    return table.set_column(table.schema.get_field_index("fold"), MANIFEST.field("fold"), column)


def check_no_shared_patients(table: pa.Table) -> None:
    """Raise LeakageError, naming one, when scans of a patient lie in different folds."""
    fold_of: dict[str, int] = {}
    for patient, fold in zip(table["patient_id"].to_pylist(), table["fold"].to_pylist(), strict=True):
        if patient is not None and fold is not None and fold_of.setdefault(patient, fold) != fold:
            raise LeakageError(
                f"patient '{patient}' lies in folds {fold_of[patient]} and {fold}; folds must not share patients"
            )


def _owners(table: pa.Table, *, by_scan: bool) -> list[str | None]:
    patients: list[str | None] = table["patient_id"].to_pylist()
    if not by_scan:
        return patients
    return [f"scan {s}" if p is None else p for p, s in zip(patients, table["scan_id"].to_pylist(), strict=True)]


def _strata(table: pa.Table, owners: Sequence[str | None], attribute: str | None) -> dict[str, str]:
    """Return owner -> value of an attribute; the smallest where an owner's scans differ."""
    if attribute is None:
        return {}
    values = [dict(pairs or ()).get(attribute) for pairs in table["attributes"].to_pylist()]
    strata: dict[str, str] = {}
    for owner, value in zip(owners, values, strict=True):
        if owner is not None and value is not None:
            strata[owner] = min(value, strata.get(owner, value))
    if not strata:
        known = sorted({key for pairs in table["attributes"].to_pylist() for key, _ in pairs or ()})
        raise UsageError(f"no scan has the attribute '{attribute}' to stratify by; there are: {', '.join(known) or 'none'}")
    return strata


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()


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
    fields = [SOURCE.field(i) for i in range(SOURCE.num_fields)]
    parts = [pa.array([getattr(source, field.name) for source in flat], field.type) for field in fields]
    offsets = _offsets(len(scan.sources) for scan in scans)
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(parts, fields=fields))


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


def write_manifest(uri: str, table: pa.Table) -> None:
    """Write a manifest. Raises UsageError when it is none."""
    write_table(uri, _checked(table, uri), row_group_rows=ROW_GROUP_ROWS)


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
    """Cast field by field: other writers declare every field nullable, which Arrow will not cast as a whole."""
    if array.type == MANIFEST.field("sources").type:
        return array
    if array.null_count:
        return array  # refused by the caller, which counts nulls
    flat = array.flatten()
    fields = [SOURCE.field(i) for i in range(SOURCE.num_fields)]
    parts = [pc.struct_field(flat, field.name).cast(field.type) for field in fields]
    values = pa.StructArray.from_arrays(parts, fields=fields)
    return pa.ListArray.from_arrays(_offsets(pc.list_value_length(array).to_pylist()), values)


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
    sources = table["sources"]
    flat = pc.list_flatten(sources)
    yield table["scan_id"].to_pylist()
    yield [str(n) for n in pc.list_value_length(sources).to_pylist()]
    for name in ("uri", "size_bytes", "tag"):
        yield ["" if value is None else str(value) for value in pc.struct_field(flat, name).to_pylist()]
