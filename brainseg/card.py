"""A model's card: what its network eats and answers, on whom it was trained, what it scores. `MODEL/model.json` holds it.

Nothing in it is executed, and nothing of it is believed before it is checked.
"""

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from brainseg import storage
from brainseg.config import Config, NetworkConfig, PrepareConfig, SegmentConfig, TrainConfig, misfit
from brainseg.errors import ConfigError, PreflightError, StorageError, UsageError, one_line
from brainseg.regions import label_map
from brainseg.shipped import place_of
from brainseg.weights import read_json

CARD = "model.json"
CHOICES = ("threshold", "smallest_component")
"""Settings that may say `chosen`."""
MOST_CHANNELS = 64
"""Modalities, regions, and letters of the name of either."""


class Split(Config):
    """Who was trained on, who chose the checkpoint, and who was kept back. Ids of patients where they are known."""

    unit: str = "patient"
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def part_of(self, patient_id: str | None, scan_id: str) -> str | None:
        """`train`, `validation`, `test`, or None for somebody the training never met."""
        who = patient_id if self.unit == "patient" else scan_id
        return None if who is None else self.whereabouts.get(who)

    @cached_property
    def whereabouts(self) -> dict[str, str]:
        """Everybody the training met -> the part they stand in; test where somebody stands in several."""
        return {who: part for part in ("train", "validation", "test") for who in getattr(self, part)}


class Terms(Config):
    """On what conditions a model may be used, in its maker's words."""

    data: Annotated[str, Field(max_length=500, description="what it was trained on, whose that is, and where it comes from")]
    licence: Annotated[str, Field(max_length=100, description="of the weights, such as CC BY 4.0")]
    commercial: Annotated[bool, Field(description="whether the licence allows commercial use")]
    unfit_for: Annotated[str, Field(max_length=1000, description="what it must not be used for")]


class Pretrained(Config):
    """The model whose weights a training began with."""

    name: str
    model_fingerprint: str
    dataset: str
    unit: str
    """What its split is of. Where that is not what this model's is of, whom it met cannot be told by id afterwards."""
    met: int = 0
    """Scans kept back or choosing the checkpoint here that it had met; above 0 only where leakage was accepted."""


class ModelCard(Config):
    """Everything a model is, beside its weights."""

    format_version: Literal[1] = 1
    name: str
    network: NetworkConfig
    prepare: PrepareConfig
    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    label_map: str
    dataset: str
    manifest_fingerprint: str
    split: Split
    selection_biased: bool
    accept_leakage: bool
    metrics: dict[str, Any]
    baselines: dict[str, Any] = Field(default_factory=dict)
    audit: dict[str, Any] = Field(default_factory=dict)
    """What the leakage audit found in the split: patients, contents and neighbouring slices on two sides."""
    chosen: dict[str, Any] = Field(default_factory=dict)
    """Threshold and smallest component that a sweep over the validation patients chose, and what they were chosen from.
    Nothing uses it unasked."""
    train: TrainConfig
    training: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str]
    created_at: str
    weights_sha256: str
    terms: Terms | None = None
    """None: nobody has said any; whoever trained it knows."""
    pretrained: Pretrained | None = None
    """None: it was trained from nothing. Otherwise whom that model met stand among `split.train`."""


def refuse_unaccepted(card: ModelCard, *, accepted: bool) -> None:
    """UsageError where a model's licence allows no commercial use and nobody has said that this use is none."""
    if card.terms and not card.terms.commercial and not accepted:
        terms = f"the weights of model '{card.name}' are under {card.terms.licence}, which allows no commercial use"
        raise UsageError(f"{terms}; --accept-noncommercial says that yours is none")


def fingerprint_of(card: ModelCard) -> str:
    """sha256 over what decides an answer: weights, architecture, preparation, modalities, regions, label values."""
    names = {"network", "prepare", "modalities", "regions", "label_map", "weights_sha256"}
    decisive = card.model_dump(mode="json", include=names, exclude={"network": {"deep_supervision"}})
    if card.network.dimensions == 2:  # so that 2D models keep the fingerprint that their runs know them by
        del decisive["network"]["dimensions"], decisive["prepare"]["patch"]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def save_card(uri: str, card: ModelCard) -> None:
    """Write the card alone, whole or not at all; the weights stay as they are."""
    storage.write_json(storage.join(uri, CARD), card.model_dump(mode="json"))


def load_card(uri: str) -> ModelCard:
    """Read a model's card; PreflightError says what is wrong with the folder."""
    where = f"{uri}/{CARD}"
    try:
        body = read_json(storage.join(place_of(uri), CARD))
    except StorageError as error:
        raise PreflightError(f"{uri}: not a model folder ({error})") from error
    try:
        card = ModelCard.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        said = one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        raise PreflightError(f"{where}: {said[:300]}") from error
    _check_card(card, where)
    return card


def _check_card(card: ModelCard, where: str) -> None:
    """PreflightError where no network could be rebuilt from the card, or its answers not be written down."""
    try:
        label_map(card.label_map).masks(np.zeros(1, np.uint8), card.regions)
    except ConfigError as error:
        raise PreflightError(f"{where}: {one_line(str(error))[:300]}") from error
    problem = misfit(card.network, card.prepare)
    if problem:
        raise PreflightError(f"{where}: {problem}")
    for name, words in (("modalities", card.modalities), ("regions", card.regions)):
        if not 0 < len(set(words)) == len(words) <= MOST_CHANNELS or not all(0 < len(w) <= MOST_CHANNELS for w in words):
            raise PreflightError(f"{where}: its {name} are none, doubled, or longer than any that exist")
    _check_chosen(card, where)


def _check_chosen(card: ModelCard, where: str) -> None:
    """PreflightError where the card's choice is none that a run could use."""
    smallest = card.chosen.get("smallest_component", 0)
    if smallest != "largest" and (isinstance(smallest, bool) or not isinstance(smallest, int) or smallest < 0):
        said = one_line(str(smallest))[:40]
        raise PreflightError(f"{where}: chosen.smallest_component is {said}, expected a number of voxels, or largest")
    chosen = card.chosen.get("threshold", 0.5)
    if isinstance(chosen, bool) or not isinstance(chosen, float | int) or not 0 < chosen < 1:
        raise PreflightError(f"{where}: chosen.threshold is {one_line(str(chosen))[:40]}, expected a number between 0 and 1")


def resolved(settings: SegmentConfig, card: ModelCard) -> SegmentConfig:
    """The settings with what the model records in place of `chosen`; PreflightError where it records none."""
    asked = [name for name in CHOICES if getattr(settings, name) == "chosen"]
    for name in asked:
        if name not in card.chosen:
            way = "run `brainseg evaluate RUN --threshold-sweep` first, or give a number"
            raise PreflightError(f"model '{card.name}' records no chosen {name.replace('_', ' ')}; {way}")
    return settings.model_copy(update={name: card.chosen[name] for name in asked})
