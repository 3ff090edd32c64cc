"""Curves: the course of a training as a picture beside the model."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def draw_curves(log: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of training loss and validation Dice per epoch, the best epoch marked."""
    figure = Figure(figsize=(9, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([m["epoch"] + 1 for m in log], [m["loss"] for m in log], color=BLUE, marker="o", markersize=3)
    left.set(title="Training loss", xlabel="epoch", ylim=(0, None))
    scored = [m for m in log if m["validation_dice"] is not None]
    right.plot([m["epoch"] + 1 for m in scored], [m["validation_dice"] for m in scored], color=ORANGE, marker="o", markersize=3)
    right.set(title="Validation Dice, mean over whole scans", xlabel="epoch", ylim=(0, 1))
    best = max(scored, key=lambda m: m["validation_dice"], default=None)
    if best:
        right.axvline(best["epoch"] + 1, color=GREY, linewidth=0.8, linestyle="--")
        right.annotate(
            f"best {best['validation_dice']:.3f}, epoch {best['epoch'] + 1}",
            (best["epoch"] + 1, 0.04),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=9,
        )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": ""})
    return out.getvalue()
