"""H5 slices: BraTS 2020 as it is passed on in HDF5, a file a slice with image and label in it.

`volume_41_slice_0.h5` to `volume_41_slice_154.h5` are one scan. Slice S is index S of the NIfTI's third axis; the channels
of `image` are FLAIR, T1, T1ce, T2 in this order (compared voxel for voxel with the NIfTI; many notebooks say otherwise).
"""

import re
from collections import defaultdict
from collections.abc import Sequence

from brainseg.errors import Code
from brainseg.layouts import FoundScan, Inventory, Source, gap, noise, settle, unplaced, with_listing_problems
from brainseg.storage import Entry

NAME = "h5slices"
EXAMPLE = "volume_41_slice_0.h5"
DATASET = "brats2020-h5"
MODALITIES = ("flair", "t1", "t1c", "t2")

_FILE = re.compile(r"(?:^|/)volume_(?P<volume>\d{1,9})_slice_(?P<slice>\d{1,9})\.(?:h5|hdf5)$", re.IGNORECASE)


def matches(entries: Sequence[Entry]) -> int:
    """Count slices."""
    return sum(1 for entry in entries if _FILE.search(entry.uri) and not noise(entry.uri))


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Group slices into scans, a volume of a folder each, in numeric order."""
    volumes: dict[tuple[str, int], dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    ignored: list[tuple[str, str]] = []
    for entry in entries:
        reason, found = noise(entry.uri, root), _FILE.search(entry.uri)
        if reason:
            ignored.append((entry.uri, reason))
        elif found:
            volumes[entry.uri.rpartition("/")[0], int(found["volume"])][int(found["slice"])].append(entry)
        else:
            ignored.append(unplaced(entry, f"expected names like {EXAMPLE}"))
    return settle([_scan(volume, volumes[folder, volume]) for folder, volume in sorted(volumes)], ignored)


def _scan(volume: int, slices: dict[int, list[Entry]]) -> FoundScan:
    name = f"volume_{volume}"
    order = sorted(slices)
    scan = FoundScan(
        scan_id=name,
        patient_id=name,
        dataset=DATASET,
        layout=NAME,
        reader="h5slices",
        label_map="brats2020",
        modalities=MODALITIES,
        sources=tuple(Source.of(entry, "both", index=i) for i, number in enumerate(order) for entry in slices[number]),
    )
    scan = with_listing_problems(scan, (entry for files in slices.values() for entry in files))
    twice = [number for number in order if len(slices[number]) > 1]
    if twice:
        return scan.with_problem(Code.DUPLICATE_ID, f"{name}: slice {twice[0]} has more than one file")
    hole = gap(order, first=0)
    return scan.with_problem(Code.MISSING_SLICE, f"{name}: {hole}") if hole else scan
