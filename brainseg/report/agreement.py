"""Agreement: how far predicted volumes stand from the label's, and how far trust figures know a good mask from a bad one.

Bland and Altman (Lancet 1986): the difference prediction - label over the mean of the two; the mean difference is the bias,
bias +- 1.96 standard deviations are the limits within which 95 % of scans are expected.

*Surprise* says where trust and Dice disagree. Within one side of the split every scan has two ranks from 0 to 1: that of its
trust (the mean of the ranks of mean probability inside the mask, high is sure, and of mean entropy over the head, low is
sure) and that of its mean Dice. Surprise is the first minus the second: near +1 the network was sure and wrong, near -1
unsure and right. Nobody who had the trust figures alone would have found the former.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import rankdata

from brainseg.aggregate import bootstrap_interval
from brainseg.report.facts import SPLITS, Cohort
from brainseg.report.rows import (
    labelled_rows,
    mean_dice_of_scans,
    mean_per_scan,
    patients_of,
    plain,
    volume_columns,
    volume_unit,
    volumes,
)

Floats = NDArray[np.float64]
LIMIT = 1.96
FEWEST = 3
"""Below so many scans ranks say nothing."""


def volume_agreement(cohort: Cohort, split: str, regions: Sequence[str]) -> list[dict[str, Any]]:
    """Per region bias, its interval by patient, and limits of agreement, over scans where label or prediction is not empty."""
    unit, divisor = volume_unit(labelled_rows(cohort, split, columns=["prediction_volume_mm3"]))
    found = []
    for region in regions:
        part = told_apart(labelled_rows(cohort, split, region, ["row", "state", *volume_columns(unit)]))
        difference = volumes(part, "prediction", unit, divisor) - volumes(part, "label", unit, divisor)
        known = difference[~np.isnan(difference)]
        bias = float(known.mean()) if known.size else float("nan")
        spread = float(known.std(ddof=1)) if known.size > 1 else float("nan")
        found.append(
            {
                "region": region,
                "unit": unit,
                "scans": int(known.size),
                "bias": bias,
                "bias_interval": list(bootstrap_interval(difference, patients_of(cohort, part["row"]))),
                "sd": spread,
                "limits": [bias - LIMIT * spread, bias + LIMIT * spread],
                "inside_limits": int(np.count_nonzero(np.abs(known - bias) <= LIMIT * spread)),
            }
        )
    return list(plain(found))


def told_apart(rows: pa.Table) -> pa.Table:
    """Without the rows where label and prediction are both empty: nothing to agree on."""
    return rows.filter(pc.not_equal(rows["state"], "both_empty"))


def surprise(cohort: Cohort) -> Floats:
    """For each scan how much surer it was than it was right, -1 to 1; NaN where a rank is missing."""
    dice, found = mean_dice_of_scans(cohort), np.full(cohort.scans.num_rows, np.nan)
    sure, unsure = mean_per_scan(cohort, "mean_probability"), mean_per_scan(cohort, "mean_entropy")
    for split in SPLITS:
        inside = pc.equal(cohort.scans["split"], split).to_numpy() & ~np.isnan(dice)
        rows = np.flatnonzero(inside & ~(np.isnan(sure) & np.isnan(unsure)))
        if rows.size >= FEWEST:
            found[rows] = _trust_rank(sure[rows], unsure[rows]) - _rank(dice[rows])
    return found


def _trust_rank(sure: Floats, unsure: Floats) -> Floats:
    return _rank(np.nanmean(np.stack([_rank(sure), _rank(-unsure)]), axis=0))


def _rank(values: Floats) -> Floats:
    """Ranks from 0 to 1, ties shared; NaN stays."""
    ranks = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        ranks[known] = (rankdata(values[known]) - 1) / max(1, int(known.sum()) - 1)
    return ranks


def trust_against_dice(cohort: Cohort, split: str, regions: Sequence[str]) -> list[dict[str, Any]]:
    """Per region Spearman's rank correlation of mean probability, and of entropy, with Dice: whether trust can be trusted."""
    found = []
    for region in regions:
        part = labelled_rows(cohort, split, region, ["dice", "mean_probability", "mean_entropy"])
        dice = part["dice"].to_numpy()
        entry: dict[str, Any] = {"region": region}
        for name in ("mean_probability", "mean_entropy"):
            known = ~np.isnan(dice) & ~np.isnan(part[name].to_numpy())
            entry |= {name: _correlation(dice[known], part[name].to_numpy()[known]), f"{name}_scans": int(known.sum())}
        found.append(entry)
    return found


def _correlation(one: Floats, other: Floats) -> float | None:
    """Spearman's rho: Pearson's of the ranks; None where there is nothing to rank."""
    if one.size < FEWEST or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
