"""Charts: every scan a point, drawn as inline SVG of our own. Numbers in, markup out; no file, no table is known here.

Why no library: all points of a state are *one* SVG path (`M12.3 45.6h0`, a dot by its round line end), so 1,000 scans take
15 kB and one element where matplotlib's SVG takes 119 kB and 1,000 (at 100,000: 1.3 MB in 0.8 s against 10.7 MB in 9.3 s), stay
sharp, linked, in the page's light, dark and print colours, and print as vectors. Matplotlib's PNG is none of that, and the
interactive libraries bring hundreds of kB (Vega) to 4.5 MB (Plotly) of script: more than the whole page may weigh.

Colours follow one rule on the whole page: blue is the label, orange the prediction, grey is where both are. Shapes say the
same again for those who cannot tell the colours apart: dot = both, triangle = missed, square = spurious. The page's script
finds the point under the pointer, or under the arrow keys, from the path itself; `Chart.rows` says which scan each one is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from brainseg.report.figures import log_ticks

Floats = NDArray[np.float64]
Drawn = tuple[str, str, Sequence[int]]
"""Class, path and table rows of the points of one state."""

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 18, 38
GUIDED = 62
"""Margin on the right where reference lines have words: beside the points, never over them."""

ROW, TALLEST_ROW, ROW_HEAD = 58.0, 110.0, 15.0
"""Least and largest height of a group in a strip chart, and the height of the line of words above its points."""

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill an interval evenly: a jitter that never clumps and is the same each time."""

INFINITE_AT, FINITE_TO = 0.97, 0.88
"""Where on an axis infinite values stand, and how far the finite ones reach then."""

ZERO_AT, FINITE_FROM = 0.03, 0.1
"""The same of zeros, which have no place on a logarithmic axis."""

CURVE_POINTS, LINE = 200, 12.5
"""Points of a drawn curve; height of a line of small words."""

DRAWN = (("both", "both"), ("missed", "missed"), ("spurious", "spurious"), ("no_label", "both"))
"""State -> the class it is drawn in; scans where both masks are empty have no place in a chart."""


@dataclass(frozen=True)
class Axis:
    """A scale from `ticks[0]` to `ticks[-1]`; `infinite` keeps room at its end for infinite values, `zero` before it for 0."""

    ticks: Sequence[float]
    title: str
    log: bool = False
    infinite: bool = False
    zero: bool = False

    def place(self, values: Any) -> Floats:
        """Shares 0..1 along the axis; what lies outside is put at its end, what is infinite or 0 beyond it."""
        array = known = np.asarray(values, np.float64)
        low, high = float(self.ticks[0]), float(self.ticks[-1])
        if self.log:
            array = np.log10(np.maximum(array, low))
            low, high = math.log10(low), math.log10(high)
        first, last = FINITE_FROM if self.zero else 0.0, FINITE_TO if self.infinite else 1.0
        shares = first + np.clip((array - low) / (high - low), 0, 1) * (last - first)
        shares = np.where(np.isinf(known), INFINITE_AT, shares) if self.infinite else shares
        return np.where(known == 0, ZERO_AT, shares) if self.zero else shares

    def marks(self) -> list[tuple[float, str]]:
        """Where along the axis words stand, and the words."""
        found = [(float(share), self.words(tick)) for share, tick in zip(self.place(self.ticks), self.ticks, strict=True)]
        return [*([(ZERO_AT, "0")] if self.zero else []), *found, *([(INFINITE_AT, "∞")] if self.infinite else [])]

    def words(self, tick: float) -> str:
        """A tick in at most six letters: 0.05, −200, 5,000, 20k, 1M."""
        size = abs(tick)
        short = f"{size / 1e6:,g}M" if size >= 1e6 else f"{size / 1000:g}k" if size >= 1e4 else f"{size:,g}"
        return f"−{short}" if tick < 0 else short


