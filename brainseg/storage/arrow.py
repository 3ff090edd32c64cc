"""Arrow: our storage as the file system that Ray Train keeps checkpoints on, so that they get the same retries and proofs.

Ray hands out paths without a scheme: `bucket/key`. A stream that is written goes out as one put when it is closed.
"""

import io
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from brainseg import storage
from brainseg.storage.place import SCHEME


def ray_storage(uri: str) -> tuple[FileSystem | None, str]:
    """What Ray's `storage_filesystem` and `storage_path` must be for a place: on disk Ray's own, on S3 ours."""
    return (PyFileSystem(Objects()), uri.removeprefix(SCHEME)) if storage.is_remote(uri) else (None, uri)


class _Put(io.BytesIO):
    """Bytes that become an object when the stream is closed."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri

    def close(self) -> None:
        """Send what was written, once."""
        if not self.closed:
            storage.write_bytes(self._uri, self.getvalue())
        super().close()


class Objects(FileSystemHandler):  # type: ignore[misc]
    """The objects of a store as files; folders are what objects lie below."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Objects)

    def __hash__(self) -> int:
        return hash(Objects)

    def get_type_name(self) -> str:
        return "brainseg"

    def normalize_path(self, path: str) -> str:
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        uri = _uri(path)
        if storage.exists(uri):
            sizes = {entry.uri: entry.size_bytes for entry in storage.list_files(storage.parent_of(uri))}
            return FileInfo(path, FileType.File, size=sizes.get(uri))
        return FileInfo(path, FileType.Directory if storage.is_dir(uri) else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        base, found = selector.base_dir.strip("/"), dict[str, FileInfo]()
        for entry in storage.list_files(_uri(base)):
            path = entry.uri.removeprefix(SCHEME)
            below = path.removeprefix(f"{base}/").split("/")
            for depth in range(1, len(below)):
                folder = "/".join([base, *below[:depth]])
                if selector.recursive or depth == 1:
                    found[folder] = FileInfo(folder, FileType.Directory)
            if selector.recursive or len(below) == 1:
                found[path] = FileInfo(path, FileType.File, size=entry.size_bytes)
        if not found and not selector.allow_not_found and not storage.is_dir(_uri(base)):
            raise FileNotFoundError(base)
        return list(found.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        """A store needs no folders."""

    def delete_dir(self, path: str) -> None:
        storage.delete_tree(_uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        storage.delete_tree(_uri(path))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a store's buckets are not ours")

    def delete_file(self, path: str) -> None:
        storage.delete(_uri(path))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def copy_file(self, src: str, dest: str) -> None:
        storage.write_bytes(_uri(dest), storage.read_bytes(_uri(src)))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A missing object is FileNotFoundError, which Ray expects."""
        uri = _uri(path)
        if not storage.exists(uri):
            raise FileNotFoundError(path)
        return pa.PythonFile(pa.BufferReader(storage.read_bytes(uri)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Put(_uri(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("objects are written whole")


def _uri(path: str) -> str:
    return SCHEME + path.strip("/")
