"""HDF5: the bytes of one file -> its named arrays, and nothing from outside that file.

HDF5 can name other files in four ways (external links, soft links to them, external storage, virtual datasets), can claim
terabytes in a kilobyte, fills in what was never written, and loads code for filters that it does not know. All of this is
judged from metadata, before any value is read; a chunk that unpacks to more than its size is found before HDF5 unpacks it.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from typing import Any

import h5py
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats import MAX_SLICE_BYTES, Notes, require_bytes, unexpected

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_SOFT_LINKS = 8
MAX_KEYS_SHOWN = 12
MAX_CHUNKS = 65_536
"""Chunks of one dataset: more of them in one slice are a few bytes each, and take longer than a scan may."""

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, 32000
_FILTERS = (_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF)
_CHECKSUM_BYTES = 4


def read_keys(data: bytes, keys: Sequence[str], name: str) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """Read the datasets `keys` (paths from the root) of an HDF5 file as numeric arrays in native order, with warnings.

    NO_CHECKSUM is the warning of a dataset in which a flipped bit cannot be told: stored without compression and without
    Fletcher-32. Raises ScanError with the reason; MISSING_KEY lists the keys that are there.
    """
    notes = Notes(name)
    require_bytes(data, notes)
    if not any(data.startswith(HDF5_MAGIC, at) for at in _user_blocks(len(data))):
        raise unexpected(data, Code.NOT_HDF5, "an HDF5 file", notes)
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            datasets = {key: _dataset(file, key, notes) for key in keys}
            bare = [key for key, dataset in datasets.items() if not _is_protected(dataset)]
            arrays = {key: _values(dataset) for key, dataset in datasets.items()}
    except ScanError:
        raise
    except Exception as error:  # a foreign decoder on foreign bytes
        code = Code.TRUNCATED if "truncated" in str(error) else Code.CORRUPT
        raise notes.error(code, "found an HDF5 file that cannot be read; fetch the file again") from error
    if bare:
        notes.warn(Code.NO_CHECKSUM, f"found no checksum over {', '.join(bare)}: a flipped bit would go unseen")
    return arrays, tuple(notes.warnings)


def _user_blocks(size: int) -> Iterator[int]:
    """Where the magic may stand: at 0, 512, 1024, 2048, ... MATLAB 7.3 files put 512 bytes of text before it."""
    at = 0
    while at < size:
        yield at
        at = 2 * at or 512


def _dataset(file: h5py.File, key: str, notes: Notes) -> h5py.Dataset:
    """Find a dataset without leaving the file, and judge what it claims."""
    path = _resolve(file, key, notes)
    found = file.get(path) if path else None
    if not isinstance(found, h5py.Dataset):
        there = ", ".join(ascii(name[:40]) for name in islice(file, MAX_KEYS_SHOWN))
        raise notes.error(Code.MISSING_KEY, f"found the keys {there or 'none'}, expected a dataset '{key}'")
    if found.external or found.is_virtual:
        raise notes.error(Code.OUTSIDE_ROOT, f"found '{key}' stored in another file, expected its values in this one")
    try:
        dtype = found.dtype
    except TypeError as error:  # types that numpy has no word for
        raise notes.error(Code.BAD_DATATYPE, f"found '{key}' of a type unknown to NumPy, expected numbers") from error
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise notes.error(Code.BAD_DATATYPE, f"found '{key}' of a type of kind '{dtype.kind}', expected numbers")
    claim = 0 if found.shape is None else prod(found.shape) * dtype.itemsize
    if found.shape is None or max(claim, prod(found.chunks or (0,)) * dtype.itemsize) > MAX_SLICE_BYTES:
        text = f"found a claim of {found.shape} for '{key}', in chunks of {found.chunks}"
        raise notes.error(Code.TOO_LARGE, f"{text}, expected at most {MAX_SLICE_BYTES:,} bytes")
    _require_all_stored(found, key, notes)
    return found


def _require_all_stored(dataset: h5py.Dataset, key: str, notes: Notes) -> None:
    """Refuse values that were never written, which HDF5 makes up, and chunks that hold more than their size."""
    if dataset.chunks is None:
        stored, expected, what = dataset.id.get_storage_size(), dataset.nbytes, "bytes"
    else:
        stored, expected, what = dataset.id.get_num_chunks(), _num_chunks(dataset), "chunks"
    if stored < expected:
        raise notes.error(Code.TRUNCATED, f"found {stored} of the {expected} {what} of '{key}' written, expected all")
    if dataset.chunks is None:
        return
    filters = _filters(dataset)
    if not set(filters) <= set(_FILTERS) or filters.count(_DEFLATE) + filters.count(_LZF) > 1:
        text = f"found '{key}' packed with HDF5 filters {filters}, expected gzip or lzf once, shuffle, fletcher32"
        raise notes.error(Code.UNSUPPORTED, f"{text}; repack it with h5repack")
    if expected > MAX_CHUNKS:
        raise notes.error(Code.TOO_LARGE, f"found '{key}' in {expected} chunks, expected at most {MAX_CHUNKS}")
    if _DEFLATE in filters:
        _require_fitting_chunks(dataset, filters.index(_DEFLATE), filters, key, notes)


def _num_chunks(dataset: h5py.Dataset) -> int:
    return prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))


def _filters(dataset: h5py.Dataset) -> list[int]:
    created = dataset.id.get_create_plist()
    return [int(created.get_filter(index)[0]) for index in range(created.get_nfilters())]


def _require_fitting_chunks(dataset: h5py.Dataset, place: int, filters: Sequence[int], key: str, notes: Notes) -> None:
    """HDF5 unpacks a chunk's gzip data to their end, whatever the chunk's size: so nothing may come after that size."""
    before, after = (filters[:place].count(_FLETCHER32), filters[place + 1 :].count(_FLETCHER32))
    size = prod(dataset.chunks) * dataset.dtype.itemsize + before * _CHECKSUM_BYTES
    room = bytearray(size)
    for index in range(dataset.id.get_num_chunks()):
        offset = dataset.id.get_chunk_info(index).chunk_offset
        skipped, packed = dataset.id.read_direct_chunk(offset)
        if skipped:
            raise notes.error(Code.UNSUPPORTED, f"found a chunk of '{key}' that leaves filters out, expected all to be alike")
        if _unpacked_bytes(packed[: len(packed) - after * _CHECKSUM_BYTES], room) != size:
            raise notes.error(Code.CORRUPT, f"found a chunk of '{key}' that does not unpack to its {size} bytes")


def _unpacked_bytes(packed: bytes, room: bytearray) -> int:
    """How many bytes zlib data unpack to; -1 where they are damaged or take more than `room`."""
    try:
        return len(imagecodecs.deflate_decode(packed, out=room))
    except imagecodecs.DeflateError:
        return -1


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
