"""Folds: who is held out together. Dealt by patient, evenly within tumour type, site or grade; or as a table says.

Whose turn it is comes from a hash of seed and patient, so the same archive gives the same folds everywhere. Folds that
share a patient are refused unless leakage is accepted in so many words.
"""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainseg import storage
from brainseg.errors import LeakageError, StorageError, UsageError
from brainseg.layouts import SLICE_READERS
from brainseg.tables import MANIFEST, flat_sources

AUTO, NONE = "auto", "none"
GROUPING = ("tumor_type", "tumour_type", "site", "grade", "neoplasm_histologic_grade", "histological_type")
"""Attributes by which folds are stratified where nobody says which: the first that fits, in this order."""

By = Literal["patient", "scan"]

_SCAN_COLUMNS = ("scan_id", "scan", "image_id", "image", "case_id", "case", "file", "filename", "name", "study", "sample", "id")
_PATIENT_COLUMNS = ("patient_id", "patient", "pid", "subject_id", "subject", "participant_id", "participant")
_ENDING = re.compile(r"\.(nii(\.gz)?|tiff?|png|jpe?g|h5|hdf5)$", re.IGNORECASE)


@dataclass(frozen=True)
class FoldPlan:
    """How folds shall come about.

    `stratify` is an attribute's name, `auto` (the first of `GROUPING` that fits) or `none`. `by` `scan` deals every scan
    by itself, whatever patient it is of; `auto` is `none` then. `table` is the place of a CSV that says who is in which fold.
    """

    folds: int = 5
    seed: int = 0
    stratify: str = AUTO
    by: By = "patient"
    table: str | None = None
    accept_leakage: bool = False


@dataclass(frozen=True)
class Dealt:
    """A manifest with its folds, and how they came about: in words, and by which attribute they are stratified."""

    manifest: pa.Table
    how: str
    stratified_by: str | None = None


def deal(manifest: pa.Table, plan: FoldPlan) -> Dealt:
    """Give a manifest its folds: from a table, as the set's own table declared them, or dealt.

    Raises UsageError for a plan that contradicts itself or a table that leaves a labelled scan without a fold, and
    LeakageError for folds that share a patient, unless the plan accepts it.
    """
    _check(plan)
    declared = manifest["fold"].null_count < manifest.num_rows
    if plan.table is not None:
        dealt = _as_told(manifest, plan.table)
    elif declared and plan.by == "patient":
        if plan.stratify not in (AUTO, NONE):
            raise UsageError(f"the set's own table declares the folds: nothing is left to stratify by '{plan.stratify}'")
        dealt = Dealt(manifest, "as the set's own table declares them")
    else:
        return _dealt(manifest, plan)
    if not plan.accept_leakage:
        check_no_shared_patients(dealt.manifest)
    return dealt


def _check(plan: FoldPlan) -> None:
    if plan.table is not None and (plan.by == "scan" or plan.stratify not in (AUTO, NONE)):
        raise UsageError("--folds-from says who is in which fold; it leaves nothing to --folds-by and --stratify")
    if plan.by == "scan" and not plan.accept_leakage:
        raise LeakageError(
            "--folds-by scan deals every scan by itself: scans of one patient will stand on both sides of every split, and "
            "what a model scores there says nothing about new patients. Pass --accept-leakage to do it all the same"
        )


def _dealt(manifest: pa.Table, plan: FoldPlan) -> Dealt:
    attribute = None if plan.stratify == NONE else plan.stratify
    if attribute == AUTO:
        attribute = choose_attribute(manifest, folds=plan.folds) if plan.by == "patient" else None
    table = assign_folds(manifest, folds=plan.folds, seed=plan.seed, stratify=attribute, by=plan.by)
    if table["fold"].null_count == table.num_rows:
        return Dealt(table, "none: nobody says whose the scans are")
    how = f"{plan.folds} by {plan.by}, " + (f"stratified by {attribute}" if attribute else "not stratified")
    return Dealt(table, how, attribute)


# ---- dealing ---------------------------------------------------------------------------------------------------------


