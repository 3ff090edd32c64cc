"""The network: built from its config, it answers in the shape it was asked in, and learns."""

import copy

import pytest
import torch
from factory import tiny_config
from torch import nn

from brainseg import unet
from brainseg.config import NetworkConfig
from brainseg.unet import PRIOR_LOGIT, Activated, ChannelDropout, UNet, folded, num_parameters


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_logits_have_a_channel_a_region_and_the_size_of_the_slices(norm, residual):
    network = UNet(NetworkConfig(widths=(8, 8, 16), norm=norm, residual=residual, dropout=0.2), 2, 3)
    assert network(torch.randn(2, 2, 16, 24)).shape == (2, 3, 16, 24)


def test_context_slices_are_further_channels():
    network = UNet(NetworkConfig(widths=(4, 4), context_slices=2), num_modalities=3, num_regions=1)
    assert network.down[0].conv1.in_channels == 15
    assert network(torch.zeros(1, 15, 8, 8)).shape == (1, 1, 8, 8)


def test_the_stride_is_the_one_the_config_says_and_smaller_slices_do_not_fit():
    config = NetworkConfig(widths=(4, 4, 4))
    network = UNet(config, 1, 1)
    assert network.stride == config.stride == 4
    assert network(torch.zeros(1, 1, 8, 12)).shape == (1, 1, 8, 12)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 1, 10, 10))


def test_the_published_widths_make_the_published_number_of_parameters():
    """16-32-64-128-256-512 with batch norm and transposed convolutions: 7.8 million, as in most public 2D U-Nets."""
    assert num_parameters(UNet(NetworkConfig(widths=(16, 32, 64, 128, 256, 512)), 4, 3)) == pytest.approx(7.78e6, rel=0.01)


def test_an_untrained_network_believes_that_tumour_is_rare():
    torch.manual_seed(0)
    network = UNet(tiny_config().network, 2, 1).eval()
    with torch.no_grad():
        answer = network(torch.zeros(1, 2, 16, 16))
    assert answer.flatten().tolist() == pytest.approx([PRIOR_LOGIT] * 256, abs=1e-5)


