"""Given away: what stands behind `brainseg models`, as commands.py stands behind the other words."""

from collections.abc import Mapping
from typing import Any

from brainseg import shipped, storage
from brainseg.card import ModelCard, Terms, load_card
from brainseg.config import build
from brainseg.console import Voice
from brainseg.release import described, release
from brainseg.results import shipped_words


def list_models(voice: Voice) -> None:
    """Say what is to be known of each model that ships."""
    known = [described(load_card(name)) for name in shipped.names()]
    voice.result({"models": known}, "\n\n".join(shipped_words(each) for each in known) or "no model ships with this version")


def release_model(model: str, out: str, name: str, terms: Mapping[str, Any], voice: Voice) -> ModelCard:
    """Make a trained model ready to be given away; says under which licence and where it is."""
    place = storage.absolute(out)
    storage.check_writable(place)
    card = release(storage.absolute(model), place, name, build(Terms, dict(terms), "terms"))
    voice.result({"model": out, "name": name}, f"model '{name}' under {terms['licence']} -> {out}")
    return card
