"""Cross-validation: train on every fold in turn, so that each labelled scan is judged once, by a model that never saw it.

    OUT/fold-K/                   the model that kept fold K back (`train.py`)
    OUT/out_of_fold.parquet       the held-out rows of all finished folds: every labelled scan once
    OUT/out_of_fold_chosen.parquet    the same, answered as each fold's validation patients chose, where the recipe has that
    OUT/baselines.parquet         what the same scans score without a network
    OUT/cross_validation.json     figures over all of them, fold by fold, denominators, who is missing and why

Finished folds are never trained again: the same command goes on with the others. Several jobs may share an OUT, each with
its own `--folds`; the last one to finish sums up them all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainseg import manifest, storage
from brainseg.aggregate import RegionSummary, Rule, aggregate, bootstrap_interval, in_words
from brainseg.card import CARD, ModelCard, load_card
from brainseg.config import TrainConfig
from brainseg.course import BASELINES_FILE, FAILED_FILE, HELD_OUT_CHOSEN_FILE, HELD_OUT_FILE
from brainseg.ensemble import SUMMARY, fold_model
from brainseg.errors import BrainsegError, PreflightError
from brainseg.scoring import summary_json
from brainseg.split import folds_of, usable_rows
from brainseg.train import CLAIM_FILE, NOBODY, claimed_before, draft, finished_before, train_model
from brainseg.watch import Watcher

OUT_OF_FOLD, OUT_OF_FOLD_CHOSEN = "out_of_fold.parquet", "out_of_fold_chosen.parquet"
SMALL_TUMOUR_VOXELS = 6000
"""A label below this is a small tumour: a line of its own, since a few voxels decide its Dice."""
NEARLY_ALL = 0.9
"""A group of so many is no group: single images hardly ever show more of a tumour than that."""
MOST_NAMED = 10
"""Missing scans that the words name; the JSON names them all."""
RULES: tuple[Rule, ...] = ("exclude", "brats")
Row = Mapping[str, Any]
Say = Callable[[str], None]


def cross_validate(
    manifest_uri: str,
    out: str,
    config: TrainConfig,
    *,
    folds: Sequence[int] | None = None,
    workers: int | str | None = None,
    say: Say = lambda _: None,
    watcher: Watcher = NOBODY,
    small_tumour_voxels: int = SMALL_TUMOUR_VOXELS,
) -> dict[str, Any]:
    """Train the named folds (all, by default) and sum up every fold that is finished; returns OUT/cross_validation.json.

    Raises UsageError, before anything is written, where manifest, config or folds cannot serve or `out` holds another
    recipe's or manifest's folds. Where a fold fails its error is raised and the finished ones stay.
    """
    table = manifest.read_manifest(manifest_uri)
    place_of = _folds(table, config)
    there = sorted(set(place_of.values()))
    wanted = sorted(set(folds)) if folds else there
    unknown = [fold for fold in wanted if fold not in there]
    if unknown:
        raise PreflightError(f"the manifest has no fold {unknown[0]}; it has {there}")
    drafted = cache(lambda fold: draft(table, _of_fold(config, fold))[0])
    for fold in wanted:
        drafted(fold)
    finished = _finished(out, there, drafted)
    for number, fold in enumerate(wanted, start=1):
        say(f"fold {fold} ({number} of {len(wanted)})")
        try:
            train_model(manifest_uri, fold_model(out, fold), _of_fold(config, fold), workers=workers, say=say, watcher=watcher)
        except BrainsegError:
            say(f"fold {fold} did not finish; {len(finished)} of {len(there)} are kept, and the same command goes on from here")
            raise
        finished.add(fold)
    finished = _finished(out, there, drafted)  # others' too, done meanwhile
    cards = {fold: load_card(fold_model(out, fold)) for fold in sorted(finished)}
    return _sum_up(table, out, cards, place_of, small_tumour_voxels)


def _folds(table: pa.Table, config: TrainConfig) -> dict[str, int]:
    """scan_id -> fold of every scan that can be trained on."""
    rows = usable_rows(table.select(["scan_id", "patient_id", "fold", "has_label", "problem_code"]).to_pylist())
    return {row["scan_id"]: fold for row, fold in zip(rows, folds_of(rows, config), strict=True)}


def _of_fold(config: TrainConfig, fold: int) -> TrainConfig:
    return config.model_copy(update={"folds_held_out": fold})


def _finished(out: str, folds: Sequence[int], drafted: Callable[[int], ModelCard]) -> set[int]:
    """The folds whose very models are in OUT; UsageError where another recipe's is, finished or not.

    A fold of which nothing is there need not be one that could be trained: what it would begin with may be missing.
    """
    found: set[int] = set()
    for fold in folds:
        model = fold_model(out, fold)
        if storage.exists(storage.join(f"{model}.work", CLAIM_FILE)):
            claimed_before(f"{model}.work", drafted(fold))
        if storage.exists(storage.join(model, CARD)) and finished_before(model, drafted(fold)):
            found.add(fold)
    return found


# --- summing up -----------------------------------------------------------------------------------------------------


def _sum_up(
    table: pa.Table, out: str, cards: Mapping[int, ModelCard], place_of: Mapping[str, int], small_tumour_voxels: int
) -> dict[str, Any]:
    """Gather the finished folds into the files of OUT; returns the JSON one."""
    rows = _gathered(out, list(cards), HELD_OUT_FILE)
    baselines = _gathered(out, list(cards), BASELINES_FILE)
    _check_once(rows)
    scans = _denominators(table, rows, cards, place_of)
    body = _body(table, cards, rows, baselines) | {"scans": scans, "missing": _missing(table, out, rows, cards, place_of)}
    body["subgroups"] = _subgroups(rows, cards, small_tumour_voxels)
    if all("held_out_chosen" in card.metrics for card in cards.values()):
        chosen = _gathered(out, list(cards), HELD_OUT_CHOSEN_FILE)
        _check_once(chosen)
        body |= _as_chosen(chosen, cards, small_tumour_voxels)
        storage.write_table(storage.join(out, OUT_OF_FOLD_CHOSEN), chosen, row_group_rows=65536)
    storage.write_table(storage.join(out, OUT_OF_FOLD), rows, row_group_rows=65536)
    storage.write_table(storage.join(out, BASELINES_FILE), baselines, row_group_rows=65536)
    storage.write_json(storage.join(out, SUMMARY), body)
    return body


def _as_chosen(rows: pa.Table, cards: Mapping[int, ModelCard], small_tumour_voxels: int) -> dict[str, Any]:
    """The figures of the answers as each fold's validation patients chose them, and what they chose."""
    kept = ("threshold", "smallest_component", "chosen_on", "settings")
    return {
        "regions_chosen": _figures(rows, _num_failed(cards)),
        "subgroups_chosen": _subgroups(rows, cards, small_tumour_voxels),
        "chosen": {str(fold): {name: card.chosen[name] for name in kept} for fold, card in cards.items()},
    }


