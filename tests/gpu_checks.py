"""What `test_on_a_gpu` runs, in a process of its own: on a GPU nothing is mixed with what lies on the CPU, and the answers are
the CPU's. The GPU is a pretended one: which tensor is where is real, speed and order are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factory import CPU, make_card, make_model, make_row, make_scan, tiny_config
from pretended_gpu import GPU, Held, brought_home, pretended_gpu

from brainseg.cache import SampleSet, write_shard
from brainseg.config import AugmentConfig, LossConfig, NetworkConfig, OptimiserConfig, PrepareConfig, SegmentConfig
from brainseg.ensemble import load_segmenter
from brainseg.errors import Code, ScanError
from brainseg.learn import Worker, batches, make_learner, restore, state_tensors, train_epoch
from brainseg.presets import STRONG_AUGMENT
from brainseg.sweep import Candidates, try_candidates

LOW = SegmentConfig(threshold=0.12)
THREE = {"regions": ("WT", "TC", "ET")}
VOLUME = NetworkConfig(dimensions=3, widths=(8, 8), norm="group")
WAYS = {
    "slices": {},
    "head": {"prepare": PrepareConfig(size=16, frame="head")},
    "maximum of a slice": {"prepare": PrepareConfig(size=16, normalise="slice_max")},
    "neighbours": {"network": NetworkConfig(widths=(8, 8), norm="group", context_slices=1)},
    "patches": {"network": VOLUME, "prepare": PrepareConfig(size=32, patch=(4, 16, 16))},
}
SCANS = [make_scan((n, 30 + n, 24), order=o, seed=n, name=o) for n, o in ((3, "LPS"), (6, "RAS"), (4, "SPL"))]


def test_what_a_gpu_refuses_is_refused():
    with pretended_gpu():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + here.to(GPU)).tolist() == [2, 2, 2]


class TestPredict:
    def both(self, uris, settings, scans=SCANS):
        """What a CPU says and what a GPU says, of how many operations."""
        here = load_segmenter(uris, settings, CPU).predict(scans)
        with pretended_gpu() as gpu:
            there = load_segmenter(uris, settings, GPU).predict(scans)
            assert gpu.operations > 50
        return here, there

    def equal(self, here, there):
        for one, other in zip(here, there, strict=True):
            assert isinstance(other.label, np.ndarray)
            assert np.array_equal(one.label, other.label)
            assert 0 < np.count_nonzero(one.label) < one.label.size
            for mine, theirs in zip(one.trust, other.trust, strict=True):
                assert theirs.keys() == mine.keys()
                assert list(theirs.values()) == [v if v is None else pytest.approx(v, rel=1e-5) for v in mine.values()]

    @pytest.mark.parametrize("smallest", [0, 3, "largest"])
    @pytest.mark.parametrize("way", WAYS)
    def test_the_answer_is_the_cpus(self, tmp_path, way, smallest):
        settings = LOW.model_copy(update={"smallest_component": smallest, "flip": smallest == 3})
        make_model(tmp_path, make_card(tiny_config(**THREE, **WAYS[way]), label_map="brats2020"), settings)
        self.equal(*self.both([str(tmp_path)], settings))

    def test_of_several_models_too(self, tmp_path):
        for name, way in (("a", "slices"), ("b", "head"), ("c", "neighbours")):
            make_model(tmp_path / name, make_card(tiny_config(**WAYS[way])), LOW)
        self.equal(*self.both([str(tmp_path / name) for name in "abc"], LOW))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
    def test_of_every_type_that_voxels_are_stored_in(self, tmp_path, dtype):
        make_model(tmp_path, settings=LOW)
        scans = [replace(one, image=one.image.astype(dtype)) for one in (make_scan(seed=n) for n in range(2))]
        self.equal(*self.both([str(tmp_path)], LOW, scans))

    def test_thresholds_are_tried_with_the_cpus_outcome(self, tmp_path):
        make_model(tmp_path, settings=LOW)
        candidates, rows = Candidates((0.1, 0.12, 0.14), (0, 3)), [make_row(scan.scan_id) for scan in SCANS]
        here = try_candidates(load_segmenter([str(tmp_path)], LOW, CPU), list(zip(SCANS, rows, strict=True)), candidates)
        with pretended_gpu():
            there = try_candidates(load_segmenter([str(tmp_path)], LOW, GPU), list(zip(SCANS, rows, strict=True)), candidates)
        assert here == there
        assert len({entry["fp"] for entry in here}) > 3

    def test_an_answer_that_is_no_number_is_refused(self, tmp_path):
        model = make_model(tmp_path)
        weights = model.network.state_dict()
        weights[next(iter(weights))].fill_(float("nan"))
        with pretended_gpu():
            there = load_segmenter([str(tmp_path)], LOW, GPU)
            there.network.load_state_dict({k: v.to(GPU) for k, v in weights.items()}, assign=True)
            with pytest.raises(ScanError, match="no number") as caught:
                there.predict(SCANS[:1])
        assert caught.value.code is Code.NON_FINITE


class TestTraining:
    EVERYTHING = STRONG_AUGMENT.model_copy(update={"elastic": 1.0, "low_resolution": 1.0, "modality_dropout": 0.5, "blur": 1.0})

    def samples(self, folder, config, device=CPU):
        scans = [make_scan((5, 24, 24), seed=1, name="a"), make_scan((6, 22, 26), seed=2, name="b")]
        return SampleSet(write_shard([(s, "binary") for s in scans], str(folder / "s.bin"), config), 1, device=device)

    @pytest.mark.parametrize("free", [0, 1 << 20])
    @pytest.mark.parametrize("augment", [AugmentConfig(), EVERYTHING])
    @pytest.mark.parametrize("way", WAYS)
    def test_batches_are_the_cpus(self, tmp_path, monkeypatch, way, augment, free):
        """Whether the GPU has room for all slices or not."""
        config = tiny_config(augment=augment, **WAYS[way])
        samples = self.samples(tmp_path, config)
        here = list(batches(make_learner(config, len(samples), CPU, Worker()), samples, 0))
        monkeypatch.setattr("brainseg.cache.free_bytes", lambda device: free)
        with pretended_gpu():
            samples = self.samples(tmp_path, config, GPU)
            assert isinstance(samples._images, Held) == bool(free)
            there = list(batches(make_learner(config, len(samples), GPU, Worker()), samples, 0))
            assert all(isinstance(x, Held) for batch in there for x in batch)
        for ours, theirs in zip(here, there, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                assert np.allclose(mine.numpy(), brought_home(other), atol=1e-5)

    @pytest.mark.parametrize("micro_batch", [None, 1])
    @pytest.mark.parametrize("kind", ["dice", "bce", "bce_dice"])
    def test_an_epoch_leaves_the_weights_that_the_cpus_does(self, tmp_path, kind, micro_batch):
        config = tiny_config(
            network=NetworkConfig(widths=(8, 8, 8), norm="group", deep_supervision=1, dropout=0.3),
            loss=LossConfig(kind=kind, dice_over="batch"),
            optimiser=OptimiserConfig(clip_norm=1),
            ema_decay=0.9,
            micro_batch=micro_batch,
        )
        samples, states = self.samples(tmp_path, config), []
        for device in (CPU, GPU):
            with pretended_gpu():
                learner = make_learner(config, len(samples), device, Worker())
                train_epoch(learner, samples, 0)
                states.append(state_tensors(learner, learner.best_guess()))
                restore(learner, states[-1])
        assert not any(isinstance(x, Held) for state in states for x in state.values())
        for name, expected in states[0].items():
            assert torch.allclose(states[1][name], expected, atol=1e-5), name
