"""Local disk: files as they are, written beside their place and then renamed."""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from brainseg.errors import Code, StorageError
from brainseg.storage.place import (
    Entry,
    Leftover,
    absolute,
    check_probe,
    is_temporary,
    one_line,
    printable,
    temporary_name,
    translated,
)

VOLUME_ENDINGS = (".nii", ".nii.gz")
"""A folder that is named like a volume is listed besides being entered: a scan may be waiting for that volume."""

PIECE_BYTES = 1 << 20


class LocalDisk:
    """The file system of this machine, or one mounted on it."""

    def list_files(self, root: str) -> Iterator[Entry]:
        """List every file below `root`; links are followed to files inside it, a link to a folder is listed, not entered."""
        root = absolute(root)
        real_root = Path(os.path.realpath(root))
        for item in _walk(root):
            yield item if isinstance(item, Entry) else _entry(item, real_root)

    def exists(self, uri: str) -> bool:
        """Whether a file (not a folder) is there."""
        with translated("look for", uri):
            return Path(uri).is_file()

    def is_dir(self, uri: str) -> bool:
        """Whether this is a folder."""
        with translated("look for", uri):
            return Path(uri).is_dir()

    def read_bytes(self, uri: str) -> bytes:
        """Return a whole file. Never waits for the writer of a pipe."""
        with translated("read", uri), open(uri, "rb", buffering=0, opener=_open_at_once) as file:
            size_bytes = _regular_size(uri, os.fstat(file.fileno()))
            data = file.readall()
        _check_whole(uri, len(data), size_bytes)
        return data

    def digest(self, uri: str) -> tuple[int, str]:
        """Size and sha256 of a whole file."""
        digest, read = hashlib.sha256(), 0
        with translated("read", uri), open(uri, "rb", buffering=0, opener=_open_at_once) as file:
            size_bytes = _regular_size(uri, os.fstat(file.fileno()))
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                read += len(piece)
        _check_whole(uri, read, size_bytes)
        return read, digest.hexdigest()

    def open_table(self, uri: str, columns: list[str] | None) -> Any:
        """Open a file for pyarrow, which reads only what it needs."""
        with translated("read", uri):
            _regular_size(uri, os.stat(uri))  # noqa: PTH116 - a pipe must not be opened
            return pa.OSFile(uri, "rb")

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write beside the target and rename. A killed writer can leave a temporary file there, never half a target."""
        with translated("write", uri), _beside(Path(uri), data) as written:
            written.replace(uri)

    @contextmanager
    def writing(self, uri: str) -> Iterator[BinaryIO]:
        """Open a temporary file beside the target, whose name it gets at the end."""
        with translated("write", uri), _temporary(Path(uri)) as beside:
            with beside.open("xb") as file:
                yield file
                _sync(file)
            beside.replace(uri)

    def create_bytes(self, uri: str, data: bytes, *, rivals: bool = True) -> bool:
        """Write beside the target and link it in under its name, which fails where the name is taken.

        The count of links tells whether it is ours even where a network file system lost the answer. Where there are no hard
        links, the file is opened exclusively: still one winner, but a killed one can leave half a file.
        """
        with translated("create", uri), _beside(Path(uri), data) as written:
            try:
                os.link(written, uri)
            except FileExistsError:
                pass
            except OSError:
                return _create_in_place(uri, data)
            return written.stat().st_nlink > 1

    def delete(self, uri: str) -> None:
        """Delete a file; a missing one is no error."""
        with translated("delete", uri), suppress(NotADirectoryError):
            Path(uri).unlink(missing_ok=True)

    def delete_tree(self, root: str) -> None:
        """Delete everything under a folder, and the folder itself; a missing one is fine."""
        with translated("delete", root):
            if Path(root).exists():
                shutil.rmtree(root)

    def check_readable(self, uri: str) -> None:
        """Open the file, or list the folder."""
        with translated("read", uri):
            if Path(uri).is_dir():
                os.scandir(uri).close()
            elif Path(uri).exists():
                with open(uri, "rb", opener=_open_at_once) as file:
                    _regular_size(uri, os.fstat(file.fileno()))
            else:
                raise StorageError(one_line("read", uri, "there is no such folder or file"))

    def check_writable(self, folder: str) -> None:
        """Probe a folder; those that had to be made for it are removed again."""
        with translated("write to", folder):
            made = [place for place in (Path(folder), *Path(folder).parents) if not place.exists()]
        try:
            check_probe(self, folder)
        finally:
            with suppress(OSError):  # another writer has come to live there meanwhile
                for place in made:
                    place.rmdir()

    def leftovers(self, root: str, older_than: float) -> Iterator[Leftover]:
        """Temporary files and probes whose writer was killed."""
        for item in _walk(absolute(root)):
            if isinstance(item, Entry) or not is_temporary(item.name) or not item.is_file(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):  # its writer has just finished
                status = item.stat(follow_symlinks=False)
                if status.st_mtime < older_than:
                    yield Leftover(item.path, "file", status.st_size, status.st_mtime)

    def remove_leftover(self, leftover: Leftover) -> None:
        """Delete the file."""
        self.delete(leftover.uri)


def _walk(root: str) -> Iterator["os.DirEntry[str] | Entry"]:
    """Everything below a folder that is no folder, sorted; an Entry stands for a folder that cannot be listed."""
    if not Path(root).is_dir():
        return
    stack = [_children(root)]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, Entry) or not item.is_dir(follow_symlinks=False):
            yield item
        else:
            if item.name.lower().endswith(VOLUME_ENDINGS):
                yield Entry(printable(item.path), 0, "", Code.NOT_A_FILE)
            stack.append(_children(item.path))


def _children(folder: str) -> Iterator["os.DirEntry[str] | Entry"]:
    """A folder's entries in the order of their full uris: a folder sorts as if its name ended in a slash."""
    try:
        with os.scandir(folder) as found:
            yield from sorted(found, key=lambda e: e.name + "/" if e.is_dir(follow_symlinks=False) else e.name)
    except OSError:
        yield Entry(printable(folder), 0, "", Code.UNREADABLE)


