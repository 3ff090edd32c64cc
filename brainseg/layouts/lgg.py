"""LGG: the LGG MRI segmentation set (Buda et al. 2019), a folder a patient, a TIFF a slice, three modalities a TIFF.

`TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_7.tif` is slice 7 with the channels pre-contrast, FLAIR, post-contrast;
`..._7_mask.tif` is its label. Slices are ordered by number, not by name (10 follows 9). A slice that lacks beside others
makes the scan a problem: a volume with a hole would be segmented and measured as if it were whole.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from brainseg.errors import Code, StorageError
from brainseg.layouts import FoundScan, Inventory, Source, gap, noise, settle, unplaced, with_listing_problems
from brainseg.storage import Entry, name_of, read_text

NAME = "lgg"
EXAMPLE = "TCGA_CS_4941_19960909/TCGA_CS_4941_19960909_7.tif with TCGA_CS_4941_19960909_7_mask.tif"
MODALITIES = ("t1", "flair", "t1c")
ATTRIBUTES = (
    "histological_type",
    "neoplasm_histologic_grade",
    "laterality",
    "tumor_location",
    "RNASeqCluster",
    "MethylationCluster",
    "miRNACluster",
    "CNCluster",
    "RPPACluster",
    "OncosignCluster",
    "COCCluster",
)
"""Columns of `data.csv` that describe the tumour. Age, sex, race, ethnicity and death stay where they are."""

_SLICE = re.compile(r"(?:^|/)(?P<folder>TCGA_[^/]+)/(?P=folder)_(?P<number>\d{1,9})(?P<mask>_mask)?\.tiff?$", re.IGNORECASE)
_PATIENT = re.compile(r"TCGA_(?P<site>[A-Z0-9]{2})_[A-Z0-9]{4}", re.IGNORECASE)


@dataclass
class _Folder:
    """The files of one scan, by slice number."""

    name: str
    slices: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    masks: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))

    def files(self) -> Iterator[Entry]:
        for group in (*self.slices.values(), *self.masks.values()):
            yield from group


def matches(entries: Sequence[Entry]) -> int:
    """Count slices and masks."""
    return sum(1 for entry in entries if _SLICE.search(entry.uri) and not noise(entry.uri))


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Group slices into scans, a folder each; take attributes from a `data.csv` where one lies among them."""
    folders: dict[str, _Folder] = {}
    ignored: list[tuple[str, str]] = []
    table: dict[str, dict[str, str]] = {}
    for entry in entries:
        reason, found = noise(entry.uri, root), _SLICE.search(entry.uri)
        if reason:
            ignored.append((entry.uri, reason))
        elif found:
            folder = folders.setdefault(entry.uri.rpartition("/")[0], _Folder(found["folder"]))
            (folder.masks if found["mask"] else folder.slices)[int(found["number"])].append(entry)
        elif name_of(entry.uri).lower() == "data.csv" and entry.problem is None:
            rows, line = _read_attributes(entry.uri)
            table.update(rows)
            ignored.append((entry.uri, line))
        else:
            ignored.append(unplaced(entry, f"expected names like {EXAMPLE}"))
    return settle([_scan(folder, table) for folder in folders.values()], ignored)


def _scan(folder: _Folder, table: Mapping[str, Mapping[str, str]]) -> FoundScan:
    order = sorted({*folder.slices, *folder.masks})
    sources = [
        Source.of(entry, role, index=index)
        for index, number in enumerate(order)
        for role, files in (("image", folder.slices), ("label", folder.masks))
        for entry in files.get(number, ())
    ]
    patient = _PATIENT.match(folder.name)
    known = {"site": patient["site"].upper(), **table.get(patient[0].upper(), {})} if patient else {}
    scan = FoundScan(
        scan_id=folder.name,
        patient_id=patient[0].upper() if patient else None,
        dataset=NAME,
        layout=NAME,
        reader="stack",
        label_map="binary",
        modalities=MODALITIES,
        sources=tuple(sources),
        attributes=known,
    )
    return _checked(with_listing_problems(scan, folder.files()), folder)


def _checked(scan: FoundScan, folder: _Folder) -> FoundScan:
    """Mark holes in the numbering, slices without a mask beside others with one, and masks without a slice."""
    slices, masks = set(folder.slices), set(folder.masks)
    twice = sorted(n for files in (folder.slices, folder.masks) for n, group in files.items() if len(group) > 1)
    if twice:
        return scan.with_problem(Code.DUPLICATE_ID, f"{folder.name}: slice {twice[0]} has more than one file")
    if masks - slices:
        return scan.with_problem(Code.MISSING_FILE, f"{folder.name}: {_some(masks - slices)} a mask and no image")
    hole = gap(sorted(slices), first=1)
    if hole:
        return scan.with_problem(Code.MISSING_SLICE, f"{folder.name}: {hole}")
    if masks and slices - masks:
        return scan.with_problem(
            Code.MISSING_FILE, f"{folder.name}: {_some(slices - masks)} no mask; the other slices have one"
        )
    return scan


def _some(numbers: set[int]) -> str:
    shown = ", ".join(str(n) for n in sorted(numbers)[:5]) + (", ..." if len(numbers) > 5 else "")
    return f"slice {shown} has" if len(numbers) == 1 else f"slices {shown} have"


def _read_attributes(uri: str) -> tuple[dict[str, dict[str, str]], str]:
    """Return patient -> attributes from the set's own table, and what to say about the file."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(uri), newline="")))
    except (StorageError, csv.Error) as error:
        return {}, f"a table that cannot be read: {error}"
    if not rows or "Patient" not in rows[0]:
        return {}, "a table without a column 'Patient'"
    found = {
        (row["Patient"] or "").strip().upper(): {
            name: row[name].strip() for name in ATTRIBUTES if (row.get(name) or "").strip()
        }
        for row in rows
    }
    return found, f"the set's table: attributes of {len(found)} patients taken from it"
