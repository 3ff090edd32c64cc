"""How long a network waits for the store that its process writes notes to, by how many blocks that process works on.

    python tests/bench/slow_notes.py [--scan-ms 10] [--answer-ms 50]

A mock-up: the network sleeps, blocks hold 8 small scans, and the store answers three times a block, as others than AWS do.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from slow_network import actor, block, late

from brainseg import inflight, stages

BLOCKS, SCANS = 36, 8


def busy_share(blocks_at_once: int, scan_s: float) -> float:
    """Share of the time in which the network has work."""
    with tempfile.TemporaryDirectory() as run, ThreadPoolExecutor(blocks_at_once) as threads:
        started = time.perf_counter()
        list(threads.map(actor(run, scan_s), [block(number, SCANS) for number in range(BLOCKS)]))
        return BLOCKS * SCANS * scan_s / (time.perf_counter() - started)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scan-ms", type=float, default=10)
    words.add_argument("--answer-ms", type=float, default=50)
    chosen = words.parse_args()
    stages.VOXELS_TOGETHER = 1
    inflight._create = late(inflight._create, 2 * chosen.answer_ms / 1000)
    inflight.storage.delete = late(inflight.storage.delete, chosen.answer_ms / 1000)
    print("blocks at once, share of the time in which the network has work")
    for blocks_at_once in (1, 2, 3, 4):
        print(f"{blocks_at_once:14}{busy_share(blocks_at_once, chosen.scan_ms / 1000):6.2f}")


if __name__ == "__main__":
    main()
