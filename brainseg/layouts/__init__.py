"""Layouts: folder conventions turned into found scans, one module a dataset. Names alone decide; nothing is decoded here.

Every layout module has a `NAME`, an `EXAMPLE`, `matches(entries)` (how many files bear its names) and
`find(entries, root)` (its scans). Nothing vanishes: a file belongs to a scan or stands in `Inventory.ignored` with its
reason, and a scan that cannot be used stays a row with a `problem`. This module holds what they share: the record types
and the rules for ids.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

from brainseg.errors import Code, UsageError, one_line
from brainseg.storage import Entry, name_of

MAX_ID_BYTES = 200
"""An id becomes a file name (`<id>.nii.gz`), which file systems limit to 255 bytes."""

SLICE_READERS = ("stack", "h5slices")
"""Readers of scans that are stored a file a slice, in an order that `Source.index` gives."""

_PLAIN = re.compile(r"[A-Za-z0-9_.+-]+")
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³")}
_PERSONAL = re.compile(
    r"(^|[^a-z])(age|gender|sex|race|ethnic(ity)?|dea(d|th)|died|survival|(sur)?name|birth(date|day)?|dob|born|address|mrn|date)([^a-z]|$)"
)
_VALUE_LENGTH = 200
_PACKED = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
_LISTING_PROBLEMS: Mapping[Code | None, str] = {
    Code.NOT_A_FILE: "not a regular file: a pipe, a folder, a link to a folder, or a link to nothing",
    Code.OUTSIDE_ROOT: "a link that leads out of the archive",
    Code.UNREADABLE: "may not be read",
    Code.BAD_ID: "its name is not UTF-8, or no path",
}


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a scan; the fields of `tables.SOURCE`."""

    uri: str
    role: str
    modality: str | None
    index: int | None
    size_bytes: int
    tag: str

    @classmethod
    def of(cls, entry: Entry, role: str, *, modality: str | None = None, index: int | None = None) -> "Source":
        """Build from a listed file."""
        return cls(entry.uri, role, modality, index, entry.size_bytes, entry.tag)


@dataclass(frozen=True, slots=True)
class FoundScan:
    """One row of the manifest, before folds are dealt. `fold` is only set where the set's own table declares it."""

    scan_id: str
    patient_id: str | None
    dataset: str
    layout: str
    reader: str
    label_map: str
    modalities: tuple[str, ...]
    sources: tuple[Source, ...]
    attributes: Mapping[str, str] = field(default_factory=dict)
    problem_code: Code | None = None
    problem: str | None = None
    fold: int | None = None

    @property
    def has_label(self) -> bool:
        """Whether a label file is listed among the sources."""
        return any(source.role != "image" for source in self.sources)

    @property
    def size_bytes(self) -> int:
        """Sum over the sources."""
        return sum(source.size_bytes for source in self.sources)

    def with_problem(self, code: Code, line: str) -> "FoundScan":
        """Return this scan marked as unusable; the first problem found is the one that stays."""
        return self if self.problem_code else replace(self, problem_code=code, problem=one_line(line))


@dataclass
class Inventory:
    """What an archive holds: its scans, every other file as (uri, reason), and what deserves a person's eye."""

    scans: list[FoundScan] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Layout(Protocol):
    """What a layout module offers."""

    NAME: str
    EXAMPLE: str

    def matches(self, entries: Sequence[Entry]) -> int:
        """Count the files that bear this layout's names."""

    def find(self, entries: Sequence[Entry], root: str) -> Inventory:
        """Group the files into scans."""


def noise(uri: str, root: str = "") -> str | None:
    """Why a file is never part of a scan whatever the layout, or None. `root` itself may lie in a hidden folder."""
    parts = uri.removeprefix(root).split("/")
    if parts[-1].startswith("._") or "__MACOSX" in parts:
        return "metadata that macOS leaves behind"
    if parts[-1].startswith("."):
        return "hidden file"
    if root and any(part.startswith(".") for part in parts):
        return "inside a hidden folder"
    return None


def unplaced(entry: Entry, expected: str) -> tuple[str, str]:
    """The line of `Inventory.ignored` for a file that no scan claims."""
    if entry.problem is None and entry.uri.lower().endswith(_PACKED):
        return entry.uri, "a packed archive, which is never unpacked here: unpack it, and index the folder"
    return entry.uri, _LISTING_PROBLEMS.get(entry.problem, f"no part of a scan: {expected}")


def with_listing_problems(scan: FoundScan, entries: Iterable[Entry]) -> FoundScan:
    """Mark a scan one of whose files already proved unusable while it was listed."""
    for entry in entries:
        if entry.problem is not None:
            return scan.with_problem(entry.problem, f"{name_of(entry.uri)!a}: {unplaced(entry, '')[1]}")
    return scan


