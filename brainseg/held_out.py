"""Held out: what a finished model scores on the fold it never saw, beside the two baselines it must beat."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainseg.aggregate import aggregate
from brainseg.baselines import NearestMask, predict_nothing
from brainseg.errors import ScanError, StorageError
from brainseg.geometry import from_canonical, to_canonical
from brainseg.metrics import score_scan
from brainseg.model import ModelCard
from brainseg.prepare import select_modalities, uncrop
from brainseg.regions import label_map
from brainseg.scans import Scan, load_scan
from brainseg.scoring import in_model_values, summary_json

MOST_TRAINING_SCANS = 3000
"""The nearest-mask baseline looks no further than this many training scans."""
Row = Mapping[str, Any]


def measure(scored: Sequence[Row], train_rows: Sequence[Row], test_rows: Sequence[Row], card: ModelCard) -> dict[str, Any]:
    """Summaries of the model's own rows, of predicting nothing, and of copying the nearest training mask."""
    nothing, nearest = _baseline_rows(train_rows, test_rows, card)
    return {
        "held_out": _summaries(scored),
        "baselines": {"nothing": _summaries(nothing), "nearest_training_mask": _summaries(nearest)},
    }


def _summaries(rows: Sequence[Row]) -> dict[str, Any]:
    return {region: summary_json(s) for region, s in aggregate(rows).items()} if rows else {}


def _baseline_rows(train_rows: Sequence[Row], test_rows: Sequence[Row], card: ModelCard) -> tuple[list[Row], list[Row]]:
    memory = NearestMask(card.regions)
    meaning = label_map(card.label_map)
    for scan, label in _labelled(train_rows[:MOST_TRAINING_SCANS], card):
        memory.add(_whole_image(scan, card), meaning.masks(to_canonical(label, scan.grid), card.regions))
    nothing: list[Row] = []
    nearest: list[Row] = []
    for scan, label in _labelled(test_rows, card):
        who = {"scan_id": scan.scan_id, "patient_id": scan.scan_id}
        nothing += [{**who, **e} for e in predict_nothing(label, meaning, card.regions, scan.grid)]
        copied = from_canonical(memory.predict(_whole_image(scan, card)), scan.grid)
        painted = meaning.paint_label(copied, card.regions)
        nearest += [{**who, **e} for e in score_scan(label, painted, meaning, card.regions, scan.grid)]
    return nothing, nearest


def _labelled(rows: Sequence[Row], card: ModelCard) -> Iterator[tuple[Scan, NDArray[np.uint8]]]:
    """The scans that can be read and have a label, which comes in the model's values."""
    for row in rows:
        try:
            scan = load_scan(row)
            select_modalities(scan, card.modalities)
        except (ScanError, StorageError):
            continue
        if scan.label is not None:
            yield scan, in_model_values(scan.label, str(row["label_map"]), card)


def _whole_image(scan: Scan, card: ModelCard) -> NDArray[Any]:
    """The wanted modalities `(C, D, H, W)` of the whole grid in canonical orientation, as distance from background."""
    crop, background = select_modalities(scan, card.modalities)
    lifted = crop.astype(np.float32) - np.array(background, np.float32)[:, None, None, None]
    return to_canonical(uncrop(lifted, scan.grid, scan.box), scan.grid)
