"""DICOM elements: the bytes of one file -> the few attributes that geometry and pixels need, undecoded; all others skipped.

What is not asked for is never turned into a value, so no name, comment or private text can leave with a message; nothing
is inflated, nested or counted beyond a limit. pydicom, which converts, warns of and logs what it meets, is the oracle of
the tests. Layout of elements, sequences and fragments: DICOM PS3.5 sections 6.2, 7 and A.4; of the file: PS3.10 section 7.
"""

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from brainseg.errors import Code, ScanError
from brainseg.formats import Notes, describe_content, require_bytes

MAX_DEPTH = 16
"""Sequences nested deeper than this are no image's."""
MAX_ELEMENTS = 200_000
MAX_INFLATED_BYTES = 1 << 27
"""What a deflated file may become."""

TRANSFER_SYNTAX, SERIES_UID, MODALITY = 0x00020010, 0x0020000E, 0x00080060
PIXELS, FLOAT_PIXELS, DOUBLE_PIXELS = 0x7FE00010, 0x7FE00008, 0x7FE00009
POSITION, ORIENTATION, SPACING, THICKNESS, STEP = 0x00200032, 0x00200037, 0x00280030, 0x00180050, 0x00180088
SAMPLES, PHOTOMETRIC, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
INTERCEPT, SLOPE, LOOKUP = 0x00281052, 0x00281053, 0x00283000
BURNED_IN, IDENTITY_REMOVED = 0x00280301, 0x00120062
SHARED, PER_FRAME = 0x52009229, 0x52009230
PLANE_POSITION, PLANE_ORIENTATION, PIXEL_MEASURES, PIXEL_VALUES = 0x00209113, 0x00209116, 0x00289110, 0x00289145

_WANTED: Mapping[int, str] = {
    **dict.fromkeys((TRANSFER_SYNTAX, SERIES_UID), "UI"),
    **dict.fromkeys((MODALITY, PHOTOMETRIC, BURNED_IN, IDENTITY_REMOVED), "CS"),
    **dict.fromkeys((POSITION, ORIENTATION, SPACING, THICKNESS, STEP, INTERCEPT, SLOPE, FRAMES), "DS"),
    **dict.fromkeys((SAMPLES, ROWS, COLUMNS, ALLOCATED, STORED, HIGH_BIT, SIGNED), "US"),
    **dict.fromkeys((SHARED, PER_FRAME, PLANE_POSITION, PLANE_ORIENTATION, PIXEL_MEASURES, PIXEL_VALUES, LOOKUP), "SQ"),
    **dict.fromkeys((PIXELS, FLOAT_PIXELS, DOUBLE_PIXELS), "OW"),
}
"""What is kept, with the value representation that counts where the file gives none."""

