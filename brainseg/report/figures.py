"""Figures: numbers in, inline SVG out: curves of a training, slices under outlines, bars. No file, no table is known here.

The cohort's charts stand in `charts.py`. Text stays text (sharp, searchable, spoken by screen readers) and colours are CSS
classes, so one drawing serves light, dark and print. Blue is the label, orange the prediction, on every page.
"""

import base64
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from brainseg.outlines import Corner, loops

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 34, 14, 12, 36
MOST_TICKS = 8


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _n(value: float) -> str:
    """A coordinate to a tenth of a pixel, without a trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(parts: Iterable[str], says: str, top: float = 0) -> Markup:
    """The chart's element; `top` cuts off what stays empty above."""
    box = f"0 {_n(top)} {WIDTH} {_n(HEIGHT - top)}"
    return Markup(f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(says)}">{"".join(parts)}</svg>')


def _text(x: float, y: float, words: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text class="{css}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def log_ticks(low: float, high: float) -> list[float]:
    """Ascending ticks that enclose the range: 1, 2, 5, 10, 20 ..., or only powers of ten where those would be too many."""
    for steps in ((1, 2, 5), (1,)):
        ladder = [float(f"{step}e{power}") for power in range(-9, 16) for step in steps]
        first = max(bisect_right(ladder, low) - 1, 0)
        last = max(bisect_left(ladder, high), first + 1)
        if last - first < MOST_TICKS:
            break
    return ladder[first : last + 1]


def curve(
    points: Sequence[tuple[int, float]], epochs: int, says: str, *, top: float | None = None, best: int | None = None
) -> Markup:
    """A value by epoch, counted from 1, on an axis from 0 to `top` (or what encloses all); the best epoch marked."""
    highest = max((y for _, y in points), default=1.0)
    ticks = even_ticks(top or highest or 1.0)
    places = [(_x((x - 1) / max(1, epochs - 1)), _y(max(y, 0.0) / ticks[-1])) for x, y in points]
    parts = [_line(LEFT, _y(t / ticks[-1]), WIDTH - RIGHT, _y(t / ticks[-1]), "grid" if t else "axis") for t in ticks]
    parts += [_text(LEFT - 6, _y(t / ticks[-1]) + 4, f"{t:g}", "end") for t in ticks]
    parts += [_text(_x((x - 1) / max(1, epochs - 1)), _y(0) + 16, f"{x}") for x in epoch_ticks(epochs)]
    parts.append(_text(_x(0.5), HEIGHT - 3, "epoch", css="title"))
    if best is not None:
        x = _x((best - 1) / max(1, epochs - 1))
        side, anchor = (-5, "end") if x > WIDTH / 2 else (5, "start")
        parts.append(_line(x, TOP, x, _y(0), "median"))
        value = dict(points)[best]
        height = _y(0) - 8 if value > ticks[-1] / 2 else TOP + 12
        parts.append(_text(x + side, height, f"best {value:.3f}, epoch {best}", anchor, "note"))
    parts.append(f'<path class="curve" d="M{"L".join(f"{_n(x)} {_n(y)}" for x, y in places)}"/>' if places else "")
    parts += [
        f'<circle class="dot" cx="{_n(x)}" cy="{_n(y)}" r="2.4"><title>epoch {epoch}: {value:.4g}</title></circle>'
        for (x, y), (epoch, value) in zip(places, points, strict=True)
    ]
    return _svg(parts, says)


def even_ticks(highest: float) -> list[float]:
    """Ticks from 0 in even steps of 1, 2 or 5 times a power of ten, the last at or above `highest` > 0, at most six."""
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(s for s in (power * f for f in (0.1, 0.2, 0.5, 1, 2, 5, 10)) if 5 * s >= highest * (1 - 1e-9))
    return [float(f"{n * step:.6g}") for n in range(math.ceil(highest / step * (1 - 1e-9)) + 1)]


def epoch_ticks(epochs: int) -> list[int]:
    """The first epoch and up to six others in even steps."""
    step = next(s * 10**power for power in range(9) for s in (1, 2, 5) if epochs / (s * 10**power) <= MOST_TICKS - 2)
    return [1, *(n for n in range(step, epochs + 1, step) if n > 1)]


def outline(mask: NDArray[np.bool_]) -> str:
    """SVG path along the pixel edges around a mask (H, W): closed loops, in relative steps, clockwise around what is inside."""
    return "".join(_loop(corners) for corners in loops(mask))


def _loop(walk: Sequence[Corner]) -> str:
    """A closed loop as a path, each straight run one command."""
    steps: list[tuple[str, int]] = []
    for (x0, y0), (x1, y1) in pairwise(walk):
        letter, by = ("v", y1 - y0) if x0 == x1 else ("h", x1 - x0)
        if steps and steps[-1][0] == letter:
            steps[-1] = (letter, steps[-1][1] + by)
        else:
            steps.append((letter, by))
    return f"M{walk[0][0]} {walk[0][1]}{''.join(f'{letter}{by}' for letter, by in steps)}z"


def panel(picture: str, shape: tuple[int, int], label: Sequence[str], prediction: Sequence[str], says: str) -> Markup:
    """One picture of a row: the slice `picture`, drawn by `slice_picture`, under outlines, from the widest region on."""
    lines = [f'<path class="edge label r{rank}" d="{path}"/>' for rank, path in enumerate(label) if path]
    lines += [f'<path class="edge prediction r{rank}" d="{path}"/>' for rank, path in enumerate(prediction) if path]
    return _slice(shape, f'<use href="#{escape(picture)}"/>{"".join(lines)}', says)


def slice_picture(picture: str, shape: tuple[int, int], webp: bytes, says: str) -> Markup:
    """The bare slice. Its WebP is embedded here under the id `picture`, once; the panels beside it point to it."""
    height, width = shape
    data = base64.b64encode(webp).decode()
    image = f'<image id="{escape(picture)}" width="{width}" height="{height}" href="data:image/webp;base64,{data}"/>'
    return _slice(shape, image, says)


def _slice(shape: tuple[int, int], body: str, says: str) -> Markup:
    height, width = shape
    return Markup(f'<svg class="slice" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(says)}">{body}</svg>')


def bar(share: float) -> Markup:
    """A flat bar for a table's cell, `share` of the cell wide."""
    return Markup(
        f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{_n(100 * min(max(share, 0.0), 1.0))}" height="6"/></svg>'
    )
