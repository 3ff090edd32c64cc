"""Each stage of a scan's way beside what people use for it today, turn by turn in one process on one core.

    python tests/bench/stages.py [--turns 7] [--cases FOLDER]

Scans are phantoms in the BraTS layout at full size (240x240x155, four modalities), or those of `--cases`. Seconds are CPU
seconds, the median of the turns, in a process that keeps its memory as a worker does; what two ways should find alike is
compared before it is timed. Needs MONAI.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

warnings.simplefilter("ignore", FutureWarning)
from monai import metrics as monai_metrics  # noqa: E402
from monai.transforms import (  # noqa: E402
    Compose,
    ConcatItemsd,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
)

from brainseg import manifest, metrics  # noqa: E402
from brainseg.config import PrepareConfig  # noqa: E402
from brainseg.environment import FOR_WORKERS  # noqa: E402
from brainseg.formats.nifti import read_nifti  # noqa: E402
from brainseg.geometry import Grid, occupied  # noqa: E402
from brainseg.masks import encode_mask  # noqa: E402
from brainseg.phantom import write_archive  # noqa: E402
from brainseg.prepare import plan_scan, select_modalities  # noqa: E402
from brainseg.regions import label_map  # noqa: E402
from brainseg.scans import load_scan  # noqa: E402
from brainseg.surfaces import surface_pair  # noqa: E402

REGIONS = ("WT", "TC", "ET")
SPACING = (1.0, 1.0, 1.0)
HALF = 0.5
"""Of the voxels that two HD95 may differ by: MONAI rounds its percentile to a voxel's own distance, ours lies between."""


