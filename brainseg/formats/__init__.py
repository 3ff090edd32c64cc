"""Formats: the bytes of one stored file -> an array (and, where the format carries one, its Grid). One module a format.

What a file is called decides nothing; its content does. Every reader judges the header before it allocates, and raises
ScanError alone, whatever the foreign decoder behind it raises.
"""

import codecs
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from brainseg.errors import Code, ScanError, one_line
from brainseg.formats.pickles import holds_pickle
from brainseg.geometry import Grid

MAX_VOXELS = 200_000_000
"""The largest volume that is read: a field of view of 240x240x200 mm at 0.4 mm is 180 million voxels."""
MAX_BYTES = 4 * MAX_VOXELS
"""The most that one file, and all files of one scan together, may decode to: a few times this is held at once, never 2 GiB."""
MAX_SLICE_BYTES = MAX_BYTES // 8
"""The most that one slice of a stack may decode to; no scanner writes a tenth of it."""
MODEST_BYTES, MOST_RATIO = 1 << 26, 100
"""An image beyond the first size must fill its files: noise packs to a half, a head in much air to a thirtieth at most."""


@dataclass(frozen=True)
class Decoded:
    """A volume `(D, H, W)` in its stored type, its grid, and `CODE: one line` for all that was odd but usable."""

    array: NDArray[Any]
    grid: Grid
    warnings: tuple[str, ...] = ()


@dataclass
class Notes:
    """What is said about one file while it is read: every line begins with its name, whoever writes it."""

    name: str
    warnings: list[str] = field(default_factory=list)

    def warn(self, code: Code, text: str) -> None:
        """Note what is odd but usable."""
        self.warnings.append(warning(code, f"{self.name}: {text}"))

    def error(self, code: Code, text: str) -> ScanError:
        """Return the reason why the file cannot be used, to be raised."""
        return ScanError(code, f"{self.name}: {text}")


def warning(code: Code, text: str) -> str:
    """A warning as tables keep it: `CODE: one line`."""
    return one_line(f"{code}: {text}")


def require_bytes(data: bytes, notes: Notes) -> None:
    """Refuse what is no file of any format: nothing at all (EMPTY_FILE), or a binary file damaged as text (CORRUPT)."""
    if not data:
        raise notes.error(Code.EMPTY_FILE, "found 0 bytes, expected an image; fetch the file again")
    if _was_decoded_as_text(data):
        text = "found bytes that were once decoded as UTF-8 text, which loses all above 127; fetch the file again"
        raise notes.error(Code.CORRUPT, text)


def unexpected(data: bytes, code: Code, expected: str, notes: Notes) -> ScanError:
    """The reason to refuse a file of another kind: UNSAFE_PICKLE where loading it could run code, else the given code."""
    if holds_pickle(data):
        text = f"found a Python pickle, or an archive with one in it, which runs code when loaded, expected {expected}"
        return notes.error(Code.UNSAFE_PICKLE, f"{text}; it was not opened")
    return notes.error(code, f"found {describe_content(data)}, expected {expected}")


def describe_content(data: bytes) -> str:
    """What a file that is not what it should be looks like, for an error line. Never quotes the content."""
    for start, says in _STARTS.items():
        if data.startswith(start):
            return says
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if data[257:262] == b"ustar":
        return "a tar archive"
    head = data[:256].lstrip()
    if head[:1] == b"<":
        return "a web page or XML document"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "plain text"
    return "bytes of an unknown kind"


_STARTS = {
    b"version https://git-lfs": "a git-LFS pointer (run `git lfs pull`)",
    b"\x1f\x8b": "gzip data",
    b"\x89PNG": "a PNG image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x89HDF": "an HDF5 file",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"MATLAB 5.0": "a MATLAB 5 file",
    b"RIFF": "a WebP image or other RIFF file",
    b"\0\0\0\x0cjP": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"SIMPLE  =": "a FITS file",
    b"NRRD": "an NRRD file",
    b"\x00\x05\x16\x07": "the side file macOS writes beside a file on a foreign disk",
}

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def _was_decoded_as_text(data: bytes) -> bool:
    """Whether a decoder put U+FFFD in place of bytes: real image data beyond ASCII is never valid UTF-8 throughout."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data[:4096])  # image data mostly ends the search here
    except UnicodeDecodeError:
        return False
    if data.count(_REPLACEMENT, 0, 1 << 20) < 4:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
