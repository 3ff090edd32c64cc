"""Baselines: what the same scans score without a network, beside the model. Who does not beat both has learnt nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from brainseg.aggregate import Rule, aggregate
from brainseg.report.facts import Cohort, Run

Entry = dict[str, Any]


def baseline_figures(cohort: Cohort, split: str | None, rule: Rule) -> list[Entry]:
    """One entry a baseline and region: mean and median Dice, the mean where the label is not empty, scans, and whence.

    Measured on the scans of `split` where `evaluate` has been run; otherwise what training wrote into the model's card.
    """
    if cohort.baselines.num_rows:
        return _measured(cohort, split, rule)
    return [entry for run in cohort.runs for entry in _recorded(run)]


def _measured(cohort: Cohort, split: str | None, rule: Rule) -> list[Entry]:
    inside = cohort.baselines.filter(pc.equal(cohort.baselines["side"], split)) if split else cohort.baselines.slice(0, 0)
    return [
        {
            "name": name,
            "region": region,
            "mean": figures.dice.mean,
            "median": figures.dice.median,
            "labelled_mean": figures.labelled_dice.mean,
            "scans": figures.num_scored,
            "measured": "evaluate",
        }
        for name in pc.unique(inside["baseline"]).to_pylist()
        for region, figures in aggregate(inside.filter(pc.equal(inside["baseline"], name)), rule=rule).items()
    ]


def _recorded(run: Run) -> list[Entry]:
    found = run.info.get("baselines") or run.model.get("baselines") or {}
    return [
        {
            "name": name,
            "region": region,
            "mean": mean,
            "median": figures.get("dice_median") if isinstance(figures, Mapping) else None,
            "labelled_mean": None,
            "scans": figures.get("num_scans") if isinstance(figures, Mapping) else None,
            "measured": "training",
        }
        for name, regions in found.items()
        for region, figures in regions.items()
        if (mean := mean_dice(figures)) is not None
    ]


def mean_dice(figures: Any) -> float | None:
    """A mean Dice as a model's card holds it: a plain number, or the field of a summary."""
    mean = figures.get("dice_mean") if isinstance(figures, Mapping) else figures
    return float(mean) if isinstance(mean, int | float) else None


def not_beaten(entries: Sequence[Mapping[str, Any]], means: Mapping[str, float | None]) -> list[str]:
    """A line for each baseline that the model, whose mean Dice by region is `means`, does not beat."""
    return [
        f"The model does not beat the baseline '{words(e['name'])}' on {e['region']}: mean Dice {mean:.3f} against "
        f"{e['mean']:.3f}. It has not learnt to segment."
        for e in entries
        if (mean := means.get(e["region"])) is not None and e["mean"] is not None and mean <= e["mean"]
    ]


def words(name: str) -> str:
    """A baseline's name as a person reads it."""
    return name.replace("_", " ")
