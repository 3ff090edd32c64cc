"""Figures: numbers in, inline SVG out. No file, no table, no page is known here.

Drawn by hand rather than by matplotlib: a dot costs 30 bytes instead of 90, text stays text (sharp, searchable, spoken
by screen readers) and colours are CSS classes, so one drawing serves light, dark and print.

Colours follow one rule on the whole page: blue is the label, orange the prediction, grey is where both are. Shapes say the
same again for those who cannot tell the colours apart: dot = both, triangle = missed, square = spurious.
"""

import base64
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 34, 14, 12, 36
ROOM, LOWEST = 144, 90
"""Height of the tallest stack of a distribution, and the least height that the chart keeps."""

MAX_DOTS = 2000
"""More points than this become bars or a seeded sample: a browser is slow with 10,000 elements."""

MOST_TICKS = 8
FINE_BINS, COARSE_BINS, FEW = 50, 25, 150
"""Bins of the Dice axis, and the number of scans up to which the coarse ones do."""


@dataclass(frozen=True)
class Point:
    """One scan in one region. `volume` is the label's, in whatever unit the axis says; None where it has none."""

    scan_id: str
    state: str
    dice: float
    volume: float | None = None


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


def _mark(point: Point, x: float, y: float, radius: float) -> str:
    """A scan's mark with its name as a tooltip: dot, triangle or square by state."""
    title = f"<title>{escape(point.scan_id)}: Dice {point.dice:.3f}</title>"
    r = radius
    if point.state == "missed":
        shape = f'<path class="missed" d="M{_n(x - r)} {_n(y - r)}h{_n(2 * r)}l{_n(-r)} {_n(2 * r)}z">{title}</path>'
    elif point.state == "spurious":
        size = _n(2 * r)
        shape = f'<rect class="spurious" x="{_n(x - r)}" y="{_n(y - r)}" width="{size}" height="{size}">{title}</rect>'
    else:
        shape = f'<circle class="both" cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}">{title}</circle>'
    return shape


def distribution(points: Sequence[Point], median: float | None, says: str) -> Markup:
    """Every scan a mark above its Dice, stacked like a histogram; bars instead where there are more than `MAX_DOTS`."""
    bins = COARSE_BINS if len(points) <= FEW else FINE_BINS
    places = [min(int(p.dice * bins), bins - 1) for p in points]
    tallest = max(Counter(places).values(), default=1)
    many = len(points) > MAX_DOTS
    pitch = ROOM / tallest if many else min((WIDTH - LEFT - RIGHT) / bins, ROOM / tallest)
    parts = [_dice_axis_below()]
    parts += _bars(places, bins, tallest) if many else _stacks(points, places, bins, pitch)
    top = min(_y(0) - pitch * tallest - 18, _y(0) - LOWEST)
    if median is not None:
        side, anchor = (-4, "end") if median > 0.5 else (4, "start")
        parts.append(_line(_x(median), top + 4, _x(median), _y(0), "median"))
        parts.append(_text(_x(median) + side, top + 12, f"median {median:.3f}", anchor, "note"))
    return _svg(parts, says, top)


def _dice_axis_below() -> str:
    ticks = [_line(LEFT, _y(0), WIDTH - RIGHT, _y(0), "axis")]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        ticks.append(_text(_x(tick), _y(0) + 15, f"{tick:g}"))
    return "".join([*ticks, _text(_x(0.5), HEIGHT - 4, "Dice", css="title")])


def _stacks(points: Sequence[Point], places: Sequence[int], bins: int, pitch: float) -> list[str]:
    width = (WIDTH - LEFT - RIGHT) / bins
    radius = min(width / 2 - 0.3, max(1.2, pitch / 2))
    height: Counter[int] = Counter()
    marks = []
    for point, place in sorted(zip(points, places, strict=True), key=lambda pair: (pair[1], pair[0].state, pair[0].dice)):
        marks.append(_mark(point, LEFT + (place + 0.5) * width, _y(0) - radius - 0.6 - height[place] * pitch, radius))
        height[place] += 1
    return marks


def _bars(places: Sequence[int], bins: int, tallest: int) -> list[str]:
    width = (WIDTH - LEFT - RIGHT) / bins
    bars = [_text(LEFT - 4, _y(0) - ROOM + 4, f"{tallest:,}", "end")]
    for place, count in sorted(Counter(places).items()):
        tall = ROOM * count / tallest
        title = f"<title>Dice {place / bins:.2f} to {(place + 1) / bins:.2f}: {count} scans</title>"
        left, top = _n(LEFT + place * width + 0.4), _n(_y(0) - tall)
        bars.append(f'<rect class="both" x="{left}" y="{top}" width="{_n(width - 0.8)}" height="{_n(tall)}">{title}</rect>')
    return bars