def test_every_weight_receives_a_gradient():
    network = UNet(NetworkConfig(widths=(4, 8, 8), residual=True), 2, 2)
    network(torch.randn(2, 2, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_pooled_axis_by_axis_the_largest_are_the_same_and_lie_as_before(dimensions, dtype):
    network = UNet(NetworkConfig(dimensions=dimensions, widths=(8, 16)), 1, 1)
    x = torch.randn(2, 8, *(8, 6, 4)[:dimensions]).to(dtype).contiguous(memory_format=network.memory_format)
    x[0, 0, 0, 0], x[1, 1, 1] = float("nan"), 0
    with torch.inference_mode():
        mine, torchs = unet._pooled(network.pool, x), network.pool(x)
    assert torch.equal(mine.nan_to_num(9), torchs.nan_to_num(9))
    assert torch.equal(mine.isnan(), torchs.isnan())
    assert mine.is_contiguous(memory_format=network.memory_format)


def test_where_gradients_are_asked_for_ties_go_to_one_pixel_as_ever():
    network = UNet(NetworkConfig(widths=(8, 16)), 1, 1)
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    unet._pooled(network.pool, x).sum().backward()
    assert sorted(x.grad.flatten().tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_bias_added_by_itself_in_bf16_is_the_same_bias_and_learns_the_same(dimensions):
    torch.manual_seed(3)
    network = UNet(NetworkConfig(dimensions=dimensions, widths=(8, 16)), 1, 1)
    layer, x = network.lift[0], torch.randn(2, 16, *[8] * dimensions)
    nn.init.normal_(layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        answer = unet._lifted(layer, x)
    slope = torch.randn_like(answer)
    answer.backward(slope)
    learnt = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    plain = layer(x)
    plain.backward(slope.float())
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), plain, rtol=0.02, atol=0.05)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(learnt[name], p.grad, rtol=0.02, atol=0.3)


def test_dropout_is_in_the_lower_half_alone():
    network = UNet(NetworkConfig(widths=(4, 4, 4, 4), dropout=0.5), 1, 1)
    assert [isinstance(b.drop, ChannelDropout) for b in network.down] == [False, False, True, True]
    assert [isinstance(b.drop, ChannelDropout) for b in network.up] == [False, False, True]


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 6, 8, 8, 8)])
def test_dropout_takes_away_whole_channels_in_training_and_makes_up_for_them(shape):
    layer, x = ChannelDropout(6, 0.5), torch.ones(shape)
    left = torch.cat([layer(x) for _ in range(300)]).flatten(2)
    assert set(left.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(left.amin(dim=2), left.amax(dim=2))
    assert left.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_leaves_what_it_is_told_to():
    layer, told = ChannelDropout(3, 0.5), torch.tensor([[2.0, 0, 2], [0, 0, 2]])
    layer.kept = told
    assert torch.equal(layer(torch.ones(2, 3, 4, 4)).mean(dim=(2, 3)), told)


def test_the_seed_alone_decides_the_weights():
    config = NetworkConfig(widths=(4, 4))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(torch.cat([p.flatten() for p in UNet(config, 1, 1).parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_folded_it_answers_the_same_to_rounding_and_is_left_as_it_was(dimensions, norm, residual):
    network = UNet(NetworkConfig(dimensions=dimensions, widths=(8, 16, 16), norm=norm, residual=residual), 2, 1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):  # as after some training
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(2, 2, *(16,) * dimensions)
    joined = folded(network)
    with torch.inference_mode():
        assert torch.allclose(joined(x), network.eval()(x), atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in joined.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


class TestActivationsAreDoneAlongWithConvolutions:
    def pair(self, monkeypatch, network, x):
        """What a folded network answers with activations in the same pass, and with activations in one of their own."""
        ready = folded(network).to(memory_format=network.memory_format)
        assert any(isinstance(m, Activated) for m in ready.modules())
        with torch.inference_mode():
            together = ready.to(x.dtype)(x)
            monkeypatch.setattr(unet, "_activates_in_one_pass", lambda _: False)
            return together, ready(x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_every_cpu_answers_in_every_precision(self, dtype):
        """oneDNN refuses bf16 on one without AVX-512, and doubles everywhere."""
        network = folded(UNet(NetworkConfig(widths=(8, 16)), 2, 1)).to(dtype)
        with torch.inference_mode():
            answer = network(torch.randn(1, 2, 16, 16, dtype=dtype))
        assert answer.dtype == dtype
        assert torch.isfinite(answer).all()

    @pytest.mark.skipif(not unet._activates_in_one_pass(torch.float32), reason="this torch cannot")
    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_to_the_last_bit_but_for_leaks_in_bf16(self, monkeypatch, dimensions, residual, activation, precision):
        if not unet._activates_in_one_pass(precision):
            pytest.skip("this CPU cannot in bf16")
        torch.manual_seed(2)
        config = NetworkConfig(dimensions=dimensions, widths=(8, 16, 16), residual=residual, activation=activation)
        network = UNet(config, 2, 3).eval()
        together, apart = self.pair(monkeypatch, network, torch.randn(2, 2, *[16] * dimensions).to(precision))
        assert together.std() > 0
        if activation == "relu" or precision == torch.float32:
            assert torch.equal(together, apart)
        else:  # what leaks is rounded once where it was twice
            assert (together - apart).norm() < 0.01 * apart.norm()

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_weights_laid_out_with_the_first_batch_serve_the_others_and_are_left_out_of_copies(self, monkeypatch, dimensions):
        network = folded(UNet(NetworkConfig(dimensions=dimensions, widths=(8, 16, 16)), 2, 1))
        batches = [torch.randn(count, 2, *[side] * dimensions) for count, side in ((1, 16), (5, 16), (2, 24))]
        with torch.inference_mode():
            together = [network(x) for x in batches]
            copied = copy.deepcopy(network).to(torch.float64)(batches[0].double())
            monkeypatch.setattr(unet, "_activates_in_one_pass", lambda _: False)
            apart = [network(x) for x in batches]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart, strict=True))
        assert torch.allclose(copied.float(), together[0], atol=1e-4)

    @pytest.mark.skipif(not unet._activates_in_one_pass(torch.bfloat16), reason="this CPU cannot in bf16")
    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_a_bias_is_not_rounded_with_the_weights(self, dimensions):
        layer = UNet(NetworkConfig(dimensions=dimensions, widths=(8, 8), norm="none"), 1, 1).down[0].conv1
        nn.init.ones_(layer.weight)
        nn.init.constant_(layer.bias, 2**-10 - 27)  # bf16 has no number between -27.125 and -26.875 but -27
        layer = Activated(layer, nn.ReLU()).to(torch.bfloat16)
        with torch.inference_mode():
            answer = layer(torch.full((1, 1, *[8] * dimensions), 27 / 3**dimensions, dtype=torch.bfloat16))
        middle = (0, 0, *[4] * dimensions)
        assert answer[middle] == 2**-10

    def test_not_where_a_norm_stands_between_them_nor_before_the_shortcut_is_added(self):
        grouped = folded(UNet(NetworkConfig(widths=(8, 8), norm="group"), 1, 1))
        assert not any(isinstance(module, Activated) for module in grouped.modules())
        block = folded(UNet(NetworkConfig(widths=(8, 8), residual=True), 1, 1)).down[0]
        assert isinstance(block.conv1, Activated)
        assert isinstance(block.conv2, nn.Conv2d)
        assert isinstance(block.act2, nn.ReLU)

    def test_gradients_are_still_there_for_who_asks_for_them(self):
        x = torch.randn(1, 1, 8, 8, requires_grad=True)
        folded(UNet(NetworkConfig(widths=(4, 8)), 1, 1))(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


class TestDeepSupervision:
    DEEP = NetworkConfig(widths=(4, 8, 8, 8), deep_supervision=2)

    def test_in_training_coarser_levels_answer_too_each_half_the_size_of_the_one_before(self):
        answer = UNet(self.DEEP, 2, 3)(torch.randn(2, 2, 16, 24))
        assert [tuple(a.shape) for a in answer] == [(2, 3, 16, 24), (2, 3, 8, 12), (2, 3, 4, 6)]

    def test_in_use_the_finest_alone_answers_as_if_the_others_were_not_there(self):
        network, plain = UNet(self.DEEP, 2, 3).eval(), UNet(NetworkConfig(widths=(4, 8, 8, 8)), 2, 3).eval()
        weights = {name: value for name, value in network.state_dict().items() if not name.startswith("coarse_heads")}
        plain.load_state_dict(weights)
        assert len(network.state_dict()) - len(weights) == 4
        x = torch.randn(2, 2, 16, 16)
        assert torch.equal(network(x), plain(x))

    def test_every_head_receives_a_gradient(self):
        network = UNet(self.DEEP, 2, 2)
        sum(a.square().sum() for a in network(torch.randn(2, 2, 16, 16))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())

    def test_no_more_levels_can_be_taught_than_there_are(self):
        with pytest.raises(ValueError, match="deep_supervision is 3; 4 levels have 2 below the finest"):
            NetworkConfig(widths=(4, 8, 8, 8), deep_supervision=3)


class TestThreeDimensions:
    @pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
    @pytest.mark.parametrize("residual", [False, True])
    def test_patches_come_out_as_large_as_they_went_in(self, norm, residual):
        config = NetworkConfig(dimensions=3, widths=(8, 8, 16), norm=norm, residual=residual, dropout=0.2)
        assert UNet(config, 2, 3)(torch.randn(2, 2, 8, 12, 16)).shape == (2, 3, 8, 12, 16)

    def test_coarser_levels_are_half_as_deep_too(self):
        network = UNet(NetworkConfig(dimensions=3, widths=(4, 8, 8), deep_supervision=1), 2, 3)
        assert [tuple(a.shape) for a in network(torch.randn(1, 2, 8, 12, 16))] == [(1, 3, 8, 12, 16), (1, 3, 4, 6, 8)]

    def test_it_has_the_layers_of_the_2d_one_in_the_same_places(self):
        flat, deep = (UNet(NetworkConfig(dimensions=n, widths=(4, 8, 8), residual=True), 2, 1).state_dict() for n in (2, 3))
        assert flat.keys() == deep.keys()
        for name, value in flat.items():
            assert deep[name].shape == (*value.shape, *value.shape[-1:] * (value.dim() == 4))

    def test_the_answer_at_a_voxel_depends_on_the_slices_around_it(self):
        network = UNet(NetworkConfig(dimensions=3, widths=(4, 4)), 1, 1).eval()
        plain, changed = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
        changed[0, 0, 3] = 5
        with torch.no_grad():
            moved = (network(plain) != network(changed)).flatten(3).any(dim=3)[0, 0]
        assert moved[2:5].all()
