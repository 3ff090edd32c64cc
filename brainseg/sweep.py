"""Sweep: choose on a model's validation patients what is done with its probabilities, and write the choice into the model.

It comes between a trained model and a run: threshold and smallest component are chosen together, by mean per-scan Dice. The
patients of the test part are never looked at, so a figure on them stays an evaluation; the validation patients chose the
checkpoint already, so the figures here are none. No run uses the choice unless its settings say `chosen`.

Validation patients are few and candidates many, so the best of them is mostly luck. A candidate must therefore beat the
default by more than one standard error of the paired difference over patients (after the one-standard-error rule of Breiman
et al., Classification and Regression Trees, 1984), and where it changes both threshold and component rule, also each of the
two alone, so that what one patient gains by the one does not ride on what all gain a little by the other. The error is the
jackknife's, every patient left out once: with one scan a patient that is the usual s / sqrt(n), under which a gain that is
one patient's alone never suffices, however large. It also holds for several scans a patient, several regions, and scans
without a value. One patient chooses nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brainseg import manifest
from brainseg.aggregate import Rule
from brainseg.card import ModelCard, save_card
from brainseg.config import SegmentConfig
from brainseg.errors import PreflightError, ScanError, StorageError
from brainseg.geometry import to_canonical
from brainseg.model import Segmenter, load_model
from brainseg.postprocess import Smallest
from brainseg.prepare import canonical_box, select_modalities
from brainseg.regions import label_map
from brainseg.scans import Scan, load_scan
from brainseg.scoring import in_model_values

THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))
SMALLEST: tuple[Smallest, ...] = (0, 50, 200, 1000, "largest")
DEFAULT: tuple[float, Smallest] = (0.5, 0)
"""Always among the candidates, and wins a tie: a choice must earn itself."""
SCANS_TOGETHER = 4
"""Scans that share forward batches; more would only take memory."""
ROUNDING = 1e-9
"""A difference is more than an error only beyond what floats leave of sums."""
Row = Mapping[str, Any]
Floats = NDArray[np.float64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidates:
    """What is tried: every threshold, ascending, with every component rule. The default is always among them."""

    thresholds: tuple[float, ...]
    smallest: tuple[Smallest, ...]

    @classmethod
    def of(cls, thresholds: Iterable[float] = THRESHOLDS, smallest: Iterable[Smallest] = SMALLEST) -> "Candidates":
        rules = {*smallest, DEFAULT[1]}
        ordered = sorted(rules, key=lambda rule: math.inf if rule == "largest" else rule)
        return cls(tuple(sorted({*thresholds, DEFAULT[0]})), tuple(ordered))

    def __iter__(self) -> Iterator[tuple[float, Smallest]]:
        return ((threshold, smallest) for threshold in self.thresholds for smallest in self.smallest)


def sweep_model(
    model_uri: str,
    manifest_uri: str,
    candidates: Candidates | None = None,
    rule: Rule = "exclude",
    settings: SegmentConfig | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Choose threshold and smallest component, for all regions alike, over the model's validation part; returns the record.

    The record goes into the model's card as `chosen`; weights and fingerprint stay. Of `settings` flip and precision count.
    Raises PreflightError where the manifest is not the one the model's split was made on, holds no labelled validation scan,
    or no tumour to choose by. Regions without a tumour have no say.
    """
    threshold, smallest = DEFAULT
    settings = (settings or SegmentConfig()).model_copy(update={"threshold": threshold, "smallest_component": smallest})
    model, candidates = load_model(model_uri, settings), candidates or Candidates.of()
    rows = validation_rows(model.card, manifest_uri)
    tried: list[dict[str, Any]] = []
    failed: list[str] = []
    for group in _readable(rows, model.card, failed, say):
        tried += try_candidates(model, group, candidates)
    record = choose(tried, settings, rule) | {"num_failed": len(failed)}
    for line in describe(record):
        say(line)
    save_card(model_uri, model.card.model_copy(update={"chosen": record}))
    return record


def validation_rows(card: ModelCard, manifest_uri: str) -> list[dict[str, Any]]:
    """The labelled rows of the manifest that stand in the validation part of the model's recorded split."""
    table = manifest.read_manifest(manifest_uri)
    if manifest.fingerprint(table) != card.manifest_fingerprint:
        raise PreflightError(
            f"{manifest_uri} is not the manifest that model '{card.name}' was trained on, so its validation patients cannot "
            "be told from others; give that one"
        )
    rows = [
        row
        for row in table.to_pylist()
        if row["has_label"]
        and not row["problem_code"]
        and card.split.part_of(row["patient_id"], row["scan_id"]) == "validation"
    ]
    if not rows:
        why = "the model kept none" if not card.split.validation else f"none of {table.num_rows} scans stands in it"
        raise PreflightError(f"no validation scan to choose a threshold on: {why}; test scans must not choose it")
    return rows


