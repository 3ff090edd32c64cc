"""Export: the masks of a run, out of Parquet and into the files that other programs open.

`nifti` writes `<scan_id>.nii.gz`, the bytes as they were stored; a mask that was stored as PNG becomes a NIfTI of one slice
without an affine. `png` writes `<scan_id>_<k>.png`, one per slice along D in the file's own order, so that slice k of the
mask lies on slice k of the image; a scan of one slice is `<scan_id>.png`. PNG values: 0 and 255 where the label map knows
only background and tumour, so that a viewer shows something; the label values themselves otherwise.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from brainseg import storage
from brainseg.errors import UsageError
from brainseg.formats.images import write_png
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid
from brainseg.masks import check_mask, decode_mask
from brainseg.regions import LABEL_MAPS

Format = Literal["nifti", "png"]
Layout = Literal["plain"]
Row = Mapping[str, Any]
COLUMNS = ["scan_id", "status", "label_map", "mask", "mask_encoding", "mask_sha256"]
ROWS_AT_ONCE = 32
UNSAFE = re.compile(r"[^\w .()+=,-]|^[. ~=-]|[. ]$|\A(?:con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³])(?=\s*(?:\.|\Z))", re.IGNORECASE)
"""What does not go into a file name as it is: separators, control characters, leading dots, names that Windows reserves."""
MOST_NAME_BYTES = 180
"""Of a mask's file name, which file systems limit to 255 bytes: number of the slice and ending come on top."""


def export_run(run_uri: str, out: str, *, format: Format = "nifti", layout: Layout = "plain") -> int:  # noqa: A002 - the option's own word
    """Write every mask of a run below `out`; return how many scans that were. Writing again replaces.

    Holds one part of the run in memory at a time. Raises UsageError for a place that is no run or an unknown format,
    RunError for a mask that does not match its hash.
    """
    if format not in get_args(Format):
        raise UsageError(f"unknown format '{format}'; known: {', '.join(get_args(Format))}")
    if layout not in get_args(Layout):
        raise UsageError(f"unknown layout '{layout}'; known: {', '.join(get_args(Layout))}")
    run_uri, out = storage.absolute(run_uri), storage.absolute(out)
    meaning = _model_label_map(run_uri)
    write = _WRITERS[format]
    names = _Names(with_slices=format == "png")
    done: set[str] = set()
    for row in _segmented(run_uri):
        if row["scan_id"] not in done:
            done.add(row["scan_id"])
            write(storage.join(out, names.of(row["scan_id"])), row, meaning or row["label_map"])
    return len(done)


class _Names:
    """The names given so far, so that no scan's files replace another's, also where upper and lower case are the same."""

    def __init__(self, *, with_slices: bool) -> None:
        self.with_slices = with_slices
        self.stems: set[str] = set()
        self.trunks: set[str] = set()
        """Names without the number that they end in: slice 3 of `a` is called like a scan `a_3`."""

    def of(self, scan_id: str) -> str:
        """The name of a scan's files, without their ending."""
        stem = file_name(scan_id)
        folded = stem.casefold()
        trunk, _, number = folded.rpartition("_")
        is_numbered = self.with_slices and number.isdecimal()
        if folded in self.stems or folded in self.trunks or (is_numbered and trunk in self.stems):
            return _marked(stem, scan_id)
        self.stems.add(folded)
        if is_numbered:
            self.trunks.add(trunk)
        return stem


def _model_label_map(run_uri: str) -> str | None:
    """The label map that the run's masks are written in. UsageError where there is no run."""
    info_uri = storage.join(run_uri, "run.json")
    if not storage.exists(info_uri):
        raise UsageError(f"{run_uri} is not a run: it has no run.json; expected a folder that `brainseg segment` wrote")
    name = (storage.read_json(info_uri).get("model") or {}).get("label_map")
    return None if name is None else str(name)


def _segmented(run_uri: str) -> Iterator[Row]:
    """Rows with a mask, part by part, each mask checked against its hash."""
    for entry in storage.list_files(storage.join(run_uri, "scans")):
        if not entry.uri.endswith(".parquet"):
            continue
        for batch in storage.read_table(entry.uri, COLUMNS).to_batches(max_chunksize=ROWS_AT_ONCE):
            for row in batch.to_pylist():
                if row["status"] == "ok" and row["mask"] is not None:
                    check_mask(row, entry.uri)
                    yield row


def file_name(scan_id: str) -> str:
    """A scan's id as a file name on any system; what is unsafe becomes %XX. Different ids keep different names.

    Two that differ in upper and lower case alone are told apart by `export_run`.
    """
    quoted = UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in _bytes(found.group())), scan_id)
    if len(quoted.encode()) > MOST_NAME_BYTES:
        return _marked(quoted, scan_id)
    return quoted or "%"


def _marked(stem: str, scan_id: str) -> str:
    """The beginning of a name and a digest of the id. No quoted name holds two % together."""
    start = stem.encode()[: MOST_NAME_BYTES - 34].decode("utf-8", "ignore").rstrip("%. ")
    return f"{start}%%{hashlib.sha256(_bytes(scan_id)).hexdigest()[:32]}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _write_nifti(stem: str, row: Row, meaning: str) -> None:
    data = row["mask"]
    if row["mask_encoding"] == "png":
        mask = decode_mask(row)
        data = write_nifti(mask, Grid.of(mask.shape))
    storage.write_bytes(f"{stem}.nii.gz", data)


def _write_pngs(stem: str, row: Row, meaning: str) -> None:
    mask = _visible(decode_mask(row), meaning)
    for name, plane in zip(slice_names(stem, len(mask)), mask, strict=True):
        storage.write_bytes(name, write_png(np.ascontiguousarray(plane)))


def slice_names(stem: str, depth: int) -> Sequence[str]:
    """The PNG names of a scan's slices, counted from 0, padded so that they sort."""
    if depth == 1:
        return [f"{stem}.png"]
    return [f"{stem}_{k:0{len(str(depth - 1))}d}.png" for k in range(depth)]


def _visible(mask: NDArray[np.uint8], meaning: str) -> NDArray[np.uint8]:
    """0 and 255 where there is only background and tumour; label values otherwise."""
    known = LABEL_MAPS.get(meaning)
    if known is None or set(known.values) != {0, 1}:
        return mask
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


_WRITERS: Mapping[str, Callable[[str, Row, str], None]] = {"nifti": _write_nifti, "png": _write_pngs}
