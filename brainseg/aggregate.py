"""Aggregate: the metrics of many scans, to one region's summary and its interval.

It stands between the `metrics` table and the report. A mean without its rule means nothing, so a summary carries the
rule and the counts of `missed`, `spurious` and `both_empty` beside every mean:

- `exclude` (default): scans whose label and prediction are both empty are left out.
- `brats`: they count 1 in every overlap ratio and 0 in HD95, and an infinite HD95 counts 373.13 mm. A labelled scan without
  a lesion to find or a wrong one counts 1 in lesion-wise Dice and 0 mm in lesion-wise HD95. Plain lesion figures stay null.

A patient who is not named (null) is taken to be a patient of one scan; `num_unnamed` says how many there were.
What the same counts give under other rules says `averaging.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Values: TypeAlias = Sequence[Any] | NDArray[Any] | pa.Array | pa.ChunkedArray
Rule = Literal["exclude", "brats"]

STATES = ("both", "missed", "spurious", "both_empty", "no_label")
OVERLAP = ("dice", "iou", "precision", "recall", "specificity", "accuracy")
SURFACE = ("nsd_1mm", "nsd_2mm", "nsd_1px", "nsd_2px")
LESION = ("lesion_recall", "lesion_precision", "lesion_f1", "lesionwise_dice", "lesionwise_hd95_mm")
LESION_COUNTS = ("lesionwise_tp", "lesionwise_fp", "lesionwise_fn")
COUNTS = ("tp", "fp", "fn")
VOLUMES = ("prediction_volume_mm3", "volume_error_mm3", "volume_error_relative")
NUMBERS = (*OVERLAP, *SURFACE, *LESION, *LESION_COUNTS, *COUNTS, *VOLUMES, "hd95_mm", "hd95_px")

BRATS_INFINITE_MM = 373.13
"""What the BraTS challenges put for an HD95 without a second surface: the diagonal of 240 x 240 x 155 mm."""

DRAWS_AT_ONCE = 2_000_000
"""Bootstrap picks held in memory at one time (16 MB of indices)."""

MANY_PATIENTS = 10_000
"""Above this the resampled sums are drawn from the normal law that they converge to; see `bootstrap_interval`."""


@dataclass(frozen=True)
class Spread:
    """A mean, median and quartiles over `num` values; all None over none."""

    num: int
    mean: float | None
    median: float | None
    q1: float | None
    q3: float | None


@dataclass(frozen=True)
class Distances:
    """HD95 of a region: median and quartiles over all `num` values, infinite ones included; the mean over finite ones."""

    num: int
    num_infinite: int
    median: float | None
    q1: float | None
    q3: float | None
    mean_finite: float | None


@dataclass(frozen=True)
class RegionSummary:
    """One region over a cohort. Unless its name says otherwise a figure weighs scans equally.

    `num_rows` all scans; `num_labelled` those with a label; `num_scored` those behind the mean Dice under `rule`.
    `num_patients` are those of all scans, `num_patients_scored` those of the scored ones.
    `num_scored + states["both_empty"] + states["no_label"] == num_rows` under `exclude`.
    `labelled_dice` is over the scans whose label is not empty (`both`, `missed`), whatever the rule.
    """

    region: str
    rule: Rule
    num_rows: int
    num_labelled: int
    num_scored: int
    num_patients: int
    num_patients_scored: int
    num_unnamed: int
    states: Mapping[str, int]
    dice: Spread
    labelled_dice: Spread
    iou: Spread
    precision: Spread
    recall: Spread
    specificity: Spread
    accuracy: Spread
    nsd_1mm: Spread
    nsd_2mm: Spread
    nsd_1px: Spread
    nsd_2px: Spread
    hd95_mm: Distances
    hd95_px: Distances
    lesion_recall: Spread
    lesion_precision: Spread
    lesion_f1: Spread
    lesionwise_dice: Spread
    lesionwise_hd95_mm: Spread
    volume_error_ml: Spread
    volume_error_relative: Spread
    pooled_dice: float | None
    patient_mean_dice: float | None

    def mean_with_failures_zero(self, num_failed: int) -> float | None:
        """Mean Dice where `num_failed` further scans, which never gave a mask, count 0; None over no scan at all."""
        num = self.num_scored + num_failed
        return (self.dice.mean or 0.0) * self.num_scored / num if num else None


def in_words(scans: int, patients: int, unnamed: int) -> str:
    """'24 scans of 12 patients', or that nobody says whose they are, though each counts as a patient's for the interval."""
    if unnamed and unnamed >= patients:
        return f"{scans} scans, patients not named"
    rest = f" (each of {unnamed} unnamed scans counted as one)" if unnamed else ""
    return f"{scans} scans of {patients} patients{rest}"


# --- summaries ------------------------------------------------------------------------------------------------------