def _readable(rows: Sequence[dict[str, Any]], card: ModelCard, failed: list[str], say: Say) -> Iterator[list[tuple[Scan, Row]]]:
    """The readable scans, a few at a time; ids of the others go into `failed`."""
    for start in range(0, len(rows), SCANS_TOGETHER):
        able: list[tuple[Scan, Row]] = []
        for row in rows[start : start + SCANS_TOGETHER]:
            try:
                scan = load_scan(row)
                select_modalities(scan, card.modalities)
            except (ScanError, StorageError) as error:
                failed.append(row["scan_id"])
                say(f"left out: {row['scan_id']}: {error}")
            else:
                able.append((scan, row))
        if able:
            yield able


# --- trying -----------------------------------------------------------------------------------------------------------


def try_candidates(model: Segmenter, group: Sequence[tuple[Scan, Row]], candidates: Candidates) -> list[dict[str, Any]]:
    """What each candidate makes of each labelled scan: one entry a scan, candidate and region that the label knows."""
    labelled = [(scan, row) for scan, row in group if scan.label is not None]
    answers = model.probabilities([scan for scan, _ in labelled]) if labelled else ()
    return [
        entry
        for (scan, row), answer in zip(labelled, answers, strict=True)
        for entry in _tried(model, scan, row, answer, candidates)
    ]


def _tried(model: Segmenter, scan: Scan, row: Row, probability: Tensor, candidates: Candidates) -> Iterator[dict[str, Any]]:
    """Threshold, component rule, region, state, tp, fp, fn and Dice on the native grid.

    `probability` is `(R, d, h, w)` on the scan's canonical crop; outside it nothing is ever predicted.
    """
    names = [r for r in model.card.regions if r in label_map(row["label_map"]).regions]
    meaning = label_map(model.card.label_map)
    truth = _truth(scan, str(row["label_map"]), model.card, names)  # (R, D, H, W)
    box, _ = canonical_box(scan.grid, scan.box)
    # At or below the lowest threshold a voxel is background for all of them: the few others decide
    live = (probability > candidates.thresholds[0]).any(dim=0)
    few, places = probability[:, live], live.cpu().numpy()
    known, sizes = truth[:, *(slice(a, b) for a, b in box)][:, places], truth.sum(axis=(1, 2, 3))  # (R, N), (R,)
    painted = np.zeros(places.shape, np.uint8)  # (d, h, w)
    for threshold in candidates.thresholds:
        painted[places] = model.paint(few, threshold)
        for smallest in candidates.smallest:
            masks = meaning.masks(model.drop_components(painted, smallest)[places], names)
            overlap, predicted = (masks & known).sum(axis=1), masks.sum(axis=1)
            which = {"threshold": threshold, "smallest_component": smallest}
            who = {"scan_id": row["scan_id"], "patient_id": row["patient_id"]}
            for name, tp, p, n in zip(names, overlap.tolist(), predicted.tolist(), sizes.tolist(), strict=True):
                yield {**who, **which, "region": name, **_entry(tp, p, n)}


def _truth(scan: Scan, meaning: str, card: ModelCard, names: Sequence[str]) -> NDArray[np.bool_]:
    """Label masks `(R, D, H, W)` of the named regions in canonical orientation."""
    assert scan.label is not None
    label = in_model_values(scan.label, meaning, card, names)
    return label_map(card.label_map).masks(to_canonical(label, scan.grid), names)


def _entry(tp: int, predicted: int, labelled: int) -> dict[str, Any]:
    if not predicted and not labelled:
        return {"state": "both_empty", "tp": 0, "fp": 0, "fn": 0, "dice": None}
    state = "missed" if not predicted else "spurious" if not labelled else "both"
    return {
        "state": state,
        "tp": tp,
        "fp": predicted - tp,
        "fn": labelled - tp,
        "dice": 2 * tp / (predicted + labelled),
    }


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(tried: Sequence[Row], settings: SegmentConfig, rule: Rule = "exclude") -> dict[str, Any]:
    """The candidate of the best mean over regions among those that beat the default, see above.

    Of equals the one nearest the default. The order of the entries does not matter. PreflightError where no label holds a
    tumour.
    """
    regions = sorted({row["region"] for row in tried if row["tp"] + row["fn"]})
    if not regions:
        raise PreflightError("the validation scans hold no tumour, so no threshold is better than another")
    candidates = Candidates.of({r["threshold"] for r in tried}, {r["smallest_component"] for r in tried})
    keys = list(candidates)
    sums, counts = _totals(tried, keys, regions, rule)
    means = _over_regions(sums.sum(axis=1), counts.sum(axis=1))
    without = _leaving_one_out(sums, counts)
    able = [k for k in range(len(keys)) if all(_beats(k, keys.index(other), means, without) for other in _rivals(keys[k]))]
    best = max(range(len(keys)), key=lambda k: (means[k], _nearness(keys[k], candidates)))
    chosen = max(able, key=lambda k: (means[k], _nearness(keys[k], candidates)))
    means_of = dict(zip(keys, means.tolist(), strict=True))
    return {
        **_named(keys[chosen]),
        "chosen_on": "validation",
        "rule": f"per scan, {rule}",
        "mean": means_of[keys[chosen]],
        "default_mean": means_of[DEFAULT],
        "standard_error": _error(without[chosen] - without[keys.index(DEFAULT)]),
        "best": {**_named(keys[best]), "mean": means_of[keys[best]]},
        "table": [
            {"smallest_component": s, "curve": [[t, means_of[t, s]] for t in candidates.thresholds]}
            for s in candidates.smallest
        ],
        "regions": regions,
        "patients": sorted({_whose(row) for row in tried}),
        "num_scans": len({row["scan_id"] for row in tried}),
        "num_patients": sums.shape[1],
        "num_failed": 0,
        "settings": {"flip": settings.flip, "precision": settings.precision},
    }


