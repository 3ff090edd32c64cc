"""Figshare: the contrast-enhanced T1 slices of Cheng et al., where a scan is a single image.

`images/12.png` with `masks/12.png`, or flat `12.png` with `12_mask.png`. Neighbouring numbers are neighbouring slices of
one patient, so a split by image is a look-up table: a CSV among the files (`image,...,fold` or `...,patient`) says whose
an image is. Without one, patients and folds stay unknown and no split is made up.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from brainseg.errors import Code, StorageError, UsageError
from brainseg.layouts import FoundScan, Inventory, Source, harmless, noise, settle, unplaced, with_listing_problems
from brainseg.layouts.dicom import modality_of_folder
from brainseg.storage import Entry, name_of, read_text

NAME = "figshare"
EXAMPLE = "images/12.png with masks/12.png, or 12.png with 12_mask.png"
MODALITIES = ("t1c",)

_FILE = re.compile(
    r"^(?P<base>.*?)(?:(?:^|/)(?P<kind>images|masks))?(?:^|/)(?P<number>\d{1,9})(?P<mask>_mask)?\.png$", re.IGNORECASE
)
_NUMBER = re.compile(r"(?:^|[/_])(\d{1,9})(?:\.\w+)?$")
_IMAGE_COLUMNS = ("image", "image_id", "scan_id", "scan", "id", "file", "filename")
_PATIENT_COLUMNS = ("patient_id", "patient", "pid")


@dataclass
class _Image:
    """The files of one scan, and the folder in which images and masks lie."""

    base: str
    number: int
    images: list[Entry] = field(default_factory=list)
    masks: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class _Said:
    """What a CSV says of one image."""

    patient_id: str | None
    fold: int | None
    attributes: Mapping[str, str]


def matches(entries: Sequence[Entry]) -> int:
    """Count images and masks, but not masks in a place that has no image: those are of another convention's."""
    found = [match for entry in entries if not noise(entry.uri) and (match := _named(entry.uri))]
    places = {match["base"] for match in found if not _is_mask(match)}
    return sum(match["base"] in places for match in found)


def _named(uri: str) -> re.Match[str] | None:
    """What the name of an image or a mask is made of; None for another, and for one in a folder that is a modality's."""
    found = _FILE.match(uri)
    return None if found is None or (not found["kind"] and modality_of_folder(name_of(found["base"]))) else found


def _is_mask(found: re.Match[str]) -> bool:
    return bool(found["mask"]) or (found["kind"] or "").lower() == "masks"


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Pair images with masks; a CSV in the root gives patients, folds and attributes by image number.

    Raises UsageError when its fold column holds something else than whole numbers.
    """
    images: dict[tuple[str, int], _Image] = {}
    ignored: list[tuple[str, str]] = []
    said: dict[int, _Said] = {}
    for entry in entries:
        reason, found = noise(entry.uri, root), _named(entry.uri)
        if reason:
            ignored.append((entry.uri, reason))
        elif found:
            key = (found["base"], int(found["number"]))
            if key not in images:
                images[key] = _Image(*key)
            (images[key].masks if _is_mask(found) else images[key].images).append(entry)
        elif entry.uri == f"{root}/{name_of(entry.uri)}" and entry.uri.lower().endswith(".csv") and entry.problem is None:
            rows, line = _read_table(entry.uri)
            said |= rows
            ignored.append((entry.uri, line))
        else:
            ignored.append(unplaced(entry, f"expected names like {EXAMPLE}"))
    return settle(list(_scans(images, said, root)), ignored)


def _scans(images: Mapping[tuple[str, int], _Image], said: Mapping[int, _Said], root: str) -> Iterator[FoundScan]:
    """Yield scans in numeric order. Where several folders hold images, the folder's name goes into the id."""
    several = len({image.base for image in images.values()}) > 1
    first_fold = min((row.fold for row in said.values() if row.fold is not None), default=0)
    for image in sorted(images.values(), key=lambda i: (i.base, i.number)):
        where = image.base.removeprefix(root).strip("/").replace("/", "_") if several else ""
        scan = _scan(image, f"{where}_{NAME}_{image.number:04d}".lstrip("_"))
        row = said.get(image.number)
        if row is not None:
            fold = None if row.fold is None else row.fold - first_fold
            scan = replace(scan, patient_id=row.patient_id, fold=fold, attributes=row.attributes)
        yield scan


def _scan(image: _Image, scan_id: str) -> FoundScan:
    sources = [Source.of(entry, "image", index=0) for entry in image.images]
    sources += [Source.of(entry, "label", index=0) for entry in image.masks]
    scan = FoundScan(
        scan_id=scan_id,
        patient_id=None,
        dataset=NAME,
        layout=NAME,
        reader="stack",
        label_map="binary",
        modalities=MODALITIES,
        sources=tuple(sources),
    )
    scan = with_listing_problems(scan, (*image.images, *image.masks))
    for kind, files in (("image", image.images), ("mask", image.masks)):
        if len(files) > 1:
            names = " and ".join(name_of(f.uri) for f in files[:2])
            scan = scan.with_problem(Code.DUPLICATE_ID, f"{scan_id}: {names} both claim to be the {kind}")
    if not image.images:
        scan = scan.with_problem(Code.MISSING_FILE, f"{scan_id}: {name_of(image.masks[0].uri)} is a mask without an image")
    return scan


def _read_table(uri: str) -> tuple[dict[int, _Said], str]:
    """Return image number -> what the table says of it, and what to say about the file."""
    try:
        rows = [{(k or "").strip(): v or "" for k, v in row.items() if isinstance(v, str)} for row in _dict_rows(uri)]
    except (StorageError, csv.Error) as error:
        return {}, f"a table that cannot be read: {error}"
    columns = {name.lower(): name for name in (rows[0] if rows else ())}
    image = next((columns[c] for c in _IMAGE_COLUMNS if c in columns), None)
    patient = next((columns[c] for c in _PATIENT_COLUMNS if c in columns), None)
    if image is None:
        return {}, f"a table without a column that names images ({', '.join(_IMAGE_COLUMNS)})"
    fold = columns.get("fold")
    said = {}
    for row in rows:
        number = _NUMBER.search(row.get(image, "").strip())
        if number:
            said[int(number[1])] = _said(row, image, patient, fold, name_of(uri))
    return said, f"the set's table: {len(said)} images described by it"


def _dict_rows(uri: str) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(read_text(uri), newline=""))


def _said(row: Mapping[str, str], image: str, patient: str | None, fold: str | None, table: str) -> _Said:
    taken = [name for name in (image, patient, fold) if name]
    attributes = harmless(row, but=taken)
    given = row.get(fold, "").strip() if fold else ""
    if given and not re.fullmatch(r"-?\d{1,6}", given):
        raise UsageError(f"{table}: image {row[image]!a} has fold {given[:20]!a}, expected a whole number")
    if given:
        attributes["authors_fold"] = given
    who = " ".join(row.get(patient, "").split())[:200] if patient else ""
    return _Said(who or None, int(given) if given else None, attributes)
