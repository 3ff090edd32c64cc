"""HDF5: the bytes of one file -> its named arrays, and nothing from outside that file.

HDF5 can name other files in four ways (external links, soft links to them, external storage, virtual datasets) and can
claim terabytes in a kilobyte. All of this is judged from metadata, before any value is read. A file of pickles or a zip is
NOT_HDF5: nothing here unpickles.
"""

import io
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats import MAX_VOXELS, Notes, describe_content, require_bytes

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
USER_BLOCKS = (0, 512, 1024, 2048)
"""Where the magic may stand: MATLAB 7.3 files put 512 bytes of text before it."""
MAX_SOFT_LINKS = 8
MAX_KEYS_SHOWN = 12


def read_keys(data: bytes, keys: Sequence[str], name: str) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """Read the datasets `keys` (paths from the root) of an HDF5 file as numeric arrays in native order, with warnings.

    NO_CHECKSUM is the warning of a dataset in which a flipped bit cannot be told: stored without compression and without
    Fletcher-32. Raises ScanError with the reason; MISSING_KEY lists the keys that are there.
    """
    notes = Notes(name)
    require_bytes(data, notes)
    if not any(data.startswith(HDF5_MAGIC, at) for at in USER_BLOCKS):
        raise notes.error(Code.NOT_HDF5, f"found {describe_content(data)}, expected an HDF5 file")
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            datasets = {key: _dataset(file, key, notes) for key in keys}
            bare = [key for key, dataset in datasets.items() if not _is_protected(dataset)]
            arrays = {key: _values(dataset) for key, dataset in datasets.items()}
    except ScanError:
        raise
    except Exception as error:  # a foreign decoder on foreign bytes
        code = Code.TRUNCATED if "truncated" in str(error) else Code.CORRUPT
        raise notes.error(code, f"found an HDF5 file that cannot be read ({error}); fetch the file again") from error
    if bare:
        notes.warn(Code.NO_CHECKSUM, f"found no checksum over {', '.join(bare)}: a flipped bit would go unseen")
    return arrays, tuple(notes.warnings)


def _dataset(file: h5py.File, key: str, notes: Notes) -> h5py.Dataset:
    """Find a dataset without leaving the file, and judge what it claims."""
    path = _resolve(file, key, notes)
    found = file.get(path) if path else None
    if not isinstance(found, h5py.Dataset):
        there = sorted(file)[:MAX_KEYS_SHOWN]
        raise notes.error(Code.MISSING_KEY, f"found the keys {there}, expected a dataset '{key}'")
    if found.external or found.is_virtual:
        raise notes.error(Code.OUTSIDE_ROOT, f"found '{key}' stored in another file, expected its values in this one")
    if found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise notes.error(Code.BAD_DATATYPE, f"found '{key}' of type {found.dtype}, expected numbers")
    chunk = int(np.prod(found.chunks or (0,), dtype=np.float64))
    if found.shape is None or found.size > MAX_VOXELS or chunk > MAX_VOXELS:
        raise notes.error(Code.TOO_LARGE, f"found a claim of {found.shape} for '{key}', expected at most {MAX_VOXELS:,} values")
    return found


def _resolve(file: h5py.File, key: str, notes: Notes) -> str | None:
    """Follow soft links by hand, so that no link is followed out of the file. None where the path leads nowhere."""
    todo, done = [part for part in key.split("/") if part], ""
    for _ in range(MAX_SOFT_LINKS + len(todo)):
        if not todo:
            return done
        here = f"{done}/{todo[0]}"
        link = file.get(here, getlink=True)
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise notes.error(
                Code.OUTSIDE_ROOT, f"found '{key}' to be a link into another file, expected its values in this one"
            )
        if isinstance(link, h5py.SoftLink):
            target = [part for part in link.path.split("/") if part and part != "."]
            todo, done = target + todo[1:], "" if link.path.startswith("/") else done
        else:
            todo, done = todo[1:], here
    return None


def _is_protected(dataset: h5py.Dataset) -> bool:
    """Whether a flipped bit in the values would be noticed: by Fletcher-32, or by the Adler-32 inside gzip's chunks."""
    return bool(dataset.fletcher32) or dataset.compression == "gzip"


def _values(dataset: h5py.Dataset) -> NDArray[Any]:
    array = np.asarray(dataset[()])
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
