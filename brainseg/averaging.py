"""Averaging: what one run's counts give under every rule that published Dice figures are averaged by.

It stands beside `aggregate.py`, for a reader who wants to hold a published figure against a run. The product reports by its
two rules alone (`exclude` and `brats`, per scan); everything here is for translation, and starts from stored counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.aggregate import Floats, float_column, patient_codes
from brainseg.tables import METRICS

BATCH = 16
"""Slices that the rule `batch` takes together."""

_COLUMNS = ("region", "state", "patient_id", "tp", "fp", "fn", "shape")


@dataclass(frozen=True)
class _Slices:
    """Counts of n labelled slices, and the number of the patient whom each belongs to."""

    tp: Floats
    fp: Floats
    fn: Floats
    patients: NDArray[np.int64]

    @property
    def has_label(self) -> NDArray[np.bool_]:
        return self.tp + self.fn > 0

    @property
    def dice(self) -> Floats:
        """Dice of each slice, NaN where both masks are empty."""
        return _dice(self.tp, self.fp, self.fn)

    def joined(self, groups: NDArray[np.int64]) -> Floats:
        """Dice of each group of slices, its counts summed; NaN where all its masks are empty."""
        tp, fp, fn = (np.bincount(groups, counts).astype(np.float64) for counts in (self.tp, self.fp, self.fn))
        return _dice(tp, fp, fn)


def dice_by_every_rule(rows: Sequence[Mapping[str, Any]] | pa.Table, *, seed: int = 0) -> dict[str, float | None]:
    """Return the Dice of one region under every rule below, from rows of the `metrics` table whose scans are slices.

    | rule             | what is averaged                                           | who uses it                              |
    |------------------|------------------------------------------------------------|------------------------------------------|
    | `slice_empty_0`  | slices; both empty counts 0                                | a term in the denominator only           |
    | `slice_exclude`  | slices; both empty left out                                | here `exclude`; nnU-Net (over volumes)   |
    | `slice_labelled` | slices whose label is not empty                            | MONAI's `DiceMetric`, `ignore_empty=True`|
    | `slice_empty_1`  | slices; both empty counts 1                                | here `brats`; a smoothing term above and |
    |                  |                                                            | below; MONAI with `ignore_empty=False`   |
    | `volume`         | volumes: a patient's slices counted together               | Buda et al. 2019 (LGG), the mean         |
    | `volume_median`  | the same, their median                                     | Buda et al. 2019 (LGG), the median       |
    | `batch`          | shuffled batches of 16 slices, each counted together       | a Dice over the flattened batch, as the  |
    |                  |                                                            | metric of a training loop                |
    | `pooled`         | nothing: all slices counted together                       | nnU-Net's `pseudo Dice` while training   |

    A patient is taken for one volume, and one who is not named for a volume of one slice. Volumes and batches in which
    everything is empty are left out. `batch` depends on the order of the slices: `seed` shuffles them. A rule with nothing
    to average gives None. Raises ValueError for rows of several regions, and where `shape` says that a row is a volume.
    """
    table = _table(rows)
    _require_slices(table)
    slices = _slices(table)
    found = {name: rule(slices) for name, rule in _RULES.items()}
    return {**found, "batch": _mean(slices.joined(_batches(len(slices.tp), seed)))}


_RULES: Mapping[str, Callable[[_Slices], float | None]] = {
    "slice_empty_0": lambda s: _mean(np.nan_to_num(s.dice, nan=0.0)),
    "slice_exclude": lambda s: _mean(s.dice),
    "slice_labelled": lambda s: _mean(s.dice[s.has_label]),
    "slice_empty_1": lambda s: _mean(np.nan_to_num(s.dice, nan=1.0)),
    "volume": lambda s: _mean(s.joined(s.patients)),
    "volume_median": lambda s: _median(s.joined(s.patients)),
    "pooled": lambda s: _mean(s.joined(np.zeros_like(s.patients))),
}


def _batches(num: int, seed: int) -> NDArray[np.int64]:
    """The batch that each of `num` slices falls into when they are shuffled."""
    return np.random.default_rng(seed).permutation(num) // BATCH


def _dice(tp: Floats, fp: Floats, fn: Floats) -> Floats:
    whole = 2 * tp + fp + fn
    dice: Floats = np.divide(2 * tp, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return dice


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _median(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else None


def _slices(table: pa.Table) -> _Slices:
    """The counts of all rows with a label."""
    known = table.filter(pc.field("state") != "no_label")
    tp, fp, fn = (float_column(known, name) for name in ("tp", "fp", "fn"))
    return _Slices(tp, fp, fn, patient_codes(known.column("patient_id").to_numpy()))


def _table(rows: Sequence[Mapping[str, Any]] | pa.Table) -> pa.Table:
    """The columns that the rules need; null for a mapping that lacks one."""
    if isinstance(rows, pa.Table):
        return rows.select([name for name in _COLUMNS if name in rows.column_names])
    return pa.Table.from_pylist(list(rows), schema=pa.schema([METRICS.field(name) for name in _COLUMNS]))


def _require_slices(table: pa.Table) -> None:
    regions = pc.unique(table.column("region")).to_pylist()
    if len(regions) > 1:
        raise ValueError(f"rows are of the regions {', '.join(regions)}; expected those of one region")
    if "shape" not in table.column_names:
        return
    depth = pc.max(pc.list_element(table.column("shape"), 0)).as_py()
    if depth is not None and depth > 1:
        raise ValueError(f"a row is a volume of {depth} slices; expected slices: index the archive with --unit slice")
