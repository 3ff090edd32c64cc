"""Plots: which charts a page shows of a cohort, each made from the rows behind the figures beside it.

A large cohort is drawn as its quartiles and its density, which are over all scans, under a fair sample of points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.report import charts, drift, versus
from brainseg.report.charts import Axis, Chart, Dots, Guide, Strip
from brainseg.report.cohort import carried
from brainseg.report.facts import Cohort
from brainseg.report.groups import grouping_columns
from brainseg.report.rows import (
    distance_unit,
    five_numbers,
    labelled_rows,
    of_region,
    volume_columns,
    volume_unit,
    volumes,
)

Floats = NDArray[np.float64]
DENSE = 1500
"""From so many points on a group also shows its density."""

MOST_DOTS_OF_GROUPS = 1500
"""With more points than this subgroups show quartiles and density alone: there are dozens of such charts."""

MOST_CURVES = 6
BINS = 60


@dataclass(frozen=True)
class Plot:
    """A chart under its caption; `key` names it for the page's script, `region` says whose it is (None: of all)."""

    key: str
    title: str
    chart: Chart
    region: str | None = None


@dataclass(frozen=True)
class Sample:
    """Which scans may be drawn as points, and where each stands in the page's table (-1: not in it)."""

    place: NDArray[np.int64]
    drawn: NDArray[np.bool_]
    of_all: bool

    @classmethod
    def of(cls, cohort: Cohort) -> "Sample":
        shown, sample = carried(cohort)
        place = np.full(cohort.scans.num_rows, -1, np.int64)
        place[shown] = np.arange(shown.size)
        drawn = np.zeros(cohort.scans.num_rows, bool)
        drawn[sample] = True
        return cls(place, drawn, shown.size == sample.size)

    def note(self, drawn: int, known: int) -> str:
        """What an axis says where not every scan is drawn."""
        return f" · {drawn:,} of {known:,} scans drawn" if drawn < known else ""


def _dots(part: pa.Table, x: Any, y: Any, sample: Sample) -> Dots:
    """The points of those rows that may be drawn and have both values."""
    scans = part["row"].to_numpy()
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    chosen = sample.drawn[scans] & ~np.isnan(x) & ~np.isnan(y)
    states = np.asarray(part["state"].filter(pa.array(chosen)).to_pylist(), dtype=object)
    return Dots(x[chosen], y[chosen], states, sample.place[scans[chosen]])


# --- with labels ----------------------------------------------------------------------------------------------------


def labelled_plots(cohort: Cohort, summary: Mapping[str, Any], sample: Sample) -> list[Plot]:
    """Of the leading split the distribution of Dice, and per region Dice, HD95, volumes and trust against one another."""
    split = summary["headline"]
    agreement = {entry["region"]: entry for entry in summary["volume_agreement"]}
    unit = distance_unit(labelled_rows(cohort, split, columns=["prediction_volume_mm3"]))
    dice: list[Strip] = []
    away: list[Strip] = []
    found: list[Plot] = []
    for number, (region, entry) in enumerate(agreement.items()):
        part = _drawn_rows(cohort, split, region, f"hd95_{unit}")
        dice.append(_strip(part, region, sample))
        away.append(_strip(part, region, sample, part[f"hd95_{unit}"].to_numpy(), density=False))
        found += [
            Plot(f"volume-{number}", "Dice against the label's volume", _dice_by_volume(part, sample), region),
            Plot(f"bland-{number}", "Bland–Altman of the volumes", _bland_altman(part, entry, sample), region),
            Plot(f"hd95-{number}", "HD95 against the label's volume", _hd95_by_volume(part, sample), region),
            Plot(f"trust-{number}", "Dice against the network's own trust", _dice_by_trust(part, sample), region),
        ]
    dices = charts.strips(dice, charts.share_axis("Dice"), "Dice of every scan by region")
    distances = labelled_rows(cohort, split, columns=[f"hd95_{unit}"])[f"hd95_{unit}"].to_numpy()
    axis = charts.log_axis(distances, f"HD95 ({unit})", infinite=True)
    hd95 = charts.strips(away, axis, "HD95 of every scan by region; missed and spurious tumours are infinite")
    return [Plot("dice", "Dice of every scan", dices), Plot("hd95", "HD95 of every scan", hd95), *found]


