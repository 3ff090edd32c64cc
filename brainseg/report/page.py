"""Page: the cohort's numbers, charts and pictures become one HTML file that opens from any file share.

Nothing is counted here: `cohort.py` gave the numbers, `figures.py` the drawings. The template escapes all that it is
given; a figure is written as `<data value="...">`, which carries the unrounded number beside the one that is read.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from brainseg.report import figures
from brainseg.report.cohort import scored_rows
from brainseg.report.facts import Cohort
from brainseg.report.gallery import gallery

TEMPLATE = Path(__file__).with_name("template.html.j2")
TITLES = {
    "test": ("Held-out test patients", "kept back from training and from every choice of the model"),
    "outside": ("Patients outside the model's split", "named in no part of it: never trained on, as far as the model records"),
    "validation": ("Validation patients", "chose the checkpoint: these figures are too kind"),
    "train": ("Seen in training", "the model learnt from these scans: this is no evaluation"),
}
LEAKY_TITLES = {
    **TITLES,
    "test": ("Held-out test scans", "not trained on, but scans of the same patients may have been"),
    "outside": ("Scans outside the model's split", "named in no part of it; their patients may have been trained on"),
    "validation": ("Validation scans", "chose the checkpoint: these figures are too kind"),
}
"""Where leakage was accepted: then nothing is said of patients."""
RULES = {
    "exclude": "mean over scans; scans where label and prediction are both empty are left out",
    "brats": "mean over scans; scans where label and prediction are both empty count 1, an infinite HD95 counts 373.13 mm",
}
NONE = "–"


def render(cohort: Cohort, summary: Mapping[str, Any]) -> str:
    """The whole page as HTML text. `summary` is `cohort.summarise(cohort)`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "whole": whole, "duration": duration, "moment": moment}
    leading = summary["headline"]
    lead = next((group for group in summary["groups"] if group["split"] == leading), None)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        s=summary,
        titles=LEAKY_TITLES if any(run["model"]["accept_leakage"] for run in summary["runs"]) else TITLES,
        rule=RULES[summary["rule"]],
        lead=lead,
        others=[group for group in summary["groups"] if group["split"] != leading],
        charts=_charts(cohort, leading, {g["region"]: g["dice"]["median"] for g in lead["regions"]}) if lead else [],
        shelves=gallery(cohort, leading),
        table=table_data(summary["scans"]),
        bar=figures.bar,
    )


def _charts(cohort: Cohort, split: str, medians: Mapping[str, float | None]) -> list[tuple[str, Markup, Markup]]:
    """Per region of `medians`: its name, the distribution of Dice, Dice against the label's volume."""
    rows = scored_rows(cohort, split)
    unit, column, scale = _volume_axis(rows)
    charts = []
    for region, median in medians.items():
        part = rows.filter(pc.and_(pc.equal(rows["region"], region), pc.is_valid(rows["dice"])))
        volumes = pc.divide(pc.cast(part[column], pa.float64()), scale).to_pylist()
        whose = zip(part["scan_id"].to_pylist(), part["state"].to_pylist(), part["dice"].to_pylist(), volumes, strict=True)
        points = [figures.Point(*values) for values in whose]
        says = f"{region}: Dice of {len(points)} scans"
        spread = figures.distribution(points, median, says)
        charts.append((region, spread, figures.dice_against_volume(points, unit, f"{says} over label volume")))
    return charts


def _volume_axis(rows: pa.Table) -> tuple[str, str, float]:
    """Unit, column and divisor of the volumes: mL where every label has a spacing, voxels otherwise."""
    known = rows["label_volume_mm3"].null_count == 0
    return ("mL", "label_volume_mm3", 1000.0) if known else ("voxels", "label_voxels", 1.0)


def table_data(scans: Mapping[str, Any]) -> dict[str, Any]:
    """The table of scans as its script reads it: lists rather than objects, four digits, one entry a region in each row.

    A row is [scan, patient, split, warnings, regions], a region [state, Dice, precision, recall, HD95, label volume,
    predicted volume, probability]. Volumes in mL and HD95 in mm where all scans have a spacing, else voxels and pixels.
    """
    rows = scans["rows"]
    names = list(dict.fromkeys(entry["region"] for row in rows for entry in row["regions"]))
    metric = all(entry["prediction_volume_mm3"] is not None for row in rows for entry in row["regions"])
    return {
        "of": scans["of"],
        "regions": names,
        "units": {"distance": "mm" if metric else "px", "volume": "mL" if metric else "voxels"},
        "rows": [_table_row(row, names, metric=metric) for row in rows],
    }


def _table_row(row: Mapping[str, Any], names: Sequence[str], *, metric: bool) -> list[Any]:
    entries = {entry["region"]: _table_region(entry, metric=metric) for entry in row["regions"]}
    return [row["scan_id"], row["patient_id"], row["split"], len(row["warnings"]), [entries.get(name) for name in names]]


def _table_region(entry: Mapping[str, Any], *, metric: bool) -> list[Any]:
    distance = entry["hd95_mm"] if entry["hd95_mm"] is not None else entry["hd95_px"]
    kinds = ("label_volume_mm3", "prediction_volume_mm3") if metric else ("label_voxels", "prediction_voxels")
    volumes = [entry[kind] / 1000 if metric and entry[kind] is not None else entry[kind] for kind in kinds]
    figures_ = [entry["dice"], entry["precision"], entry["recall"], distance, *volumes, entry["mean_probability"]]
    return [entry["state"], *(float(f"{x:.4g}") if isinstance(x, float) else x for x in figures_)]


def number(value: float | str | None, digits: int = 3) -> Markup:
    """A figure of the summary as HTML: what is read, and the unrounded value beside it."""
    if value is None:
        return Markup(f'<span class="none">{NONE}</span>')
    words = "∞" if value == "inf" else f"{value:,.{digits}f}"
    return Markup('<data value="{}">{}</data>').format(value, words)


def whole(value: int | None) -> str:
    """A count with its thousands apart."""
    return NONE if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str | None) -> str:
    """An ISO time in UTC, to the minute; what is no time is shown as it is."""
    if not text:
        return NONE
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
