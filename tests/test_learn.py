"""Learning: every choice follows from the seed and the place in the global batch, so that workers and resumptions change
nothing."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import CPU, FEW, make_scan, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from two_workers import SHARES, trained, uneven_batch, work

from brainseg.cache import SampleSet, write_shard
from brainseg.config import AugmentConfig, LossConfig, NetworkConfig, OptimiserConfig, PrepareConfig
from brainseg.errors import PreflightError
from brainseg.learn import (
    Worker,
    accumulate,
    batches,
    epoch_order,
    learning_rate,
    make_learner,
    restore,
    shrunk,
    state_tensors,
    steps_per_epoch,
    train_epoch,
    train_step,
)
from brainseg.losses import loss_of
from brainseg.presets import STRONG_AUGMENT

HARD = tiny_config(
    network=NetworkConfig(widths=(8, 8), dropout=0.3),
    augment=STRONG_AUGMENT,
    optimiser=OptimiserConfig(warmup_steps=2, clip_norm=0.5),
    ema_decay=0.9,
    seed=3,
)
"""All that keeps a state: batch norm, dropout, augmentation, moving average, momentum."""
DEEP = tiny_config(network=NetworkConfig(widths=(8, 8, 8, 8), norm="group", deep_supervision=2), ema_decay=0.9, batch_size=5)
VOLUME = tiny_config(
    network=NetworkConfig(dimensions=3, widths=(8, 8, 8), norm="group", deep_supervision=1),
    prepare=PrepareConfig(size=16, patch=(8, 8, 8)),
    augment=STRONG_AUGMENT.model_copy(update={"elastic": 0.5, "low_resolution": 0.5}),
    ema_decay=0.9,
    batch_size=3,
    samples_per_epoch=6,
)
"""A 3D network, taught on two levels."""


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Two small heads in a shard."""
    scans = [make_scan((5, 24, 24), seed=1, name="a"), make_scan((6, 22, 26), seed=2, name="b")]
    return write_shard([(s, "binary") for s in scans], str(tmp_path_factory.mktemp("shard") / "s.bin"), tiny_config())


@pytest.fixture(scope="module")
def samples(entries):
    return SampleSet(entries, 1)


def learner_for(config, samples):
    return make_learner(config, len(samples), CPU, Worker())


class TestCoarseEpochs:
    """Progressive resizing: the first epochs see the same slices in fewer pixels."""

    CONFIG = tiny_config(prepare=PrepareConfig(size=32), coarse_size=16, coarse_share=0.5, epochs=4)

    def test_they_come_first_and_the_last_ones_are_fine(self):
        assert [self.CONFIG.size_in(epoch) for epoch in range(4)] == [16, 16, 32, 32]
        assert [tiny_config(epochs=2).size_in(epoch) for epoch in range(2)] == [16, 16]

    def test_a_batch_is_smaller_and_holds_the_same_tumour(self, tmp_path):
        scan = make_scan((5, 24, 24), seed=1, name="a")
        held = SampleSet(write_shard([(scan, "binary")], str(tmp_path / "s.bin"), self.CONFIG), 1)
        learner = learner_for(self.CONFIG.model_copy(update={"coarse_share": 0.25, "seed": 4}), held)
        coarse, fine = (next(batches(learner, held, epoch)) for epoch in (0, 1))
        assert coarse[0].shape[2:] == coarse[1].shape[2:] == (16, 16)
        assert fine[0].shape[2:] == fine[1].shape[2:] == (32, 32)
        whole = held.batch(np.arange(len(held)), CPU)
        halves = [shrunk(x, 16) for x in whole]
        assert torch.allclose(halves[0].mean(), whole[0].mean(), atol=0.02)
        assert torch.allclose(halves[1].mean(), whole[1].mean(), atol=0.01)
        assert halves[1].any()

    def test_full_slices_are_left_alone(self):
        slices = torch.rand(2, 1, 16, 16)
        assert shrunk(slices, 16) is slices

    @pytest.mark.parametrize(
        ("wrong", "line"),
        [
            ({"coarse_size": 32}, "coarse_size is 32; it must be less than prepare.size, 32"),
            ({"coarse_size": 17}, "coarse_size is 17; 2 levels need a multiple of 2"),
            (
                {
                    "coarse_size": 16,
                    "network": NetworkConfig(dimensions=3, widths=(8, 8)),
                    "prepare": PrepareConfig(size=32, patch=(8, 8, 8)),
                },
                "coarse_size is for network.dimensions 2 alone",
            ),
        ],
    )
    def test_sizes_that_cannot_be_are_refused(self, wrong, line):
        with pytest.raises(ValueError, match=line):
            tiny_config(**{"prepare": PrepareConfig(size=32), **wrong})