def assign_folds(
    table: pa.Table, *, folds: int = 5, seed: int = 0, stratify: str | None = None, by: By = "patient"
) -> pa.Table:
    """Deal patients into folds 0..folds-1, and every scan with its patient; replaces the column `fold`.

    Patients are taken in the order of a hash of seed and id, stratum by stratum, and dealt in turn, so folds differ by at
    most one patient. Scans of unknown patients get null. By scan, each is dealt as if it were a patient of its own: such
    folds may share patients. Raises UsageError for an attribute that no scan has.
    """
    if folds < 2:
        raise UsageError(f"{folds} folds were asked for, expected 2 or more")
    owners = _owners(table, by)
    strata = _strata(table, owners, stratify)
    order = sorted({o for o in owners if o is not None}, key=lambda o: (strata.get(o, ""), _hash(o, seed)))
    fold_of = {owner: turn % folds for turn, owner in enumerate(order)}
    return _with_folds(table, [None if o is None else fold_of[o] for o in owners])


def choose_attribute(table: pa.Table, *, folds: int) -> str | None:
    """Return the first of `GROUPING`, in any spelling of case, that divides the patients into groups worth dealing.

    That is two or more values, and so few that a group could on average reach every fold: patients / folds.
    """
    owners = _owners(table, "patient")
    most = len(set(owners) - {None}) // folds
    known = {_plain(name): name for name in reversed(_attribute_names(table))}
    for wanted in GROUPING:
        name = known.get(wanted)
        if name and 2 <= len(set(_values(table, owners, name).values())) <= most:
            return name
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def check_no_shared_patients(table: pa.Table) -> None:
    """Raise LeakageError, naming one, when scans of a patient lie in different folds."""
    fold_of: dict[str, int] = {}
    for patient, fold in zip(table["patient_id"].to_pylist(), table["fold"].to_pylist(), strict=True):
        if patient is not None and fold is not None and fold_of.setdefault(patient, fold) != fold:
            raise LeakageError(
                f"patient '{patient}' lies in folds {fold_of[patient]} and {fold}; folds must not share patients"
            )


def _owners(table: pa.Table, by: By) -> list[str | None]:
    owners: list[str | None] = table["patient_id" if by == "patient" else "scan_id"].to_pylist()
    return owners


def _strata(table: pa.Table, owners: Sequence[str | None], attribute: str | None) -> dict[str, str]:
    if attribute is None:
        return {}
    strata = _values(table, owners, attribute)
    if not strata:
        known = ", ".join(_attribute_names(table)) or "none"
        raise UsageError(f"no scan has the attribute '{attribute}' to stratify by; there are: {known}")
    return strata


def _values(table: pa.Table, owners: Sequence[str | None], attribute: str) -> dict[str, str]:
    """Return owner -> value of an attribute; the smallest where an owner's scans differ."""
    found: dict[str, str] = {}
    values = pc.map_lookup(table["attributes"], attribute, "first").to_pylist()
    for owner, value in zip(owners, values, strict=True):
        if owner is not None and value is not None:
            found[owner] = min(value, found.get(owner, value))
    return found


def _attribute_names(table: pa.Table) -> list[str]:
    """Every attribute that some scan has, sorted."""
    names: set[str] = set()
    for chunk in table["attributes"].chunks:
        names |= set(chunk.keys.unique().to_pylist())
    return sorted(names)


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()


def _with_folds(table: pa.Table, folds: Sequence[int | None]) -> pa.Table:
    return table.set_column(table.schema.get_field_index("fold"), MANIFEST.field("fold"), pa.array(folds, pa.int32()))


# ---- folds from a table ----------------------------------------------------------------------------------------------


