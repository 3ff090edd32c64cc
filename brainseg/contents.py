"""Contents: which image files of an archive could be copies of one another, and what the bytes of those hash to.

Files of different size cannot be equal, so only sizes that occur more than once are read. On S3 an ETag that proves to be
an MD5 stands for the bytes: then one file of each set of equals is read. Hashes are for the audit alone; a file that cannot
be read has none, and the job that reads its scan will say why.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brainseg import storage
from brainseg.errors import ScanError, StorageError
from brainseg.formats.hdf5 import read_keys
from brainseg.formats.images import read_image
from brainseg.formats.nifti import read_nifti
from brainseg.tables import MANIFEST, SOURCE, flat_sources, nested_sources

READS = 8
"""Files that are read at the same time."""

_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class _File:
    """An image file, and its place among all sources of the table."""

    place: int
    uri: str
    size_bytes: int
    tag: str
    reader: str


def with_contents(table: pa.Table, say: Callable[[str], None] = lambda _line: None) -> pa.Table:
    """Return a manifest with `sha256` filled in for image files whose size another one shares; blank images stay null."""
    owners, files = flat_sources(table["sources"])
    alike = _of_equal_size(_images(table, owners, files))
    say(f"comparing the contents of {len(alike):,} files that share their size with another")
    with ThreadPoolExecutor(READS) as pool:
        hashes = _hashes(alike, pool)
        blank = _blank(alike, hashes, pool)
    known = [None if hashes.get(place) in blank else hashes.get(place) for place in range(len(files))]
    parts = {f.name: files.field(f.name) for f in SOURCE} | {"sha256": pa.array(known, pa.string())}
    column = nested_sources(pc.list_value_length(table["sources"]).to_pylist(), parts)
    return table.set_column(table.schema.get_field_index("sources"), MANIFEST.field("sources"), column)


def _images(table: pa.Table, owners: pa.Array, files: pa.StructArray) -> list[_File]:
    """The image files of usable scans."""
    usable = pc.take(table["problem_code"].is_null(), owners)
    wanted = pc.and_(usable, pc.not_equal(files.field("role"), "label")).combine_chunks()
    places = pa.array(np.flatnonzero(wanted.to_numpy(zero_copy_only=False)))
    columns = [places, *(files.field(n).take(places) for n in ("uri", "size_bytes", "tag"))]
    columns.append(pc.take(table["reader"], owners.take(places)))
    return [_File(*values) for values in zip(*(column.to_pylist() for column in columns), strict=True)]


def _of_equal_size(files: Sequence[_File]) -> list[_File]:
    counts = Counter(file.size_bytes for file in files)
    return [file for file in files if file.size_bytes and counts[file.size_bytes] > 1]


def _hashes(files: Sequence[_File], pool: ThreadPoolExecutor) -> dict[int, str]:
    """Return place -> hash of all that could be read; what an ETag already tells apart is not read."""
    by_tag, others = _by_etag(files)
    if by_tag and not _is_md5(next(iter(by_tag.values()))[0]):
        by_tag, others = {}, list(files)
    sets = [same for same in by_tag.values() if len(same) > 1] + [[file] for file in others]
    read = pool.map(_hash, (same[0] for same in sets))
    return {file.place: digest for same, digest in zip(sets, read, strict=True) if digest for file in same}


def _by_etag(files: Sequence[_File]) -> tuple[dict[Hashable, list[_File]], list[_File]]:
    """Sort files into sets of equal size and ETag, and those that must be read: a multipart ETag tells nothing."""
    unclear = {f.size_bytes for f in files if not (storage.is_remote(f.uri) and _MD5.fullmatch(f.tag or ""))}
    sets: dict[Hashable, list[_File]] = defaultdict(list)
    for file in files:
        if file.size_bytes not in unclear:
            sets[file.size_bytes, file.tag].append(file)
    return sets, [file for file in files if file.size_bytes in unclear]


def _is_md5(file: _File) -> bool:
    """Whether this store's ETags are MD5s: those of objects encrypted with keys of their own look the same and are not."""
    data = _read(file)
    return data is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == file.tag


def _hash(file: _File) -> str | None:
    data = _read(file)
    return None if data is None else hashlib.sha256(data).hexdigest()


def _read(file: _File) -> bytes | None:
    try:
        return storage.read_bytes(file.uri)
    except StorageError:
        return None


def _blank(files: Iterable[_File], hashes: Mapping[int, str], pool: ThreadPoolExecutor) -> set[str | None]:
    """Hashes of images that occur more than once and show nothing: that those are equal is no evidence."""
    counts = Counter(hashes.values())
    twice = {hashes[f.place]: f for f in files if counts[hashes.get(f.place, "")] > 1}
    return {digest for digest, empty in zip(twice, pool.map(_is_blank, twice.values()), strict=True) if empty}


def _is_blank(file: _File) -> bool:
    """Whether every channel of the image holds one value. What cannot be decoded counts as something."""
    data, name = _read(file), storage.name_of(file.uri)
    try:
        if file.reader == "volumes":
            channels = read_nifti(data or b"", name).array[..., None]
        elif file.reader == "h5slices":
            channels = read_keys(data or b"", ["image"], name)[0]["image"]
        else:
            channels = np.atleast_3d(read_image(data or b"", name)[0])
    except ScanError:
        return False
    flat = channels.reshape(-1, channels.shape[-1])
    return bool((flat == flat[:1]).all())
