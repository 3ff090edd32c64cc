"""Pictures: slices of one's own, where a scan is a single image and the folder it lies in says which sequence it shows.

`[PATIENT/]flair/anything.png` with `[PATIENT/]masks/anything.png`, PNG or TIFF. The patient is the first folder below the
archive, unless that is the sequence's own: then nobody knows whose an image is, and no split is made up.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from brainseg.errors import Code
from brainseg.layouts import FoundScan, Inventory, Source, noise, settle, unplaced, with_listing_problems
from brainseg.layouts.brats import MODALITIES
from brainseg.layouts.dicom import modality_of_folder
from brainseg.storage import Entry, name_of

NAME = "pictures"
EXAMPLE = "patient-7/flair/slice_05.png with patient-7/masks/slice_05.png"

_FILE = re.compile(r"(?P<base>.*?)(?P<folder>[^/]+)/(?P<stem>[^/]+?)(?P<mask>_mask)?\.(?:png|tiff?)", re.IGNORECASE | re.DOTALL)
_MASKS = ("mask", "masks", "label", "labels")


@dataclass
class _Picture:
    """The files that bear one name in one place, images by modality."""

    images: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    masks: list[Entry] = field(default_factory=list)


def matches(entries: Sequence[Entry]) -> int:
    """Count pictures in folders that are named as a modality, and masks beside such folders."""
    return sum(len(p.masks) + sum(map(len, p.images.values())) for p in _pictures(entries)[0].values() if p.images)


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Pair images with masks of the same name; a name in two modalities' folders is two scans."""
    pictures, others = _pictures(entries, root)
    ignored = [*others]
    scans = []
    for (base, stem), picture in sorted(pictures.items()):
        if not picture.images:
            ignored += [(entry.uri, "a mask without an image of its name in a modality's folder") for entry in picture.masks]
        for modality, images in picture.images.items():
            scans.append(_scan(base.removeprefix(root).strip("/"), stem, modality, images, picture.masks))
    return settle(scans, ignored)


def _pictures(entries: Sequence[Entry], root: str = "") -> tuple[dict[tuple[str, str], _Picture], list[tuple[str, str]]]:
    """Pictures by place and name, and what is none, with the reason."""
    pictures: dict[tuple[str, str], _Picture] = defaultdict(_Picture)
    others: list[tuple[str, str]] = []
    for entry in entries:
        reason, found = noise(entry.uri, root), _FILE.fullmatch(entry.uri)
        modality = modality_of_folder(found["folder"]) if found else None
        is_mask = found is not None and (found["folder"].lower() in _MASKS or bool(modality and found["mask"]))
        if reason:
            others.append((entry.uri, reason))
        elif found and is_mask:
            pictures[found["base"], found["stem"]].masks.append(entry)
        elif found and modality:
            pictures[found["base"], found["stem"]].images[modality].append(entry)
        else:
            others.append(unplaced(entry, f"expected names like {EXAMPLE}, in folders called {', '.join(MODALITIES)}"))
    return pictures, others


def _scan(place: str, stem: str, modality: str, images: Sequence[Entry], masks: Sequence[Entry]) -> FoundScan:
    name = "_".join([*(place.split("/") if place else []), modality, stem])
    scan = FoundScan(
        scan_id=name,
        patient_id=place.split("/")[0] or None,
        dataset=NAME,
        layout=NAME,
        reader="stack",
        label_map="binary",
        modalities=(modality,),
        sources=tuple(
            Source.of(entry, role, index=0) for role, files in (("image", images), ("label", masks)) for entry in files
        ),
    )
    scan = with_listing_problems(scan, [*images, *masks])
    for kind, files in (("image", images), ("mask", masks)):
        if len(files) > 1:
            names = " and ".join(name_of(entry.uri) for entry in files[:2])
            scan = scan.with_problem(Code.DUPLICATE_ID, f"{name}: {names} both claim to be the {kind}")
    return scan
