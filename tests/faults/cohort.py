"""Cohort: small synthetic heads, an untrained network, and what becomes of each scan when nothing goes wrong.

The undisturbed outcome is computed in this process, by the stages as plain functions: no Ray has a part in it.
"""

from dataclasses import dataclass
from pathlib import Path

from factory import make_card, make_model, tiny_config

from brainseg import manifest, stages
from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig
from brainseg.phantom import write_archive
from brainseg.stages import Job


@dataclass(frozen=True)
class Cohort:
    """`undisturbed`: scan -> status, error code, sha256 of the mask."""

    manifest: str
    model: str
    undisturbed: dict[str, tuple[str, str | None, str | None]]


def make_cohort(folder: Path, scans: int, broken: int = 2) -> Cohort:
    """Write archive, manifest and model below `folder`."""
    write_archive(folder / "archive", "lgg", scans=scans, broken=broken, shape=(6, 64, 64), seed=7)
    table = manifest.index_archive(str(folder / "archive"))[0]
    manifest.write_manifest(str(folder / "manifest.parquet"), table)
    recipe = tiny_config(
        name="random",
        modalities=("t1", "flair", "t1c"),
        network=NetworkConfig(widths=(4, 8)),
        prepare=PrepareConfig(size=48),
    )
    model = make_model(folder / "model", make_card(recipe))
    job = Job("", "", SegmentConfig(thumbnails=False), "run", 1, "model", "config", model.card)
    works = [stages.decode(row, with_label=True) for row in table.to_pylist()]
    rows = [stages.finish(work, job) for work in stages.predict(model, works)]
    outcome = {r["scan_id"]: (r["status"], r.get("error_code"), r.get("mask_sha256")) for r in rows}
    return Cohort(str(folder / "manifest.parquet"), str(folder / "model"), outcome)