TELLING = frozenset(
    {
        *(0x00080081, 0x00080092, 0x00080094, 0x00101000, 0x00101001, 0x00101002, 0x00101005, 0x00101040, 0x00101060),
        *(0x00101090, 0x00102154, 0x001021B0, 0x00104000, 0x00204000, 0x00380300, 0x00380400, 0x00384000),
    }
)
"""Further names and numbers of the patient, addresses, telephone numbers, free comments. PatientName, PatientID and
PatientBirthDate are not among them: every file has them, and a pseudonym looks like a name."""

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8"}
_DECIMAL = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_PROGRAMS = (b"MZ", b"\x7fELF", b"#!", b"\xfe\xed\xfa", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
_BARE = re.compile(rb"[\x02\x08]\0[\0-\xff]\0|\0\x08\0", re.DOTALL)
"""How elements begin that nothing precedes: in group 2, or in group 8 of either byte order."""
_STANDARD = "1.2.840.10008.1.2"


@dataclass(frozen=True)
class Syntax:
    """A transfer syntax: what it is called, how elements are coded, and which codec (if any) holds the pixels."""

    name: str
    order: str = "<"
    implicit: bool = False
    codec: str = ""
    deflated: bool = False
    lossy: bool = False


SYNTAXES: Mapping[str, Syntax] = {
    _STANDARD: Syntax("implicit little endian", implicit=True),
    f"{_STANDARD}.1": Syntax("explicit little endian"),
    f"{_STANDARD}.1.99": Syntax("deflated", deflated=True),
    f"{_STANDARD}.2": Syntax("explicit big endian", order=">"),
    f"{_STANDARD}.5": Syntax("RLE", codec="rle"),
    f"{_STANDARD}.4.50": Syntax("JPEG baseline", codec="jpeg", lossy=True),
    f"{_STANDARD}.4.51": Syntax("JPEG extended", codec="jpeg", lossy=True),
    f"{_STANDARD}.4.57": Syntax("JPEG lossless", codec="jpeg"),
    f"{_STANDARD}.4.70": Syntax("JPEG lossless", codec="jpeg"),
    f"{_STANDARD}.4.80": Syntax("JPEG-LS", codec="jpegls"),
    f"{_STANDARD}.4.81": Syntax("JPEG-LS near-lossless", codec="jpegls", lossy=True),
    f"{_STANDARD}.4.90": Syntax("JPEG 2000 lossless", codec="jpeg2000"),
    f"{_STANDARD}.4.91": Syntax("JPEG 2000", codec="jpeg2000", lossy=True),
}


@dataclass(frozen=True)
class Element:
    """One attribute as stored: its bytes, or the items of a sequence, or the fragments of compressed pixels."""

    vr: str
    order: str
    value: memoryview = field(default=memoryview(b""), repr=False)
    items: tuple["Elements", ...] = ()
    fragments: tuple[memoryview, ...] | None = field(default=None, repr=False)


class Elements(dict[int, Element]):
    """The kept attributes of a data set or of an item, by tag."""

    def text(self, tag: int) -> str:
        """A code string or UID, empty where there is none. For comparing only: never goes into a message."""
        element = self.get(tag)
        return "" if element is None else bytes(element.value).decode("latin-1").strip(" \0")

    def numbers(self, tag: int) -> tuple[float, ...] | None:
        """The numbers of an attribute; None where it is absent, empty, or holds anything else."""
        element = self.get(tag)
        if element is None or not len(element.value):
            return None
        raw = bytes(element.value)
        kind = _BINARY.get(element.vr)
        if kind is not None:
            dtype = np.dtype(element.order + kind)
            return None if len(raw) % dtype.itemsize else tuple(float(n) for n in np.frombuffer(raw, dtype))
        parts = [part.strip(b" \0") for part in raw.split(b"\\")]
        return tuple(float(part) for part in parts) if all(_DECIMAL.fullmatch(part) for part in parts) else None

    def whole(self, tag: int) -> int | None:
        """The one whole number of an attribute, or None."""
        found = self.numbers(tag)
        return int(found[0]) if found is not None and len(found) == 1 and float(found[0]).is_integer() else None


@dataclass(frozen=True)
class File:
    """One DICOM file: its kept attributes, its transfer syntax, and how much else there is that could name a person."""

    elements: Elements
    syntax: Syntax
    num_private: int
    num_telling: int


def read_elements(data: bytes, notes: Notes) -> File:
    """Walk through one file to the end of its pixels. Raises ScanError with the reason; warns of odd beginnings and ends."""
    require_bytes(data, notes)
    start = _start(data, notes)
    meta = _Walk(memoryview(data), "<", False, notes)
    head, at = meta.data_set(start, len(data), group=2) if _group(data, start) == 2 else (Elements(), start)
    syntax = _syntax(head, data[at : at + 6], notes)
    content = memoryview(_inflated(data[at:], notes)) if syntax.deflated else memoryview(data)[at:]
    walk = _Walk(content, syntax.order, syntax.implicit, notes)
    elements, end = walk.data_set(0, len(content))
    if PIXELS in elements and any(content[end:]) and bytes(content[end : end + 4]) not in _AFTER_PIXELS:
        notes.warn(Code.TRAILING_DATA, f"found {len(content) - end} bytes after the pixels; they were ignored")
    return File(elements, syntax, walk.num_private, walk.num_telling)


_AFTER_PIXELS = (b"\xfc\xff\xfc\xff", b"\xff\xfc\xff\xfc", b"\xfa\xff\xfa\xff", b"\xff\xfa\xff\xfa")
"""Padding and signatures, which may follow the pixels."""


def _group(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _start(data: bytes, notes: Notes) -> int:
    """Where the first element stands: after the 128 bytes of preamble and `DICM`, or at once (warned of)."""
    if data[128:132] == b"DICM":
        _judge_preamble(data[:128], notes)
        return 132
    at = 4 if data[:4] == b"DICM" else 0
    if at or _BARE.match(data):
        notes.warn(Code.BAD_MAGIC, "found no preamble and 'DICM' at byte 128; it was read as the bare elements it holds")
        return at
    raise notes.error(Code.NOT_DICOM, f"found {describe_content(data)}, expected a DICOM file")


def _judge_preamble(preamble: bytes, notes: Notes) -> None:
    """Warn of a preamble that makes the file a program too (CVE-2019-11687), or that is not empty for no known reason."""
    if not any(preamble) or preamble[:4] in (b"II*\0", b"MM\0*"):
        return
    what = "the start of a program" if preamble.startswith(_PROGRAMS) else "bytes of no known use"
    notes.warn(Code.PREAMBLE, f"found {what} in the preamble, expected zeros; only the DICOM after it was read")


def _syntax(head: Elements, first: bytes, notes: Notes) -> Syntax:
    """The declared transfer syntax; where none is, or where the first element contradicts it, what that element shows."""
    uid = head.text(TRANSFER_SYNTAX)
    syntax = SYNTAXES.get(uid) if uid else _guessed(first)
    if syntax is None:
        named = uid if re.fullmatch(rf"{re.escape(_STANDARD)}(\.\d{{1,3}}){{0,3}}", uid) else "of an unknown name"
        known = ", ".join(dict.fromkeys(s.name for s in SYNTAXES.values()))
        raise notes.error(Code.UNSUPPORTED, f"found the transfer syntax {named}, expected one of: {known}; transcode it first")
    if not uid:
        notes.warn(Code.BAD_HEADER, f"found no transfer syntax; its first element looks like {syntax.name}")
    elif not syntax.deflated and len(first) == 6 and _has_vr(first) == syntax.implicit:
        syntax = replace(syntax, implicit=not syntax.implicit)
        notes.warn(Code.BAD_HEADER, "found elements that are not coded as the transfer syntax says; they were read as they are")
    return syntax


def _has_vr(first: bytes) -> bool:
    return first[4:6] in _SHORT or first[4:6] in _LONG


def _guessed(first: bytes) -> Syntax:
    if not _has_vr(first):
        return SYNTAXES[_STANDARD]
    return SYNTAXES[f"{_STANDARD}.2" if first[0] == 0 and first[1] else f"{_STANDARD}.1"]


def _inflated(packed: bytes, notes: Notes) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise notes.error(Code.CORRUPT, "found a deflate stream that cannot be read; fetch the file again") from error
    if stream.unconsumed_tail:
        text = f"found a deflate stream of more than {MAX_INFLATED_BYTES:,} bytes, expected at most that"
        raise notes.error(Code.TOO_LARGE, text)
    if not stream.eof:
        raise notes.error(Code.TRUNCATED, "found a deflate stream without its end; fetch the file again")
    return content


@dataclass
class _Walk:
    """A way through the elements of one file; counts them, and what it passes by."""

    data: memoryview
    order: str
    implicit: bool
    notes: Notes
    num_elements: int = 0
    num_private: int = 0
    num_telling: int = 0

    def data_set(
        self, at: int, end: int, *, depth: int = 0, delimited: bool = False, group: int | None = None
    ) -> tuple[Elements, int]:
        """Read elements up to `end` (or a delimiter before it), the end of the pixels, or the first of another `group`."""
        found = Elements()
        while at < end:
            if group is not None and _group(bytes(self.data[at : at + 2]), 0) != group:
                break
            tag, vr, length, start = self._header(at, end)
            if tag == _ITEM_END and delimited:
                return found, start
            if tag >> 16 == 0xFFFE:
                raise self._corrupt(at)
            element, at = self._element(tag, vr, start, length, end, depth)
            if tag in _WANTED:
                if tag in found:
                    raise self.notes.error(Code.CORRUPT, "found an attribute of geometry or pixels twice, expected it once")
                found[tag] = element
            if tag == PIXELS and not depth:
                break
        if delimited:
            raise self._truncated(end + 8)
        return found, at

    def _header(self, at: int, end: int) -> tuple[int, bytes, int, int]:
        """Tag, value representation (empty where there is none), length of the value, and where it starts."""
        self.num_elements += 1
        if self.num_elements > MAX_ELEMENTS:
            raise self.notes.error(Code.TOO_LARGE, f"found more than {MAX_ELEMENTS:,} elements, expected an image")
        if at + 8 > end:
            raise self._truncated(at + 8)
        group, number = struct.unpack_from(self.order + "HH", self.data, at)
        vr = bytes(self.data[at + 4 : at + 6])
        if self.implicit or group == 0xFFFE:
            return group << 16 | number, b"", struct.unpack_from(self.order + "I", self.data, at + 4)[0], at + 8
        if vr in _SHORT:
            return group << 16 | number, vr, struct.unpack_from(self.order + "H", self.data, at + 6)[0], at + 8
        if vr not in _LONG:
            raise self._corrupt(at)
        if at + 12 > end:
            raise self._truncated(at + 12)
        return group << 16 | number, vr, struct.unpack_from(self.order + "I", self.data, at + 8)[0], at + 12

    def _element(self, tag: int, vr: bytes, start: int, length: int, end: int, depth: int) -> tuple[Element, int]:
        """The element at a header, and where the next one starts."""
        kind = vr.decode() if vr not in (b"", b"UN") else _WANTED.get(tag, "")
        if not depth and length:
            self._count(tag)
        if length == _UNDEFINED:
            if tag == PIXELS:
                fragments, at = self._fragments(start, end)
                return Element(kind, self.order, fragments=fragments), at
            items, at = self._items(start, end, depth + 1, delimited=True, as_unknown=vr == b"UN")
            return Element(kind, self.order, items=items), at
        at = start + length
        if at > end:
            raise self._truncated(at)
        if kind == "SQ" and tag in _WANTED:
            items, _ = self._items(start, at, depth + 1, as_unknown=vr == b"UN")
            return Element(kind, self.order, items=items), at
        return Element(kind, self.order, self.data[start:at]), at

    def _count(self, tag: int) -> None:
        """Count what could name a person: private elements (not the lines that reserve them) and telling ones."""
        self.num_private += bool(tag >> 16 & 1) and tag & 0xFFFF >= 0x1000
        self.num_telling += tag in TELLING

    def _items(
        self, at: int, end: int, depth: int, *, delimited: bool = False, as_unknown: bool = False
    ) -> tuple[tuple[Elements, ...], int]:
        """The items of a sequence, up to `end` or its delimiter. One of unknown representation is implicit little endian."""
        if depth > MAX_DEPTH:
            raise self.notes.error(Code.BAD_HEADER, f"found sequences nested deeper than {MAX_DEPTH}, expected an image")
        coding = self.order, self.implicit
        if as_unknown:
            self.order, self.implicit = "<", True
        items = []
        while delimited or at < end:
            tag, _, length, start = self._header(at, end)
            if tag == _SEQUENCE_END and delimited:
                at = start
                break
            if tag != _ITEM:
                raise self._corrupt(at)
            stop = end if length == _UNDEFINED else start + length
            if stop > end:
                raise self._truncated(stop)
            item, at = self.data_set(start, stop, depth=depth, delimited=length == _UNDEFINED)
            items.append(item)
        self.order, self.implicit = coding
        return tuple(items), at

    def _fragments(self, at: int, end: int) -> tuple[tuple[memoryview, ...], int]:
        """Compressed pixels: the table of offsets, then one or more fragments, then the sequence's delimiter."""
        fragments: list[memoryview] = []
        while True:
            tag, _, length, start = self._header(at, end)
            if tag == _SEQUENCE_END:
                return tuple(fragments), start
            if tag != _ITEM or length == _UNDEFINED:
                raise self._corrupt(at)
            at = start + length
            if at > end:
                raise self._truncated(at)
            fragments.append(self.data[start:at])

    def _truncated(self, needed: int) -> ScanError:
        found = f"found {len(self.data)} bytes where an element needs {needed}"
        return self.notes.error(Code.TRUNCATED, f"{found}; the file is cut short or a length in it is wrong")

    def _corrupt(self, at: int) -> ScanError:
        return self.notes.error(Code.CORRUPT, f"found no element where one must start, at byte {at}; fetch the file again")
