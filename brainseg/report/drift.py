"""Drift: this cohort beside a reference run, figure by figure, without a label: have scans or answers changed?

Each figure is compared as a distribution: the two-sample Kolmogorov-Smirnov statistic (the largest gap between the two
cumulative curves, 0 to 1) with its n, and words that weigh size before chance: in a large cohort everything is
significant. p values are multiplied by the number of figures compared (Bonferroni). Intensities are compared as stored, before
normalisation: a scanner that is changed or set anew shows there first, even where the network does not mind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from brainseg.report.brightness import brightness
from brainseg.report.facts import Cohort
from brainseg.report.rows import five_numbers, plain, volume_unit, volumes

Floats = NDArray[np.float64]
FEWEST = 20
"""Below so many values on one side nothing is said."""

CHANCE = 0.01
SIZES = ((0.1, "alike"), (0.2, "slightly different"), (0.4, "clearly different"), (1.01, "another population"))
"""Words for the Kolmogorov-Smirnov statistic below each bound."""

OF_REGIONS = ("mean_probability", "mean_entropy", "lesions_prediction", "outside_head_fraction")
NEEDED = ("prediction_volume_mm3", "prediction_voxels", *OF_REGIONS)
TITLES = {
    "prediction_volume": "predicted volume",
    "mean_probability": "mean probability in the mask",
    "mean_entropy": "mean entropy (bits)",
    "lesions_prediction": "components",
    "outside_head_fraction": "fraction outside the head",
    "slices": "slices",
    "spacing_between_slices": "spacing between slices (mm)",
    "spacing_in_plane": "spacing in the plane (mm)",
    "modalities_missing": "modalities missing",
    "intensity_mean": "mean intensity in the head, as stored",
    "intensity_sd": "standard deviation of intensity, as stored",
}


@dataclass(frozen=True)
class Pair:
    """One figure here and there; `region` (for intensities: the modality) is None where it is one of the scan."""

    figure: str
    region: str | None
    here: Floats
    there: Floats


def drift(cohort: Cohort, reference: Cohort) -> dict[str, Any]:
    """What was compared with what, and one entry a figure, the largest difference first."""
    compared = pairs(cohort, reference)
    known = {pair.figure for pair in compared}
    entries = [_compared(pair, len(compared)) for pair in compared]
    entries.sort(key=lambda e: (e["ks"] is None, -(e["ks"] or 0.0)))
    return {
        "reference": [run.uri for run in reference.runs],
        "scans": cohort.scans.num_rows,
        "reference_scans": reference.scans.num_rows,
        "intensities": "intensity_mean" in known,
        "figures": list(plain(entries)),
    }


def pairs(cohort: Cohort, reference: Cohort) -> list[Pair]:
    """Every figure that both cohorts hold."""
    here, there = _figures(cohort), _figures(reference)
    unit = {name[2] for side in (here, there) for name in side if name[0] == "prediction_volume"}
    if len(unit) > 1:  # one side has no spacing: voxels are all that both know
        here, there = _figures(cohort, "voxels"), _figures(reference, "voxels")
    return [Pair(key[0], key[1], values, there[key]) for key, values in here.items() if key in there]


def _figures(cohort: Cohort, unit: str | None = None) -> Mapping[tuple[str, str | None, str], Floats]:
    """(figure, region, unit) -> its known values."""
    found: dict[tuple[str, str | None, str], Floats] = {}
    rows = cohort.regions.select(["region", "prediction_volume_mm3"])
    measured, divisor = volume_unit(rows)
    measured, divisor = (unit, 1.0) if unit else (measured, divisor)
    for region in pc.unique(cohort.regions["region"]).to_pylist():
        part = cohort.regions.where(pc.equal(rows["region"], region), NEEDED)
        found["prediction_volume", region, measured] = volumes(part, "prediction", measured, divisor)
        for name in OF_REGIONS:
            found[name, region, ""] = part[name].cast(pa.float64()).to_numpy()
    ok = cohort.scans.filter(pc.equal(cohort.scans["status"], "ok"))
    found["slices", None, ""] = _element(ok["shape"], 0)
    found["spacing_between_slices", None, ""] = _element(ok["spacing_mm"], 0)
    found["spacing_in_plane", None, ""] = _element(ok["spacing_mm"], 1)
    for (kind, modality), values in brightness(cohort).items():
        found[f"intensity_{kind}", modality, ""] = values
    found["modalities_missing", None, ""] = pc.list_value_length(ok["modalities_missing"]).cast(pa.float64()).to_numpy()
    return {key: values[~np.isnan(values)] for key, values in found.items()}


def _element(column: pa.ChunkedArray, index: int) -> Floats:
    """One element of each list; NaN where the list is null."""
    lists = column.filter(pc.is_valid(column))
    values = pc.list_element(lists, index).cast(pa.float64()) if len(lists) else pa.array([], pa.float64())
    return np.asarray(values.to_numpy(), np.float64)


def _compared(pair: Pair, number: int) -> dict[str, Any]:
    enough = min(pair.here.size, pair.there.size) >= FEWEST
    ks = p = None
    if enough:
        found = ks_2samp(pair.here, pair.there, method="asymp")
        ks, p = float(found.statistic), min(1.0, float(found.pvalue) * number)
    return {
        "figure": pair.figure,
        "title": TITLES[pair.figure],
        "region": pair.region,
        "here": five_numbers(pair.here),
        "there": five_numbers(pair.there),
        "ks": ks,
        "p": p,
        "words": _words(pair, ks, p),
    }


def _words(pair: Pair, ks: float | None, p: float | None) -> str:
    """What a reader should make of it: size first, then chance, then the direction."""
    if not pair.here.size or not pair.there.size:
        return "not known on both sides"
    if ks is None or p is None:
        return f"too few to say: under {FEWEST} on a side"
    if ks >= SIZES[0][0] and p >= CHANCE:
        return "no difference that chance would not make"
    size = next(words for bound, words in SIZES if ks < bound)
    here, there = float(np.median(pair.here)), float(np.median(pair.there))
    way = "" if size == "alike" or here == there else ", higher here" if here > there else ", lower here"
    return size + way
