"""One of two workers that train together, as a process of its own: `python two_workers.py RANK JOB FOLDER`.

JOB holds named configs and the entries of a shard. Writes FOLDER/RANK.safetensors: for each config the state after an
epoch, and for each loss the value and gradient of an uneven batch.
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


def trained(config, entries, worker):
    """State and loss after an epoch."""
    samples = SampleSet(entries, len(config.regions))
    learner = make_learner(config, len(samples), torch.device("cpu"), worker)
    loss = train_epoch(learner, samples, 0)
    return {**state_tensors(learner, {}), "loss": torch.tensor(loss)}


def losses_of_my_share(rank):
    """Value and gradient of every loss on this worker's part of the uneven batch."""
    out = {}
    logits, masks = (x[SHARES[rank]] for x in uneven_batch())
    for kind in ("dice", "bce", "bce_dice"):
        for over in ("batch", "sample"):
            mine = logits.clone().requires_grad_()
            value = loss_of(LossConfig(kind=kind, dice_over=over), mine, masks, Share(4, 2))
            value.backward()
            out |= {f"{kind} {over} value": value.detach(), f"{kind} {over} gradient": mine.grad}
    return out


def work(rank, job, folder):
    """Meet the other worker, train with it, and write down what came of it."""
    torch.set_num_threads(1)
    where = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        body = json.loads(job.read_text())
        entries = [Entry.from_json(e) for e in body["entries"]]
        out = losses_of_my_share(rank)
        for name, config in body["configs"].items():
            state = trained(TrainConfig.model_validate(config), entries, Worker(rank, 2))
            out |= {f"{name}: {key}": value for key, value in state.items()}
        save_file(out, folder / f"{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
