"""Charts: every scan is drawn once, where its figures say, and the page's script can tell whose point it is."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainseg.report import charts
from brainseg.report.charts import Dots, Strip
from brainseg.report.rows import five_numbers

STATES = np.array(["both", "missed", "spurious", "both_empty", "no_label"], dtype=object)


def dots(number, seed=0):
    rng = np.random.default_rng(seed)
    return Dots(rng.random(number), rng.random(number), STATES[rng.integers(0, 5, number)], np.arange(number) + 100)


def places(svg):
    """The points of each path, (x, y)."""
    paths = re.findall(r'<path class="dots [^"]*"[^>]*? d="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"M([-\d.]+) ([-\d.]+)", path)] for path in paths]


@given(st.integers(0, 60), st.integers(0, 99))
def test_a_scatter_plot_draws_each_scan_once_at_its_place(number, seed):
    points = dots(number, seed)
    chart = charts.scatter(points, (charts.share_axis("x"), charts.share_axis("y")), "all")
    found = places(str(chart.svg))
    assert [len(path) for path in found] == [len(rows) for rows in chart.rows]
    drawn = {row: place for path, rows in zip(found, chart.rows, strict=True) for row, place in zip(rows, path, strict=True)}
    assert set(drawn) == {int(r) for r, s in zip(points.rows, points.states, strict=True) if s != "both_empty"}
    for x, y, row in zip(points.x, points.y, points.rows, strict=True):
        if int(row) in drawn:
            assert drawn[int(row)] == pytest.approx((42 + x * (360 - 42 - 14), 236 - 38 - y * (236 - 38 - 18)), abs=0.051)


@given(st.lists(st.floats(0, 1), max_size=80))
def test_a_strip_holds_every_point_inside_its_own_row(values):
    array = np.array(values)
    known = Dots(array, np.zeros(len(array)), np.array(["both"] * len(array), dtype=object), np.arange(len(array)))
    strip = Strip("name", "note", five_numbers(array), known)
    chart = charts.strips([strip, strip], charts.share_axis("Dice"), "all")
    ys = [y for path in places(str(chart.svg)) for _, y in path]
    assert len(ys) == 2 * len(values)
    each = charts.row_height(2)
    assert all(charts.ROW_HEAD <= y <= each for y in ys[: len(values)])
    assert all(each + charts.ROW_HEAD <= y <= 2 * each for y in ys[len(values) :])


def test_infinite_distances_stand_beyond_every_finite_one_and_zeros_before():
    axis = charts.log_axis([0.5, 3.0, np.inf, 80.0, 0.0], "HD95", infinite=True)
    shares = axis.place([0.0, axis.ticks[0], 0.5, 80.0, axis.ticks[-1], np.inf])
    assert 0 <= shares[0] < shares[1] <= shares[2] < shares[3] <= shares[4] < shares[5] <= 1
    assert [words for _, words in axis.marks()][:: len(axis.ticks) + 1] == ["0", "∞"]
    assert "0" not in dict(charts.log_axis([0.5, 80.0], "HD95").marks()).values()


@given(st.lists(st.integers(-100_000, 100_000), min_size=1, max_size=4))
def test_the_words_of_reference_lines_never_touch_and_keep_their_order(values):
    guides = [charts.Guide(value, f"line {value}") for value in values]
    axes = (charts.share_axis("x"), charts.even_axis(min(values), max(values), "y"))
    drawn = str(charts.scatter(dots(3), axes, "all", guides).svg)
    ys = [float(y) for y in re.findall(r'<text class="note" x="[\d.]+" y="([-\d.]+)"', drawn)]
    assert len(ys) == len(values)
    assert all(one - other >= 12.3 for one, other in pairwise(ys))
    assert re.findall(r">line ([^<]*)<", drawn) == [str(value) for value in sorted(values)]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_even_axes_enclose_their_range_with_few_ticks(low, width):
    ticks = charts.even_axis(low, low + width, "x").ticks
    assert list(ticks) == sorted(ticks)
    assert 2 <= len(ticks) <= 8
    slack = 1e-6 * (abs(low) + width)
    assert ticks[0] <= low + slack
    assert low + width <= ticks[-1] + slack


def test_a_point_of_a_hundred_thousand_costs_less_than_twenty_bytes():
    number = 100_000
    chart = charts.scatter(dots(number), (charts.share_axis("x"), charts.share_axis("y")), "all")
    assert len(chart.svg) < 20 * number
    assert str(chart.svg).count("<") < 120


@given(st.text(max_size=30))
def test_no_name_becomes_markup(name):
    strip = Strip(name, name, five_numbers(np.array([0.5])), dots(0))
    chart = charts.strips([strip], charts.share_axis(name), name)
    tame = charts.strips([Strip("a", "a", five_numbers(np.array([0.5])), dots(0))], charts.share_axis("a"), "a")
    assert re.findall(r"<\w+", str(chart.svg)) == re.findall(r"<\w+", str(tame.svg))