def _drawn_rows(cohort: Cohort, split: str, region: str, distance: str) -> pa.Table:
    """The rows of a region with the columns that its charts need, in the units that they have."""
    part = labelled_rows(cohort, split, region, ["prediction_volume_mm3"])
    figures = ("dice", "mean_probability", distance, f"hd95_{distance_unit(part)}", *volume_columns(volume_unit(part)[0]))
    return labelled_rows(cohort, split, region, list(dict.fromkeys(["row", "state", "prediction_volume_mm3", *figures])))


def _strip(part: pa.Table, name: str, sample: Sample, values: Any = None, *, dots: bool = True, density: bool = True) -> Strip:
    """A group of rows by a figure, Dice if none is given; with its density, if there are many, for a figure from 0 to 1."""
    values = part["dice"].to_numpy() if values is None else values
    spread, number = five_numbers(values), int(np.count_nonzero(~np.isnan(values)))
    chosen = _dots(part, values, np.zeros(len(values)), sample) if dots else _dots(part.slice(0, 0), [], [], sample)
    heights: tuple[int, ...] = ()
    if density and number and (number > DENSE or not dots):
        heights = tuple(int(n) for n in np.histogram(values[~np.isnan(values)], BINS, (0, 1.0))[0])
    if number:
        drawn = "" if sample.of_all or not dots else f", {len(chosen.x):,} drawn"
        note = f"n {number:,}{drawn} · median {_short(spread['median'])}"
    else:
        note = "none"
    return Strip(name, note, spread, chosen, heights)


def _short(value: Any) -> str:
    """A figure in three digits: 0.700, 0.0059, 22.8, 3,141."""
    if math.isinf(value):
        return "∞"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1 or not value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _dice_by_volume(part: pa.Table, sample: Sample) -> Chart:
    unit, divisor = volume_unit(part)
    size = volumes(part, "label", unit, divisor)
    size = np.where(size > 0, size, np.nan)
    dots = _dots(part, size, part["dice"].to_numpy(), sample)
    known = int(np.count_nonzero(~np.isnan(size)))
    axes = (charts.log_axis(size, f"label volume ({unit})"), charts.share_axis("Dice"))
    return charts.scatter(dots, axes, f"Dice of {known} scans over the label's volume", note=sample.note(len(dots.x), known))


def _bland_altman(part: pa.Table, entry: Mapping[str, Any], sample: Sample) -> Chart:
    unit, divisor = volume_unit(part)
    part = part.filter(pc.not_equal(part["state"], "both_empty"))
    answer, truth = (volumes(part, side, unit, divisor) for side in ("prediction", "label"))
    difference, middle = answer - truth, (answer + truth) / 2
    known = difference[~np.isnan(difference)]
    limits = [x for x in entry["limits"] if x is not None]
    ends = [*limits, *(known.min(initial=0.0), known.max(initial=0.0))]
    axes = (
        charts.fitting_axis(middle, f"mean of the two ({unit})"),
        charts.even_axis(min(ends), max(ends), f"predicted − label volume ({unit})"),
    )
    guides = [Guide(0.0, "", "axis")]
    if entry["bias"] is not None:
        guides.append(Guide(entry["bias"], f"bias {_signed(entry['bias'], 2)}", "bias"))
        guides += [Guide(limit, _signed(limit, 1)) for limit in limits]
    dots = _dots(part, middle, difference, sample)
    note = sample.note(len(dots.x), known.size)
    return charts.scatter(dots, axes, f"Volume difference of {known.size} scans over their mean volume", guides, note)


