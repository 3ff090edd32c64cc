"""Comparison: two runs on the same scans, pair by pair; their difference, its interval, and whether it could be chance."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.stats import wilcoxon

from brainseg.aggregate import BRATS_INFINITE_MM, OVERLAP, bootstrap_interval, float_column, patient_codes, patient_means


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same scans: `difference` is the mean of a - b over scans, with its 95 % interval.

    `wilcoxon_p` is two-sided, on the patients' mean differences, because scans of one patient are not independent.
    `num_left_out` pairs have a null, such as the Dice where both runs rightly found nothing; `num_unmatched` scans stand in one
    run only; `num_infinite` pairs hold an infinite distance, which counted as `infinite_as`; `num_unnamed` scans name no
    patient, and count as one of their own.
    """

    num_pairs: int
    num_patients: int
    difference: float
    interval: tuple[float, float]
    wilcoxon_p: float
    num_left_out: int = 0
    num_unmatched: int = 0
    num_infinite: int = 0
    num_unnamed: int = 0
    infinite_as: float | None = None


def paired_comparison(
    values_a: ArrayLike,
    values_b: ArrayLike,
    patients: Sequence[str | None] | NDArray[Any],
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> Comparison:
    """Compare two runs scan by scan (a - b); pairs in which either is null are left out.

    Raises ValueError for infinite values: give infinite distances a stand-in first, or they decide everything.
    """
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a.shape != b.shape or len(a) != len(patients):
        raise ValueError(f"{len(a)} and {len(b)} values for {len(patients)} patients; expected one of each a scan")
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError("an infinite value cannot be compared; replace it by a stand-in first")
    differences = a - b
    means = patient_means(differences, patient_codes(patients))
    num_pairs = int(np.count_nonzero(~np.isnan(differences)))
    return Comparison(
        num_pairs=num_pairs,
        num_patients=means.size,
        difference=float(np.nanmean(differences)) if means.size else float("nan"),
        interval=bootstrap_interval(differences, patients, seed=seed, draws=draws),
        wilcoxon_p=float(wilcoxon(means).pvalue) if means.any() else 1.0,
        num_left_out=differences.size - num_pairs,
        num_unnamed=sum(whose is None for whose in patients),
    )


def compare_runs(
    table_a: pa.Table, table_b: pa.Table, column: str = "dice", *, infinite_as: float = BRATS_INFINITE_MM, seed: int = 0
) -> dict[str, Comparison]:
    """Compare a column of two runs' `metrics` tables, region by region, on the scans that both have.

    A scan in which one run rightly found nothing counts its 1 (or distance 0) against what the other marked there; where
    both rightly found nothing there is nothing to compare.
    An infinite distance counts `infinite_as` (in the column's unit), or the largest finite one of the region where that is
    larger: finding nothing never beats finding something. Raises ValueError where a scan stands twice or the runs share none.
    """
    pairs = _paired(table_a, table_b, column)
    matched = pc.field("place_a").is_valid() & pc.field("place_b").is_valid()
    apart = Counter(pairs.filter(~matched)["region"].to_pylist())
    pairs = pairs.filter(matched).sort_by("place_a")
    if not len(pairs):
        raise ValueError("the two runs have no scan and region in common")
    out = {}
    for region in pairs["region"].unique().to_pylist():
        found = _compare_with_stand_in(pairs.filter(pc.field("region") == region), column, infinite_as, seed)
        out[region] = replace(found, num_unmatched=apart[region])
    return out


def _compare_with_stand_in(pairs: pa.Table, column: str, infinite_as: float, seed: int) -> Comparison:
    a, b = (_with_empty(pairs, side, column) for side in ("a", "b"))
    infinite = (np.isinf(a) | np.isinf(b)) & ~np.isnan(a) & ~np.isnan(b)
    both = np.concatenate([a, b])
    put = float(np.max(both[np.isfinite(both)], initial=infinite_as))
    a, b = (np.where(np.isinf(values), put, values) for values in (a, b))
    found = paired_comparison(a, b, pairs["patient_id"].to_numpy(), seed=seed)
    return replace(found, num_infinite=int(np.count_nonzero(infinite)), infinite_as=put if infinite.any() else None)


def _with_empty(pairs: pa.Table, side: str, column: str) -> NDArray[np.float64]:
    """A run's values; where it alone rightly found nothing, what the rule `brats` gives for that."""
    values, other = float_column(pairs, side), "b" if side == "a" else "a"
    states = [pairs[f"state_{s}"].to_numpy() for s in (side, other)]
    alone = (states[0] == "both_empty") & (states[1] != "both_empty")
    best = 0.0 if column.startswith("hd95") else 1.0
    known = column in OVERLAP or column.startswith("hd95")
    return np.where(alone & np.isnan(values), best, values) if known else values


def _paired(table_a: pa.Table, table_b: pa.Table, column: str) -> pa.Table:
    """Every (scan, region) once, its value `a` and `b` and the row where it stands in either run, null where it does not."""
    keys, sides = ["scan_id", "region"], []
    for table, side in ((table_a, "a"), (table_b, "b")):
        num_each = table.group_by(keys).aggregate([([], "count_all")])
        if twice := num_each.filter(pc.field("count_all") > 1).slice(0, 1).to_pylist():
            raise ValueError("scan {scan_id} stands twice for region {region}; expected one row each".format(**twice[0]))
        chosen = table.select([*keys, column, "state"]).rename_columns([*keys, side, f"state_{side}"])
        sides.append(chosen.append_column(f"place_{side}", pa.array(np.arange(len(table)))))
    owned = sides[0].append_column("patient_id", table_a["patient_id"])
    return owned.join(sides[1], keys, join_type="full outer")
