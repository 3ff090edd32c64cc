"""One of two workers that train together, as a process of its own: `python two_workers.py RANK SHARD_INDEX FOLDER`.

Writes FOLDER/RANK.safetensors: the state after an epoch, and the loss and gradient of one uneven batch.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file

from brainseg.cache import Entry, SampleSet
from brainseg.config import LossConfig, TrainConfig
from brainseg.learn import Worker, make_learner, state_tensors, train_epoch
from brainseg.losses import Share, loss_of

SHARES = (slice(0, 3), slice(3, 4))
"""What each of the two gets of the uneven batch of four."""


def uneven_batch():
    """Logits and masks `(4, 2, 6, 6)` of a batch with empty samples."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 2, 6, 6, generator=generator)
    masks = (torch.rand(4, 2, 6, 6, generator=generator) < 0.3).float()
    masks[1] = 0
    return logits, masks


def main(rank: int, job: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    body = json.loads(job.read_text())
    config = TrainConfig.model_validate(body["config"])
    samples = SampleSet([Entry.from_json(e) for e in body["entries"]], len(config.regions))
    learner = make_learner(config, len(samples), torch.device("cpu"), Worker(rank, 2))
    loss = train_epoch(learner, samples, 0)
    out = {**state_tensors(learner, {}), "loss": torch.tensor(loss)}
    logits, masks = (x[SHARES[rank]] for x in uneven_batch())
    for kind in ("dice", "bce", "bce_dice"):
        for over in ("batch", "sample"):
            mine = logits.clone().requires_grad_()
            value = loss_of(LossConfig(kind=kind, dice_over=over), mine, masks, Share(4, 2))
            value.backward()
            out |= {f"{kind} {over} value": value.detach(), f"{kind} {over} gradient": mine.grad}
    save_file(out, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