def _signed(value: float, digits: int) -> str:
    return f"{value:+,.{digits}f}".replace("-", "−")


def _hd95_by_volume(part: pa.Table, sample: Sample) -> Chart:
    unit, divisor = volume_unit(part)
    away = distance_unit(part)
    size, distance = volumes(part, "label", unit, divisor), part[f"hd95_{away}"].to_numpy()
    size = np.where(size > 0, size, np.where(np.isnan(size), np.nan, 0.0))
    dots = _dots(part, size, distance, sample)
    known = int(np.count_nonzero(~np.isnan(distance)))
    axes = (charts.log_axis(size, f"label volume ({unit})"), charts.log_axis(distance, f"HD95 ({away})", infinite=True))
    says = f"HD95 of {known} scans over the label's volume; missed and spurious tumours are infinite"
    return charts.scatter(dots, axes, says, note=sample.note(len(dots.x), known))


def _dice_by_trust(part: pa.Table, sample: Sample) -> Chart:
    sure, dice = part["mean_probability"].to_numpy(), part["dice"].to_numpy()
    dots = _dots(part, sure, dice, sample)
    known = int(np.count_nonzero(~np.isnan(sure) & ~np.isnan(dice)))
    axes = (_probability_axis(sure), charts.share_axis("Dice"))
    return charts.scatter(dots, axes, f"Dice of {known} scans over mean probability", note=sample.note(len(dots.x), known))


def _probability_axis(values: Floats) -> Axis:
    known = values[~np.isnan(values)]
    return charts.even_axis(float(known.min(initial=1.0)) if known.size else 0.0, 1.0, "mean probability in the mask")


# --- without labels -------------------------------------------------------------------------------------------------


def trust_plots(cohort: Cohort, sample: Sample) -> list[Plot]:
    """Over all segmented scans, labels or not: predicted volumes, mean probability and entropy of every scan."""
    rows, whose = cohort.regions, cohort.regions["region"]
    unit, divisor = volume_unit(rows)
    found = []
    for key, title, log in (
        ("prediction_volume", f"predicted volume ({unit}), where something was found", True),
        ("mean_probability", "mean probability in the mask", False),
        ("mean_entropy", "mean entropy over the head (bits)", False),
    ):
        values = volumes(rows, "prediction", unit, divisor) if log else rows[key].to_numpy()
        known = values[~np.isnan(values) & (values > 0)]
        axis = charts.log_axis(known, title) if log else charts.even_axis(*_ends(known), title)
        column, strips = volume_columns(unit)[1] if log else key, []
        for region in pc.unique(whose).to_pylist():
            part = rows.where(pc.equal(whose, region), ["row", "state", column])
            one = volumes(part, "prediction", unit, divisor) if log else part[key].to_numpy()
            strips.append(_strip(part, region, sample, np.where(one > 0, one, np.nan) if log else one, density=False))
        drawn = charts.strips(strips, axis, f"{title} of every scan by region")
        found.append(Plot(f"all-{key}", _first_large(title.partition(" (")[0]), drawn))
    return found


def _first_large(words: str) -> str:
    return words[:1].upper() + words[1:]


def _ends(known: Floats) -> tuple[float, float]:
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


# --- subgroups, drift, comparison, pace -----------------------------------------------------------------------------


