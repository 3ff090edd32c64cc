"""Release: a trained model made ready to be given away: half as large, and with the terms it is given on.

Weights are rounded to float16 (eleven bits of precision, as Micikevicius et al. 2018 keep them). The figures on the card stay
those of the weights before.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from brainseg import storage
from brainseg.card import CARD, ModelCard, Terms, load_card
from brainseg.errors import PreflightError, UsageError
from brainseg.model import load_weights, save_model


def release(model: str, out: str, name: str, terms: Terms) -> ModelCard:
    """Write the model folder `out` with float16 weights, the name and the terms; returns its card. Pictures stay behind.

    UsageError where something stands there already, or where the model began with weights whose licence allows less than
    these terms; PreflightError where the model is damaged or too large for float16.
    """
    if storage.exists(storage.join(out, CARD)):
        raise UsageError(f"{out} holds a model already; choose another place")
    card = load_card(model)
    if card.terms and terms.commercial and not card.terms.commercial:
        raise UsageError(
            f"{model}: its weights are under {card.terms.licence}, which allows no commercial use; these terms would"
        )
    halved = {layer: _halved(layer, tensor) for layer, tensor in load_weights(model, card).items()}
    update: dict[str, Any] = {"name": name, "terms": terms}
    if card.pretrained:  # whose weights it began with is told by name, not by where they lay
        update["train"] = card.train.model_copy(update={"pretrained": card.pretrained.name})
    return save_model(out, card.model_copy(update=update), halved)


def _halved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise PreflightError(f"{name} holds {float(tensor.abs().max()):g}, more than float16 can")
    return half


def described(card: ModelCard) -> dict[str, Any]:
    """What a person must know of a model before it is used: what it eats, on whom it learnt, what it scores, its terms."""
    held_out: Mapping[str, Any] = card.metrics.get("held_out", {})
    kept = ("rule", "num_scans", "dice_mean", "dice_median", "states")
    return {
        "name": card.name,
        "modalities": list(card.modalities),
        "regions": list(card.regions),
        "trained_on": {
            "dataset": card.dataset,
            "began_with": card.pretrained.name if card.pretrained else None,
            "unit": card.split.unit,
            **{part: len(getattr(card.split, part)) for part in ("train", "validation", "test")},
        },
        "held_out": {region: {key: figures.get(key) for key in kept} for region, figures in held_out.items()},
        "chosen": {key: card.chosen.get(key) for key in ("threshold", "smallest_component")} if card.chosen else None,
        "terms": card.terms.model_dump(mode="json") if card.terms else None,
        "created_at": card.created_at,
    }
