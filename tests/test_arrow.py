"""Ray Train's checkpoints on our storage: an object store looks to it like a file system, and keeps what it is given."""

import pickle

import pytest
from fault_proxy import faulty_store, some
from object_stores import BUCKET
from pyarrow.fs import FileSelector, FileType, copy_files

from brainseg import storage
from brainseg.storage.arrow import ray_storage

AT = f"s3://{BUCKET}/ray"


@pytest.fixture(scope="module")
def there():
    """The file system and a folder on it; one request in ten goes wrong."""
    with faulty_store() as proxy:
        proxy.choose = some(0.1, seed=1)
        yield ray_storage(AT)


def test_a_disk_is_left_to_ray(tmp_path):
    assert ray_storage(str(tmp_path)) == (None, str(tmp_path))


def test_a_folder_goes_there_and_comes_back(there, tmp_path):
    system, place = there
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "state.json").write_text("{}")
    (source / "deep/weights").write_bytes(bytes(range(256)) * 1000)
    copy_files(str(source), f"{place}/one", destination_filesystem=system)
    assert storage.read_bytes(f"{AT}/one/deep/weights") == bytes(range(256)) * 1000
    copy_files(f"{place}/one", str(tmp_path / "back"), source_filesystem=system)
    back = {p.relative_to(tmp_path / "back").as_posix(): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back == {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}


def test_files_folders_and_nothing_are_told_apart(there):
    system, place = there
    storage.write_bytes(f"{AT}/two/a/b", b"123")
    kinds = {name: system.get_file_info(f"{place}/two/{name}") for name in ("a", "a/b", "c")}
    assert [kinds[name].type for name in kinds] == [FileType.Directory, FileType.File, FileType.NotFound]
    assert kinds["a/b"].size == 3
    flat = system.get_file_info(FileSelector(f"{place}/two"))
    assert [(i.path, i.type) for i in flat] == [(f"{place}/two/a", FileType.Directory)]
    deep = system.get_file_info(FileSelector(f"{place}/two", recursive=True))
    assert sorted(i.path for i in deep) == [f"{place}/two/a", f"{place}/two/a/b"]
    assert system.get_file_info(FileSelector(f"{place}/none", allow_not_found=True)) == []
    with pytest.raises(FileNotFoundError):
        system.open_input_stream(f"{place}/none")


def test_what_is_written_is_there_once_it_is_closed(there):
    system, place = there
    with system.open_output_stream(f"{place}/three") as stream:
        stream.write(b"first ")
        stream.write(b"second")
        assert not storage.exists(f"{AT}/three")
    with system.open_input_file(f"{place}/three") as stream:
        assert stream.read() == b"first second"
    system.move(f"{place}/three", f"{place}/four")
    assert not storage.exists(f"{AT}/three")
    assert storage.read_bytes(f"{AT}/four") == b"first second"
    system.delete_dir(place)
    assert list(storage.list_files(AT)) == []


def test_it_travels_to_a_worker(there):
    system, _ = there
    assert pickle.loads(pickle.dumps(system)) == system
