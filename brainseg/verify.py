"""Verify: prove a finished run from what lies in its folder, reading every byte of every part once.

Two proofs stand beside each other. The *seal*: every file has the size and sha256 that _SUCCESS.json says. The *content*:
every scan of the manifest stands exactly once, made from the listed files by the run's own model and config, its mask as it
was hashed, its figures in metrics.parquet. A damaged file breaks the first, a file that somebody made anew the second.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from brainseg import manifest, runs, storage
from brainseg.card import Split
from brainseg.errors import BrainsegError, StorageError, one_line
from brainseg.runs import FILES_AT_ONCE, PARTS, Seal
from brainseg.storage.place import is_temporary, translated
from brainseg.tables import EARLIER_SCANS, METRICS, SCANS

IDENTITY = ("run_id", "model_fingerprint", "config_fingerprint")
NEEDED = (*runs.MEASURED, "status", "content_tag", *IDENTITY, "mask", "mask_sha256")
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Claim:
    """What a run says about itself: `run.json`, the manifest it keeps, and the files that `_SUCCESS.json` names."""

    run: str
    info: Mapping[str, Any]
    expected: Mapping[str, str]
    named: Mapping[str, Seal | None]
    split: Split
    is_evaluated: bool
    """Whether `evaluate` made the figures anew: with other labels they need not be those of the parts."""


@dataclass
class Part:
    """What one part holds: per row the scan, whether it is ok, and a digest of its figures; and what is wrong with it."""

    problems: list[str] = field(default_factory=list)
    rows: list[tuple[str, bool, int | None]] = field(default_factory=list)
    """No digest where the columns are others: which scans stand there is known all the same."""


def verify_run(run: str) -> list[str]:
    """Prove a finished run; returns what is wrong, one line each, empty when all is well.

    A few parts are in memory at a time, beside some hundred bytes a scan.
    """
    claim, success, problems = _claim(run)
    there, strange = _files(run)
    problems += [*strange, *_presence(claim, success, there)]
    seen: dict[str, int] = {}
    figures: dict[str, int | None] = {}
    num_ok = 0
    for part in storage.ahead(partial(_examine, claim), there, FILES_AT_ONCE):
        problems += part.problems
        for scan_id, is_ok, digest in part.rows:
            seen[scan_id] = seen.get(scan_id, 0) + 1
            figures[scan_id] = digest
            num_ok += is_ok
    problems += [f"{s}: {n} rows, expected 1" for s, n in seen.items() if n > 1]
    problems += [f"{s}: no row" for s in claim.expected if s not in seen]
    problems += _metrics_problems(claim, figures)
    if success and not problems:
        counts = {"found": len(claim.expected), "ok": num_ok, "failed": len(seen) - num_ok}
        problems += _counts_problems(success, counts)
    return [one_line(p) for p in problems]


# ---- what the run claims ---------------------------------------------------------------------------------------------


def _claim(run: str) -> tuple[Claim, Mapping[str, Any], list[str]]:
    """What the run claims, what _SUCCESS.json says, and what is wrong with either or with the manifest."""
    problems: list[str] = []
    info = _read_json(run, runs.RUN_FILE, problems)
    success: Mapping[str, Any] = {}
    if storage.exists(storage.join(run, runs.SUCCESS_FILE)):
        success = _read_json(run, runs.SUCCESS_FILE, problems)
    else:
        problems.append(f"{runs.SUCCESS_FILE} is missing: the run has not finished")
    named = _named(success, problems)
    expected = _expected(run, info, problems)
    evaluated = _evaluated(run, problems)
    beside = {n: seal for n, seal in named.items() if not n.startswith(f"{PARTS}/")}
    problems += _seal_problems(run, {**beside, **(evaluated or {})})
    if success and any(success.get(name) != info.get(name) for name in ("run_id", "counts")):
        problems.append(f"{runs.SUCCESS_FILE} is about another run, or about other counts, than {runs.RUN_FILE}")
    return Claim(run, info, expected, named, _split(info, problems), evaluated is not None), success, problems


def _read_json(run: str, name: str, problems: list[str]) -> Mapping[str, Any]:
    try:
        body = storage.read_json(storage.join(run, name))
    except (StorageError, RecursionError) as error:
        problems.append(f"{name}: {error}")
        return {}
    if not isinstance(body, dict):
        problems.append(f"{name}: found a {type(body).__name__}, expected an object")
        return {}
    return body


def _named(success: Mapping[str, Any], problems: list[str]) -> dict[str, Seal | None]:
    """The files that _SUCCESS.json names and their seals; runs of earlier versions name their parts alone."""
    files, parts = success.get("files", {}), success.get("parts", [])
    if not isinstance(files, dict) or not isinstance(parts, list):
        problems.append(f"{runs.SUCCESS_FILE}: its list of files is none")
        return {}
    return {**{f"{PARTS}/{name}": None for name in parts}, **files}


def _evaluated(run: str, problems: list[str]) -> dict[str, Seal | None] | None:
    """What evaluation.json says of the files that it is about; None where the run was not evaluated anew."""
    if not storage.exists(storage.join(run, runs.EVALUATION_FILE)):
        return None
    files = _read_json(run, runs.EVALUATION_FILE, problems).get("files")
    return {runs.METRICS_FILE: None, **(files if isinstance(files, dict) else {})}


def _expected(run: str, info: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    try:
        table = manifest.read_manifest(storage.join(run, runs.MANIFEST_FILE))
    except BrainsegError as error:
        problems.append(f"{runs.MANIFEST_FILE}: {error}")
        return {}
    if manifest.fingerprint(table) != info.get("manifest_fingerprint"):
        problems.append(f"{runs.MANIFEST_FILE}: it is not the manifest that the run was made from")
    return runs.expected_tags(table)


def _split(info: Mapping[str, Any], problems: list[str]) -> Split:
    model = info.get("model")
    try:
        return Split.model_validate((model.get("split") if isinstance(model, dict) else None) or {})
    except ValidationError:
        problems.append(f"{runs.RUN_FILE}: the model's split is none")
        return Split()


def _seal_problems(run: str, named: Mapping[str, Seal | None]) -> Iterator[str]:
    """Which of these files are not the ones that were sealed."""
    for name, seal in named.items():
        try:
            other = _other_bytes(runs.seal_of_file(storage.join(run, name)), seal)
        except StorageError as error:
            other = str(error)
        if other:
            yield f"{name}: {other}"


def _other_bytes(found: Seal, seal: Seal | None) -> str | None:
    """How bytes, by their seal, differ from the sealed ones, or None."""
    if seal is None or seal == found:
        return None
    said = seal if isinstance(seal, dict) else {}
    if said.get("size_bytes") != found["size_bytes"]:
        return f"it has {found['size_bytes']} bytes, and had {str(said.get('size_bytes'))[:20]} when it was sealed"
    return f"bytes have changed: its sha256 is {found['sha256'][:12]}, and was {str(said.get('sha256'))[:12]}"


# ---- which files are there -------------------------------------------------------------------------------------------


def _files(run: str) -> tuple[list[str], list[str]]:
    """The parts, named as they lie below the run; and what lies among them and is none. Leftovers of writers are left out."""
    there: list[str] = []
    strange: list[str] = []
    for entry in storage.list_files(storage.join(run, PARTS)):
        name = entry.uri.removeprefix(run.rstrip("/") + "/")
        if is_temporary(storage.name_of(entry.uri)):
            continue
        if entry.problem is not None:
            strange.append(f"{name}: not a file that can be read ({entry.problem})")
        elif not name.endswith(".parquet"):
            strange.append(f"{name}: it does not belong among the parts")
        else:
            there.append(name)
    return there, strange


def _presence(claim: Claim, success: Mapping[str, Any], there: list[str]) -> Iterator[str]:
    """Parts that _SUCCESS.json does not name, and named ones that are gone."""
    if success:
        named = {n for n in claim.named if n.startswith(f"{PARTS}/")}
        yield from (f"{n}: a part that {runs.SUCCESS_FILE} does not name" for n in there if n not in named)
        yield from (f"{n}: part is missing" for n in sorted(named.difference(there)))


# ---- what stands in a part -------------------------------------------------------------------------------------------


def _examine(claim: Claim, name: str) -> Part:
    """Read a part once and hold it against what the run claims."""
    part, uri = Part(), storage.join(claim.run, name)
    try:
        data = storage.read_bytes(uri)
        other = _other_bytes(runs.seal_of(data), claim.named.get(name))
        part.problems += [f"{name}: {other}"] if other else []
        rows, ids = _rows(data, uri)
    except StorageError as error:
        part.problems.append(str(error))
        return part
    if rows is None:
        part.problems.append(f"{name}: its columns are not those of a `{PARTS}` table of this version")
        part.rows += [(scan_id, False, None) for scan_id in ids]
        return part
    for row in rows:
        digest = sum(_digest(entry) for entry in runs.metrics_of(row, claim.split))
        part.rows.append((row["scan_id"], row["status"] == "ok", digest))
        part.problems += _row_problems(row, claim, name)
    return part


def _rows(data: bytes, uri: str) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The rows of a part, with `found_sha256` in place of the mask, and its ids; no rows where its columns are not ours.

    StorageError where the bytes are no Parquet.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            if any(file.schema_arrow.equals(known) for known in (SCANS, EARLIER_SCANS)):
                rows = _plain(file.read(use_threads=False).select(list(NEEDED)))
                return rows, [row["scan_id"] for row in rows]
            has_ids = "scan_id" in file.schema_arrow.names
            return None, [str(i) for i in file.read(["scan_id"])["scan_id"].to_pylist()] if has_ids else []
    except Exception as error:  # a foreign decoder on bytes that may be damaged anywhere
        raise StorageError(f"could not read as Parquet {uri}: {one_line(str(error))[:200]}") from error


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    masks = (value for chunk in table["mask"].chunks for value in chunk)
    found = [hashlib.sha256(mask.as_buffer()).hexdigest() if mask.is_valid else None for mask in masks]
    rows: list[dict[str, Any]] = table.drop_columns(["mask"]).to_pylist()
    return [{**row, "found_sha256": digest} for row, digest in zip(rows, found, strict=True)]


def _row_problems(row: Mapping[str, Any], claim: Claim, part: str) -> Iterator[str]:
    who = f"{row['scan_id']} in {storage.name_of(part)}"
    tag = claim.expected.get(row["scan_id"])
    if tag is None and claim.expected:
        yield f"{who}: not a scan of the manifest"
    elif tag not in (None, row["content_tag"]):
        yield f"{who}: made from files that have changed since"
    for name in IDENTITY:
        if row[name] != claim.info.get(name):
            what = name.removesuffix("_id").replace("_", " ")
            yield f"{who}: its {what} is {str(row[name])[:16]}, the run's is {str(claim.info.get(name))[:16]}"
    if row["status"] not in ("ok", "failed"):
        yield f"{who}: its status is {row['status'][:20]!a}, expected ok or failed"
    if row["status"] == "ok" and (row["found_sha256"] is None or row["found_sha256"] != row["mask_sha256"]):
        yield f"{who}: the mask does not match its sha256"


# ---- the figures beside the parts ------------------------------------------------------------------------------------


def _metrics_problems(claim: Claim, figures: Mapping[str, int | None]) -> Iterator[str]:
    """Where metrics.parquet is not what the parts make of it."""
    if claim.is_evaluated:
        return
    try:
        found = _metrics(storage.join(claim.run, runs.METRICS_FILE))
    except StorageError as error:
        yield f"{runs.METRICS_FILE}: {error}"
        return
    for scan_id in sorted(found.keys() | figures.keys()):
        if figures.get(scan_id, 0) not in (None, found.get(scan_id, 0)):
            yield f"{scan_id}: its figures in {runs.METRICS_FILE} are not those of its row"


def _metrics(uri: str) -> dict[str, int]:
    """scan_id -> a digest of its rows in metrics.parquet, in whatever order they stand."""
    found: dict[str, int] = {}
    for piece in storage.read_pieces(uri):
        if not piece.schema.equals(METRICS):
            raise StorageError("its columns are not those of a `metrics` table")
        with translated("read as Parquet", uri):
            for batch in piece.to_batches(max_chunksize=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    found[row["scan_id"]] = found.get(row["scan_id"], 0) + _digest(row)
    return found


def _digest(entry: Mapping[str, Any]) -> int:
    """A number that tells one row of `metrics` from any other; those of several rows may be added up."""
    text = json.dumps([entry[name] for name in METRICS.names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _counts_problems(success: Mapping[str, Any], counts: Mapping[str, int]) -> Iterator[str]:
    said = success.get("counts")
    for name, number in counts.items():
        if not isinstance(said, dict) or said.get(name) != number:
            yield f"{runs.SUCCESS_FILE}: {name} is {said.get(name) if isinstance(said, dict) else said}, counted {number}"