def _entry(item: "os.DirEntry[str]", real_root: Path) -> Entry:
    uri = printable(item.path)
    try:
        status = item.stat()
    except OSError:
        return Entry(uri, 0, "", Code.NOT_A_FILE)
    problem = None
    if item.is_symlink() and not Path(os.path.realpath(item.path)).is_relative_to(real_root):
        problem = Code.OUTSIDE_ROOT
    elif not stat.S_ISREG(status.st_mode):
        problem = Code.NOT_A_FILE
    elif uri != item.path:
        problem = Code.BAD_ID
    return Entry(uri, status.st_size if problem is None else 0, str(status.st_mtime_ns), problem)


def _open_at_once(path: str, flags: int) -> int:
    """Open a regular file alone, and without waiting: a pipe must not hang a job, nor a device feel that it was opened."""
    _regular_size(path, os.stat(path))  # noqa: PTH116 - as it is opened
    return os.open(path, flags | os.O_NONBLOCK)


def _regular_size(uri: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"could not read {uri}: it is not a regular file")
    return status.st_size


def _check_whole(uri: str, read: int, size_bytes: int) -> None:
    if read < size_bytes:
        raise StorageError(f"could not read {uri}: got {read} of {size_bytes} bytes")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A free name beside the target, for as long as the block takes to write a file there and give it another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / temporary_name("tmp")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """The data in a synced temporary file beside the target, for as long as the block takes to give it its name."""
    with _temporary(target) as beside:
        with beside.open("xb") as file:
            file.write(data)
            _sync(file)
        yield beside


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _create_in_place(uri: str, data: bytes) -> bool:
    try:
        with open(uri, "xb") as file:  # noqa: PTH123 - one call that both tests and makes
            file.write(data)
            _sync(file)
    except FileExistsError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the file system lets a folder be synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
