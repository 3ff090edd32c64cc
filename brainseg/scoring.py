"""Scoring: one predicted scan against its label, region by region, in the words of the `scans` table.

Training's validation, a bulk run and a later `evaluate` all score through here, so a figure means the same everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from brainseg.aggregate import RegionSummary, aggregate
from brainseg.config import LesionPreset
from brainseg.geometry import Grid
from brainseg.metrics import score_scan
from brainseg.model import Model, Prediction
from brainseg.regions import label_map
from brainseg.scans import Scan


class Answers(Protocol):
    """Whatever says what is eaten and what is answered: a model's card, or what a run kept of it."""

    @property
    def modalities(self) -> tuple[str, ...]: ...
    @property
    def regions(self) -> tuple[str, ...]: ...
    @property
    def label_map(self) -> str: ...


def in_model_values(
    label: NDArray[np.uint8], meaning: str, card: Answers, regions: Sequence[str] | None = None
) -> NDArray[np.uint8]:
    """Rewrite a label from its dataset's values to the model's; regions (all, or the named) keep their voxels exactly."""
    if meaning == card.label_map:
        return label
    names = card.regions if regions is None else regions
    return label_map(card.label_map).paint_label(label_map(meaning).masks(label, names), names)


def score_regions(
    label: NDArray[np.uint8] | None,
    meaning: str,
    predicted: NDArray[np.uint8],
    grid: Grid,
    card: Answers,
    *,
    lesions: LesionPreset | None = "glioma",
) -> list[dict[str, Any]]:
    """Return one REGION entry per region of the model (trust figures of the network left to the caller).

    A region that the label's own map does not know, such as ET in a binary mask, is scored as `no_label`. Without a lesion
    preset the lesion-wise figures are None.
    """
    known = [] if label is None else [r for r in card.regions if r in label_map(meaning).regions]
    truth = None if label is None else in_model_values(label, meaning, card, known)
    target = label_map(card.label_map)
    scored = {e["region"]: e for e in score_scan(truth, predicted, target, known, grid, lesions=lesions)} if known else {}
    rest = [r for r in card.regions if r not in scored]
    scored |= {e["region"]: e for e in score_scan(None, predicted, target, rest, grid)} if rest else {}
    return [scored[r] for r in card.regions]


def with_trust(entries: Sequence[dict[str, Any]], prediction: Prediction) -> list[dict[str, Any]]:
    """Add what the network said of its own certainty."""
    return [{**entry, **trust} for entry, trust in zip(entries, prediction.trust, strict=True)]


def segment_and_score(
    model: Model, scans: Sequence[Scan], rows: Sequence[Mapping[str, Any]], *, lesions: LesionPreset | None = "glioma"
) -> list[dict[str, Any]]:
    """Segment labelled scans and return flat rows of the `metrics` table, without `split`.

    Scans without a label, or without a modality that the model needs, are left out.
    """
    wanted = set(model.card.modalities)
    able = [(s, r) for s, r in zip(scans, rows, strict=True) if s.label is not None and wanted <= set(s.modalities)]
    answers = model.predict([scan for scan, _ in able]) if able else []
    out: list[dict[str, Any]] = []
    for (scan, row), answer in zip(able, answers, strict=True):
        entries = score_regions(scan.label, str(row["label_map"]), answer.label, scan.grid, model.card, lesions=lesions)
        about = {name: row[name] for name in ("scan_id", "patient_id", "dataset", "fold", "attributes")}
        grid = {"shape": list(scan.grid.shape), "spacing_mm": scan.grid.spacing_mm and list(scan.grid.spacing_mm)}
        out += [{**about, **grid, **entry} for entry in with_trust(entries, answer)]
    return out


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over regions of the mean per-scan Dice, rule `exclude`; 0 where nothing could be scored."""
    means = [s.dice.mean for s in aggregate(rows).values() if s.dice.mean is not None] if rows else []
    return sum(means) / len(means) if means else 0.0


def summary_json(summary: RegionSummary) -> dict[str, Any]:
    """The figures of a region that a model's card carries, with the rule that made them."""
    return {
        "rule": f"per scan, {summary.rule}",
        "num_scans": summary.num_scored,
        "dice_mean": summary.dice.mean,
        "dice_median": summary.dice.median,
        "iou_mean": summary.iou.mean,
        "precision_mean": summary.precision.mean,
        "recall_mean": summary.recall.mean,
        "accuracy_mean": summary.accuracy.mean,
        "states": dict(summary.states),
    }
