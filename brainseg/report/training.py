"""Training: the page of a model folder: what was trained on what, how it went, what it scores, what it took.

Made from the folder alone (card, log, held-out rows, overlays), so it can be made again. What an older model does not
record is left out, never guessed.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from brainseg import storage
from brainseg.aggregate import aggregate, bootstrap_interval
from brainseg.audit import Audit
from brainseg.card import ModelCard, load_card
from brainseg.loggers import flat
from brainseg.presets import PRESETS
from brainseg.report import figures
from brainseg.report.baselines import not_beaten, words
from brainseg.report.page import duration, template

PAGE = "training.html"
NOT_OF_A_RECIPE = {"modalities", "folds_held_out", "accept_leakage", "seed", "overlays_every", "pretrained"}
"""Keys that a manifest, a fold or a person's taste sets without making another recipe of it."""
Row = Mapping[str, Any]


def write_training_page(model: str) -> str:
    """Write `training.html` into a model folder; returns its place. PreflightError where it is no model folder."""
    place = storage.join(model, PAGE)
    storage.write_text(place, render(load_card(model), _log(model), _tables(model), _pictures(model)))
    return place


def render(card: ModelCard, log: Sequence[Row], rows: Mapping[str, pa.Table], pictures: Sequence[tuple[str, bytes]]) -> str:
    """The page as HTML. `rows` are tables of the model folder by name, as far as they are there; `pictures` by file name."""
    regions = region_figures(card, rows)
    return template("training.html.j2").render(
        card=card,
        alerts=alerts(card, regions),
        regions=regions,
        chosen=_of(card, rows, "held_out_chosen"),
        audit=_audit_lines(card),
        changes=changes(card),
        recipe=recipe(card),
        curves=curves(log, card),
        pictures=[_picture(name, png, card) for name, png in pictures],
        took=took(card.training, log),
        ran_on=ran_on(card.training, log),
        parts={part: len(getattr(card.split, part)) for part in ("train", "validation", "test")},
        scans=card.training.get("scans", []),
        tested=card.metrics.get("held_out_scans"),
    )


# --- what a model folder holds --------------------------------------------------------------------------------------


def _log(model: str) -> list[dict[str, Any]]:
    place = storage.join(model, "metrics.jsonl")
    return [json.loads(line) for line in storage.read_text(place).splitlines()] if storage.exists(place) else []


def _tables(model: str) -> dict[str, pa.Table]:
    places = {name: storage.join(model, f"{name}.parquet") for name in ("held_out", "held_out_chosen", "baselines")}
    return {name: storage.read_table(place) for name, place in places.items() if storage.exists(place)}


def _pictures(model: str) -> list[tuple[str, bytes]]:
    entries = storage.list_files(storage.join(model, "overlays"))
    places = [entry.uri for entry in entries if entry.uri.endswith(".png")]
    return [(storage.name_of(place), storage.read_bytes(place)) for place in places]


# --- figures --------------------------------------------------------------------------------------------------------


