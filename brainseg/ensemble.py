"""Ensemble: several models that answer as one. Their probabilities are averaged on the scan's crop, before the threshold.

It stands between the model folders and a bulk run, which sees one card and one fingerprint whatever is behind them. Members
must agree on what they eat and answer; how they prepare scans and what network they are may differ. One model alone goes
its own way, untouched.

The folds of a cross-validation are an ensemble for scans that none of them met. For those they were trained on there is
`out-of-fold`: only members that neither trained on a scan's patient nor were chosen by it may answer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from brainseg import shipped, storage
from brainseg.card import CARD, ModelCard, Split, Terms, fingerprint_of, load_card
from brainseg.config import SegmentConfig
from brainseg.errors import PreflightError, StorageError, UsageError
from brainseg.model import Loaded, Model, Patients, Segmenter, Shown, load_model
from brainseg.weights import read_json

SUMMARY = "cross_validation.json"
MOST_FOLDS = 1000
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Members:
    """Model folders in a fixed order, none twice, and what they are together."""

    uris: tuple[str, ...]
    cards: tuple[ModelCard, ...]
    card: ModelCard
    fingerprint: str

    def describe(self) -> list[dict[str, str]]:
        """Each member in a few words that tell it from any other."""
        pairs = zip(self.uris, self.cards, strict=True)
        return [{"uri": uri, "name": card.name, "fingerprint": fingerprint_of(card)} for uri, card in pairs]


class Ensemble(Segmenter):
    """Models on one device whose probabilities are averaged; one member's answers are in memory beside their sum."""

    def __init__(self, members: Sequence[Model], settings: SegmentConfig) -> None:
        ordered = sorted(members, key=lambda member: member.fingerprint)
        cards = tuple(member.card for member in ordered)
        self.models, self.settings, self.uploads = ordered, settings, ordered[0].uploads
        self.card, self.fingerprint = joint_card(cards, settings), joint_fingerprint(cards)

    def ways(self) -> set[Shown]:
        return set().union(*(model.ways() for model in self.models))

    def answers(self, loaded: Sequence[Loaded], patients: Patients = None) -> Iterator[Tensor]:
        """Yield each scan's mean region probabilities `(R, D, h, w)` over the members that may answer it."""
        whose = patients or [None] * len(loaded)
        sums: list[Tensor | None] = [None] * len(loaded)
        counts = [0] * len(loaded)
        for model in self.models:
            places = [
                i
                for i, (one, patient) in enumerate(zip(loaded, whose, strict=True))
                if may_answer(model.card, patient, one.scan.scan_id, self.settings)
            ]
            answers = model.answers([loaded[i] for i in places]) if places else ()
            for i, answer in zip(places, answers, strict=True):
                so_far = sums[i]
                sums[i], counts[i] = answer if so_far is None else so_far + answer, counts[i] + 1
        for i, total in enumerate(sums):
            assert total is not None, "`refuse_unanswered` comes before"
            sums[i] = None
            yield total / counts[i]


def load_segmenter(uris: Sequence[str], settings: SegmentConfig, device: torch.device | None = None) -> Segmenter:
    """Rebuild one model, or several as an ensemble."""
    models = [load_model(uri, settings, device) for uri in uris]
    return models[0] if len(models) == 1 else Ensemble(models, settings)


def find_members(places: Sequence[str], settings: SegmentConfig) -> Members:
    """The models at these places, each a model folder or that of a cross-validation, which stands for its finished folds.

    A model that is named twice counts once. UsageError where they cannot answer together; PreflightError for what is none.
    """
    found: dict[str, tuple[str, ModelCard]] = {}
    for uri in (uri for place in places for uri in model_folders(place)):
        card = load_card(uri)
        found.setdefault(fingerprint_of(card), (uri, card))
    ordered = [found[fingerprint] for fingerprint in sorted(found)]
    uris, cards = tuple(uri for uri, _ in ordered), tuple(card for _, card in ordered)
    if len(cards) == 1:
        return Members(uris, cards, cards[0], fingerprint_of(cards[0]))
    return Members(uris, cards, joint_card(cards, settings), joint_fingerprint(cards))


def fold_model(out: str, fold: int) -> str:
    """Where a cross-validation keeps the model that kept this fold back."""
    return storage.join(out, f"fold-{fold}")


