"""Pretrained: a training that begins with the weights of another model (fine-tuning), and what it owes to that one.

Whom those weights have met counts as trained on from then on, and their licence goes with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safetensors.torch import save as save_tensors

from brainseg import storage
from brainseg.audit import Audit
from brainseg.card import ModelCard, Pretrained, Split, Terms, fingerprint_of, load_card
from brainseg.config import Config, TrainConfig
from brainseg.ensemble import fold_model, model_folders
from brainseg.errors import LeakageError, PreflightError
from brainseg.model import load_weights

GENTLER = 0.25
"""Share of the learning rate that weights were trained with from nothing, for going on with them."""
ALIKE = ("modalities", "regions", "label_map", "network", "prepare.normalise", "prepare.patch")
"""What weights mean something for. Size and frame may differ: they change how large a thing is seen, not what."""
MOST_WORDS = 500
Row = Mapping[str, Any]


def begun_with(uri: str, fold: int) -> str:
    """The model folder that a place stands for: of a cross-validation's, the model that kept the same fold back.

    PreflightError where that one is not finished.
    """
    folders = model_folders(uri)
    if folders == [uri]:
        return uri
    own = fold_model(uri, fold)
    if own not in folders:
        raise PreflightError(
            f"{uri}: a cross-validation whose fold {fold} is not finished; there is no model to begin fold {fold} with"
        )
    return own


def any_card(uri: str) -> ModelCard:
    """The card of a model, or of some fold of a cross-validation: recipe and terms are those of all."""
    return load_card(model_folders(uri)[0])


def recipe_of(uri: str) -> dict[str, Any]:
    """The recipe to go on with where nobody names another: the model's own, at a gentler pace."""
    values = any_card(uri).train.model_dump(mode="json", exclude={"folds_held_out", "accept_leakage", "pretrained"})
    values["optimiser"]["learning_rate"] *= GENTLER
    return values


def descended(card: ModelCard, parts: Mapping[str, Sequence[Row]]) -> ModelCard:
    """The card of a training that begins with the weights its recipe names; `parts` are its rows by side of its split.

    Raises PreflightError where there is no such model or it is for another network or other inputs, and LeakageError where it
    has met whom this training keeps back, unless that is accepted.
    """
    uri = begun_with(str(card.train.pretrained), card.train.folds_held_out)
    parent = load_card(uri)
    _check_alike(parent, card, uri)
    met = _met(parent, parts)
    if not card.accept_leakage:
        _refuse_met(parent, met, uri)
    record = {"name": parent.name, "model_fingerprint": fingerprint_of(parent), "dataset": parent.dataset}
    begun = Pretrained(**record, unit=parent.split.unit, met=len(met))
    split = _joined(card.split, parent.split)
    return card.model_copy(update={"pretrained": begun, "terms": _inherited(parent, card.dataset), "split": split})


def _refuse_met(parent: ModelCard, met: Sequence[str], uri: str) -> None:
    if parent.accept_leakage:
        raise LeakageError(
            f"{uri} was trained with --accept-leakage: its weights may have met whom this training keeps back, and "
            "nobody can tell. Begin with a model whose split is by patient, or pass --accept-leakage"
        )
    if met:
        raise LeakageError(
            f"{uri} has met {len(met)} of the scans that are kept back or choose the checkpoint, such as {met[0]}: no figure "
            "on them would be honest. Keep back the fold that it kept back, or pass --accept-leakage; if they are other scans "
            "of the same name, index them under another one (--dataset)"
        )


def _check_alike(parent: ModelCard, card: ModelCard, uri: str) -> None:
    for key in ALIKE:
        has, wants = _value(parent, key), _value(card, key)
        if has != wants:
            raise PreflightError(
                f"{uri}: {_difference(key, has, wants)}; a training that begins with its weights cannot differ there"
            )


def _value(card: ModelCard, key: str) -> Any:
    value: Any = card
    for word in key.split("."):
        value = getattr(value, word)
    return value


def _difference(key: str, has: Any, wants: Any) -> str:
    """What is not alike, down to the one key of a config that differs first."""
    if not isinstance(has, Config):
        return f"its {key} is {_words(has)}, here it is {_words(wants)}"
    one, other = has.model_dump(), wants.model_dump()
    return next(_difference(f"{key}.{name}", one[name], other[name]) for name in one if one[name] != other[name])


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _met(parent: ModelCard, parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """Scans of the test part that a model was trained on or chosen by, and of the validation part that it was trained on."""
    spoilt = {"test": ("train", "validation"), "validation": ("train",)}
    return [
        str(row["scan_id"])
        for part, sides in spoilt.items()
        for row in parts[part]
        if parent.split.part_of(row["patient_id"], row["scan_id"]) in sides
    ]


def _joined(split: Split, earlier: Split) -> Split:
    """The split, with everybody trained on or chosen by before among those trained on.

    Where one is of patients and the other of scans neither can be told by the other's ids, and it stays as it is.
    """
    if split.unit != earlier.unit:
        return split
    met = {*earlier.train, *earlier.validation} - {*split.validation, *split.test}
    return split.model_copy(update={"train": tuple(sorted({*split.train, *met}))})


def _inherited(parent: ModelCard, dataset: str) -> Terms | None:
    """The terms of the weights that were begun with, which those made of them are under as well."""
    if parent.terms is None:
        return None
    data = f"{dataset}; before that, as '{parent.name}': {parent.terms.data}"
    return parent.terms.model_copy(update={"data": data[:MOST_WORDS]})


def line(card: ModelCard, begun: Pretrained) -> str:
    """What a training says of the weights that it begins with."""
    said = f"begins with the weights of '{begun.name}', trained on {begun.dataset}"
    if begun.unit == card.split.unit:
        return said
    return f"{said}; it knows {begun.unit}s, this training {card.split.unit}s: a run will not tell whom only the former met"


def audited(audit: Audit, begun: Pretrained) -> Audit:
    """The audit of a split of which some scans were met before by the weights: it leaks then."""
    if not begun.met:
        return audit
    return replace(
        audit, verdict="leaks", reason=f"the weights that it began with had met {begun.met:,} of the scans kept back"
    )


def bring(config: TrainConfig, place: str) -> None:
    """Write the weights that a recipe begins with to `place`, in the precision that is trained in, for every worker to read.

    PreflightError where they are not those of their model's card.
    """
    uri = begun_with(str(config.pretrained), config.folds_held_out)
    weights = load_weights(uri, load_card(uri))
    storage.write_bytes(place, save_tensors({k: t.float() if t.is_floating_point() else t for k, t in weights.items()}))