def _subgroups(rows: pa.Table, cards: Mapping[int, ModelCard], small_tumour_voxels: int) -> list[dict[str, Any]]:
    """Scans that a mean over all hides: figures of those with a small tumour, and of those with a substituted modality.

    A modality that equals another one in every voxel stands in for one that was never taken. Folds that were trained before
    that was recorded have no such group. Where nearly all tumours are small, as in single images, they are no group either.
    """
    tumours = rows.filter(pc.fill_null(pc.greater(rows["label_voxels"], 0), False))
    small = tumours.filter(pc.less(tumours["label_voxels"], small_tumour_voxels))
    figures = _figures(small) if small.num_rows < NEARLY_ALL * tumours.num_rows else {}
    out = [{"name": "small_tumours", "what": f"label under {small_tumour_voxels} voxels", "regions": figures}]
    recorded = [card.metrics.get("held_out_duplicated") for card in cards.values()]
    if None not in recorded:
        scans = {scan: equal for one in recorded for scan, equal in (one or {}).items()}
        some = rows.filter(pc.is_in(rows["scan_id"], value_set=pa.array(list(scans), pa.string())))
        what = "one modality equal to another in every voxel"
        out.append({"name": "substituted_modality", "what": what, "regions": _figures(some), "scans": scans})
    return out


def _gathered(out: str, folds: Sequence[int], name: str) -> pa.Table:
    """The tables of all folds as one, by scan; a scan's regions stay in the model's order."""
    return pa.concat_tables([storage.read_table(storage.join(fold_model(out, fold), name)) for fold in folds]).sort_by(
        "scan_id"
    )


