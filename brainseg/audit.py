"""Audit: what stands on both sides of a split: patients, identical contents, neighbouring slices.

Sides are the folds when an archive is indexed, and training, validation and test when a model is trained. Nothing is read
here: contents are compared by the hashes that the manifest holds. Time is linear in the number of scans.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.layouts import SLICE_READERS
from brainseg.tables import flat_sources

Row = Mapping[str, Any]
Verdict = Literal["clean", "leaks", "unknown"]

EXAMPLES = 3
FEWEST_PAIRS = 20
"""With fewer pairs of neighbouring slices than this, nothing is read from how often they are divided."""
SCATTERED = 0.5
"""Neighbours divided more often than this share of what chance would do look like a random split. Folds made by patient
divide neighbours only where a patient ends: 13 % of pairs in the folds of Cheng et al., where chance divides 75 %."""

_NUMBERED = re.compile(r"(.*?)(\d{1,9})", re.DOTALL)


@dataclass(frozen=True)
class Audit:
    """What the audit of one split found. Counts are of scans, patients, distinct contents and pairs of slices.

    `identical` contents are image files equal in every byte that stand at two or more places, `identical_across` those on
    more than one side, `identical_patients` those under more than one patient; all 0 unless `contents_compared`. Two
    scans are neighbours where each is one image, of one patient as far as known, with consecutive numbers. `scattered`:
    patients are unknown and neighbours are divided about as often as chance would.
    """

    verdict: Verdict
    reason: str
    sides: tuple[str, ...]
    scans: int
    scans_without_side: int
    scans_without_patient: int
    patients: int
    shared_patients: int
    contents_compared: bool
    identical: int
    identical_across: int
    identical_patients: int
    neighbours: int
    neighbours_across: int
    scattered: bool
    shared_patient_examples: tuple[str, ...] = ()
    identical_examples: tuple[str, ...] = ()
    neighbour_examples: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was found, for people: the verdict, then a line a question."""
        verdict = self.verdict + (f": {self.reason}" if self.reason else "")
        return [f"leakage audit: {verdict}", *(f"  {line}" for line in self._answers())]

    def _answers(self) -> Iterator[str]:
        unknown = f"; unknown for {self.scans_without_patient:,} of {self.scans:,} scans" if self.scans_without_patient else ""
        yield f"patients on more than one side: {self.shared_patients:,} of {self.patients:,}{unknown}" + _such_as(
            self.shared_patient_examples
        )
        if self.contents_compared:
            found = f"{self.identical_across:,}; twice or more in all: {self.identical:,}"
            owners = f", of which under more than one patient: {self.identical_patients:,}" if self.patients else ""
            yield f"identical contents on more than one side: {found}{owners}{_such_as(self.identical_examples)}"
        else:
            yield "identical contents: not compared"
        if self.neighbours:
            found = f"{self.neighbours_across:,} of {self.neighbours:,} pairs"
            yield f"neighbouring slices on different sides: {found}{_such_as(self.neighbour_examples)}"
        else:
            yield "neighbouring slices: no scan is a slice that has a neighbour"

    def to_json(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Audit":
        """Build from what `to_json` gave; keys of later versions are left out. Raises ValueError for anything else."""
        known = {f.name for f in fields(cls)}
        if not isinstance(body, Mapping) or body.get("verdict") not in get_args(Verdict):
            raise ValueError("not a leakage audit: it has no verdict")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items() if k in known}
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a leakage audit: {error}") from error


def _such_as(examples: Sequence[str]) -> str:
    return f" (such as {', '.join(examples)})" if examples else ""


@dataclass(frozen=True)
class _Scans:
    """What is compared, scan by scan; `contents` are (scan's place, file's hash)."""

    ids: Sequence[str]
    patients: Sequence[str | None]
    sides: Sequence[str | None]
    datasets: Sequence[str]
    is_single: Sequence[bool]
    contents: Iterable[tuple[int, str]]


def audit_split(parts: Mapping[str, Sequence[Row]], *, recorded: Audit | None = None) -> Audit:
    """Audit manifest rows divided into named parts, such as train, validation and test.

    `recorded` is the audit that stands in the manifest: it knows whether contents were compared at all. Without it they
    count as compared where any row holds a hash.
    """
    rows = [row for members in parts.values() for row in members]
    contents = [(n, s["sha256"]) for n, row in enumerate(rows) for s in row["sources"] if s.get("sha256")]
    scans = _Scans(
        ids=[row["scan_id"] for row in rows],
        patients=[row["patient_id"] for row in rows],
        sides=[part for part, members in parts.items() for _ in members],
        datasets=[row["dataset"] for row in rows],
        is_single=[_is_single(row) for row in rows],
        contents=contents,
    )
    return _audit(scans, contents_compared=bool(contents) or (recorded is not None and recorded.contents_compared))


def audit_folds(table: pa.Table, *, contents_compared: bool) -> Audit:
    """Audit the usable scans of a manifest, its folds being the sides."""
    usable = table.filter(table["problem_code"].is_null())
    return _audit(_of_table(usable), contents_compared=contents_compared)


def _is_single(row: Row) -> bool:
    images = [source for source in row["sources"] if source["role"] != "label"]
    return len(images) == 1 and row["reader"] in SLICE_READERS


