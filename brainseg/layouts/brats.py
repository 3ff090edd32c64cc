"""BraTS: a NIfTI file a modality, as every release since 2013 names them, in a folder a case or flat.

The modality is what the name's last word says, in all the spellings of the years (`_t1ce`, `-t1c`, `_T1Gd`); so are the
label (`_seg`) and, through the case's name or spelling, the release: it decides what label 3 and 4 mean. A modality that
a case lacks is no problem here: which ones are needed is the model's business.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from brainseg.errors import Code
from brainseg.layouts import FoundScan, Inventory, Source, noise, settle, unplaced, with_listing_problems
from brainseg.storage import Entry, name_of

NAME = "brats"
EXAMPLE = "BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz or BraTS-GLI-00000-000-t2f.nii.gz"
MODALITIES = ("flair", "t1", "t1c", "t2")
LABEL = "label"

MEANINGS: Mapping[str, str] = {
    **dict.fromkeys(("flair", "t2f", "fla"), "flair"),
    **dict.fromkeys(("t1", "t1n"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd"), "t1c"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
    **dict.fromkeys(("seg", "segm"), LABEL),
}
"""What a word means in every release's spelling."""
_SPELT_SINCE_2023 = frozenset({"t2f", "t1n", "t2w"})
_FILE = re.compile(
    rf"^(?P<case>.*?)(?:_hdbet_native)?[-_](?P<word>{'|'.join(MEANINGS)})(?:_with-skull)?\.nii(?:\.gz)?$",
    re.IGNORECASE | re.DOTALL,
)
_FILE_2013 = re.compile(r"^(?:(?P<word>flair|t1|t1c|t2)_subtrMeanDivStd|(?P<label>OTMultiClass))\.nii(?:\.gz)?$", re.IGNORECASE)


class _Release(NamedTuple):
    """How a release names its cases, what it is called, and its label map. The group `patient` leaves out the visit."""

    case: re.Pattern[str]
    dataset: str
    label_map: str


def _release(pattern: str, dataset: str, label_map: str) -> _Release:
    return _Release(re.compile(pattern, re.IGNORECASE), dataset, label_map)


_RELEASES = (
    _release(r"(?P<patient>brats_2013_pat\d+)_\d+", "brats2013", "brats2013"),
    _release(r"(?P<patient>BraTS17_.+)_\d+", "brats2017", "brats2020"),
    _release(r"(?P<patient>BraTS18_.+)_\d+", "brats2018", "brats2020"),
    _release(r"(?P<patient>BraTS19_.+)_\d+", "brats2019", "brats2020"),
    _release(r"(?P<patient>BraTS20_[A-Z]+_\d+)", "brats2020", "brats2020"),
    _release(r"(?P<patient>BraTS2021_\d+)", "brats2021", "brats2020"),
    _release(r"(?P<patient>BraTS-GLI-\d+)-1\d\d", "brats2024", "brats2024"),
    _release(r"(?P<patient>BraTS-[A-Z]+-\d+)-\d+", "brats2023", "brats2023"),
)
"""The post-treatment gliomas of 2024 count their visits from 100, the releases of 2023 from 000."""


class _Part(NamedTuple):
    """What a file's name says: its case, what it holds, and the word that said so."""

    case: str
    meaning: str
    word: str


@dataclass
class _Case:
    """The files of one scan."""

    name: str
    folder: str
    files: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    words: set[str] = field(default_factory=set)

    def add(self, entry: Entry, part: _Part) -> None:
        self.files[part.meaning].append(entry)
        self.words.add(part.word)

    def is_label_only(self) -> bool:
        return set(self.files) == {LABEL}


def matches(entries: Sequence[Entry]) -> int:
    """Count volumes whose name ends in a modality or label."""
    return sum(1 for entry in entries if _parse(entry.uri) and not noise(entry.uri))