class TestOrder:
    @FEW
    @given(
        tumour=st.lists(st.booleans(), min_size=6, max_size=60).filter(lambda t: 0 < sum(t) < len(t)),
        size=st.integers(1, 12),
        share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        epoch=st.integers(0, 5),
    )
    def test_every_batch_has_its_share_of_tumour_slices(self, tumour, size, share, epoch):
        foreground = np.array(tumour)
        config = tiny_config(batch_size=size, foreground_share=share, samples_per_epoch=None)
        order = epoch_order(foreground, config, epoch)
        assert order.shape == (max(1, len(tumour) // size), size)
        assert order.min() >= 0
        assert order.max() < len(tumour)
        if share:
            assert (foreground[order].sum(axis=1) == round(size * share)).all()

    @FEW
    @given(count=st.integers(1, 30), wanted=st.integers(1, 100), share=st.sampled_from([0.0, 0.5]))
    def test_no_slice_comes_again_before_all_others_have_come(self, count, wanted, share):
        foreground = np.arange(count) % 3 == 0
        order = epoch_order(foreground, tiny_config(batch_size=2, samples_per_epoch=wanted, foreground_share=share), 0).ravel()
        groups = [foreground, ~foreground] if share and foreground.any() and not foreground.all() else [np.ones(count, bool)]
        for group in groups:
            times = np.bincount(order, minlength=count)[group]
            assert times.max() - times.min() <= 1

    def test_it_follows_from_seed_and_epoch_alone(self):
        foreground = np.arange(40) % 4 == 0
        one, same = (epoch_order(foreground, tiny_config(samples_per_epoch=None), 3) for _ in range(2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, epoch_order(foreground, tiny_config(samples_per_epoch=None), 4))
        assert not np.array_equal(one, epoch_order(foreground, tiny_config(samples_per_epoch=None, seed=1), 3))

    @pytest.mark.parametrize("workers", [2, 3])
    def test_workers_together_get_what_one_would_get(self, samples, workers):
        config = HARD.model_copy(update={"batch_size": 5})
        alone = learner_for(config, samples)
        crew = [batches(replace(alone, worker=Worker(rank, workers)), samples, 1) for rank in range(workers)]
        for (images, masks), *parts in zip(batches(alone, samples, 1), *crew, strict=True):
            for rank, (some_images, some_masks) in enumerate(parts):
                assert torch.allclose(some_images, images[rank::workers], atol=1e-5)
                assert torch.equal(some_masks, masks[rank::workers])

    def test_an_epoch_has_at_least_one_step(self):
        assert steps_per_epoch(tiny_config(batch_size=8, samples_per_epoch=None), samples=3) == 1
        assert steps_per_epoch(tiny_config(batch_size=8, samples_per_epoch=None), samples=24) == 3
        assert steps_per_epoch(tiny_config(batch_size=8, samples_per_epoch=80), samples=24) == 10


class TestLearningRate:
    def test_it_climbs_in_a_line_then_falls_in_half_a_cosine_to_a_hundredth(self):
        config = OptimiserConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine")
        rates = [learning_rate(config, step, 110) for step in range(110)]
        assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
        assert rates[10] == pytest.approx(2.0)
        assert rates[60] == pytest.approx((2.0 + 0.02) / 2)
        assert learning_rate(config, 110, 110) == learning_rate(config, 500, 110) == pytest.approx(0.02)
        assert all(a > b for a, b in pairwise(rates[10:]))

    def test_a_constant_one_stays(self):
        config = OptimiserConfig(learning_rate=0.1, warmup_steps=0, schedule="constant")
        assert {learning_rate(config, step, 50) for step in range(60)} == {0.1}

    def test_a_step_is_made_at_the_rate_of_its_number(self, samples):
        learner = learner_for(tiny_config(), samples)
        images, masks = next(batches(learner, samples, 0))
        train_step(learner, images, masks, step=4)
        assert learner.optimiser.param_groups[0]["lr"] == learning_rate(learner.config.optimiser, 4, learner.total_steps)

    def test_it_goes_on_from_epoch_to_epoch(self, samples):
        learner = learner_for(tiny_config(epochs=3), samples)
        train_epoch(learner, samples, 1)
        rate = learning_rate(learner.config.optimiser, 2 * learner.steps_per_epoch - 1, learner.total_steps)
        assert learner.optimiser.param_groups[0]["lr"] == rate < learner.config.optimiser.learning_rate


class TestStep:
    def test_the_gradient_is_no_longer_than_allowed(self, samples):
        config = tiny_config(optimiser=OptimiserConfig(clip_norm=0.01))
        learner = learner_for(config, samples)
        train_step(learner, *next(batches(learner, samples, 0)), step=0)
        squares = sum(float(p.grad.square().sum()) for p in learner.network.parameters())
        assert squares**0.5 == pytest.approx(0.01, rel=1e-3)

    def test_the_average_of_the_weights_follows_them_slowly(self, samples):
        learner = learner_for(tiny_config(ema_decay=0.5), samples)
        before = {k: v.clone() for k, v in learner.network.state_dict().items()}
        train_step(learner, *next(batches(learner, samples, 0)), step=0)
        after = learner.network.state_dict()
        for name, value in learner.averaged.items():  # the first step keeps a tenth
            assert torch.allclose(value, 0.1 * before[name] + 0.9 * after[name], atol=1e-6)
        assert learner.best_guess() is learner.averaged

    def test_without_an_average_the_network_itself_is_the_best_guess(self, samples):
        learner = learner_for(tiny_config(ema_decay=0), samples)
        train_epoch(learner, samples, 0)
        for name, value in learner.network.state_dict().items():
            assert torch.equal(learner.best_guess()[name], value)

    def test_training_lowers_the_loss(self, samples):
        config = tiny_config(optimiser=OptimiserConfig(learning_rate=1e-2, warmup_steps=0), epochs=6, samples_per_epoch=24)
        learner = learner_for(config, samples)
        losses = [train_epoch(learner, samples, epoch) for epoch in range(6)]
        assert losses[-1] < 0.7 * losses[0]

    @pytest.mark.parametrize("kind", ["adam", "adamw"])
    def test_the_seed_decides_the_whole_training(self, samples, kind):
        config = HARD.model_copy(update={"optimiser": OptimiserConfig(kind=kind)})
        results = []
        for seed in (3, 3, 4):
            learner = learner_for(config.model_copy(update={"seed": seed}), samples)
            results.append((train_epoch(learner, samples, 0), learner.network.state_dict()))
        assert results[0][0] == results[1][0] != results[2][0]
        assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))

    def test_more_workers_than_samples_in_a_batch_are_refused(self, samples):
        with pytest.raises(PreflightError, match="5 workers cannot share batches of 4"):
            make_learner(tiny_config(batch_size=4), len(samples), CPU, Worker(0, 5))


def gradient_of(learner, images, masks):
    """Loss, and the gradient of every weight as one vector."""
    learner.network.train()
    torch.manual_seed(9)
    loss = accumulate(learner, images, masks, 0)
    return loss.item(), torch.cat([p.grad.flatten() for p in learner.network.parameters()])


class TestVolumes:
    def test_batches_are_patches_on_the_model_grid(self, samples):
        learner = learner_for(VOLUME, samples)
        made = list(batches(learner, samples, 0))
        assert len(made) == 2
        assert {tuple(images.shape) for images, _ in made} == {(3, 2, 8, 8, 8)}
        assert {tuple(masks.shape) for _, masks in made} == {(3, 1, 8, 8, 8)}

    def test_training_lowers_the_loss(self, samples):
        optimiser = OptimiserConfig(learning_rate=1e-2, warmup_steps=0)
        config = VOLUME.model_copy(update={"optimiser": optimiser, "augment": AugmentConfig(), "epochs": 6})
        learner = learner_for(config, samples)
        losses = [train_epoch(learner, samples, epoch) for epoch in range(6)]
        assert losses[-1] < 0.8 * losses[0]

    def test_the_gradient_in_small_parts_is_that_of_the_whole_batch(self, samples):
        images, masks = next(batches(learner_for(VOLUME, samples), samples, 0))
        loss, slope = gradient_of(learner_for(VOLUME, samples), images, masks)
        part_loss, part = gradient_of(learner_for(VOLUME.model_copy(update={"micro_batch": 1}), samples), images, masks)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert (part - slope).norm() < 1e-5 * slope.norm()


class TestMicroBatch:
    """A batch in small parts has the loss and the gradient of the batch in one."""

    @pytest.mark.parametrize("kind", ["dice", "bce", "bce_dice"])
    @pytest.mark.parametrize("over", ["batch", "sample"])
    @pytest.mark.parametrize("network", ["group", "instance", "deep"])
    def test_the_gradient_is_that_of_the_whole_batch(self, samples, kind, over, network):
        shape = DEEP.network if network == "deep" else NetworkConfig(widths=(8, 8), norm=network)
        config = tiny_config(network=shape, loss=LossConfig(kind=kind, dice_over=over), batch_size=7)
        images, masks = samples.batch(np.array([2, 0, 3, 3, 7, 8, 1]), CPU)
        loss, slope = gradient_of(learner_for(config, samples), images, masks)
        for most in (1, 2, 3, 6, 9):
            learner = learner_for(config.model_copy(update={"micro_batch": most}), samples)
            part_loss, part_slope = gradient_of(learner, images, masks)
            assert part_loss == pytest.approx(loss, rel=1e-5)
            assert (part_slope - slope).norm() < 1e-5 * slope.norm()

    def test_parts_of_a_batch_wise_dice_on_their_own_would_have_another(self, samples):
        config = tiny_config(loss=LossConfig(kind="dice"), batch_size=4)
        images, masks = samples.batch(np.array([2, 0, 3, 7]), CPU)
        _, slope = gradient_of(learner_for(config, samples), images, masks)
        learner = learner_for(config, samples)
        for n in range(4):
            learner.network.train()
            loss_of(config.loss, learner.network(images[n : n + 1]), masks[n : n + 1]).div(4).backward()
        alone = torch.cat([p.grad.flatten() for p in learner.network.parameters()])
        assert (alone - slope).norm() > 0.05 * slope.norm()

    @pytest.mark.parametrize("over", ["batch", "sample"])
    def test_no_more_go_through_at_once_than_allowed(self, samples, over):
        learner = learner_for(tiny_config(loss=LossConfig(dice_over=over), batch_size=7, micro_batch=3), samples)
        seen = []
        learner.network.down[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        accumulate(learner, *samples.batch(np.arange(7), CPU), 0)
        assert seen == [3, 2, 2] * (2 if over == "batch" else 1)

    def test_both_passes_drop_the_same_and_running_averages_move_once(self, samples):
        """Otherwise the slope would be taken at other logits than those that are learnt from."""
        learner = learner_for(HARD.model_copy(update={"micro_batch": 2, "loss": LossConfig(kind="dice")}), samples)
        learner.network.train()
        answers = []
        learner.network.head.register_forward_hook(lambda _, __, out: answers.append(out.detach().clone()))
        accumulate(learner, *samples.batch(np.array([2, 0, 3, 7]), CPU), 0)
        assert len(answers) == 4
        assert torch.equal(answers[0], answers[2])
        assert torch.equal(answers[1], answers[3])
        assert learner.network.down[0].norm1.num_batches_tracked == 2

    def test_parts_hold_tumour_and_empty_slices_alike(self, samples):
        learner = learner_for(tiny_config(loss=LossConfig(kind="bce"), batch_size=4, micro_batch=2), samples)
        seen = []
        learner.network.down[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        numbers = epoch_order(samples.foreground, learner.config, 0)[0]
        images, masks = samples.batch(numbers, CPU)
        accumulate(learner, images, masks, 0)
        assert torch.equal(torch.cat(seen), images[[0, 2, 1, 3]])
        assert samples.foreground[numbers].tolist() == [True, True, False, False]


class TestResume:
    @pytest.mark.parametrize(
        "config",
        [HARD, tiny_config(optimiser=OptimiserConfig(kind="adam")), DEEP, VOLUME],
        ids=["hard", "plain", "deep", "volume"],
    )
    def test_a_resumed_training_goes_on_to_the_last_bit(self, samples, config):
        whole = learner_for(config, samples)
        losses = [train_epoch(whole, samples, epoch) for epoch in range(2)]
        first = learner_for(config, samples)
        assert train_epoch(first, samples, 0) == losses[0]
        stored = save(state_tensors(first, first.best_guess()))
        second = learner_for(config, samples)
        restore(second, load(stored))
        assert train_epoch(second, samples, 1) == losses[1]
        expected, got = state_tensors(whole, {}), state_tensors(second, {})
        assert expected.keys() == got.keys()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []

    def test_the_best_weights_so_far_come_back(self, samples):
        learner = learner_for(HARD, samples)
        best = {k: v.clone() for k, v in learner.best_guess().items()}
        train_epoch(learner, samples, 0)
        back = restore(learner_for(HARD, samples), load(save(state_tensors(learner, best))))
        assert back.keys() == best.keys()
        assert all(torch.equal(back[name], best[name]) for name in best)

    def test_a_state_is_a_copy_that_training_on_leaves_alone(self, samples):
        learner = learner_for(HARD, samples)
        state = state_tensors(learner, learner.best_guess())
        before = {k: v.clone() for k, v in state.items()}
        train_epoch(learner, samples, 0)
        assert all(torch.equal(state[k], before[k]) for k in before)


PAIR = {
    "group": tiny_config(augment=AugmentConfig(flip=True, noise=0.1), ema_decay=0.9, batch_size=5),
    "dropout": DEEP.model_copy(update={"network": DEEP.network.model_copy(update={"dropout": 0.4}), "micro_batch": 1}),
    "batch": HARD.model_copy(update={"loss": LossConfig(kind="dice", dice_over="sample")}),
    "deep": DEEP,
    "volume": VOLUME.model_copy(update={"micro_batch": 1}),
    "parts": DEEP.model_copy(update={"micro_batch": 1, "loss": LossConfig(kind="bce_dice")}),
}


@pytest.fixture(scope="module")
def pair(entries, tmp_path_factory):
    """What this process and another make together of the same epochs, and of an uneven batch."""
    folder = tmp_path_factory.mktemp("pair")
    configs = {name: config.model_dump(mode="json") for name, config in PAIR.items()}
    (folder / "job.json").write_text(json.dumps({"configs": configs, "entries": [e.to_json() for e in entries]}))
    root = Path(__file__).parent
    command = [sys.executable, "-W", "error", str(root / "two_workers.py"), "1", str(folder / "job.json"), str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", str(root.parent))
        other = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            work(0, folder / "job.json", folder)
        finally:
            _, complaint = other.communicate(timeout=60)
    assert other.returncode == 0, complaint.decode()[-2000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


class TestTwoWorkers:
    def test_end_with_the_same_weights_average_and_running_statistics(self, pair):
        states = [{k: v for k, v in one.items() if ": network." in k or ": averaged." in k} for one in pair]
        assert any("running_mean" in name for name in states[0])
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []

    @pytest.mark.parametrize("name", ["group", "dropout", "deep", "parts", "volume"])
    def test_learn_what_one_would_have_learnt(self, pair, entries, name):
        alone = trained(PAIR[name].model_copy(update={"micro_batch": None}), entries, Worker())
        assert float(pair[0][f"{name}: loss"] + pair[1][f"{name}: loss"]) / 2 == pytest.approx(float(alone["loss"]), rel=1e-4)
        for key, value in alone.items():
            if key.startswith(("network.", "averaged.")):
                assert torch.allclose(pair[0][f"{name}: {key}"], value, atol=2e-4), key

    @pytest.mark.parametrize("kind", ["dice", "bce", "bce_dice"])
    @pytest.mark.parametrize("over", ["batch", "sample"])
    def test_have_the_loss_and_the_gradient_of_the_whole_batch_however_uneven_their_shares(self, pair, kind, over):
        logits, masks = uneven_batch()
        logits.requires_grad_()
        whole = loss_of(LossConfig(kind=kind, dice_over=over), logits, masks)
        whole.backward()
        assert sum(float(one[f"{kind} {over} value"]) for one in pair) / 2 == pytest.approx(whole.item(), rel=1e-5)
        for rank, one in enumerate(pair):
            assert torch.allclose(one[f"{kind} {over} gradient"] / 2, logits.grad[SHARES[rank]], atol=1e-7)
