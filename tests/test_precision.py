"""Precision: in bf16 a network answers, to a thousandth, as in float32; what bf16 could decide, float32 decides."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from factory import CPU, make_card, make_model, make_network, make_scan, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from brainseg import precision
from brainseg.config import NetworkConfig, SegmentConfig
from brainseg.manifest import index_archive
from brainseg.model import Model, load_model
from brainseg.precision import NEAR, TOGETHER, Precise, decided, has_fast_bf16, in_bf16, inference_dtype, rounded
from brainseg.scans import load_scan
from brainseg.unet import UNet, folded


class TestRounded:
    @given(st.integers(0, 2**32 - 1))
    def test_the_errors_of_a_kernel_nearly_cancel(self, seed):
        weights = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        kept = rounded(weights)
        assert torch.equal(kept, kept.bfloat16().float())
        largest = kept.abs().amax(dim=(2, 3))
        drift = (kept - weights).sum(dim=(2, 3)).abs()
        assert bool((drift <= 2**-8 * largest + 1e-6).all())  # half a step of the coarsest tap, however many taps there are

    def test_no_weight_moves_by_more_than_a_step(self):
        weights = torch.randn(8, 8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        assert bool(((rounded(weights) - weights).abs() <= 2**-7 * weights.abs().amax()).all())

    def test_what_bf16_can_say_stays_as_it_is(self):
        weights = torch.randn(2, 2, 3, 3).bfloat16().float()
        assert torch.equal(rounded(weights), weights)


class TestInBf16:
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("first_block", [False, True])
    def test_the_image_meets_float32(self, residual, first_block):
        network = UNet(NetworkConfig(widths=(8, 16), residual=residual), 2, 1).eval()
        low = in_bf16(folded(network), first_block=first_block)
        kept = {"down.0"} if first_block else {"down.0.conv1", "down.0.shortcut"} if residual else {"down.0.conv1"}
        assert {name for name, layer in low.named_modules() if isinstance(layer, Precise)} == kept
        for name, p in low.named_parameters():
            assert p.dtype == (torch.float32 if ".layer." in name else torch.bfloat16)
        with torch.inference_mode():
            x = torch.randn(1, 2, 32, 32)
            exact = network(x)
            assert (low(x).float() - exact).norm() < 0.02 * exact.norm()

    def test_the_network_it_comes_from_stays_as_it_was(self):
        network = UNet(NetworkConfig(widths=(8, 16)), 1, 1)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        in_bf16(network, first_block=True)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not any(isinstance(m, Precise) for m in network.modules())

    def test_asked_for_it_is_taken_and_otherwise_not(self):
        assert inference_dtype("bf16", CPU) == torch.bfloat16
        assert inference_dtype("fp32", CPU) == torch.float32


def answer(*slices):
    """Probabilities `(1, D, 32, 32)`; of each slice how many pixels are inside for sure, and how many undecided, just above."""
    found = torch.zeros(1, len(slices), 1024)
    for number, (inside, near) in enumerate(slices):
        found[0, number, :inside] = 0.9
        found[0, number, inside : inside + near] = 0.5 + NEAR / 2
    return found.view(1, -1, 32, 32)


class Again:
    """What float32 says of some slices: all that was undecided changes sides, or nothing. Remembers what it was asked."""

    def __init__(self, first, *, changes):
        self.slices = torch.where((first - 0.5).abs() < NEAR, 0.5 - NEAR / 2, first) if changes else first + 0.001
        self.asked = []

    def __call__(self, numbers):
        self.asked += numbers.tolist()
        return self.slices[:, numbers]


class TestDecided:
    @pytest.mark.parametrize("scan", [[(1000, 2), (0, 0)], [(0, 0)], [(1000, 0), (5, 0)]])
    def test_a_scan_without_much_doubt_is_left_alone(self, scan):
        first = answer(*scan)
        again = Again(first, changes=True)
        assert torch.equal(decided(first.clone(), 0.5, again), first)
        assert again.asked == []

    def test_doubt_without_any_tumour_is_looked_into(self):
        again = Again(answer((0, 0), (0, 1)), changes=True)
        assert torch.equal(decided(answer((0, 0), (0, 1)), 0.5, again), again.slices)
        assert again.asked == [1]

    def test_in_a_small_mask_one_pixel_is_doubt_enough(self):
        """An eighth of a pixel is expected on the wrong side; but there is one or there is none."""
        again = Again(answer((130, 1)), changes=True)
        assert torch.equal(decided(answer((130, 1)), 0.5, again), again.slices)

    def test_slices_with_most_doubt_come_first_and_none_without(self):
        scan = [(300, n) for n in range(30)]
        again = Again(answer(*scan), changes=True)
        decided(answer(*scan), 0.5, again)
        assert sorted(again.asked[:TOGETHER], reverse=True) == list(range(29, 29 - TOGETHER, -1))
        assert len(set(again.asked)) == len(again.asked)
        assert 0 not in again.asked

    def test_it_goes_on_while_float32_says_otherwise_and_ends_where_it_agrees(self):
        scan = [(300, 10)] * 40
        asked = {}
        for changes in (True, False):
            again = Again(answer(*scan), changes=changes)
            decided(answer(*scan), 0.5, again)
            asked[changes] = len(again.asked)
        assert asked[True] == 40
        assert TOGETHER <= asked[False] < 40

    def test_doubt_is_measured_from_the_threshold(self):
        again = Again(answer((100, 30)), changes=True)
        decided(answer((100, 30)), 0.3, again)
        assert again.asked == []

    def test_each_region_has_its_own_doubts_and_no_slice_is_asked_twice(self):
        first = torch.cat([answer((100, 0), (100, 9), (100, 9)), answer((100, 9), (100, 9), (100, 0))])
        again = Again(first, changes=True)
        assert torch.equal(decided(first.clone(), 0.5, again), again.slices)
        assert sorted(again.asked) == [0, 1, 2]


class TestAModelInBf16:
    def make(self, kind, threshold):
        card = make_card(tiny_config(network=NetworkConfig(widths=(8, 16))))
        network = make_network(card).eval()
        return Model(card, network, "", CPU, SegmentConfig(precision=kind, threshold=threshold))

    def test_where_it_is_undecided_it_answers_as_float32_does(self, monkeypatch):
        """An untrained network says about the same of every voxel: at that threshold all of it is undecided."""
        monkeypatch.setattr(precision, "TOGETHER", 8)  # the whole scan at once: none is left because the first ones agreed
        low, high = self.make("bf16", 0.12), self.make("fp32", 0.12)
        (mine,), (others,) = (list(m.probabilities([make_scan()])) for m in (low, high))
        near = (others - 0.12).abs() < NEAR
        assert near.any()
        assert torch.equal(mine[near], others[near])
        assert (low.predict([make_scan()])[0].label == high.predict([make_scan()])[0].label).all()

    def test_elsewhere_it_answers_in_bf16(self):
        low, high = self.make("bf16", 0.9), self.make("fp32", 0.9)
        (mine,), (others,) = (list(m.probabilities([make_scan()])) for m in (low, high))
        assert not torch.equal(mine, others)
        assert torch.allclose(mine, others, atol=0.02)

    def test_a_scan_of_one_slice_is_answered_by_float32_at_once_and_others_beside_it_are_not(self, monkeypatch):
        low, high = self.make("bf16", 0.9), self.make("fp32", 0.9)
        asked = []
        forward = low._forward
        monkeypatch.setattr(low, "_forward", lambda s, network=None: asked.append((len(s), network)) or forward(s, network))
        volume = make_scan()
        slice_ = replace(volume, image=volume.image[:, 2:3])
        (first, second, third), (one, two) = (
            list(m.probabilities(s)) for m, s in ((low, [slice_, volume, slice_]), (high, [slice_, volume]))
        )
        assert [(count, network is low.precise) for count, network in asked[:2]] == [(second.shape[1], False), (2, True)]
        assert torch.allclose(first, one, rtol=0, atol=1e-6)
        assert torch.equal(first, third)
        assert not torch.equal(second, two)
        assert torch.allclose(second, two, atol=0.02)

    def test_no_layer_is_left_behind_where_it_cannot_compute(self):
        assert not [m for m in self.make("fp32", 0.5).network.modules() if isinstance(m, Precise)]
        assert isinstance(self.make("bf16", 0.5).network.down[0], Precise)


def test_where_a_model_is_float32_is_no_less_on_a_gpu(tmp_path):
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # what a process begins with
    make_model(tmp_path)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.skipif(not has_fast_bf16(CPU), reason="no processor with bf16: emulated, it takes minutes")
def test_masks_of_real_scans_are_those_of_float32_to_a_thousandth(data_dir, tmp_path):
    """Networks that ship, on patients whom they never met; `tests/bench/masks_in_bf16.py` takes whole archives."""
    subprocess.run([sys.executable, str(data_dir / "unpack.py"), "brats2013", str(tmp_path)], check=True, capture_output=True)
    low, high = (load_model("lgg-flair", SegmentConfig(precision=p), CPU) for p in ("bf16", "fp32"))
    rows = index_archive(str(tmp_path))[0].to_pylist()
    assert len(rows) == 3
    for row in rows:
        scan = load_scan(row, with_label=False)
        one, other = (model.predict([scan])[0].label > 0 for model in (low, high))
        assert 2 * (one & other).sum() >= 0.999 * (one.sum() + other.sum()) > 0