def aggregate(rows: "Sequence[Mapping[str, Any]] | Columns", *, rule: Rule = "exclude") -> dict[str, RegionSummary]:
    """Summarise rows of the `metrics` table (mappings, or the Arrow table itself) region by region, in order of appearance.

    A row needs `region`, `patient_id`, `state` and the numbers of `tables.REGION`; a missing number counts as null.
    """
    if rule not in ("exclude", "brats"):
        raise ValueError(f"rule is '{rule}', expected 'exclude' or 'brats'")
    table = _table(rows) if isinstance(rows, Sequence) else rows
    regions, codes = _codes(table.column("region"))
    alone = len(regions) == 1
    return {name: _summarise(name, rule, _Part(table, None if alone else codes == n)) for n, name in enumerate(regions)}


class Columns(Protocol):
    """What `aggregate` reads of a table, a column at a time; an Arrow table is one."""

    @property
    def column_names(self) -> Sequence[str]: ...
    def column(self, name: str) -> pa.ChunkedArray: ...


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Mappings as a table, with NaN for a missing number."""
    texts = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("region", "state", "patient_id")}
    return pa.table({**texts, **{name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in NUMBERS}})


@dataclass(frozen=True)
class _Part:
    """The rows of one region, of which a column is in memory while it is looked at. `chosen` None: all rows are."""

    table: Columns
    chosen: NDArray[np.bool_] | None

    def codes(self, name: str) -> tuple[list[Any], NDArray[np.int64]]:
        """A column's distinct values in order of appearance, and the number of each row's; -1 is null."""
        column = self.table.column(name)
        return _codes(column if self.chosen is None else column.filter(pa.array(self.chosen)))

    def numbers(self, name: str) -> Floats:
        """A column as floats with NaN for null."""
        if name not in self.table.column_names:
            return np.broadcast_to(np.nan, len(self.codes("state")[1]))
        numbers = float_column(self.table, name)
        return numbers if self.chosen is None else numbers[self.chosen]


def float_column(table: Columns, name: str) -> Floats:
    """A column as floats, NaN for null; one of nulls alone takes no memory."""
    column = table.column(name)
    if column.null_count == len(column):
        return np.broadcast_to(np.nan, len(column))
    numbers: Floats = column.cast(pa.float64()).to_numpy()
    return numbers


def _codes(values: Values) -> tuple[list[Any], NDArray[np.int64]]:
    """Number the distinct values from 0 in order of appearance; null is -1."""
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    encoded = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.fill_null(-1).to_numpy().astype(np.int64)


def patient_codes(patients: Values) -> NDArray[np.int64]:
    """Number the patients; every null is a patient of its own, after all others."""
    return _each_their_own(_codes(patients)[1])


def _each_their_own(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number those that are -1 on from the last code."""
    unnamed = codes < 0
    return np.where(unnamed, codes.max(initial=-1) + np.cumsum(unnamed), codes)


def _summarise(region: str, rule: Rule, part: _Part) -> RegionSummary:
    words, state = part.codes("state")
    states = {name: state == words.index(name) if name in words else np.zeros(len(state), bool) for name in STATES}
    whose = part.codes("patient_id")[1]
    num_unnamed, codes = int(np.count_nonzero(whose < 0)), _each_their_own(whose)
    column = partial(_ruled, rule, part, states["both_empty"])
    dice = column("dice")
    means = patient_means(dice, codes)
    return RegionSummary(
        region=region,
        rule=rule,
        num_rows=len(state),
        num_labelled=len(state) - int(np.count_nonzero(states["no_label"])),
        num_scored=int(np.count_nonzero(~np.isnan(dice))),
        num_patients=int(codes.max(initial=-1)) + 1,
        num_patients_scored=means.size,
        num_unnamed=num_unnamed,
        states={name: int(np.count_nonzero(those)) for name, those in states.items()},
        labelled_dice=_spread(part.numbers("dice")[states["both"] | states["missed"]]),
        hd95_mm=_distances(column("hd95_mm")),
        hd95_px=_distances(column("hd95_px")),
        volume_error_ml=_spread(column("volume_error_mm3") / 1000),
        volume_error_relative=_spread(column("volume_error_relative")),
        pooled_dice=_pooled_dice(*(np.nansum(column(name)) for name in COUNTS)),
        patient_mean_dice=_mean(means),
        **{name: _spread(column(name)) for name in (*OVERLAP, *SURFACE, *LESION)},
    )


