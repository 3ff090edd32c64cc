"""Sweep: choose a model's threshold on its validation patients, and write the choice into the model.

It comes between a trained model and a run. The patients of the test part are never looked at, so a figure on them stays an
evaluation; the validation patients chose the checkpoint already, so the curve itself is none. No run uses the choice unless
its settings say `threshold: chosen`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from brainseg import manifest
from brainseg.aggregate import Rule, aggregate
from brainseg.config import SegmentConfig
from brainseg.errors import PreflightError, ScanError, StorageError
from brainseg.geometry import to_canonical
from brainseg.model import Model, ModelCard, load_model, save_card
from brainseg.prepare import canonical_box, select_modalities
from brainseg.regions import label_map
from brainseg.scans import Scan, load_scan
from brainseg.scoring import in_model_values

THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))
DEFAULT = 0.5
"""Always among the candidates, and wins a tie: a choice must earn itself."""
SCANS_TOGETHER = 4
"""Scans that share forward batches; more would only take memory."""
Row = Mapping[str, Any]
Say = Callable[[str], None]


def sweep_thresholds(
    model_uri: str,
    manifest_uri: str,
    thresholds: Sequence[float] = THRESHOLDS,
    rule: Rule = "exclude",
    settings: SegmentConfig | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Choose one threshold for all regions by mean per-scan Dice over the model's validation part; returns what is recorded.

    The record goes into the model's card as `chosen`; weights and fingerprint stay. Raises PreflightError where the manifest
    is not the one the model's split was made on, holds no labelled validation scan, or no tumour to choose by. Regions
    without a tumour have no say.
    """
    settings = (settings or SegmentConfig()).model_copy(update={"threshold": DEFAULT})
    model = load_model(model_uri, settings)
    rows = validation_rows(model.card, manifest_uri)
    candidates = sorted({*thresholds, DEFAULT})
    scored: list[list[dict[str, Any]]] = [[] for _ in candidates]
    failed: list[str] = []
    for row, scan, probability in _answered(model, rows, failed, say):
        for rows_so_far, entries in zip(scored, score_at(model, row, scan, probability, candidates), strict=True):
            rows_so_far += entries
    record = _choose(candidates, scored, rule, say) | {
        "num_scans": len(rows) - len(failed),
        "num_patients": len({row["patient_id"] or row["scan_id"] for row in rows if row["scan_id"] not in failed}),
        "num_failed": len(failed),
        "settings": {"flip": settings.flip, "precision": settings.precision},
    }
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


def _answered(model: Model, rows: Sequence[dict[str, Any]], failed: list[str], say: Say) -> Iterator[tuple[Row, Scan, Tensor]]:
    """Each readable scan with the network's probabilities on its canonical crop; ids of the others go into `failed`."""
    for start in range(0, len(rows), SCANS_TOGETHER):
        able: list[tuple[Row, Scan]] = []
        for row in rows[start : start + SCANS_TOGETHER]:
            try:
                scan = load_scan(row)
                select_modalities(scan, model.card.modalities)
            except (ScanError, StorageError) as error:
                failed.append(row["scan_id"])
                say(f"left out: {row['scan_id']}: {error}")
            else:
                able.append((row, scan))
        if able:
            answers = model.probabilities([scan for _, scan in able])
            yield from ((row, scan, answer) for (row, scan), answer in zip(able, answers, strict=True))


def score_at(
    model: Model, row: Row, scan: Scan, probability: Tensor, thresholds: Sequence[float]
) -> list[list[dict[str, Any]]]:
    """Per threshold (ascending) one entry a region that the label knows: state, tp, fp, fn and Dice on the native grid.

    `probability` is `(R, d, h, w)` on the scan's canonical crop; outside it nothing is ever predicted.
    """
    names = [r for r in model.card.regions if r in label_map(row["label_map"]).regions]
    meaning = label_map(model.card.label_map)
    truth = _truth(scan, str(row["label_map"]), model.card, names)  # (R, D, H, W)
    box, _ = canonical_box(scan.grid, scan.box)
    inside = truth[:, *(slice(a, b) for a, b in box)]
    sizes = truth.sum(axis=(1, 2, 3))
    # At or below the lowest threshold a voxel is background for all of them: the few others decide
    live = (probability > thresholds[0]).any(dim=0)
    few, known = probability[:, live], inside[:, live.cpu().numpy()]  # (R, N)
    out = []
    for threshold in thresholds:
        masks = meaning.masks(model.paint(few, threshold), names)
        overlap, predicted = (masks & known).sum(axis=1), masks.sum(axis=1)
        who = {"scan_id": row["scan_id"], "patient_id": row["patient_id"]}
        counts = zip(names, overlap.tolist(), predicted.tolist(), sizes.tolist(), strict=True)
        out.append([{**who, "region": name, **_entry(tp, p, n)} for name, tp, p, n in counts])
    return out


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


def _choose(thresholds: Sequence[float], scored: Sequence[Sequence[Row]], rule: Rule, say: Say) -> dict[str, Any]:
    """The threshold of the best mean over regions, of equals the one nearest 0.5, with the curves it was chosen by."""
    regions = list(dict.fromkeys(row["region"] for row in scored[0] if row["tp"] + row["fn"]))
    if not regions:
        raise PreflightError("the validation scans hold no tumour, so no threshold is better than another")
    means = [_region_means(rows, regions, rule) for rows in scored]
    curve = [(t, sum(m.values()) / len(regions)) for t, m in zip(thresholds, means, strict=True)]
    best = max(mean for _, mean in curve)
    chosen = min((t for t, mean in curve if mean == best), key=lambda t: (abs(t - DEFAULT), t))
    for t, mean in curve:
        say(f"threshold {t:.2f}  mean Dice {mean:.4f}{' *' if t == chosen else ''}")
    return {
        "threshold": chosen,
        "chosen_on": "validation",
        "rule": f"per scan, {rule}",
        "curve": [list(point) for point in curve],
        "at_0.5": dict(curve)[DEFAULT],
        "regions": {region: [[t, m[region]] for t, m in zip(thresholds, means, strict=True)] for region in regions},
    }


def _region_means(rows: Sequence[Row], regions: Sequence[str], rule: Rule) -> dict[str, float]:
    """Mean Dice of the named regions, in each of which some scan has a tumour, so that there is a mean under any rule."""
    summaries = aggregate(rows, rule=rule)
    return {region: summaries[region].dice.mean or 0.0 for region in regions}