def unchosen(settings: SegmentConfig, why: str) -> dict[str, Any]:
    """The record where nothing could be chosen: the default, and why."""
    return {
        **_named(DEFAULT),
        "chosen_on": None,
        "why": why,
        "settings": {"flip": settings.flip, "precision": settings.precision},
    }


def _named(key: tuple[float, Smallest]) -> dict[str, Any]:
    return {"threshold": key[0], "smallest_component": key[1]}


def _nearness(key: tuple[float, Smallest], candidates: Candidates) -> tuple[float, float, float]:
    """Larger for what changes less: the component rule counts first."""
    return -candidates.smallest.index(key[1]), -round(abs(key[0] - DEFAULT[0]), 9), -key[0]


def _whose(row: Row) -> str:
    return str(row["patient_id"] or row["scan_id"])


def _totals(
    tried: Sequence[Row], keys: Sequence[tuple[float, Smallest]], regions: Sequence[str], rule: Rule
) -> tuple[Floats, Floats]:
    """Sum and number of the Dice values by candidate, patient and region: two `(K, P, R)`."""
    patients = {name: p for p, name in enumerate(sorted({_whose(row) for row in tried}))}
    place, column = {key: k for k, key in enumerate(keys)}, {name: r for r, name in enumerate(regions)}
    sums = np.zeros((len(keys), len(patients), len(regions)))
    counts = np.zeros_like(sums)
    for row in sorted(tried, key=lambda r: str(r["scan_id"])):
        value = 1.0 if rule == "brats" and row["state"] == "both_empty" else row["dice"]
        if value is not None and row["region"] in column:
            at = place[row["threshold"], row["smallest_component"]], patients[_whose(row)], column[row["region"]]
            sums[at] += value
            counts[at] += 1
    return sums, counts


def _over_regions(sums: Floats, counts: Floats) -> Floats:
    """Mean over the regions that have a value of each one's mean over scans: `(..., R)` -> `(...)`."""
    known = counts > 0
    means: Floats = np.where(known, sums / np.maximum(counts, 1), 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1)
    return means


def _rivals(key: tuple[float, Smallest]) -> set[tuple[float, Smallest]]:
    """What a candidate has to beat: the default, and itself with either of its two settings at the default."""
    return {DEFAULT, (key[0], DEFAULT[1]), (DEFAULT[0], key[1])} - {key}


def _leaving_one_out(sums: Floats, counts: Floats) -> Floats:
    """Each candidate's mean over regions without each patient in turn: `(K, P)`."""
    return _over_regions(sums.sum(axis=1, keepdims=True) - sums, counts.sum(axis=1, keepdims=True) - counts)


def _beats(one: int, other: int, means: Floats, without: Floats) -> bool:
    """Whether a candidate's mean is above another's by more than a standard error of the difference."""
    error = _error(without[one] - without[other])
    return error is not None and bool(means[one] - means[other] > error * (1 + ROUNDING) + ROUNDING)


def _error(differences: Floats) -> float | None:
    """The jackknife's standard error of a difference `(P,)` from which each patient was left out; None for fewer than two."""
    num = differences.size
    return float(np.sqrt(((differences - differences.mean()) ** 2).sum() * (num - 1) / num)) if num > 1 else None


def describe(record: Row) -> Iterator[str]:
    """The table that was chosen from, a line a threshold, and what was chosen."""
    rules = [row["smallest_component"] for row in record["table"]]
    yield "mean Dice by threshold and smallest component (voxels):"
    yield "        " + "  ".join(f"{rule!s:>8}" for rule in rules)
    for points in zip(*(row["curve"] for row in record["table"]), strict=True):
        marks = ("*" if _named((points[0][0], rule)).items() <= record.items() else " " for rule in rules)
        yield f"  {points[0][0]:.2f}  " + "  ".join(f"{mean:7.4f}{mark}" for (_, mean), mark in zip(points, marks, strict=True))
    if record["best"]["mean"] > record["mean"]:
        best = record["best"]
        yield (
            f"best of all, but not by more than its standard error: threshold {best['threshold']:g}, smallest component "
            f"{best['smallest_component']}, {best['mean']:.4f}"
        )