def find(entries: Sequence[Entry], root: str) -> Inventory:
    """Group volumes into scans: those of one folder that share a case name."""
    cases: dict[tuple[str, str], _Case] = {}
    ignored: list[tuple[str, str]] = []
    for entry in entries:
        reason, part = noise(entry.uri, root), _parse(entry.uri)
        if reason:
            ignored.append((entry.uri, reason))
        elif part:
            folder = entry.uri.rpartition("/")[0]
            cases.setdefault((folder, part.case), _Case(part.case, folder)).add(entry, part)
        else:
            ignored.append(_ignored(entry))
    return settle([_scan(case) for case in _with_stray_labels_joined(list(cases.values()))], ignored)


def _parse(uri: str) -> _Part | None:
    """Read a file's name; None where it says no modality."""
    folder, _, name = uri.rpartition("/")
    old = _FILE_2013.match(name)
    if old:
        word = (old["word"] or "seg").lower()
        return _Part(name_of(folder), MEANINGS[word], word)
    found = _FILE.match(name)
    if not found:
        return None
    word = found["word"].lower()
    return _Part(found["case"], MEANINGS[word], word)


def _ignored(entry: Entry) -> tuple[str, str]:
    if re.match(r"brain_?mask\.nii", name_of(entry.uri), re.IGNORECASE) and entry.problem is None:
        return entry.uri, "a brain mask: the head is found from the modalities themselves"
    return unplaced(entry, f"expected names like {EXAMPLE}")


def _with_stray_labels_joined(cases: list[_Case]) -> list[_Case]:
    """Give a label named otherwise to the one case of its folder that has none.

    BraTS20_Training_355 holds `W39_1998.09.19_Segm.nii`; the folder leaves no doubt whose it is.
    """
    whole = [case for case in cases if not case.is_label_only()]
    stray = {case.folder: case for case in cases if case.is_label_only()}
    alone = Counter(case.folder for case in cases)
    for case in whole:
        if alone[case.folder] == 2 and case.folder in stray and LABEL not in case.files:
            case.files[LABEL] = stray.pop(case.folder).files[LABEL]
            cases = [c for c in cases if c.folder != case.folder or c is case]
    return cases


def _scan(case: _Case) -> FoundScan:
    present = tuple(modality for modality in MODALITIES if modality in case.files)
    named = next((r for r in _RELEASES if r.case.fullmatch(case.name)), None)
    scan = FoundScan(
        scan_id=case.name,
        patient_id=_patient(case.name),
        dataset=named.dataset if named else NAME,
        layout=NAME,
        reader="volumes",
        label_map=named.label_map if named else "brats2023" if case.words & _SPELT_SINCE_2023 else "brats2020",
        modalities=present,
        sources=tuple(_source(entry, meaning) for meaning in (*present, LABEL) for entry in case.files.get(meaning, ())),
        attributes=_grade(case),
    )
    scan = with_listing_problems(scan, (entry for files in case.files.values() for entry in files))
    for meaning, files in case.files.items():
        if len(files) > 1:
            names = " and ".join(name_of(f.uri) for f in files[:2])
            scan = scan.with_problem(Code.DUPLICATE_ID, f"{case.name}: {names} both claim to be {meaning}")
    if not present:
        scan = scan.with_problem(Code.MISSING_MODALITY, f"{case.name}: a label without any modality beside it")
    return scan


def _source(entry: Entry, meaning: str) -> Source:
    return Source.of(entry, "label") if meaning == LABEL else Source.of(entry, "image", modality=meaning)


def _patient(case: str) -> str:
    """Whose case it is: the name without the number of the visit, where the release is known to append one."""
    found = next(filter(None, (release.case.fullmatch(case) for release in _RELEASES)), None)
    return found["patient"] if found else case


def _grade(case: _Case) -> dict[str, str]:
    """Releases up to 2019 sort their cases into folders HGG and LGG."""
    above = case.folder.split("/")[-2:]
    grade = next((part.upper() for part in above if part.upper() in ("HGG", "LGG")), None)
    return {"grade": grade} if grade else {}
