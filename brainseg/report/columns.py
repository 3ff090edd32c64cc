"""Columns: what scans can be picked and grouped by: columns of the tables, and the attributes that a manifest brought along."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg.report.facts import Cohort
from brainseg.report.where import parse, scalar_columns, unknown

INNER = {"run", "part", "row"}
"""Columns of a cohort's tables that are positions and mean nothing to a person."""


def attribute_names(scans: pa.Table) -> list[str]:
    """Every attribute that any scan has, in order of the alphabet."""
    return sorted(name for name in pc.unique(_flat(scans)[0]).to_pylist() if name)


def attribute(scans: pa.Table, name: str) -> pa.Array:
    """One attribute of each scan; null where a scan lacks it."""
    keys, values, rows = _flat(scans)
    found = pc.equal(keys, name).to_numpy(zero_copy_only=False)
    places = np.full(scans.num_rows, -1, np.int64)
    places[rows[found]] = np.flatnonzero(found)
    return values.take(pa.array(places, mask=places < 0))


def _flat(scans: pa.Table) -> tuple[pa.Array, pa.Array, NDArray[np.int64]]:
    """All attributes one after another: names, values, and the scan of each."""
    column = scans["attributes"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    offsets = column.offsets.to_numpy()
    lengths = np.diff(offsets)
    start, end = int(offsets[0]), int(offsets[-1])
    rows = np.repeat(np.arange(len(column)), lengths)
    return column.keys.slice(start, end - start), column.items.slice(start, end - start), rows


def only(cohort: Cohort, text: str) -> Cohort:
    """The part of a cohort that a condition picks.

    A condition on columns of scans alone picks scans; one that names a figure of a region picks pairs of scan and region,
    and the scans that have any. A scan without figures, such as a failed one, meets no condition on a figure. UsageError
    names the columns there are where the condition names another.
    """
    condition = parse(text)
    whole = scalar_columns(cohort.scans)
    measured = cohort.regions.column_names
    named = {name: name for name in attribute_names(cohort.scans) if name not in whole and name not in measured}
    known = [n for n in (*whole, *measured) if n not in INNER] + [f'"{n}"' if not n.isidentifier() else n for n in named]
    for name in condition.names:
        if name in INNER or (name not in whole and name not in measured and name not in named):
            raise unknown(name, known)

    def of_scan(name: str) -> Any:
        return whole[name] if name in whole else attribute(cohort.scans, name)

    if not condition.names & set(measured):
        keep = _flags(condition.mask(of_scan))
        return _kept(cohort, keep, keep[cohort.regions["row"].to_numpy()], condition.text)
    rows = cohort.regions["row"]
    picked = _flags(condition.mask(lambda name: cohort.regions[name] if name in measured else of_scan(name).take(rows)))
    keep = np.zeros(cohort.scans.num_rows, bool)
    keep[rows.to_numpy()[picked]] = True
    return _kept(cohort, keep, picked, condition.text)


def _flags(mask: Any) -> NDArray[np.bool_]:
    flags: NDArray[np.bool_] = mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy()
    return flags


def _kept(cohort: Cohort, scans: NDArray[np.bool_], regions: NDArray[np.bool_], text: str) -> Cohort:
    """The chosen rows of both tables, with `row` counted anew, and of the baselines those of scans that stay."""
    left = cohort.regions.filter(regions).renumbered(np.cumsum(scans) - 1)
    chosen = cohort.scans.filter(pa.array(scans))
    baselines = cohort.baselines.filter(pc.is_in(cohort.baselines["scan_id"], value_set=chosen["scan_id"].combine_chunks()))
    return replace(cohort, scans=chosen, regions=left, baselines=baselines, where=text)
