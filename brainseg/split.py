"""Split: who is trained on, who chooses the checkpoint, who is kept back. By patient, or refused."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from brainseg.audit import audit_split
from brainseg.card import Split
from brainseg.config import TrainConfig
from brainseg.errors import LeakageError, PreflightError

NUM_FOLDS = 5
"""How many folds are made up where the manifest gives none."""
BLOCK = 20
"""Where patients are unknown but folds are given, validation takes whole runs of this many neighbouring scans."""
Row = Mapping[str, Any]


def split_rows(rows: Sequence[Row], config: TrainConfig) -> tuple[Split, dict[str, list[Row]]]:
    """Divide labelled manifest rows into train, validation and test.

    The fold `folds_held_out` is the test part. Validation is `validation_share` of the remaining patients, chosen by a hash
    of the patient and the seed; where folds divide patients and that is accepted, of the remaining scans.

    Raises LeakageError where patients are shared, where neither patients nor folds are known, or where unknown patients'
    slices are dealt as if at random (unless the config accepts leakage), and PreflightError where a part would be empty.
    """
    usable = usable_rows(rows)
    folds = folds_of(usable, config)
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    by_patient = not _divided(usable, folds)
    for row, fold, group in zip(usable, folds, _groups(usable, by_patient=by_patient), strict=True):
        if fold == config.folds_held_out:
            parts["test"].append(row)
        else:
            parts["validation" if _unit(group, config.seed) < config.validation_share else "train"].append(row)
    if not parts["validation"] and config.validation_share:
        _lend(parts, "train", "validation")
    if not parts["train"]:
        _lend(parts, "validation", "train")
    for name in ("train", "test"):
        if not parts[name]:
            there = sorted(set(folds))
            raise PreflightError(f"fold {config.folds_held_out} leaves nothing for {name}; the manifest has folds {there}")
    if not config.accept_leakage:
        _refuse_leakage(parts)
    unit = "patient" if by_patient and all(r["patient_id"] for r in usable) else "scan"
    names = {part: tuple(sorted({str(r[f"{unit}_id"]) for r in members})) for part, members in parts.items()}
    return Split(unit=unit, **names), parts


def _refuse_leakage(parts: Mapping[str, Sequence[Row]]) -> None:
    shared = _shared(parts)
    if shared:
        raise LeakageError(
            f"{len(shared)} patients stand on two sides of the split, such as {shared[0]}; folds must be made by patient"
        )
    if audit_split(parts).scattered:
        raise LeakageError(
            "patients are unknown, and the folds divide neighbouring slices as often as a random split would: patients stand "
            "on both sides. Give patients in a CSV beside the images, or pass --accept-leakage"
        )


def usable_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows with a label and without a problem; PreflightError where there are none."""
    usable = [r for r in rows if r["has_label"] and not r["problem_code"]]
    if not usable:
        raise PreflightError(f"none of the manifest's {len(rows)} scans has a usable label; training needs labels")
    return usable


def folds_of(rows: Sequence[Row], config: TrainConfig) -> list[int]:
    """Every row's fold; made up by patient where missing, and by scan only where leakage is accepted in so many words."""
    unknown = [r for r in rows if r["fold"] is None and not r["patient_id"]]
    if unknown and not config.accept_leakage:
        raise LeakageError(
            f"{len(unknown)} of {len(rows)} scans have neither a patient nor a fold, such as {unknown[0]['scan_id']}: a "
            "random split may put one patient on both sides. Give patients or folds in a CSV beside the images, or pass "
            "--accept-leakage"
        )
    return [int(r["fold"]) if r["fold"] is not None else _made_up_fold(r, config.seed) for r in rows]


def _made_up_fold(row: Row, seed: int) -> int:
    return int(NUM_FOLDS * _unit(f"fold|{row['patient_id'] or row['scan_id']}", seed))


def _divided(rows: Sequence[Row], folds: Sequence[int]) -> bool:
    """Whether a known patient's scans lie in several folds: then nothing is by patient any more."""
    fold_of: dict[str, int] = {}
    owned = ((str(r["patient_id"]), fold) for r, fold in zip(rows, folds, strict=True) if r["patient_id"])
    return any(fold_of.setdefault(patient, fold) != fold for patient, fold in owned)


def _groups(rows: Sequence[Row], *, by_patient: bool) -> Iterable[str]:
    """What must stay together: the patient, or where unknown a run of neighbouring scans of one fold.

    Where folds divide patients each scan stands alone, as in the random split that such folds are.
    """
    seen: dict[int, int] = {}
    for row in rows:
        if not by_patient:
            yield str(row["scan_id"])
            continue
        if row["patient_id"]:
            yield str(row["patient_id"])
            continue
        fold = -1 if row["fold"] is None else int(row["fold"])
        seen[fold] = seen.get(fold, 0) + 1
        yield f"fold {fold} block {(seen[fold] - 1) // BLOCK}"


def _lend(parts: dict[str, list[Row]], lender: str, taker: str) -> None:
    """A small set can leave no patient for a part by chance: give it the lender's last one, unless that is its only one."""
    last = parts[lender][-1:]
    who = last[0]["patient_id"] if last else None
    lent = [r for r in parts[lender] if r["patient_id"] == who] if who else last
    if len(lent) < len(parts[lender]):
        parts[taker] = lent
        parts[lender] = [r for r in parts[lender] if r not in lent]


def _unit(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on text and seed alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}|validation|{text}".encode()).digest()[:8], "big") / 2**64


def _shared(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """Known patients of more than one part; looked at row by row, since a manifest may know some and not others."""
    train, validation, test = (
        {str(r["patient_id"]) for r in parts[p] if r["patient_id"]} for p in ("train", "validation", "test")
    )
    return sorted((train & validation) | (train & test) | (validation & test))
