"""Scoring: one predicted scan against its label, region by region, in the words of the `scans` table.

Training's validation, a bulk run and a later `evaluate` all score through here, so a figure means the same everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.aggregate import RegionSummary, aggregate
from brainseg.geometry import Grid
from brainseg.metrics import score_scan
from brainseg.model import Model, ModelCard, Prediction
from brainseg.regions import label_map
from brainseg.scans import Scan


def in_model_values(label: NDArray[np.uint8], meaning: str, card: ModelCard) -> NDArray[np.uint8]:
    """Rewrite a label from its dataset's values to the model's; regions keep their voxels exactly."""
    if meaning == card.label_map:
        return label
    masks = label_map(meaning).masks(label, card.regions)
    return label_map(card.label_map).paint_label(masks, card.regions)


def score_regions(label: NDArray[np.uint8] | None, meaning: str, predicted: NDArray[np.uint8], grid: Grid, card: ModelCard) -> list[dict[str, Any]]:
    """Return one REGION entry per region of the model (trust figures of the network left to the caller)."""
    truth = None if label is None else in_model_values(label, meaning, card)
    return score_scan(truth, predicted, label_map(card.label_map), card.regions, grid)


def with_trust(entries: Sequence[dict[str, Any]], prediction: Prediction) -> list[dict[str, Any]]:
    """Add what the network said of its own certainty."""
    return [{**entry, **trust} for entry, trust in zip(entries, prediction.trust, strict=True)]


def segment_and_score(model: Model, scans: Sequence[Scan], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Segment labelled scans and return flat metric rows: scan_id, patient_id and the REGION fields."""
    out: list[dict[str, Any]] = []
    for scan, row, prediction in zip(scans, rows, model.predict(scans), strict=True):
        if scan.label is None:
            continue
        entries = score_regions(scan.label, str(row["label_map"]), prediction.label, scan.grid, model.card)
        out += [{"scan_id": scan.scan_id, "patient_id": row["patient_id"], **e} for e in entries]
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
