"""Held out: what a finished model scores on the fold it never saw, beside the two baselines it must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import aggregate
from brainseg.baselines import NearestMask, predict_nothing
from brainseg.errors import ScanError, StorageError
from brainseg.geometry import from_canonical, to_canonical
from brainseg.metrics import score_scan
from brainseg.prepare import select_modalities, uncrop
from brainseg.regions import label_map
from brainseg.scans import Scan, load_scan
from brainseg.scoring import Answers, in_model_values, summary_json
from brainseg.tables import BASELINES, METRICS

ABOUT_A_SCAN = ("scan_id", "patient_id", "dataset", "fold", "attributes", "shape", "spacing_mm")
MEMORY_BYTES = 2 << 30
"""The nearest-mask baseline learns no more training scans by heart than fit in here."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Memory:
    """The training part learnt by heart: `num_scans` of its `num_training` scans could be read and fitted."""

    nearest: NearestMask
    num_scans: int
    num_training: int


def metrics_table(scored: Sequence[Row]) -> pa.Table:
    """The model's own rows on the held-out fold as a `metrics` table, by scan, regions in the model's order."""
    rows = [{**row, "split": "test"} for row in scored]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: str(r["scan_id"])), schema=METRICS)


def baselines_table(
    train_rows: Sequence[Row], test_rows: Sequence[Row], scored: Sequence[Row], card: Answers, before: Sequence[Row] = ()
) -> pa.Table:
    """What the held-out scans score without a network, as a `baselines` table.

    `scored` are the model's own rows: the baselines' rows carry the same words about their scans. `before` are those of the
    weights that a training began with, which are a baseline to it.
    """
    memory = remember(train_rows, card)
    about = {row["scan_id"]: {name: row[name] for name in ABOUT_A_SCAN} for row in scored}
    rows = [
        {**entry, **about.get(entry["scan_id"], {}), "baseline": name, "split": "test"}
        for row in test_rows
        for name, entries in baseline_rows(row, card, memory).items()
        for entry in entries
    ]
    rows += [{**row, "baseline": "pretrained_weights", "split": "test"} for row in before]
    return pa.Table.from_pylist(sorted(rows, key=lambda r: (r["baseline"], str(r["scan_id"]))), schema=BASELINES)


def figures(metrics: pa.Table, baselines: pa.Table) -> dict[str, Any]:
    """The card's summaries by region: of the model's own rows, and of each baseline's."""
    of_baseline = {
        name: summaries(baselines.filter(pc.equal(baselines["baseline"], name)))
        for name in baselines["baseline"].unique().to_pylist()
    }
    return {"held_out": summaries(metrics), "baselines": of_baseline}


def summaries(table: pa.Table) -> dict[str, Any]:
    """The card's figures by region of some rows of a `metrics` table."""
    return {region: summary_json(s) for region, s in aggregate(table).items()}


def remember(train_rows: Sequence[Row], card: Answers) -> Memory:
    """Read the training scans into the nearest-mask baseline, as many as `MEMORY_BYTES` hold."""
    nearest, known, meaning = NearestMask(card.regions), 0, label_map(card.label_map)
    for row in train_rows:
        if nearest.size_bytes > MEMORY_BYTES:
            break
        found = _labelled(row, card)
        if found is not None:
            scan, label = found
            nearest.add(_whole_image(scan, card), meaning.masks(to_canonical(label, scan.grid), card.regions))
            known += 1
    return Memory(nearest, known, len(train_rows))


def baseline_rows(row: Row, card: Answers, memory: Memory) -> dict[str, list[dict[str, Any]]]:
    """What a labelled scan scores without a network: by baseline, metric rows with scan_id, patient_id and REGION fields.

    Empty where the scan cannot be read or has no label; without the nearest mask where nothing is remembered.
    """
    found = _labelled(row, card)
    if found is None:
        return {}
    scan, label = found
    meaning, who = label_map(card.label_map), {"scan_id": row["scan_id"], "patient_id": row["patient_id"]}
    out = {"nothing": predict_nothing(label, meaning, card.regions, scan.grid)}
    if memory.num_scans:
        copied = from_canonical(memory.nearest.predict(_whole_image(scan, card)), scan.grid)
        painted = meaning.paint_label(copied, card.regions)
        out["nearest_training_mask"] = score_scan(label, painted, meaning, card.regions, scan.grid)
    return {name: [{**who, **entry} for entry in entries] for name, entries in out.items()}


def _labelled(row: Row, card: Answers) -> tuple[Scan, NDArray[np.uint8]] | None:
    """A scan that can be read and has a label, which comes in the model's values."""
    try:
        scan = load_scan(row)
        select_modalities(scan, card.modalities)
    except (ScanError, StorageError):
        return None
    return None if scan.label is None else (scan, in_model_values(scan.label, str(row["label_map"]), card))


def _whole_image(scan: Scan, card: Answers) -> NDArray[Any]:
    """The wanted modalities `(C, D, H, W)` of the whole grid in canonical orientation, as distance from background."""
    crop, background = select_modalities(scan, card.modalities)
    lifted = crop.astype(np.float32) - np.array(background, np.float32)[:, None, None, None]
    return to_canonical(uncrop(lifted, scan.grid, scan.box), scan.grid)