@dataclass(frozen=True)
class Race:
    """A stage: our way and theirs, and how many times as fast ours should be, at least and hoped for."""

    name: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    floor: float
    hope: float


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call, garbage of the call before out of the way."""
    gc.collect()
    started = time.process_time()
    call()
    return time.process_time() - started


def run(race: Race, turns: int) -> tuple[float, float]:
    """Medians of ours and theirs, taken in turn; the first turn pays for what is done once and does not count."""
    taken = [(seconds(race.ours), seconds(race.theirs)) for _ in range(turns + 1)][1:]
    ours, theirs = zip(*taken, strict=True)
    return statistics.median(ours), statistics.median(theirs)


# --- decode, load, crop, normalise -----------------------------------------------------------------------------------


def decode(paths: list[Path]) -> Race:
    """Every `.nii.gz` of a scan, from the file to voxels as stored."""

    def ours() -> list[Any]:
        return [read_nifti(path.read_bytes(), path.name).array for path in paths]

    def theirs() -> list[Any]:
        return [np.asanyarray(nib.load(path).dataobj) for path in paths]

    assert all(np.array_equal(mine, voxels.T) for mine, voxels in zip(ours(), theirs(), strict=True))
    return Race("decode .nii.gz", "nibabel", ours, theirs, 5, 7)


def load(row: dict[str, Any]) -> Race:
    """Four files to normalised voxels of the head: everything before the network but resampling."""
    paths = {source["modality"]: source["uri"] for source in row["sources"] if source["role"] != "label"}
    config = PrepareConfig(size=128)
    to_image = Compose(
        [
            LoadImaged([*paths]),
            EnsureChannelFirstd([*paths]),
            ConcatItemsd([*paths], "image"),
            CropForegroundd(["image"], source_key="image"),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ]
    )

    def ours() -> torch.Tensor:
        scan = load_scan(row, with_label=False)
        plan = plan_scan(scan, row["modalities"], config, 0)
        voxels = torch.from_numpy(np.ascontiguousarray(select_modalities(scan, row["modalities"])[0])).float()
        shift, scale = (torch.tensor(each).view(-1, 1, 1, 1) for each in (plan.shift, plan.scale))
        return voxels.sub_(shift).div_(scale)

    def theirs() -> Any:
        return to_image(dict(paths))["image"]

    assert tuple(ours().shape) == tuple(np.moveaxis(np.asarray(theirs()), -1, 1).swapaxes(2, 3).shape)
    return Race("load + crop + normalise", "MONAI", ours, theirs, 6, 10)


# --- figures -------------------------------------------------------------------------------------------------------------


def overlap(label: np.ndarray, prediction: np.ndarray) -> Race:
    """Dice of three regions, from label volumes as they are stored."""
    known = label_map("brats2020")

    def ours() -> list[float]:
        box = occupied(label, prediction)
        masks = [known.masks(volume[box], REGIONS) for volume in (label, prediction)]
        counts = [metrics._counts(truth, answer, label.size) for truth, answer in zip(*masks, strict=True)]
        return [metrics._overlap("both", each)["dice"] for each in counts]

    def theirs() -> list[float]:
        truth, answer = (
            torch.stack([v > 0, (v == 1) | (v == 4), v == 4])[None] for v in map(torch.as_tensor, (label, prediction))
        )
        return monai_metrics.compute_dice(answer, truth, include_background=True)[0].tolist()

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-6)
    return Race("overlap, 3 regions", "MONAI", ours, theirs, 50, 50)


def distances(label: np.ndarray, prediction: np.ndarray) -> Race:
    """HD95 and the surface Dice at 1 mm of three regions, from their masks."""
    known = label_map("brats2020")
    labels, predictions = (known.masks(volume, REGIONS) for volume in (label, prediction))
    truth, answer = (torch.as_tensor(np.stack(list(masks)))[None].float() for masks in (labels, predictions))

    def ours() -> list[tuple[float, float]]:
        found = []
        for mask, guess in zip(labels, predictions, strict=True):
            box = occupied(mask, guess)
            pair = surface_pair(mask[box], guess[box], SPACING)
            found.append((pair.hd95, pair.nsd(1)))
        return found

    def theirs() -> list[tuple[float, float]]:
        far = monai_metrics.compute_hausdorff_distance(
            answer, truth, include_background=True, percentile=95, spacing=[*SPACING]
        )
        near = monai_metrics.compute_surface_dice(answer, truth, [1.0] * 3, include_background=True, spacing=[*SPACING])
        return list(zip(far[0].tolist(), near[0].tolist(), strict=True))

    mine, others = np.array(ours()), np.array(theirs())
    np.testing.assert_allclose(mine[:, 0], others[:, 0], atol=HALF)
    np.testing.assert_allclose(mine[:, 1], others[:, 1], atol=1e-6)
    return Race("HD95 + NSD, 3 regions", "MONAI", ours, theirs, 12, 12)


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(label: np.ndarray, affine: np.ndarray, folder: Path) -> tuple[Race, float, float]:
    """A label volume as stored bytes; also how many bytes of ours and of theirs."""
    grid, path = Grid.of(label.shape, affine), folder / "mask.nii.gz"
    voxels = np.ascontiguousarray(label.T)

    def theirs() -> None:
        nib.save(nib.Nifti1Image(voxels, affine), path)

    theirs()
    ours = partial(encode_mask, label, grid)
    back = np.asanyarray(nib.Nifti1Image.from_bytes(_unzipped(ours()[0])).dataobj)
    assert np.array_equal(back, voxels)
    return Race("encode a mask", "nib.save", ours, theirs, 8, 8), len(ours()[0]), path.stat().st_size


def _unzipped(data: bytes) -> bytes:
    import gzip

    return gzip.decompress(data)


# --- the table --------------------------------------------------------------------------------------------------------


def rows_of(cases: Path) -> Iterator[dict[str, Any]]:
    table, *_ = manifest.index_archive(str(cases))
    yield from (row for row in table.to_pylist() if row["has_label"] and not row["problem_code"])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--turns", type=int, default=7)
    words.add_argument("--cases", type=Path, help="an archive in the BraTS layout; default: a phantom")
    chosen = words.parse_args()
    if not FOR_WORKERS.items() <= os.environ.items():  # as a worker finds them; read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **FOR_WORKERS})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = chosen.cases or Path(folder) / "cases"
        if chosen.cases is None:
            write_archive(cases, "brats", scans=1, shape=(155, 240, 240), seed=5)
        row = next(rows_of(cases))
        scan = load_scan(row)
        paths = [Path(source["uri"]) for source in row["sources"] if source["role"] != "label"]
        prediction = np.roll(scan.label, (1, 3, -2), (0, 1, 2))
        mask_race, our_bytes, their_bytes = masks(scan.label, np.diag((1.0, 1.0, 1.0, 1.0)), Path(folder))
        races = [decode(paths), load(row), overlap(scan.label, prediction), distances(scan.label, prediction), mask_race]
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread"
        print(f"{machine}; {row['scan_id']}, {chosen.turns} turns")
        print(f"{'stage':26}{'ours ms':>9}{'theirs ms':>11}  {'':10}{'times':>7}{'floor':>7}{'hope':>6}")
        for race in races:
            mine, others = run(race, chosen.turns)
            line = f"{race.name:26}{mine * 1000:9.1f}{others * 1000:11.1f}  {race.peer:10}{others / mine:7.1f}"
            print(f"{line}{race.floor:7g}{race.hope:6g}", flush=True)
        smaller = their_bytes / our_bytes
        print(f"a mask's bytes: {our_bytes:,.0f}, by nib.save {their_bytes:,.0f}: {smaller:.1f} times smaller (2.5)")


if __name__ == "__main__":
    main()