def _of_table(table: pa.Table) -> _Scans:
    owners, files = flat_sources(table["sources"])
    images = owners.filter(pc.not_equal(files.field("role"), "label"))
    counts = dict(zip(*(column.to_pylist() for column in images.value_counts().flatten()), strict=True))
    hashes = files.field("sha256")
    hashed = hashes.is_valid()
    return _Scans(
        ids=table["scan_id"].to_pylist(),
        patients=table["patient_id"].to_pylist(),
        sides=[None if fold is None else f"fold {fold}" for fold in table["fold"].to_pylist()],
        datasets=table["dataset"].to_pylist(),
        is_single=[r in SLICE_READERS and counts.get(n) == 1 for n, r in enumerate(table["reader"].to_pylist())],
        contents=zip(owners.filter(hashed).to_pylist(), hashes.filter(hashed).to_pylist(), strict=True),
    )


# ---- the three questions ---------------------------------------------------------------------------------------------


def _audit(scans: _Scans, *, contents_compared: bool) -> Audit:
    shared = _shared_patients(scans)
    identical = _identical(scans)
    across = [places for places in identical if _sides(scans, places) > 1]
    pairs = list(_neighbours(scans))
    divided = [(a, b) for a, b in pairs if scans.sides[a] != scans.sides[b]]
    scattered = _is_scattered(scans, pairs)
    unsided = sum(side is None for side in scans.sides)
    ownerless = sum(patient is None for patient in scans.patients)
    sides = sorted({side for side in scans.sides if side is not None})
    verdict, reason = _verdict(len(shared), len(across), scattered, len(sides), unsided, ownerless, contents_compared)
    return Audit(
        verdict=verdict,
        reason=reason,
        sides=tuple(sides),
        scans=len(scans.ids),
        scans_without_side=unsided,
        scans_without_patient=ownerless,
        patients=len(set(scans.patients) - {None}),
        shared_patients=len(shared),
        contents_compared=contents_compared,
        identical=len(identical),
        identical_across=len(across),
        identical_patients=sum(len({scans.patients[n] for n in places} - {None}) > 1 for places in identical),
        neighbours=len(pairs),
        neighbours_across=len(divided),
        scattered=scattered,
        shared_patient_examples=tuple(sorted(shared)[:EXAMPLES]),
        identical_examples=tuple(_named(scans, places) for places in (across or identical)[:EXAMPLES]),
        neighbour_examples=tuple(_named(scans, pair) for pair in divided[:EXAMPLES]),
    )


def _verdict(
    shared: int, across: int, scattered: bool, sides: int, unsided: int, ownerless: int, compared: bool
) -> tuple[Verdict, str]:
    """What is proven outweighs what is not known."""
    leaks = [
        (shared, f"{shared:,} patients stand on more than one side"),
        (across, f"{across:,} identical contents stand on more than one side"),
        (scattered, "patients are unknown and neighbouring slices are divided as if at random"),
    ]
    gaps = [
        (ownerless, f"nobody says whose {ownerless:,} of the scans are"),
        (unsided, f"{unsided:,} scans are on no side"),
        (not unsided and sides < 2, "there is only one side"),
        (not compared, "contents were not compared"),
    ]
    for name, found in (("leaks", leaks), ("unknown", gaps)):
        said = "; ".join(line for holds, line in found if holds)
        if said:
            return name, said  # type: ignore[return-value]
    return "clean", ""


def _shared_patients(scans: _Scans) -> set[str]:
    side_of: dict[str, str] = {}
    pairs = zip(scans.patients, scans.sides, strict=True)
    return {p for p, side in pairs if p is not None and side is not None and side_of.setdefault(p, side) != side}


def _identical(scans: _Scans) -> list[list[int]]:
    """Return the places of every content that is there twice or more, in the order of the first."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, content in scans.contents:
        places[content].append(place)
    return [found for found in places.values() if len(found) > 1]


def _sides(scans: _Scans, places: Iterable[int]) -> int:
    return len({scans.sides[n] for n in places} - {None})


def _neighbours(scans: _Scans) -> Iterator[tuple[int, int]]:
    """Yield the places of two images with consecutive numbers of one series, both on some side."""
    series: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for place, (name, single) in enumerate(zip(scans.ids, scans.is_single, strict=True)):
        numbered = _NUMBERED.fullmatch(name) if single and scans.sides[place] is not None else None
        if numbered:
            series[scans.datasets[place], scans.patients[place], numbered[1]].append((int(numbered[2]), place))
    for members in series.values():
        for (low, a), (high, b) in pairwise(sorted(members)):
            if high - low == 1:
                yield a, b


def _is_scattered(scans: _Scans, pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether neighbours of unknown patients are divided about as often as by a random split into the same sides."""
    ownerless = [(a, b) for a, b in pairs if scans.patients[a] is None]
    if len(ownerless) < FEWEST_PAIRS:
        return False
    sizes: dict[str | None, int] = defaultdict(int)
    for a, b in ownerless:
        sizes[scans.sides[a]] += 1
        sizes[scans.sides[b]] += 1
    by_chance = 1 - sum(size**2 for size in sizes.values()) / (2 * len(ownerless)) ** 2
    divided = sum(scans.sides[a] != scans.sides[b] for a, b in ownerless) / len(ownerless)
    return divided > SCATTERED * by_chance


def _named(scans: _Scans, places: Iterable[int]) -> str:
    return " and ".join(list(dict.fromkeys(scans.ids[n] for n in places))[:EXAMPLES])