def _check_once(rows: pa.Table) -> None:
    """Every scan and region once; anything else means that two folds kept one scan back."""
    seen = rows.group_by(["scan_id", "region"]).aggregate([([], "count_all")])
    twice = seen.filter(pc.greater(seen["count_all"], 1))["scan_id"].to_pylist()
    if twice:
        raise BrainsegError(f"{twice[0]} was held out by more than one fold; the folds do not belong together")


def _missing(
    table: pa.Table, out: str, rows: pa.Table, cards: Mapping[int, ModelCard], place_of: Mapping[str, int]
) -> list[dict[str, str]]:
    """Every scan with a label that has no out-of-fold row, each with the reason."""
    scored = set(rows["scan_id"].to_pylist())
    failures = {f["scan_id"]: f for fold in cards for f in storage.read_json(storage.join(fold_model(out, fold), FAILED_FILE))}
    out_rows = []
    for row in table.select(["scan_id", "has_label", "problem_code", "problem"]).to_pylist():
        scan = row["scan_id"]
        if not row["has_label"] or scan in scored:
            continue
        if row["problem_code"]:
            code, why = str(row["problem_code"]), str(row["problem"] or "found unusable while indexing")
        elif place_of[scan] not in cards:
            code, why = "NOT_TRAINED", f"fold {place_of[scan]} is not finished"
        else:
            code, why = failures[scan]["code"], failures[scan]["message"]
        out_rows.append({"scan_id": scan, "code": code, "reason": why})
    return out_rows


def _denominators(
    table: pa.Table, rows: pa.Table, cards: Mapping[int, ModelCard], place_of: Mapping[str, int]
) -> dict[str, int]:
    """How many scans each step left over; `failed` are those of finished folds that could not be read."""
    held_out = sum(fold in cards for fold in place_of.values())
    scored = pc.count_distinct(rows["scan_id"]).as_py()
    labelled = pc.sum(table["has_label"]).as_py() or 0
    return {
        "found": table.num_rows,
        "with_label": labelled,
        "unusable": labelled - len(place_of),
        "held_out": held_out,
        "scored": scored,
        "failed": held_out - scored,
    }


def _body(table: pa.Table, cards: Mapping[int, ModelCard], rows: pa.Table, baselines: pa.Table) -> dict[str, Any]:
    some = next(iter(cards.values()))
    failed = _num_failed(cards)
    names = baselines["baseline"].unique().to_pylist()
    return {
        "name": some.name,
        "manifest_fingerprint": manifest.fingerprint(table),
        "config": some.train.model_dump(mode="json", exclude={"folds_held_out"}),
        "folds": list(cards),
        "selection_biased": any(card.selection_biased for card in cards.values()),
        "accept_leakage": some.accept_leakage,
        "leakage_audit": {str(fold): card.audit.get("verdict", "unknown") for fold, card in cards.items()},
        "regions": _figures(rows, failed),
        "baselines": {name: _figures(baselines.filter(pc.equal(baselines["baseline"], name)), failed) for name in names},
        "per_fold": {str(fold): _of_card(card) for fold, card in cards.items()},
    }


def _num_failed(cards: Mapping[int, ModelCard]) -> int:
    return sum(card.metrics["held_out_scans"]["failed"] for card in cards.values())


def _of_card(card: ModelCard) -> dict[str, Any]:
    return {"held_out": card.metrics["held_out"], "scans": card.metrics["held_out_scans"], "training": card.training}


def _figures(rows: pa.Table, failed: int | None = None) -> dict[str, dict[str, Any]]:
    """Region -> rule -> figures over all scans."""
    by_rule = {rule: aggregate(rows, rule=rule) for rule in RULES}
    regions = list(by_rule[RULES[0]])
    return {r: {rule: _with_interval(by_rule[rule][r], rows, failed) for rule in RULES} for r in regions}


