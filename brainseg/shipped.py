"""Shipped: the models that come with the package, known by name. A name is read where the package lies, on every node."""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "models"


@cache
def names() -> tuple[str, ...]:
    """The models that ship, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/model.json")))


def place_of(model: str) -> str:
    """The folder of a model that ships, by its name; any other place as it is."""
    return str(FOLDER / model) if model in names() else model
