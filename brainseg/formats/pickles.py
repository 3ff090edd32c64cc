"""Pickles: told from their bytes alone, so that what runs code when it is loaded is refused by name and never loaded.

NumPy archives (`.npz`), `.npy` files of objects, torch checkpoints and bare pickles are what people put where an image
belongs. Layouts: the opcodes of `pickletools`, NumPy's format specification 1.0 to 3.0, the ZIP directory.
"""

import io
import pickletools
import zipfile

ZIP_MAGIC = b"PK\x03\x04"
NUMPY_MAGIC = b"\x93NUMPY"
_PROTOCOLS = tuple(bytes([0x80, version]) for version in range(2, 6))
_SUFFIXES = (".pkl", ".pickle", ".joblib")
_HEAD_BYTES = 4096
_MAX_MEMBERS = 1000
_LEAST_OPCODES = 3
_TEXT_STARTS = (b"(", b"c", b"d", b"l", b"]", b"}", b")")
_CALLS = {"GLOBAL", "INST"}
"""How pickles of protocols 0 and 1, which look like words, name what they run. Without it they run nothing."""


def holds_pickle(data: bytes) -> bool:
    """Whether the bytes are a pickle or a container with one inside. Nothing is unpickled, nothing unpacked whole."""
    if data.startswith(ZIP_MAGIC):
        return _in_zip(data)
    return _is_pickle(data[:_HEAD_BYTES])


def _in_zip(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(_in_member(archive, member) for member in archive.infolist()[:_MAX_MEMBERS])
    except Exception:  # noqa: BLE001  a foreign decoder on foreign bytes: what cannot be opened holds nothing that runs
        return False


def _in_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    if member.filename.lower().endswith(_SUFFIXES):
        return True
    with archive.open(member) as file:
        return _is_pickle(file.read(_HEAD_BYTES))


def _is_pickle(head: bytes) -> bool:
    if head.startswith(NUMPY_MAGIC):
        return b"|O" in head  # the one way in which a header declares Python objects
    opcodes = _opcodes(head)
    if head.startswith(_PROTOCOLS):
        return len(opcodes) >= _LEAST_OPCODES
    return head[:1] in _TEXT_STARTS and not _CALLS.isdisjoint(opcodes)


def _opcodes(head: bytes) -> list[str]:
    """The names of the opcodes until the bytes end or stop making sense."""
    names = []
    try:
        for opcode, _, _ in pickletools.genops(head):
            names.append(opcode.name)
    except Exception:  # noqa: BLE001  a foreign decoder on foreign bytes: here they stop making sense
        return names
    return names