def _with_interval(summary: RegionSummary, rows: pa.Table, failed: int | None) -> dict[str, Any]:
    """The figures that a model's card carries, with the interval of the mean and the denominators beside them.

    Nobody knows which group a failed scan would have belonged to: without their number no figure counts them.
    """
    chosen = rows.filter(pc.equal(rows["region"], summary.region))
    dice, states = chosen["dice"].to_pylist(), chosen["state"].to_pylist()
    if summary.rule == "brats":
        dice = [1.0 if state == "both_empty" else value for value, state in zip(dice, states, strict=True)]
    known = [math.nan if value is None else value for value in dice]
    low, high = bootstrap_interval(known, chosen["patient_id"].to_pylist())
    return summary_json(summary) | {
        "dice_interval_95": None if math.isnan(low) else [low, high],
        "dice_q1": summary.dice.q1,
        "dice_q3": summary.dice.q3,
        **({} if failed is None else {"dice_mean_failed_zero": summary.mean_with_failures_zero(failed)}),
        "pooled_dice": summary.pooled_dice,
        "patient_mean_dice": summary.patient_mean_dice,
        "num_patients": summary.num_patients_scored,
        "num_unnamed": summary.num_unnamed,
    }


# --- in words -------------------------------------------------------------------------------------------------------


def describe(body: Mapping[str, Any], out: str) -> str:
    """A cross-validation in a few lines."""
    scans = body["scans"]
    lines = [f"cross-validation of '{body['name']}', folds {', '.join(map(str, body['folds']))} -> {out}"]
    for region, rules in body["regions"].items():
        lines.append(f"out of fold, {region}: {_words(rules['exclude'])}")
        if rules["exclude"]["states"]["both_empty"]:
            lines.append(f"  with both-empty as 1: {_words(rules['brats'])}")
        means = (f"{k}: {_number(f['held_out'][region]['dice_mean'])}" for k, f in _with_region(body, region))
        lines.append(f"  mean by fold: {', '.join(means)}")
        lines += _subgroup_words(body["subgroups"], region)
        if "regions_chosen" in body:
            lines.append(f"as chosen, {region}: {_words(body['regions_chosen'][region]['exclude'])}")
            lines += _subgroup_words(body["subgroups_chosen"], region)
        for name, regions in body["baselines"].items():
            lines.append(f"  baseline {name.replace('_', ' ')}: {_words(regions[region]['exclude'])}")
    if "chosen" in body:
        lines.append(_chosen_words(body["chosen"]))
    lines.append(
        f"scans: {scans['found']} found, {scans['with_label']} with a label, {scans['held_out']} held out, "
        f"{scans['scored']} scored, {scans['failed']} failed"
    )
    lines += [f"  missing: {m['scan_id']}: {m['reason']}" for m in body["missing"][:MOST_NAMED]]
    if len(body["missing"]) > MOST_NAMED:
        lines.append(f"  and {len(body['missing']) - MOST_NAMED} more; {SUMMARY} names them all")
    if body["selection_biased"]:
        lines.append("selection_biased: each held-out fold also chose its model's checkpoint")
    return "\n".join(lines)


def _subgroup_words(groups: Sequence[Mapping[str, Any]], region: str) -> list[str]:
    there = [(group["what"], group["regions"][region]["exclude"]) for group in groups if region in group["regions"]]
    return [f"  {what}: {_words(figures)}" for what, figures in there]


def _chosen_words(chosen: Mapping[str, Any]) -> str:
    """What the validation patients of each fold chose."""
    parts = (f"{k}: {c['threshold']:g} and {c['smallest_component']}" for k, c in chosen.items())
    flip = ", flipped" if any(c["settings"]["flip"] for c in chosen.values()) else ""
    return f"chosen by each fold's validation patients, threshold and smallest component: {', '.join(parts)}{flip}"


def _with_region(body: Mapping[str, Any], region: str) -> list[tuple[str, Any]]:
    return [(fold, figures) for fold, figures in body["per_fold"].items() if region in figures["held_out"]]


def _words(s: Mapping[str, Any]) -> str:
    """One region's figures with their rule, interval and counts."""
    low_high = s["dice_interval_95"]
    interval = f" (95 % {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
    states = f"missed {s['states']['missed']}, spurious {s['states']['spurious']}, both empty {s['states']['both_empty']}"
    mean, median = _number(s["dice_mean"]), _number(s["dice_median"])
    over = in_words(s["num_scans"], s["num_patients"], s["num_unnamed"])
    return f"Dice mean {mean}{interval}, median {median}; {states} ({s['rule']}, {over})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
