"""Folds: the page of a cross-validation: every labelled scan judged once, fold by fold, with a way to each fold's own page.

Made from `cross_validation.json` and the folds' cards; nothing is counted here.
"""

from collections.abc import Mapping
from typing import Any

from brainseg import storage
from brainseg.card import ModelCard, load_card
from brainseg.errors import PreflightError
from brainseg.report.baselines import words
from brainseg.report.page import template
from brainseg.report.training import PAGE, write_training_page

INDEX, SUMMARY = "index.html", "cross_validation.json"
MOST_NAMED = 50
"""Missing scans that the page names; the JSON names them all."""
Body = Mapping[str, Any]


def write_folds_page(out: str) -> str:
    """Write `index.html` into a cross-validation's folder, and `training.html` into folds that lack it; returns its place.

    Raises PreflightError where the folder holds no cross-validation.
    """
    if not storage.exists(storage.join(out, SUMMARY)):
        raise PreflightError(f"{out} holds no cross-validation: it has no {SUMMARY}")
    body = storage.read_json(storage.join(out, SUMMARY))
    models = {fold: storage.join(out, f"fold-{fold}") for fold in body["per_fold"]}
    for model in models.values():
        if not storage.exists(storage.join(model, PAGE)):
            write_training_page(model)
    storage.write_text(storage.join(out, INDEX), render(body, {fold: load_card(m) for fold, m in models.items()}))
    return storage.join(out, INDEX)


def render(body: Body, cards: Mapping[str, ModelCard]) -> str:
    """The page as HTML."""
    return template("folds.html.j2").render(
        body=body,
        cards=cards,
        alerts=alerts(body, cards),
        page=PAGE,
        words=words,
        lines=[line for fold, figures in body["per_fold"].items() for line in _of_fold(fold, figures, cards[fold])],
        missing=body["missing"][:MOST_NAMED],
        took=_took(cards),
    )


def alerts(body: Body, cards: Mapping[str, ModelCard]) -> list[str]:
    """What must be known before a figure is believed."""
    said = []
    leaky = [fold for fold, verdict in body["leakage_audit"].items() if verdict == "leaks"]
    if leaky:
        said.append(f"The leakage audit says that the split leaks in fold {', '.join(leaky)}.")
    if body["accept_leakage"]:
        said.append("Leakage was accepted: patients may stand on both sides of a split; no figure here holds for new ones.")
    if body["selection_biased"]:
        said.append("Selection bias: the fold kept back also chose the checkpoint.")
    scans = body["scans"]
    left = scans["with_label"] - scans["unusable"] - scans["held_out"]
    if left:
        said.append(f"Not finished: {left:,} labelled scans stand in folds that are not trained yet.")
    if scans["failed"]:
        said.append(f"{scans['failed']:,} scan(s) could not be read and stand in no figure.")
    return said


def _of_fold(fold: str, figures: Body, card: ModelCard) -> list[dict[str, Any]]:
    """A line of the table a region: the fold's own figures, and how it was trained."""
    return [
        {"fold": fold, "region": region, "first": number == 0, **summary, "training": card.training, "tested": figures["scans"]}
        for number, (region, summary) in enumerate(figures["held_out"].items())
    ]


def _took(cards: Mapping[str, ModelCard]) -> dict[str, Any]:
    """Sums over the folds; a price only where every fold states one in the same currency."""
    each = [card.training for card in cards.values()]
    total = {key: sum(t[key] for t in each) for key in ("seconds", "core_hours", "gpu_hours") if all(key in t for t in each)}
    currencies = {t.get("currency") for t in each}
    if len(currencies) == 1 and None not in currencies:
        total |= {"price": sum(t["price"] for t in each), "currency": currencies.pop()}
    return total