def model_folders(place: str) -> list[str]:
    """The model folders that a place stands for."""
    if (
        place in shipped.names()
        or storage.exists(storage.join(place, CARD))
        or not storage.exists(storage.join(place, SUMMARY))
    ):
        return [place]
    try:
        body: Any = read_json(storage.join(place, SUMMARY))
    except StorageError as error:
        raise PreflightError(f"{place}: not a cross-validation ({error})") from error
    folds = body.get("folds") if isinstance(body, dict) else None
    if not isinstance(folds, list) or not 0 < len(folds) < MOST_FOLDS or not all(type(fold) is int for fold in folds):
        raise PreflightError(f"{place}: {SUMMARY} names no folds")
    return [fold_model(place, fold) for fold in folds]


def _strictest(cards: Sequence[ModelCard]) -> Terms | None:
    """The terms of the first model that allows no commercial use, else of the first that has any."""
    said = [card.terms for card in cards if card.terms]
    return min(said, key=lambda terms: terms.commercial, default=None)


def joint_card(cards: Sequence[ModelCard], settings: SegmentConfig) -> ModelCard:
    """What several models are together. Architecture, preparation and recipe are the first one's; nobody may ask for them.

    UsageError where they do not eat and answer the same.
    """
    first = cards[0]
    for card in cards[1:]:
        for name in ("modalities", "regions", "label_map"):
            mine, theirs = (_words(getattr(one, name)) for one in (first, card))
            if mine != theirs:
                what = name.replace("_", " ")
                raise UsageError(
                    f"models that answer together must share their {what}: '{first.name}' has {mine}, '{card.name}' {theirs}"
                )
    names = ", ".join(dict.fromkeys(card.name for card in cards))
    manifests = {card.manifest_fingerprint for card in cards}
    return first.model_copy(
        update={
            "name": f"{len(cards)} models ({names})",
            "dataset": ", ".join(dict.fromkeys(card.dataset for card in cards)),
            "manifest_fingerprint": manifests.pop() if len(manifests) == 1 else "",
            "split": joint_split([card.split for card in cards], settings),
            "selection_biased": any(card.selection_biased for card in cards),
            "accept_leakage": any(card.accept_leakage for card in cards),
            "metrics": {},
            "baselines": {},
            "audit": {},
            "chosen": {},
            "weights_sha256": "",
            "terms": _strictest(cards),
        }
    )


def _words(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def joint_split(splits: Sequence[Split], settings: SegmentConfig) -> Split:
    """Where somebody stands for members together: `train` if any of them was trained on him, else `validation` if any was
    chosen by him. Out of fold, everybody whom any of them met is `test`: those that met him otherwise do not answer.
    """
    units = sorted({split.unit for split in splits})
    if len(units) > 1:
        raise UsageError(f"models that answer together must be split alike; some by {units[0]}, some by {units[1]}")
    met = [{who for split in splits for who, there in split.whereabouts.items() if there == part} for part in PARTS]
    if settings.members == "out-of-fold":
        return Split(unit=units[0], test=tuple(sorted(set().union(*met))))
    train, validation, test = met[0], met[1] - met[0], met[2] - met[1] - met[0]
    return Split(
        unit=units[0], **{part: tuple(sorted(who)) for part, who in zip(PARTS, (train, validation, test), strict=True)}
    )


def joint_fingerprint(cards: Sequence[ModelCard]) -> str:
    """sha256 over the fingerprints of all members, in whatever order they were named."""
    return hashlib.sha256(json.dumps(sorted(fingerprint_of(card) for card in cards)).encode()).hexdigest()


def may_answer(card: ModelCard, patient_id: str | None, scan_id: str, settings: SegmentConfig) -> bool:
    """Whether a model may answer a scan: out of fold, only if it neither trained on its patient nor was chosen by it."""
    return settings.members == "all" or card.split.part_of(patient_id, scan_id) not in ("train", "validation")


def refuse_unanswered(table: pa.Table, members: Members, settings: SegmentConfig) -> None:
    """PreflightError where, out of fold, some scan of the manifest would have no member to answer it."""
    if settings.members == "all":
        return
    rows = zip(table["scan_id"].to_pylist(), table["patient_id"].to_pylist(), strict=True)
    without = [s for s, p in rows if not any(may_answer(card, p, s, settings) for card in members.cards)]
    if without:
        raise PreflightError(
            f"members=out-of-fold: {len(without)} of {table.num_rows} scans, such as {without[0]}, were met in training by "
            "every model given; give the other folds too, or a manifest without them"
        )