def group_plots(cohort: Cohort, split: str | None, regions: Sequence[str], sample: Sample) -> dict[str, list[Plot]]:
    """Column -> a chart a region: Dice within each value, or mean probability where there are no labels."""
    name = "mean_probability" if split is None else "dice"
    scans = cohort.regions["row"] if split is None else labelled_rows(cohort, split, columns=["row"])["row"]
    dots = int(np.count_nonzero(np.bincount(scans.to_numpy()))) <= MOST_DOTS_OF_GROUPS
    axis = _probability_axis(cohort.regions[name].to_numpy()) if split is None else charts.share_axis("Dice")
    found: dict[str, list[Plot]] = {}
    groupings = grouping_columns(cohort, split)
    for place, region in enumerate(regions):
        part = _measured_rows(cohort, split, region, ["row", "state", name])
        for number, (column, grouping) in enumerate(groupings.items()):
            inside = grouping.place[part["row"].to_numpy()]
            strips = [
                _strip(chosen, value, sample, chosen[name].to_numpy(), dots=dots, density=split is not None)
                for value_place, value in enumerate(grouping.values)
                if (chosen := part.filter(pa.array(inside == value_place))).num_rows
            ]
            drawn = charts.strips(strips, axis, f"{axis.title} of {region} by {column}")
            found.setdefault(column, []).append(Plot(f"group-{number}-{place}", f"{region}, by {column}", drawn, region))
    return found


def _measured_rows(cohort: Cohort, split: str | None, region: str, columns: Sequence[str]) -> pa.Table:
    """The rows of a region behind a chart: those with a label, or all of them where there is none."""
    if split is not None:
        return labelled_rows(cohort, split, region, columns)
    return cohort.regions.where(pc.equal(cohort.regions["region"], region), columns)


def drift_plots(cohort: Cohort, reference: Cohort, summary: Mapping[str, Any]) -> list[Plot]:
    """Cumulative curves of the figures that moved most; none of those that did not move."""
    pairs = {(p.figure, p.region): p for p in drift.pairs(cohort, reference)}
    found = []
    moved = [e for e in summary["drift"]["figures"] if e["ks"] is not None and e["ks"] >= drift.SIZES[0][0]]
    for number, entry in enumerate(moved[:MOST_CURVES]):
        pair = pairs[entry["figure"], entry["region"]]
        axis = charts.fitting_axis(np.concatenate([pair.here, pair.there]), entry["title"])
        title = f"{entry['region']}: {entry['title']}" if entry["region"] else _first_large(entry["title"])
        says = f"{title}: cumulative share of scans here and in the reference"
        found.append(Plot(f"drift-{number}", title, charts.curves(pair.here, pair.there, axis, says)))
    return found


def comparison_plots(cohort: Cohort, other: Cohort, regions: Sequence[str], sample: Sample) -> list[Plot]:
    """Per region Dice here over Dice in the other run; above the diagonal is better here."""
    pairs = versus.paired(cohort, other)
    places = dict(zip(cohort.scans["scan_id"].to_pylist(), range(cohort.scans.num_rows), strict=True))
    found = []
    for number, region in enumerate(regions):
        part = of_region(pairs, region)
        rows = np.array([places[scan] for scan in part["scan_id"].to_pylist()], np.int64)
        dots = _dots(part.append_column("row", pa.array(rows)), part["other"].to_numpy(), part["dice"].to_numpy(), sample)
        axes = (charts.share_axis("Dice in the other run"), charts.share_axis("Dice here"))
        note = sample.note(len(dots.x), part.num_rows)
        drawn = charts.scatter(dots, axes, f"Dice of {region} here over the other run", [Guide(None)], note)
        found.append(Plot(f"versus-{number}", f"{region}: above the line is better here", drawn, region))
    return found


def pace_plot(summary: Mapping[str, Any]) -> Plot | None:
    """Scans finished along the clock."""
    pace = summary["throughput"]
    if pace is None or not pace["spans"]["seconds_each"]:
        return None
    spans = pace["spans"]
    minutes = spans["seconds_each"] * len(spans["scans"]) / 60
    unit, whole = ("hours", minutes / 60) if minutes > 120 else ("minutes", minutes)
    even = charts.even_axis(0.0, whole, f"{unit} since the first scan")
    axis = Axis([*(t for t in even.ticks if t < 0.93 * whole), float(f"{whole:.3g}")], even.title)
    each = f"scans in {_lasting(spans['seconds_each'])}"
    return Plot("pace", "Scans finished", charts.columns(spans["scans"], axis, each, "Scans finished along the clock"))


def _lasting(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 90 else f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"
