"""The least that a bulk run can be: actors under Ray Data that unpack scans, ask the network and write masks, and nothing else.

    python tests/bench/least.py --model MODEL [--scans 60] [--precision fp32]

No labels, no figures, nothing that a killed run would need, and in bf16 no second answer. Prints its pace as a share of the
bare forward pass on the same cores. `bulk.py` measures what brainseg reaches with all of that.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from brainseg.environment import prepare_environment  # noqa: E402

prepare_environment()  # before Ray is imported

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
import torch  # noqa: E402
from bulk import bare_pace, copied_archive, slices_of  # noqa: E402

from brainseg import manifest, memory, session  # noqa: E402
from brainseg.config import SegmentConfig  # noqa: E402
from brainseg.masks import encode_mask  # noqa: E402
from brainseg.model import load_model  # noqa: E402
from brainseg.prepare import uncrop  # noqa: E402
from brainseg.scans import load_scan  # noqa: E402
from brainseg.workers import LARGE_BYTES  # noqa: E402

SCANS_PER_PART = 4


class Masks:
    """An actor: manifest rows to a part of masks, and when it was written."""

    def __init__(self, model: str, precision: str, out: str) -> None:
        torch.set_num_threads(1)
        memory.give_back_from(LARGE_BYTES)
        settings = SegmentConfig(precision=precision, threshold=0.5, smallest_component=0)
        self.model, self.out = load_model(model, settings, torch.device("cpu")), Path(out)
        self.model.precise = None

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        masks = [{"scan_id": row["scan_id"], "mask": self._mask(row)} for row in rows]
        pq.write_table(pa.Table.from_pylist(masks), self.out / f"{rows[0]['scan_id']}.parquet")
        return pa.table({"scans": [len(rows)], "finished_at": [time.time()]})

    def _mask(self, row: dict[str, Any]) -> bytes:
        scan = load_scan(row, with_label=False)
        (probability,) = self.model.probabilities([scan])
        return encode_mask(uncrop(self.model._painted(probability, 0.5), scan.grid, scan.box), scan.grid)[0]


def pace(archive: Path, model: str, precision: str, actors: int, out: Path) -> float:
    """Scans a second while all actors had work: from each one's first part to the last but `actors` - 1."""
    out.mkdir(parents=True, exist_ok=True)
    rows = manifest.index_archive(str(archive))[0]
    blocks = [rows.slice(first, SCANS_PER_PART) for first in range(0, len(rows), SCANS_PER_PART)]
    session.connect()
    made = ray.data.from_arrow(blocks).map_batches(
        Masks,
        fn_constructor_args=(model, precision, str(out)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    done = made.take_all()
    ray.shutdown()
    ends = sorted((part["finished_at"], part["scans"]) for part in done)
    first, last = actors - 1, len(ends) - actors
    return sum(scans for _, scans in ends[first + 1 : last + 1]) / (ends[last][0] - ends[first][0])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--scans", type=int, default=60)
    words.add_argument("--model", required=True, help="a model folder with four modalities, WT, TC and ET")
    words.add_argument("--precision", default="fp32")
    words.add_argument("--actors", type=int, default=os.cpu_count())
    words.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "brainseg-bench")
    chosen = words.parse_args()
    archive = copied_archive(chosen.work, chosen.scans, distinct=6)
    model = str(Path(chosen.model).resolve()) if Path(chosen.model).exists() else chosen.model
    before = bare_pace(model, chosen.precision, chosen.actors)[0]
    ours = pace(archive, model, chosen.precision, chosen.actors, chosen.work / "least") * slices_of(archive)
    bare = max(before, bare_pace(model, chosen.precision, chosen.actors)[0])
    print(f"{chosen.precision}: bare forward {bare:.1f} slices/s, the least pipeline {ours:.1f}: share {ours / bare:.3f}")


if __name__ == "__main__":
    main()