@dataclass(frozen=True)
class Dots:
    """Points at (x, y) in the axes' units, the state of each, and the row of the page's table it belongs to (-1: none)."""

    x: Floats
    y: Floats
    states: NDArray[Any]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Chart:
    """A drawing, and for each path of points in it the table rows of its points."""

    svg: Markup
    rows: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Strip:
    """One group of a strip chart. `spread` is over all its values; `dots.x` may be a sample, jittered here."""

    name: str
    note: str
    spread: Mapping[str, Any]
    dots: Dots
    density: Sequence[int] = field(default=())


def even_axis(low: float, high: float, title: str, *, most: int = 6) -> Axis:
    """A linear axis in steps of 1, 2 or 5 times a power of ten that encloses the range."""
    width = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(width))
    step = next(s for s in (power * f for f in (0.1, 0.2, 0.5, 1, 2, 5, 10)) if width / s <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis([float(f"{n * step:.12g}") for n in range(first, max(last, first + 1) + 1)], title)


def log_axis(values: Any, title: str, *, infinite: bool = False) -> Axis:
    """A logarithmic axis around the positive finite values, with a place for zeros where there are any."""
    array = np.asarray(values, np.float64)
    zero = bool(np.any(array == 0))
    known = array[np.isfinite(array) & (array > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 10.0)
    return Axis(log_ticks(low, high), title, log=True, infinite=infinite, zero=zero)


def share_axis(title: str) -> Axis:
    """0 to 1, as of Dice."""
    return Axis((0, 0.2, 0.4, 0.6, 0.8, 1), title)


def fitting_axis(values: Any, title: str) -> Axis:
    """Logarithmic where positive values span more than a factor of 30, linear otherwise."""
    array = np.asarray(values, np.float64)
    known = array[np.isfinite(array)]
    if not known.size:
        return even_axis(0, 1, title)
    if known.min() > 0 and known.max() / known.min() > 30:
        return log_axis(known, title)
    return even_axis(min(0.0, float(known.min())), float(known.max()), title)


# --- charts ---------------------------------------------------------------------------------------------------------


def strips(groups: Sequence[Strip], axis: Axis, says: str) -> Chart:
    """Groups below one another: box of the quartiles with whiskers to the 5th and 95th percentile, and every point jittered."""
    each = row_height(len(groups))
    height = len(groups) * each + BOTTOM
    parts = [_below(axis, height - BOTTOM, top=2.0, left=8)]
    drawn: list[Drawn] = []
    boxes: list[str] = []
    for number, group in enumerate(groups):
        top, half = number * each, (each - ROW_HEAD) / 2
        boxes += _box(group, axis, top, half)
        places = axis.place(group.dots.x)
        ys = top + ROW_HEAD + half + (half - 5) * _jitter(places)
        drawn += _paths(group.dots, _x(places, 8), ys, radius=_radius(len(group.dots.x)))
    return _chart(parts, drawn, says, height, boxes)


def row_height(groups: int) -> float:
    """Of each group of a strip chart: a few groups fill the height of the charts beside them."""
    return min(TALLEST_ROW, max(ROW, (HEIGHT - BOTTOM) / max(groups, 1)))


def _box(group: Strip, axis: Axis, top: float, half: float) -> list[str]:
    middle = top + ROW_HEAD + half
    name = group.name if len(group.name) <= 30 else f"{group.name[:29]}…"
    parts = [_text(8, top + 12, name, "start", "name"), _text(WIDTH - RIGHT, top + 12, group.note, "end", "tick")]
    if group.density:
        parts.append(_violin(group.density, middle, half - 4))
    if group.spread["median"] is None:
        return parts
    p5, q1, median, q3, p95 = (
        float(x) for x in _x(axis.place([group.spread[k] for k in ("p5", "q1", "median", "q3", "p95")]), 8)
    )
    parts.append(_line(p5, middle, p95, middle, "whisker"))
    parts.append(f'<rect class="box" x="{_n(q1)}" y="{_n(middle - 13)}" width="{_n(max(q3 - q1, 0.5))}" height="26" rx="2"/>')
    return [*parts, _line(median, middle - 15, median, middle + 15, "middle")]


def _violin(density: Sequence[int], middle: float, half: float) -> str:
    """How many scans lie where, of all of them, as a symmetric outline."""
    tallest, number = max(max(density), 1), len(density)
    xs = _x(np.repeat(np.arange(number + 1) / number, 2)[1:-1], 8)
    ys = np.repeat(half * np.array(density) / tallest, 2)
    upper = [f"{_n(x)} {_n(middle - y)}" for x, y in zip(xs, ys, strict=True)]
    lower = [f"{_n(x)} {_n(middle + y)}" for x, y in zip(xs[::-1], ys[::-1], strict=True)]
    return f'<path class="violin" d="M{"L".join(upper + lower)}z"/>'


def _jitter(shares: Floats) -> Floats:
    """Offsets in -1..1: wide where points are dense, none where one stands alone."""
    if not shares.size:
        return shares
    bins = np.minimum((shares * 40).astype(np.int64), 39)
    counts = np.bincount(bins, minlength=40)
    order = np.argsort(shares, kind="stable")
    spread = np.empty(shares.size)
    spread[order] = (np.arange(shares.size) * GOLDEN) % 1
    widest = max(int(counts.max()), 8)
    return (2 * spread - 1) * np.sqrt((counts[bins] - 1) / widest)


@dataclass(frozen=True)
class Guide:
    """A reference line at a value of the y axis (or the diagonal), with words at its end."""

    at: float | None
    words: str = ""
    css: str = "median"


def scatter(dots: Dots, axes: tuple[Axis, Axis], says: str, guides: Sequence[Guide] = (), note: str = "") -> Chart:
    """Points over two axes, with reference lines. `note` says of how many scans the points are a sample."""
    x, y = axes
    right = GUIDED if any(guide.words for guide in guides) else RIGHT
    parts = [_below(x, HEIGHT - BOTTOM, title=f"{x.title}{note}", right=right), _beside(y, right)]
    parts += [_guide(guide, axes, right) for guide in guides]
    parts += _beside_guides([guide for guide in guides if guide.words], y, WIDTH - right + 5)
    drawn = _paths(dots, _x(x.place(dots.x), right=right), _y(y.place(dots.y)), radius=_radius(len(dots.x)))
    return _chart(parts, drawn, says, HEIGHT)


def _guide(guide: Guide, axes: tuple[Axis, Axis], right: float) -> str:
    if guide.at is None:
        low, high = max(a.ticks[0] for a in axes), min(a.ticks[-1] for a in axes)
        (x1, x2), (y1, y2) = _x(axes[0].place([low, high]), right=right), _y(axes[1].place([low, high]))
        return _line(x1, y1, x2, y2, guide.css)
    y = float(_y(axes[1].place([guide.at]))[0])
    return _line(LEFT, y, WIDTH - right, y, guide.css)


def _beside_guides(guides: Sequence[Guide], axis: Axis, left: float) -> list[str]:
    """The words of reference lines at their right ends, from the lowest up, pushed apart where they would touch."""
    drawn, below = [], float(HEIGHT)
    for guide in sorted(guides, key=lambda guide: guide.at or 0.0):
        y = min(float(_y(axis.place([guide.at]))[0]) + 3.5, below - LINE)
        drawn.append(_text(left, y, guide.words, "start", "note"))
        below = y
    return drawn


def curves(here: Floats, there: Floats, axis: Axis, says: str) -> Chart:
    """The cumulative shares of two sets of values: this cohort's solid, the reference's dashed."""
    parts = [_below(axis, HEIGHT - BOTTOM), _beside(share_axis("share of scans below"))]
    for values, css in ((there, "curve there"), (here, "curve here")):
        if values.size:
            shares = np.linspace(0, 1, min(CURVE_POINTS, values.size))
            xs, ys = _x(axis.place(np.quantile(values, shares))), _y(shares)
            steps = "L".join(f"{_n(x)} {_n(y)}" for x, y in zip(xs, ys, strict=True))
            parts.append(f'<path class="{css}" d="M{steps}"/>')
    return _chart(parts, [], says, HEIGHT)


def columns(counts: Sequence[int], axis: Axis, title: str, says: str) -> Chart:
    """Counts as columns side by side, evenly over the axis below."""
    up = even_axis(0, max([*counts, 1]), title)
    width = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
    gap = min(1.0, width / 5)
    tops = _y(up.place(np.array(counts, np.float64)))
    foot = HEIGHT - BOTTOM
    bars = [
        f"M{_n(LEFT + i * width + gap / 2)} {foot}v{_n(top - foot)}h{_n(width - gap)}V{foot}z" for i, top in enumerate(tops)
    ]
    return _chart(
        [_beside(up), _below(axis, HEIGHT - BOTTOM), f'<path class="columns" d="{"".join(bars)}"/>'], [], says, HEIGHT
    )


# --- their parts ----------------------------------------------------------------------------------------------------


def _x(shares: Floats, left: float = LEFT, right: float = RIGHT) -> Floats:
    return left + shares * (WIDTH - left - right)


def _y(shares: Floats) -> Floats:
    return HEIGHT - BOTTOM - shares * (HEIGHT - TOP - BOTTOM)


def _n(value: float) -> str:
    """A coordinate to a tenth of a pixel, without a trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def _radius(number: int) -> float:
    return 3.4 if number <= 150 else 2.6 if number <= 800 else 1.9 if number <= 2000 else 1.5


def _paths(dots: Dots, xs: Floats, ys: Floats, radius: float) -> list[Drawn]:
    """Class, path and rows of the points of each state."""
    drawn: list[Drawn] = []
    known = ~(np.isnan(xs) | np.isnan(ys))
    for state, css in DRAWN:
        chosen = np.flatnonzero((dots.states == state) & known)
        if chosen.size:
            r = _n(radius)
            shape = f"m-{r}-{r}h{_n(2 * radius)}l-{r} {_n(2 * radius)}z" if css == "missed" else "h0"
            path = "".join(f"M{_n(xs[i])} {_n(ys[i])}{shape}" for i in chosen)
            width = "" if css == "missed" else f'" stroke-width="{_n(2 * radius)}'
            drawn.append((f"dots {css}{width}", path, [int(row) for row in dots.rows[chosen]]))
    return drawn


def _chart(parts: Sequence[str], drawn: Sequence[Drawn], says: str, height: float, over: Sequence[str] = ()) -> Chart:
    paths = "".join(f'<path class="{css}" d="{path}"/>' for css, path, _ in drawn)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{escape(says)}">'
    return Chart(Markup(f"{head}{''.join(parts)}{paths}{''.join(over)}</svg>"), [rows for _, _, rows in drawn])


def _below(
    axis: Axis, bottom: float, *, top: float = TOP, left: float = LEFT, right: float = RIGHT, title: str | None = None
) -> str:
    """Ticks, faint lines up from them, and the title of the horizontal axis."""
    drawn = [_line(left, bottom, WIDTH - right, bottom, "axis")]
    for share, words in axis.marks():
        x = float(_x(np.array(share), left, right))
        drawn += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 14, words)]
    return "".join(
        [*drawn, _text((left + WIDTH - right) / 2, bottom + 31, axis.title if title is None else title, css="title")]
    )


def _beside(axis: Axis, right: float = RIGHT) -> str:
    """Ticks, faint lines from them, and above all of it the title of the vertical axis."""
    drawn = []
    for share, words in axis.marks():
        y = float(_y(np.array(share)))
        drawn += [_line(LEFT, y, WIDTH - right, y, "grid"), _text(LEFT - 5, y + 3.5, words, "end")]
    return "".join([*drawn, _text(2, 8, axis.title, "start", "title")])


def _text(x: float, y: float, words: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text class="{css}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'