def region_figures(card: ModelCard, rows: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    """Per region what the held-out scans scored, and what they score without a network; with intervals where rows are."""
    scored = _of(card, rows, "held_out")
    baselines = rows.get("baselines")
    beside = {name: _of_baseline(name, baselines) or _recorded(body) for name, body in card.baselines.items()}
    out = []
    for region, entry in scored.items():
        others = [{"name": words(name), "key": name, **found[region]} for name, found in beside.items() if region in found]
        out.append({"region": region, **entry, "baselines": others})
    return out


def _of(card: ModelCard, rows: Mapping[str, pa.Table], name: str) -> dict[str, dict[str, Any]]:
    return _measured(rows[name]) if name in rows else _recorded(card.metrics.get(name))


def _of_baseline(name: str, table: pa.Table | None) -> dict[str, dict[str, Any]]:
    return {} if table is None else _measured(table.filter(pc.equal(table["baseline"], name)))


def _measured(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Region -> figures of rows of the `metrics` table, rule `exclude`, with the bootstrap interval of the mean by patient."""
    out = {}
    for region, s in aggregate(table).items():
        part = table.filter(pc.equal(table["region"], region))
        values = [math.nan if v is None else v for v in part["dice"].to_pylist()]
        low, high = bootstrap_interval(values, part["patient_id"].to_pylist())
        out[region] = {
            "mean": s.dice.mean,
            "interval": (None, None) if math.isnan(low) else (low, high),
            "median": s.dice.median,
            "quartiles": (s.dice.q1, s.dice.q3),
            "iou": s.iou.mean,
            "precision": s.precision.mean,
            "recall": s.recall.mean,
            "states": dict(s.states),
            "scans": s.num_scored,
            "patients": num_patients(part),
            "unnamed": s.num_unnamed,
        }
    return out


def num_patients(part: pa.Table) -> int:
    """Who is behind the mean Dice; a row without a patient counts for one of its own."""
    whose = part.filter(pc.is_valid(part["dice"]))["patient_id"]
    return len(pc.unique(whose.drop_null())) + int(whose.null_count)


def _recorded(body: Any) -> dict[str, dict[str, Any]]:
    """The same from what a card records; null where it does not say."""
    found = body.items() if isinstance(body, Mapping) else ()
    return {
        region: {
            "mean": s.get("dice_mean"),
            "interval": tuple(s.get("dice_interval_95") or (None, None)),
            "median": s.get("dice_median"),
            "quartiles": (s.get("dice_q1"), s.get("dice_q3")),
            "iou": s.get("iou_mean"),
            "precision": s.get("precision_mean"),
            "recall": s.get("recall_mean"),
            "states": s.get("states") or {},
            "scans": s.get("num_scans"),
            "patients": s.get("num_patients"),
            "unnamed": 0,
        }
        for region, s in found
        if isinstance(s, Mapping) and "dice_mean" in s
    }


# --- words ----------------------------------------------------------------------------------------------------------


def alerts(card: ModelCard, regions: Sequence[Row]) -> list[str]:
    """What must be known before a figure is believed, the gravest first."""
    audit, said = card.audit, []
    if audit.get("verdict") == "leaks":
        said.append(f"The leakage audit of the split says: {audit.get('reason') or 'it leaks'}.")
    if card.accept_leakage:
        said.append("Leakage was accepted: patients may stand on both sides of the split; no figure here holds for new ones.")
    entries = [{**b, "name": b["key"], "region": r["region"]} for r in regions for b in r["baselines"]]
    said += not_beaten(entries, {r["region"]: r["mean"] for r in regions})
    if card.selection_biased:
        said.append("Selection bias: the held-out fold also chose the checkpoint.")
    if audit.get("verdict") == "unknown":
        said.append(f"The leakage audit could not decide: {audit.get('reason') or 'no reason recorded'}.")
    failed = (card.metrics.get("held_out_scans") or {}).get("failed")
    if failed:
        said.append(f"{failed} held-out scan(s) could not be read and stand in no figure; held_out_failed.json names them.")
    return said


def _audit_lines(card: ModelCard) -> list[str]:
    try:
        return Audit.from_json(card.audit).lines()[1:]
    except ValueError:
        return []


def changes(card: ModelCard) -> list[str] | None:
    """How the recipe differs from the preset of its name, key by key; None where no preset has its name."""
    shipped = PRESETS.get(card.train.name)
    if shipped is None:
        return None
    one, other = (dict(flat(c.model_dump(mode="json", exclude=NOT_OF_A_RECIPE))) for c in (card.train, shipped))
    changed = [key for key in one if one[key] != other.get(key)]
    return [f"{key} {_plain(one[key])} instead of {_plain(other.get(key))}" for key in changed]


def recipe(card: ModelCard) -> list[tuple[str, str]]:
    """Every key of the recipe with its value."""
    return [(key, _plain(value)) for key, value in flat(card.train.model_dump(mode="json"))]


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def took(training: Row, log: Sequence[Row]) -> list[tuple[str, str]]:
    """Time, pace and cost, line by line; only what is recorded."""
    lines = [("epochs", f"{training['epochs']:,}, the best was {training['best_epoch'] + 1:,}")] if "epochs" in training else []
    lines += [("all epochs", duration(training["seconds"]))] if "seconds" in training else []
    for name, key in (("training", "train_s"), ("validating", "validate_s"), ("saving checkpoints", "checkpoint_s")):
        known = [m[key] for m in log if m.get(key) is not None]
        lines += [(f"of these {name}", duration(sum(known)))] if known else []
    if "wall_s" in training:
        lines.append(("from first to last, with decoding and measuring", duration(training["wall_s"])))
    paces = sorted(m["samples_per_s"] for m in log)
    lines += [("slices/s, median epoch", f"{paces[len(paces) // 2]:,.1f}")] if paces else []
    lines += [("core-hours", f"{training['core_hours']:,.2f}")] if "core_hours" in training else []
    lines += [("GPU-hours", f"{training['gpu_hours']:,.2f}")] if training.get("gpu_hours") else []
    if "price" in training:
        cost = f"{training['price']:,.2f} {training['currency']}"
        lines.append(("price", f"{cost}, at {training['price_per_hour']:,.2f} {training['currency']} an hour as stated"))
    elif "wall_s" in training:
        lines.append(("price", "not stated (--price-per-hour)"))
    return lines


def ran_on(training: Row, log: Sequence[Row]) -> list[tuple[str, str]]:
    """Hardware, line by line; only what is recorded."""
    machine, last = training.get("hardware") or {}, log[-1] if log else {}
    lines = []
    if machine.get("cpu"):
        lines.append(("CPU", f"{machine['cpu']}, {machine.get('cores') or '?'} logical cores"))
    if machine.get("memory_bytes"):
        lines.append(("memory", _gigabytes(machine["memory_bytes"])))
    if "gpus" in machine:
        lines.append(("GPUs there", ", ".join(machine["gpus"]) or "none"))
    if {"workers", "nodes", "cpus", "gpus", "cpus_per_worker"} <= training.keys():
        each, mean = training["cpus_per_worker"], training["cpus"] / training["cpus_per_worker"]
        count = f"{training['workers']}" + ("" if mean == training["workers"] else f" at most, {mean:.1f} on average")
        share = f"{count}; {each} CPU(s){' and a GPU' if training['gpus'] else ''} each"
        lines.append(("workers", f"{share}; {training['nodes']} node(s)"))
    if last.get("device"):
        lines.append(("trained on", last["device"]))
    if last.get("peak_rss_bytes"):
        lines.append(("most memory of the first worker", _gigabytes(last["peak_rss_bytes"])))
    if last.get("peak_cuda_bytes"):
        lines.append(("most GPU memory of the first worker", _gigabytes(last["peak_cuda_bytes"])))
    return lines


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# --- pictures -------------------------------------------------------------------------------------------------------


def curves(log: Sequence[Row], card: ModelCard) -> list[tuple[str, Markup]]:
    """Loss, validation Dice and learning rate by epoch, each with its caption; without a log none."""
    if not log:
        return []
    epochs = max(m["epoch"] for m in log) + 1
    dice = _by_epoch(log, "validation_dice")
    best = max(dice, key=lambda point: point[1])[0] if dice else None
    who = "validation" if card.split.validation else "held-out"
    drawn = [
        ("Training loss", figures.curve(_by_epoch(log, "loss"), epochs, "training loss by epoch")),
        (f"Mean {who} Dice", figures.curve(dice, epochs, f"mean {who} Dice by epoch", top=1.0, best=best)),
    ]
    rates = _by_epoch(log, "learning_rate")
    power = math.floor(math.log10(max((y for _, y in rates), default=0.0) or 1.0))
    scaled = [(x, y / 10.0**power) for x, y in rates]
    if rates:
        exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        drawn.append((f"Learning rate, × 10{exponent}", figures.curve(scaled, epochs, "learning rate by epoch")))
    return drawn


def _by_epoch(log: Sequence[Row], key: str) -> list[tuple[int, float]]:
    return [(m["epoch"] + 1, float(m[key])) for m in log if m.get(key) is not None and math.isfinite(m[key])]


def _picture(name: str, png: bytes, card: ModelCard) -> dict[str, str]:
    """A picture of the page: a caption and its bytes as a data URI."""
    digits = "".join(c for c in name if c.isdigit())
    epoch = int(digits) if digits else 0
    is_best = epoch == card.training.get("best_epoch", -2) + 1
    caption = f"Epoch {epoch}" + (", the best: these weights are the model" if is_best else "")
    return {"caption": caption, "uri": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
