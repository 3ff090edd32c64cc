"""Schemas: publish the contracts that others build on, a JSON file per table and per config."""

import json
from collections.abc import Mapping
from pathlib import Path

from brainseg.card import ModelCard
from brainseg.config import Config, SegmentConfig, TrainConfig
from brainseg.specs import ReportSpec, SegmentSpec, TrainSpec
from brainseg.tables import TABLES, published

CONFIGS: Mapping[str, type[Config]] = {
    "train-config": TrainConfig,
    "segment-config": SegmentConfig,
    "model": ModelCard,
    "train-job": TrainSpec,
    "segment-job": SegmentSpec,
    "report-job": ReportSpec,
}


def contracts() -> dict[str, str]:
    """File name -> JSON text of every published contract."""
    out = {f"{name}.json": published(name) for name in TABLES}
    for name, kind in CONFIGS.items():
        out[f"{name}.json"] = json.dumps(kind.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
    return out


def write_schemas(folder: Path) -> None:
    """Write every contract into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contracts().items():
        (folder / name).write_text(text)