def gap(numbers: Sequence[int], first: int) -> str | None:
    """Say which slice numbers a scan lacks, counting up from `first`; None when there is no gap.

    Where `first` is 1, a count from 0 is as good: people number either way.
    """
    start = min(first, *numbers) if first == 1 else first
    present = sorted({start - 1, *numbers})
    holes = [(low + 1, high - 1) for low, high in pairwise(present) if high - low > 1]
    if not holes:
        return None
    shown = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in holes[:5])
    more = ", ..." if len(holes) > 5 else ""
    return f"{len(numbers)} slices numbered {min(numbers)} to {max(numbers)}; missing: {shown}{more}"


def id_fault(name: str) -> str | None:
    """Why a name cannot be a scan id, or None. An id must be harmless as a file name on every system, in a URL, in a shell.

    Letters, digits and marks of any script are welcome, and `- _ . +` between them.
    """
    if not name.strip():
        return "it is empty"
    if len(name.encode("utf-8", "replace")) > MAX_ID_BYTES:
        return f"it is longer than {MAX_ID_BYTES} bytes"
    odd = None if _PLAIN.fullmatch(name) else next((c for c in name if not _is_welcome(c)), None)
    if odd is not None:
        return f"it holds the character {odd!a}"
    if name[0] in "-_." or name[-1] == ".":
        return "it begins with '-', '_' or '.', or ends with '.'"
    if name.partition(".")[0].upper() in _DEVICES:
        return "Windows reserves it for a device"
    return None


def _is_welcome(character: str) -> bool:
    return character in "-_.+" or unicodedata.category(character)[0] in "LNM"


def settle(scans: Sequence[FoundScan], ignored: list[tuple[str, str]]) -> Inventory:
    """Give every scan an id that is safe and unique; say which could not keep theirs.

    Ids are compared after NFC normalisation, so two spellings of the same letters collide: all of them become problems,
    since nothing tells which is meant. Ids that differ only in upper and lower case are kept, with a warning.
    """
    named = [_with_safe_id(scan) for scan in scans]
    counts = Counter(scan.scan_id for scan in named)
    unique = [scan if counts[scan.scan_id] == 1 else _as_duplicate(scan, counts[scan.scan_id]) for scan in named]
    folded = Counter(scan_id.casefold() for scan_id in counts)
    warnings = [
        f"{Code.DUPLICATE_ID}: scan id '{scan_id}' differs from another only in upper and lower case"
        for scan_id in sorted(counts)
        if folded[scan_id.casefold()] > 1
    ]
    return Inventory(unique, ignored, warnings)


def sliced(inventory: Inventory) -> Inventory:
    """Make every slice of every stack a scan of its own: same patient, same attributes, its position in the id.

    A scan of one slice stays as it is, and so does one with a problem: it is refused whole. Raises UsageError for volumes,
    whose slices have no files of their own.
    """
    volumes = [scan for scan in inventory.scans if scan.reader not in SLICE_READERS]
    if volumes:
        raise UsageError(
            f"{len(volumes)} scans are stored as volumes, such as '{volumes[0].scan_id}'; only stacks of a file a slice can "
            "be taken slice by slice (layouts lgg, figshare, h5slices)"
        )
    scans = [part for scan in inventory.scans for part in _slices(scan)]
    return replace(settle(scans, inventory.ignored), warnings=inventory.warnings)


def _slices(scan: FoundScan) -> Iterator[FoundScan]:
    parts: dict[int | None, list[Source]] = {}
    for source in scan.sources:
        parts.setdefault(source.index, []).append(replace(source, index=0))
    if scan.problem_code or len(parts) < 2:
        yield scan
        return
    for index, sources in parts.items():
        yield replace(scan, scan_id=f"{scan.scan_id}_{index:03d}", sources=tuple(sources))


def _with_safe_id(scan: FoundScan) -> FoundScan:
    name = unicodedata.normalize("NFC", scan.scan_id)
    patient = None if scan.patient_id is None else unicodedata.normalize("NFC", scan.patient_id)
    fault = id_fault(name)
    if fault is None:
        return scan if (name, patient) == (scan.scan_id, scan.patient_id) else replace(scan, scan_id=name, patient_id=patient)
    safe = replace(scan, scan_id=f"bad-id-{_digest(scan.scan_id)}", patient_id=None)
    return safe.with_problem(Code.BAD_ID, f"scan id {scan.scan_id[:60]!a} cannot name a file: {fault}; rename the scan's files")


def _as_duplicate(scan: FoundScan, count: int) -> FoundScan:
    where = scan.sources[0].uri if scan.sources else ""
    line = f"{count} scans of the archive are called '{scan.scan_id}'; index one copy of the archive, or rename"
    return replace(scan, scan_id=f"{scan.scan_id[:40]}-{_digest(where)}").with_problem(Code.DUPLICATE_ID, line)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def harmless(row: Mapping[str, str], *, but: Iterable[str] = ()) -> dict[str, str]:
    """Keep a table row's filled cells as attributes, without the columns that describe the person or are named in `but`."""
    kept = {key: " ".join(value.split())[:_VALUE_LENGTH] for key, value in row.items() if key and key not in set(but)}
    return {key: value for key, value in kept.items() if value and not _PERSONAL.search(key.lower())}