def _as_told(manifest: pa.Table, table: str) -> Dealt:
    """Look every scan up in a CSV. One without a label, or that cannot be used, may lack there."""
    fold_of, by_patient, first = _read_folds(table)
    folds: list[int | None] = []
    for keys in _keys(manifest, by_patient=by_patient):
        folds.append(next((fold_of[key] for key in keys if key in fold_of), None))
    needed = pc.and_(manifest["has_label"], manifest["problem_code"].is_null()).to_pylist()
    lacking = [s for s, f, n in zip(manifest["scan_id"].to_pylist(), folds, needed, strict=True) if n and f is None]
    if lacking:
        raise UsageError(
            f"{table}: names no fold for {len(lacking):,} of {sum(needed):,} labelled scans, such as '{lacking[0]}' (it names "
            f"{len(fold_of):,}, such as '{next(iter(fold_of))}')"
        )
    how = f"as {storage.name_of(table)} says" + (", counted from 1 there and from 0 here" if first else "")
    return Dealt(_with_folds(manifest, folds), how)


def _read_folds(table: str) -> tuple[dict[str, int], bool, int]:
    """Return who -> fold counted from 0, whether that is a patient rather than a scan, and where the table counts from."""
    rows = _rows(table)
    columns = {_plain(name): name for name in reversed(list(rows[0] if rows else ()))}
    key = next((c for c in (*_SCAN_COLUMNS, *_PATIENT_COLUMNS) if c in columns), None)
    if key is None or "fold" not in columns:
        found = ", ".join(columns.values()) or "none"
        raise UsageError(f"{table}: expected a column 'scan_id' or 'patient_id' and a column 'fold'; it has: {found[:200]}")
    fold_of: dict[str, int] = {}
    for row in rows:
        who, fold = _stem(row[columns[key]]), _fold(row[columns["fold"]], table)
        if fold_of.setdefault(who, fold) != fold:
            raise UsageError(f"{table}: puts '{who[:60]}' into folds {fold_of[who]} and {fold}")
    first = 1 if min(fold_of.values()) == 1 else 0
    return {who: fold - first for who, fold in fold_of.items()}, key in _PATIENT_COLUMNS, first


def _rows(table: str) -> list[dict[str, str]]:
    """The filled rows of a CSV, separated by commas, semicolons or tabs."""
    try:
        lines = storage.read_text(storage.absolute(table)).splitlines()
        separator = max(",;\t", key=lines[0].count) if lines else ","
        found = [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(lines, delimiter=separator)]
    except (StorageError, csv.Error) as error:
        raise UsageError(f"{table}: no table of folds: {error}") from error
    return [row for row in found if any(row.values())]


def _fold(cell: str, table: str) -> int:
    if not re.fullmatch(r"\s*\d{1,6}\s*", cell):
        raise UsageError(f"{table}: found the fold {cell[:20]!a}, expected a whole number")
    return int(cell)


def _stem(name: str) -> str:
    """What a scan or patient is called in a table: without folders and ending, where it is a file's name."""
    return _ENDING.sub("", unicodedata.normalize("NFC", name.strip()).replace("\\", "/").rsplit("/", 1)[-1])


def _keys(manifest: pa.Table, *, by_patient: bool) -> Iterator[tuple[str, ...]]:
    """Yield what each scan may be called in a table: its id, that of the scan it is a slice of, its file, its patient."""
    files = _single_files(manifest)
    columns = (manifest[name].to_pylist() for name in ("scan_id", "patient_id", "reader"))
    for place, (scan, patient, reader) in enumerate(zip(*columns, strict=True)):
        names = [scan]
        if place in files and reader in SLICE_READERS:
            names += [re.sub(r"_\d{3,}$", "", scan), _stem(files[place])]
        owner = [patient] if patient else []
        yield tuple(owner + names if by_patient else names + owner)


def _single_files(manifest: pa.Table) -> Mapping[int, str]:
    """Return place of the scan -> uri of its image, for scans of one image file."""
    owners, files = flat_sources(manifest["sources"])
    images = pc.not_equal(files.field("role"), "label")
    owners, uris = owners.filter(images), files.field("uri").filter(images)
    _, first, counts = np.unique(owners.to_numpy(), return_index=True, return_counts=True)
    places = pa.array(first[counts == 1])
    return dict(zip(owners.take(places).to_pylist(), uris.take(places).to_pylist(), strict=True))