def _ruled(rule: Rule, part: _Part, both_empty: NDArray[np.bool_], name: str) -> Floats:
    """A column as the rule has it for both-empty scans and infinite distances.

    Pixels have no agreed stand-in, so infinite ones stay.
    """
    values = part.numbers(name)
    if name in (*OVERLAP, "hd95_mm", "hd95_px"):
        values = np.where(both_empty, np.nan, values)
    if rule == "exclude":
        return values
    if name in OVERLAP:
        return np.where(both_empty, 1.0, values)
    if name.startswith("lesionwise"):
        return _without_lesions(part, name, values)
    if name.startswith("hd95"):
        in_mm = ~np.isnan(part.numbers("prediction_volume_mm3"))
        known = np.where(np.isposinf(values), BRATS_INFINITE_MM, values) if name == "hd95_mm" else values
        return np.where(both_empty & (in_mm if name == "hd95_mm" else ~in_mm), 0.0, known)
    return values


def _without_lesions(part: _Part, name: str, values: Floats) -> Floats:
    """A lesion-wise figure by the rule `brats`, where there is no lesion to find and no wrong one."""
    none = sum(part.numbers(count) for count in LESION_COUNTS) == 0
    if name == "lesionwise_dice":
        return np.where(none, 1.0, values)
    return np.where(none & ~np.isnan(part.numbers("prediction_volume_mm3")), 0.0, values)


def _spread(values: Floats) -> Spread:
    known = _ascending(values)
    median, q1, q3 = (_quantile(known, q) for q in (0.5, 0.25, 0.75))
    return Spread(known.size, _mean(known), median, q1, q3)


def _distances(values: Floats) -> Distances:
    known = _ascending(values)
    finite = known[np.isfinite(known)]
    median, q1, q3 = (_quantile(known, q) for q in (0.5, 0.25, 0.75))
    return Distances(known.size, known.size - finite.size, median, q1, q3, _mean(finite))


def _ascending(values: Floats) -> Floats:
    known = values[~np.isnan(values)]
    known.sort()
    return known


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if values.size else None


def _quantile(ordered: Floats, q: float) -> float | None:
    """The linear quantile of ascending values, which may end in infinities; numpy's own makes NaN of those."""
    if not ordered.size:
        return None
    position = q * (ordered.size - 1)
    below = int(position)
    low, high, share = float(ordered[below]), float(ordered[min(below + 1, ordered.size - 1)]), position - below
    return low if share == 0 or low == high else low + (high - low) * share


def _pooled_dice(tp: float, fp: float, fn: float) -> float | None:
    """Dice of all voxels together. Large tumours weigh more, and a wholly wrong mask withdrawn can raise it."""
    whole = 2 * tp + fp + fn
    return float(2 * tp / whole) if whole else None


def patient_means(values: Floats, codes: NDArray[np.int64]) -> Floats:
    """Mean within each patient who has a value."""
    sums, counts = _patient_sums(values, codes)
    return sums / counts


def _patient_sums(values: Floats, codes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Sum and number of the values of each patient who has one, nulls left out."""
    known = ~np.isnan(values)
    sums = np.bincount(codes[known], weights=values[known]).astype(np.float64)
    counts = np.bincount(codes[known]).astype(np.float64)
    return sums[counts > 0], counts[counts > 0]


# --- intervals ------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: ArrayLike, patients: Values, *, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over scans, resampled by patient; nulls (None, NaN) are left out.

    A draw takes as many patients as there are, with replacement, each with all their scans, and divides the drawn scans'
    sum by their number. Beyond `MANY_PATIENTS` the pair (sum, number) is drawn from its limit, the normal law of equal
    mean and covariance: the error is below the noise of 10,000 draws and the cost no longer grows with the cohort.
    Fewer than two patients have no interval: (nan, nan). An infinite value makes bounds infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) != len(patients):
        raise ValueError(f"{len(array)} values for {len(patients)} patients; expected one patient a value")
    sums, counts = _patient_sums(array, patient_codes(patients))
    if sums.size < 2:
        return float("nan"), float("nan")
    if sums.size > MANY_PATIENTS and not np.isfinite(sums).all():
        return float("inf"), float("inf")
    rng = np.random.default_rng(seed)
    draw = _resampled if sums.size <= MANY_PATIENTS else _resampled_in_the_limit
    means = np.sort(draw(sums, counts, draws, rng))
    tail = (1 - level) / 2
    low, high = (_quantile(means, q) for q in (tail, 1 - tail))
    return float(low or 0.0), float(high or 0.0)


def _resampled(sums: Floats, counts: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Means of resampled patients, a chunk of draws at a time."""
    step = max(1, DRAWS_AT_ONCE // sums.size)
    means = np.empty(draws, np.float64)
    for start in range(0, draws, step):
        picks = rng.integers(sums.size, size=(min(step, draws - start), sums.size))
        means[start : start + step] = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    return means


def _resampled_in_the_limit(sums: Floats, counts: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Means whose numerator and denominator are jointly normal, as those of very many resampled patients are."""
    pairs = np.stack([sums, counts])
    drawn = rng.multivariate_normal(pairs.sum(axis=1), np.cov(pairs, bias=True) * sums.size, size=draws, method="eigh")
    means: Floats = drawn[:, 0] / drawn[:, 1]
    return means
