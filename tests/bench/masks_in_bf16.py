"""Masks in bf16 beside those in float32: the Dice between them on every scan of some archives, and what either takes.

    python tests/bench/masks_in_bf16.py ARCHIVE... [--model lgg-flair]

Wants a processor with avx512_bf16 or amx; elsewhere bf16 is emulated, and slow. One thread; seconds are CPU seconds.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from brainseg import manifest
from brainseg.config import SegmentConfig
from brainseg.model import Model, load_model
from brainseg.scans import Scan, load_scan

FLOOR = 0.999


def answered(model: Model, scan: Scan) -> tuple[np.ndarray, float]:
    """A scan's label volume, and the CPU seconds that it took."""
    started = time.process_time()
    label = model.predict([scan])[0].label
    return label, time.process_time() - started


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of whatever is not background; 1 where both are empty."""
    both = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero((one == other) & (one > 0)) / both if both else 1.0


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("archives", nargs="+")
    words.add_argument("--model", default="lgg-flair")
    chosen = words.parse_args()
    torch.set_num_threads(1)
    low, high = (load_model(chosen.model, SegmentConfig(precision=p), torch.device("cpu")) for p in ("bf16", "fp32"))
    for archive in chosen.archives:
        dices, seconds = {}, np.zeros(2)
        for row in manifest.index_archive(archive)[0].to_pylist():
            scan = load_scan(row, with_label=False)
            (mine, mine_s), (others, others_s) = (answered(model, scan) for model in (low, high))
            dices[row["scan_id"]] = alike(mine, others)
            seconds += (mine_s, others_s)
        worst = min(dices, key=dices.__getitem__)
        print(f"{archive}: {len(dices)} scans, {sum(d < FLOOR for d in dices.values())} below {FLOOR}")
        print(f"  lowest {dices[worst]:.5f} ({worst}), median {statistics.median(dices.values()):.5f}")
        print(f"  CPU s a scan: bf16 {seconds[0] / len(dices):.2f}, fp32 {seconds[1] / len(dices):.2f}", flush=True)


if __name__ == "__main__":
    main()
