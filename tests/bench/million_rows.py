"""A run folder of any size in seconds: parts of synthetic rows without a network, for benches of what reads them.

python tests/bench/million_rows.py RUN SCANS     (three regions a scan)
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from brainseg import storage
from brainseg.tables import METRICS, REGION, SCANS

REGIONS = ("WT", "TC", "ET")
SCANS_A_PART = 32
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000008000000080800000000e164e1570000000b49444154789c63601878000000480001ffb8a6440000"
    "000049454e44ae426082"
)
"""Not the picture that counts here, but that there is one."""


def write_run(run: str, scans: int, *, seed: int = 0) -> str:
    """Write run.json, scans/*.parquet and metrics.parquet of a finished run with labels; returns its place."""
    rng = np.random.default_rng(seed)
    metrics = []
    for first in range(0, scans, 8192):
        flat, columns = _rows(rng, first, min(8192, scans - first))
        metrics.append(flat)
        for start in range(0, columns.num_rows, SCANS_A_PART):
            place = storage.join(run, "scans", f"{first + start:08d}.parquet")
            storage.write_table(place, columns.slice(start, SCANS_A_PART))
    storage.write_table(storage.join(run, "metrics.parquet"), pa.concat_tables(metrics), row_group_rows=65536)
    storage.write_json(storage.join(run, "run.json"), _info(scans))
    storage.write_json(storage.join(run, "_SUCCESS.json"), {})
    return run


def _info(scans: int) -> dict:
    model = {"name": "synthetic", "dataset": "synthetic", "label_map": "brats2020", "regions": list(REGIONS)}
    model |= {"modalities": ["flair"], "fingerprint": "f" * 64, "split": {"train": ["t"], "validation": ["v"], "test": []}}
    body = {"run_id": "run", "brainseg_version": "0", "created_at": "2026-03-01T10:00:00+00:00", "source": "synthetic"}
    return {**body, "finished_at": "2026-03-02T10:00:00+00:00", "model": model, "counts": {"found": scans}, "timings": {}}


def _rows(rng: np.random.Generator, first: int, number: int) -> tuple[pa.Table, pa.Table]:
    """Rows of `metrics` and of `scans` for scans `first` to `first + number`."""
    entries = _entries(rng, number)
    names = [f"scan-{i:08d}" for i in range(first, first + number)]
    own = {
        "scan_id": names,
        "patient_id": [f"p{i // 2:07d}" for i in range(first, first + number)],
        "dataset": ["synthetic"] * number,
        "fold": [i % 5 for i in range(number)],
        "attributes": [[("site", "ABCDEFGH"[i % 8]), ("scanner", "XYZ"[i % 3])] for i in range(number)],
        "shape": [[16, 128, 128]] * number,
        "spacing_mm": [[3.0, 1.0, 1.0]] * number,
    }
    moments = np.datetime64("2026-03-01T10:00:00", "us") + np.arange(first, first + number) * np.timedelta64(250_000, "us")
    source = {"uri": "/gone", "role": "both", "modality": None, "index": None, "size_bytes": 1, "tag": "t", "sha256": None}
    picture = {"slice_index": 3, "modality": "flair", "image": PNG, "label": None, "prediction": PNG}
    more = {
        "label_map": ["brats2020"] * number,
        "sources": [[source]] * number,
        "status": ["ok"] * number,
        "warnings": [[]] * number,
        "modalities_missing": [[]] * number,
        "modalities_duplicated": [[]] * number,
        "thumbnail": [picture] * number,
        "seconds_decode": rng.lognormal(-1, 0.4, number),
        "seconds_predict": rng.lognormal(0, 0.4, number),
        "seconds_finish": rng.lognormal(-2, 0.4, number),
        **{name: ["x"] * number for name in ("model_fingerprint", "config_fingerprint", "content_tag", "run_id", "node")},
        "attempt": [1] * number,
        "finished_at": pa.array(moments, pa.timestamp("us", tz="UTC")),
        "regions": pa.ListArray.from_arrays(np.arange(0, 3 * number + 1, 3, dtype=np.int32), entries),
    }
    columns = {f.name: _column(f, {**own, **more}.get(f.name), number) for f in SCANS}
    flat = {f.name: pa.array(own[f.name], f.type).take(np.repeat(np.arange(number), 3)) for f in METRICS if f.name in own}
    flat |= {f.name: entries.field(f.name) for f in REGION}
    flat["split"] = pa.nulls(3 * number, pa.string())
    return pa.table([flat[n] for n in METRICS.names], schema=METRICS), pa.table(list(columns.values()), schema=SCANS)


def _column(field: pa.Field, values: object, number: int) -> pa.Array:
    if values is None:
        return pa.nulls(number, field.type)
    return values.cast(field.type) if isinstance(values, pa.Array) else pa.array(values, field.type)


def _entries(rng: np.random.Generator, number: int) -> pa.StructArray:
    """Three regions a scan, every figure filled in, one in fifty missed."""
    total = 3 * number
    missed = rng.random(total) < 0.02
    dice = np.where(missed, 0.0, rng.beta(8, 2, total))
    label = rng.integers(100, 100_000, total)
    found = {
        "region": pa.array(list(REGIONS) * number),
        "state": pa.array(np.where(missed, "missed", "both")),
        "dice": dice,
        "hd95_mm": np.where(missed, np.inf, rng.lognormal(1.5, 0.6, total)),
        "label_voxels": label,
        "prediction_voxels": np.where(missed, 0, label),
        "touches_border": missed,
    }
    arrays = [_column(f, pa.array(found[f.name]), total) if f.name in found else _filled(f, rng, total) for f in REGION]
    return pa.StructArray.from_arrays(arrays, fields=list(REGION))


def _filled(field: pa.Field, rng: np.random.Generator, number: int) -> pa.Array:
    empty = field.name in ("hd95_px", "nsd_1px", "nsd_2px")
    values = rng.random(number) if pa.types.is_floating(field.type) else rng.integers(0, 1000, number)
    return pa.nulls(number, field.type) if empty else pa.array(values).cast(field.type)


if __name__ == "__main__":
    print(write_run(str(Path(sys.argv[1]).resolve()), int(sys.argv[2])))
