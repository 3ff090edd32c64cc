"""Page: the cohort's numbers, charts and pictures become one HTML file that opens from any file share.

Nothing is counted here: `cohort.py` gave the numbers, `figures.py` the drawings. The template escapes all that it is
given; a figure is written as `<data value="...">`, which carries the unrounded number beside the one that is read.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from brainseg.report import figures, plots
from brainseg.report.agreement import surprise
from brainseg.report.cohort import carried_pictures, plain
from brainseg.report.facts import Cohort
from brainseg.report.gallery import Picture, choose, pictures
from brainseg.report.groups import FEWEST_PATIENTS

FOLDER = Path(__file__).parent
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
ON_SHELF = ("region", "state", "dice", "mean_probability", "label_volume_mm3", "prediction_volume_mm3")
"""Figures that stand under a picture."""


def render(cohort: Cohort, summary: Mapping[str, Any], other: Cohort | None = None, reference: Cohort | None = None) -> str:
    """The whole page as HTML text. `summary` is `cohort.summarise(cohort, other, reference)`."""
    leading = summary["headline"]
    lead = next((group for group in summary["groups"] if group["split"] == leading), None)
    regions = list(dict.fromkeys(entry["region"] for row in summary["scans"]["rows"] for entry in row["regions"]))
    sample = plots.Sample.of(cohort)
    drawn = _drawn(cohort, summary, other, reference, sample)
    shelves, pictures = _pictures(cohort, leading, regions, sample)
    flat = [plot for found in (*drawn.values(), *drawn["groups"].values()) if isinstance(found, list) for plot in found]
    table = table_data(summary["scans"])
    table["charts"] = {plot.key: plot.chart.rows for plot in flat if plot.chart.rows}
    table["pictures"] = {int(sample.place[row]): picture.data() for row, picture in pictures.items()}
    table["run"] = summary["runs"][0]["uri"]
    return template("template.html.j2").render(
        s=summary,
        titles=LEAKY_TITLES if any(run["model"]["accept_leakage"] for run in summary["runs"]) else TITLES,
        rule=RULES[summary["rule"]],
        lead=lead,
        others=[group for group in summary["groups"] if group["split"] != leading],
        plots=drawn,
        regions=regions,
        shelves=shelves,
        table=table,
        fewest_patients=FEWEST_PATIENTS,
        bar=figures.bar,
        signed=signed,
    )


def _drawn(
    cohort: Cohort, summary: Mapping[str, Any], other: Cohort | None, reference: Cohort | None, sample: plots.Sample
) -> dict[str, Any]:
    """Section -> its charts; of `groups` column -> charts."""
    names = [entry["region"] for entry in summary["trust"]]
    pace = plots.pace_plot(summary)
    return {
        "labelled": plots.labelled_plots(cohort, summary, sample) if summary["headline"] else [],
        "trust": plots.trust_plots(cohort, sample) if names else [],
        "groups": plots.group_plots(cohort, summary["headline"], names, sample) if names else {},
        "versus": plots.comparison_plots(cohort, other, names, sample) if other else [],
        "drift": plots.drift_plots(cohort, reference, summary) if reference else [],
        "pace": [pace] if pace else [],
    }


def _pictures(
    cohort: Cohort, split: str | None, regions: Sequence[str], sample: plots.Sample
) -> tuple[list[tuple[str, list[dict[str, Any]]]], dict[int, Picture]]:
    """The shelves with what stands on them, and the pictures of the scans that the page carries one by one."""
    shelves = choose(cohort, split)
    first = [row for _, rows in shelves for row in rows]
    wanted = carried_pictures(cohort)
    found = pictures(cohort, [*first, *wanted], regions)
    odd = surprise(cohort)
    filled = [(t, [_on_shelf(cohort, row, found[row], float(odd[row])) for row in rows if row in found]) for t, rows in shelves]
    return [(t, shelf) for t, shelf in filled if shelf], {row: found[row] for row in found if sample.place[row] >= 0}


def _on_shelf(cohort: Cohort, row: int, picture: Picture, odd: float) -> dict[str, Any]:
    scan_id = cohort.scans["scan_id"][row].as_py()
    entries = cohort.regions.where(pc.equal(cohort.regions["row"], row), ON_SHELF).to_pylist()
    panels = picture.panels(f"slice-{row}", scan_id)
    return {"scan_id": scan_id, "regions": plain(entries), "panels": panels, "surprise": plain(odd)}


def template(name: str) -> Template:
    """A page's template. All it is given is escaped, and a name it is not given is an error."""
    loader = FileSystemLoader(FOLDER)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"number": number, "whole": whole, "duration": duration, "moment": moment, "small": small}
    made.filters |= {"figure": figure, "without": without}
    return made.get_template(name)


def table_data(scans: Mapping[str, Any]) -> dict[str, Any]:
    """The table of scans as its script reads it: lists rather than objects, eight digits, one entry a region in each row.

    A row is [scan, patient, split, warnings, regions, surprise], a region [state, Dice, precision, recall, HD95, label volume,
    predicted volume, probability, entropy]. Volumes in mL, HD95 in mm where all scans have a spacing, else voxels and pixels.
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
    whose = [row["scan_id"], row["patient_id"], row["split"], len(row["warnings"])]
    return [*whose, [entries.get(name) for name in names], _short(row["surprise"])]


def _table_region(entry: Mapping[str, Any], *, metric: bool) -> list[Any]:
    distance = entry["hd95_mm"] if entry["hd95_mm"] is not None else entry["hd95_px"]
    kinds = ("label_volume_mm3", "prediction_volume_mm3") if metric else ("label_voxels", "prediction_voxels")
    volumes = [entry[kind] / 1000 if metric and entry[kind] is not None else entry[kind] for kind in kinds]
    ratios, trust = [entry["dice"], entry["precision"], entry["recall"]], [entry["mean_probability"], entry["mean_entropy"]]
    return [entry["state"], *(_short(x) for x in (*ratios, distance, *volumes, *trust))]


def _short(value: Any) -> Any:
    """A number to eight digits, so that the three which are shown are rounded once; whatever else as it is."""
    return float(f"{value:.8g}") if isinstance(value, float) else value


def number(value: float | str | None, digits: int = 3) -> Markup:
    """A figure of the summary as HTML: what is read, and the unrounded value beside it."""
    if value is None:
        return Markup(f'<span class="none">{NONE}</span>')
    words = "∞" if value == "inf" else _minus(f"{value:z,.{digits}f}")
    return Markup('<data value="{}">{}</data>').format(value, words)


def figure(value: float | str | None) -> Markup:
    """A figure of any size in three digits."""
    if value is None or isinstance(value, str):
        return number(value)
    return Markup('<data value="{}">{}</data>').format(value, _minus(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"))


def _minus(words: str) -> str:
    return words.replace("-", "−")


def signed(value: float | str | None, digits: int = 3) -> Markup:
    """A difference, with its sign."""
    if value is None or isinstance(value, str):
        return number(value, digits)
    words = f"{value:+z,.{digits}f}"
    return Markup('<data value="{}">{}</data>').format(value, _minus(words) if words.strip("+0.,") else words[1:])


def small(value: float | None) -> Markup:
    """A p value: three digits, or a bound where it is smaller than anybody needs."""
    if value is None:
        return number(value)
    return Markup('<data value="{}">{}</data>').format(value, "< 0.0001" if value < 1e-4 else f"{value:.3g}")


def without(message: str | None, scan_id: str) -> str:
    """A quarantine line without the scan's name at its start, where that stands beside it already."""
    return (message or "").removeprefix(f"{scan_id}: ")


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