def dice_against_volume(points: Sequence[Point], unit: str, says: str) -> Markup:
    """Dice of every scan over its label's volume (logarithmic): small tumours are where means hide failures."""
    known = [p for p in points if p.volume]
    shown = _sample(known)
    volumes = [p.volume or 1.0 for p in shown]
    ticks = log_ticks(min(volumes, default=1.0), max(volumes, default=10.0))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    left_out = f", {len(shown):,} of {len(known):,} scans" if len(shown) < len(known) else ""
    parts = [_dice_axis_left(), *_log_axis_below(ticks, f"label volume ({unit}){left_out}")]
    radius = 3.2 if len(shown) < 300 else 2.0
    for point, volume in zip(shown, volumes, strict=True):
        parts.append(_mark(point, _x((math.log10(volume) - low) / (high - low)), _y(point.dice), radius))
    return _svg(parts, says)


def _sample(points: Sequence[Point]) -> Sequence[Point]:
    """At most `MAX_DOTS` of the points, always the same ones."""
    if len(points) <= MAX_DOTS:
        return points
    chosen = np.random.default_rng(0).choice(len(points), MAX_DOTS, replace=False)
    return [points[i] for i in sorted(chosen)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ascending ticks that enclose the range: 1, 2, 5, 10, 20 ..., or only powers of ten where those would be too many."""
    for steps in ((1, 2, 5), (1,)):
        ladder = [float(f"{step}e{power}") for power in range(-9, 16) for step in steps]
        first = max(bisect_right(ladder, low) - 1, 0)
        last = max(bisect_left(ladder, high), first + 1)
        if last - first < MOST_TICKS:
            break
    return ladder[first : last + 1]


def _dice_axis_left() -> str:
    ticks = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        ticks += [_line(LEFT, _y(tick), WIDTH - RIGHT, _y(tick), "axis" if tick == 0 else "grid")]
        ticks += [_text(LEFT - 6, _y(tick) + 4, f"{tick:g}", "end")]
    return "".join(ticks)


def _log_axis_below(ticks: Sequence[float], title: str) -> list[str]:
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    drawn = []
    for tick in ticks:
        x = _x((math.log10(tick) - low) / (high - low))
        drawn.append(_line(x, _y(0), x, _y(0) + 4, "axis"))
        drawn.append(_text(x, _y(0) + 16, _short(tick)))
    return [*drawn, _text(_x(0.5), HEIGHT - 3, title, css="title")]


def _short(tick: float) -> str:
    """A tick in at most five letters: 0.05, 200, 5,000, 20k, 1M."""
    if tick >= 1e6:
        return f"{tick / 1e6:,g}M"
    return f"{tick / 1000:g}k" if tick >= 1e4 else f"{tick:,g}"


def outline(mask: NDArray[np.bool_]) -> str:
    """SVG path along the pixel edges around a mask (H, W): closed loops, clockwise around what is inside."""
    return "".join(_loop(corners) for corners in _loops(_border(mask)))


Corner = tuple[int, int]


def _border(mask: NDArray[np.bool_]) -> dict[Corner, list[Corner]]:
    """From each corner (x, y) on the border, the corners that a unit step with the inside on the right leads to."""
    steps: dict[Corner, list[Corner]] = defaultdict(list)
    padded = np.pad(mask, 1).astype(np.int8)
    across, down = np.diff(padded, axis=0)[:, 1:-1], np.diff(padded, axis=1)[1:-1, :]
    for sign, (dx0, dx1) in ((1, (0, 1)), (-1, (1, 0))):
        for y, x in np.argwhere(across == sign).tolist():
            steps[x + dx0, y].append((x + dx1, y))
        for y, x in np.argwhere(down == sign).tolist():
            steps[x, y + dx1].append((x, y + dx0))
    return steps


def _loops(steps: dict[Corner, list[Corner]]) -> Iterator[list[Corner]]:
    """Walk every step once. As many lead into a corner as out of it, so each walk ends where it began."""
    for start in list(steps):
        while steps[start]:
            walk = [start, steps[start].pop()]
            while walk[-1] != start:
                walk.append(steps[walk[-1]].pop())
            yield walk


def _loop(walk: Sequence[Corner]) -> str:
    """A closed loop as a path, each straight run one command."""
    (x, y) = walk[0]
    words: list[str] = []
    for (x0, _), (x1, y1) in pairwise(walk):
        word = f"V{y1}" if x0 == x1 else f"H{x1}"
        if words and words[-1][0] == word[0]:
            words[-1] = word
        else:
            words.append(word)
    return f"M{x} {y}{''.join(words)}z"


def panel(picture: str, shape: tuple[int, int], label: Sequence[str], prediction: Sequence[str], says: str) -> Markup:
    """One picture of a row: the slice `picture`, drawn by `slice_picture`, under outlines, from the widest region on."""
    lines = [f'<path class="edge label r{rank}" d="{path}"/>' for rank, path in enumerate(label) if path]
    lines += [f'<path class="edge prediction r{rank}" d="{path}"/>' for rank, path in enumerate(prediction) if path]
    return _slice(shape, f'<use href="#{escape(picture)}"/>{"".join(lines)}', says)


def slice_picture(picture: str, shape: tuple[int, int], png: bytes, says: str) -> Markup:
    """The bare slice. Its PNG is embedded here under the id `picture`, once; the panels beside it point to it."""
    height, width = shape
    data = base64.b64encode(png).decode()
    image = f'<image id="{escape(picture)}" width="{width}" height="{height}" href="data:image/png;base64,{data}"/>'
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
