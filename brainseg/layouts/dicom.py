"""DICOM: a folder a patient (and session), in it a folder a modality, in that the slices of one series.

`PATIENT[/SESSION]/flair/*.dcm`: which modality a folder holds, its name alone says, in BraTS's spellings and a few of the
clinic's. Patients are who the folders say they are; nothing is read from the files. Slices are numbered as their names
sort; where they really lie is for the reader. A label is a NIfTI beside the modality folders, named `...-seg.nii.gz`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from brainseg.errors import Code
from brainseg.layouts import FoundScan, Inventory, Source, noise, settle, unplaced, with_listing_problems
from brainseg.layouts.brats import LABEL, MEANINGS, MODALITIES
from brainseg.storage import Entry, name_of

NAME = "dicom"
EXAMPLE = "patient-7/2019-05-02/flair/IM0001.dcm"
LABEL_MAP = "binary"
DEEPEST = 2
"""Folders above a modality's: patient and session. What lies deeper leaves open which of them is the patient."""

_CLINICAL: Mapping[str, str] = {
    **dict.fromkeys(("post", "t1post", "t1contrast", "t1cegd", "cet1"), "t1c"),
    **dict.fromkeys(("pre", "t1pre", "t1native"), "t1"),
    **dict.fromkeys(("t2flair", "flairt2"), "flair"),
}
_WORDS = {word: meaning for word, meaning in {**MEANINGS, **_CLINICAL}.items() if meaning != LABEL}
_SLICE = re.compile(r"[^.]+|[0-9.]+|.+\.(?:dcm|ima|dicom)", re.IGNORECASE | re.DOTALL)
"""No ending, a UID, or one of the usual endings."""
_LABEL = re.compile(r"(?:.*[-_])?segm?\.nii(?:\.gz)?", re.IGNORECASE | re.DOTALL)


@dataclass
class _Scan:
    """The files of one scan: a list of slices a modality folder, and labels."""

    folders: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    labels: list[Entry] = field(default_factory=list)


def matches(entries: Sequence[Entry]) -> int:
    """Count slices in folders that are named as a modality."""
    return sum(1 for entry in entries if _modality(entry.uri) and not noise(entry.uri))


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Group slices into scans: the modality folders of one session, or of one patient without sessions."""
    scans: dict[str, _Scan] = defaultdict(_Scan)
    labels: list[Entry] = []
    ignored: list[tuple[str, str]] = []
    for entry in entries:
        reason, modality = noise(entry.uri, root) or _too_deep(entry, root), _modality(entry.uri)
        if reason:
            ignored.append((entry.uri, reason))
        elif modality:
            folder = _above(entry.uri)
            scans[_above(folder)].folders[modality][folder].append(entry)
        elif _LABEL.fullmatch(name_of(entry.uri)):
            labels.append(entry)
        else:
            ignored.append(_ignored(entry))
    for entry in labels:
        if _above(entry.uri) in scans:
            scans[_above(entry.uri)].labels.append(entry)
        else:
            ignored.append((entry.uri, "a label without a modality folder beside it"))
    return settle([_scan(folder, scans[folder], root) for folder in sorted(scans)], ignored)


def _above(uri: str) -> str:
    return uri.rpartition("/")[0]


def _modality(uri: str) -> str | None:
    """What the folder of a file that may be a slice is named after."""
    if not _SLICE.fullmatch(name_of(uri)) or name_of(uri).upper() in ("DICOMDIR", "LICENSE", "README"):
        return None
    return modality_of_folder(name_of(_above(uri)))


def modality_of_folder(name: str) -> str | None:
    """The modality that a folder is named after, in any of the spellings; None where it is named after something else."""
    return _WORDS.get(re.sub(r"[-_+ ]", "", name).lower())


def _too_deep(entry: Entry, root: str) -> str | None:
    depth = _above(entry.uri).removeprefix(root).strip("/").count("/") + 1
    if _modality(entry.uri) is None or depth <= DEEPEST + 1:
        return None
    return "its folder lies too deep: expected PATIENT/MODALITY or PATIENT/SESSION/MODALITY below the archive"


def _ignored(entry: Entry) -> tuple[str, str]:
    if entry.problem is None and _SLICE.fullmatch(name_of(entry.uri)) and "/" in entry.uri:
        known = ", ".join(MODALITIES)
        return entry.uri, f"the folder {name_of(_above(entry.uri))[:60]!a} names no modality, expected one of {known}"
    return unplaced(entry, f"expected names like {EXAMPLE}")


def _scan(folder: str, found: _Scan, root: str) -> FoundScan:
    """One row. The patient is the first folder below the archive, or the archive itself where it holds the modalities."""
    parts = folder.removeprefix(root).strip("/").split("/")
    patient, name = parts[0] or name_of(folder), "_".join(parts) or name_of(folder)
    present = tuple(modality for modality in MODALITIES if modality in found.folders)
    scan = FoundScan(
        scan_id=name,
        patient_id=patient,
        dataset=NAME,
        layout=NAME,
        reader="dicom",
        label_map=LABEL_MAP,
        modalities=present,
        sources=tuple(source for modality in present for source in _slices(found, modality))
        + tuple(Source.of(entry, "label") for entry in found.labels),
    )
    files = [entry for folders in found.folders.values() for slices in folders.values() for entry in slices]
    scan = with_listing_problems(scan, [*files, *found.labels])
    for modality, folders in found.folders.items():
        if len(folders) > 1:
            names = " and ".join(f"'{name_of(uri)}'" for uri in sorted(folders)[:2])
            scan = scan.with_problem(Code.DUPLICATE_ID, f"{name}: the folders {names} both claim to be {modality}")
    if len(found.labels) > 1:
        names = " and ".join(name_of(entry.uri) for entry in found.labels[:2])
        scan = scan.with_problem(Code.DUPLICATE_ID, f"{name}: {names} both claim to be the label")
    return scan


def _slices(found: _Scan, modality: str) -> list[Source]:
    entries = [entry for folder in sorted(found.folders[modality]) for entry in found.folders[modality][folder]]
    ordered = sorted(entries, key=lambda entry: (_natural(name_of(entry.uri)), entry.uri))
    return [Source.of(entry, "image", modality=modality, index=index) for index, entry in enumerate(ordered)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts `IM2` before `IM10`."""
    words = re.split(r"([0-9]{1,18})", name)
    return [(0, int(word), "") if place % 2 else (1, 0, word) for place, word in enumerate(words)]
