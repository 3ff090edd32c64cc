"""Brightness: the intensities of a cohort's scans as they were stored, before any normalisation: what drifts with a scanner.

Read from the parts when drift is asked for, and only then.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainseg import storage
from brainseg.errors import StorageError
from brainseg.report.facts import FILES_AT_ONCE, Cohort

KINDS = ("mean", "sd")


def brightness(cohort: Cohort) -> dict[tuple[str, str], NDArray[np.float64]]:
    """(kind, modality) -> the values of the cohort's scans that have one; nothing of runs that recorded none."""
    found: dict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
    for number, run in enumerate(cohort.runs):
        wanted = cohort.scans.filter(pc.equal(cohort.scans["run"], number))["scan_id"].combine_chunks()
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for entries in pool.map(partial(_entries, wanted=wanted), run.parts):
                for name in pc.unique(entries.field("modality")).to_pylist():
                    part = entries.filter(pc.equal(entries.field("modality"), name))
                    for kind in KINDS:
                        found[kind, name].append(pc.drop_null(part.field(kind)).to_numpy())
    return {key: np.concatenate(values) for key, values in sorted(found.items())}


def _entries(part: str, wanted: pa.Array) -> pa.StructArray:
    """The entries of a part's scans one after another; none where it cannot be read or is of an earlier version."""
    try:
        table = storage.read_table(part, ["scan_id", "intensities"])
    except StorageError:
        return pa.array([], pa.struct([("modality", pa.string()), *((kind, pa.float64()) for kind in KINDS)]))
    chosen = table.filter(pc.is_in(table["scan_id"], value_set=wanted))["intensities"].combine_chunks()
    return (pa.concat_arrays(chosen.chunks) if isinstance(chosen, pa.ChunkedArray) else chosen).flatten()
