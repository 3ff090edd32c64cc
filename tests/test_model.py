"""A model: what is loaded is what was saved, nothing in its folder is executed, and scans do not disturb each other."""

import hashlib
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import CPU, make_card, make_model, make_network, make_scan, tiny_config
from torch import nn

from brainseg import storage
from brainseg.card import CARD, Split, fingerprint_of, load_card
from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig
from brainseg.errors import Code, PreflightError, ScanError
from brainseg.geometry import to_canonical
from brainseg.model import WEIGHTS, Model, load_model, save_model

LOW = SegmentConfig(threshold=0.12)
"""About what an untrained network says of everything, so that some voxels fall on either side."""


class TestSavedAndLoaded:
    def test_a_loaded_network_answers_as_the_saved_one(self, tmp_path):
        card = make_card(make_it_wide())
        network = make_network(card).eval()
        saved = save_model(str(tmp_path), card, network.state_dict())
        loaded = load_model(str(tmp_path), SegmentConfig(), CPU)
        x = torch.randn(2, 2, 16, 16)
        with torch.no_grad():
            assert torch.allclose(loaded.network(x), network(x), atol=1e-4)
        assert loaded.card == saved == load_card(str(tmp_path))
        assert saved.weights_sha256 == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()

    def test_a_network_taught_on_several_levels_answers_with_the_finest(self, tmp_path):
        deep = NetworkConfig(widths=(8, 8, 8), norm="group", deep_supervision=1)
        model = make_model(tmp_path, make_card(tiny_config(network=deep)), LOW)
        assert any(name.startswith("coarse_heads") for name in model.network.state_dict())
        assert model.predict([make_scan()])[0].label.any()

    def test_equal_weights_make_equal_bytes(self, tmp_path):
        for name in "ab":
            make_model(tmp_path / name)
        assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()

    def test_the_fingerprint_follows_whatever_decides_an_answer(self, tmp_path):
        card = save_model(str(tmp_path), make_card(), make_network(make_card()).state_dict())
        other = save_model(str(tmp_path), make_card(), make_network(make_card(), seed=1).state_dict())
        decisive = [
            other,
            card.model_copy(update={"prepare": PrepareConfig(size=32)}),
            card.model_copy(update={"modalities": ("t1c", "flair")}),
            card.model_copy(update={"regions": ("WT",)}),
            card.model_copy(update={"label_map": "brats2020"}),
            card.model_copy(update={"network": NetworkConfig(widths=(8, 8))}),
        ]
        assert len({fingerprint_of(c) for c in [card, *decisive]}) == 7

    def test_the_fingerprint_ignores_what_does_not(self):
        card = make_card()
        told = card.model_copy(
            update={"name": "another", "metrics": {"dice": 1}, "created_at": "later", "versions": {"torch": "9"}}
        )
        assert fingerprint_of(told) == fingerprint_of(card)
        taught = card.model_copy(update={"network": card.network.model_copy(update={"deep_supervision": 1})})
        assert fingerprint_of(taught) == fingerprint_of(card)

    def test_a_model_keeps_the_fingerprint_it_had_when_all_networks_were_2d(self):
        """Its runs know it by that, and could not be resumed under another."""
        assert fingerprint_of(make_card()).startswith("12a6141a3e429a9db35487d0961fdf6d")


def make_it_wide():
    return tiny_config(network=NetworkConfig(widths=(8, 16), norm="batch", residual=True))


class TestRefused:
    def refused(self, folder):
        with pytest.raises(PreflightError) as caught:
            load_model(str(folder), SegmentConfig(), CPU)
        return str(caught.value)

    def rewrite_card(self, folder, **changes):
        body = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**body, **changes}))

    @pytest.mark.parametrize("place", [0, 100, -1])
    def test_a_flipped_byte_in_the_weights(self, tmp_path, place):
        make_model(tmp_path)
        data = bytearray((tmp_path / WEIGHTS).read_bytes())
        data[place] ^= 1
        (tmp_path / WEIGHTS).write_bytes(data)
        assert "damaged or mixed" in self.refused(tmp_path)

    def test_weights_cut_short(self, tmp_path):
        make_model(tmp_path)
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-9])
        assert "damaged or mixed" in self.refused(tmp_path)

    def test_a_pickle_in_place_of_weights_which_is_not_run(self, tmp_path):
        make_model(tmp_path)
        bomb = pickle.dumps(Bomb(tmp_path / "went off"))
        (tmp_path / WEIGHTS).write_bytes(bomb)
        assert "damaged or mixed" in self.refused(tmp_path)
        self.rewrite_card(tmp_path, weights_sha256=hashlib.sha256(bomb).hexdigest())
        assert "found a Python pickle" in self.refused(tmp_path)
        assert not (tmp_path / "went off").exists()
        pickle.loads(bomb)
        assert (tmp_path / "went off").exists()

    def test_weights_of_another_architecture(self, tmp_path):
        save_model(str(tmp_path), make_card(), make_network(make_card(make_it_wide())).state_dict())
        assert "does not fit the architecture" in self.refused(tmp_path)

    def test_a_folder_without_a_card(self, tmp_path):
        assert "not a model folder" in self.refused(tmp_path)

    def test_a_card_without_weights(self, tmp_path):
        make_model(tmp_path)
        (tmp_path / WEIGHTS).unlink()
        assert "weights cannot be read" in self.refused(tmp_path)

    def test_a_card_that_is_no_json(self, tmp_path):
        make_model(tmp_path)
        (tmp_path / CARD).write_text("{")
        assert "not a model folder" in self.refused(tmp_path)

    def test_a_card_of_a_later_format_or_with_unknown_words(self, tmp_path):
        make_model(tmp_path)
        self.rewrite_card(tmp_path, format_version=2)
        assert "format_version" in self.refused(tmp_path)
        self.rewrite_card(tmp_path, format_version=1, execute="this")
        assert "execute" in self.refused(tmp_path)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestPredict:
    def test_the_answer_lies_on_the_native_grid_and_inside_the_crop(self, tmp_path):
        model = make_model(tmp_path, settings=SegmentConfig(threshold=0.01))
        for order in ("LPS", "ASR", None):
            scan = make_scan((5, 30, 26), order=order)
            label = model.predict([scan])[0].label
            assert label.dtype == np.uint8
            assert label.shape == scan.grid.shape
            inside = np.zeros(scan.grid.shape, bool)
            inside[tuple(slice(a, b) for a, b in scan.box)] = True
            assert label[inside].all()
            assert not label[~inside].any()

    def test_one_head_gets_one_answer_in_whatever_orientation_it_is_stored(self, tmp_path):
        model = make_model(tmp_path, settings=LOW)
        plain = model.predict([make_scan(order="LPS")])[0]
        assert 0 < plain.label.sum() < make_scan().image[0].size
        for order in ("RAS", "ASR"):
            scan = make_scan(order=order)
            turned = model.predict([scan])[0]
            assert np.array_equal(to_canonical(turned.label, scan.grid), plain.label)
            assert turned.trust == plain.trust

    def test_scans_together_are_answered_as_each_alone(self, tmp_path):
        model = make_model(tmp_path, settings=LOW)
        scans = [make_scan((n, 30 + n, 24), order=o, seed=n, name=o) for n, o in ((3, "LPS"), (6, "RAS"), (4, "SPL"))]
        for scan, together in zip(scans, model.predict(scans), strict=True):
            alone = model.predict([scan])[0]
            assert (together.label != alone.label).mean() < 1e-3
            assert together.trust[0] == pytest.approx(alone.trust[0], abs=1e-3)

    def test_regions_are_painted_in_the_values_of_the_models_label_map(self, tmp_path):
        config = tiny_config(regions=("WT", "TC", "ET"))
        model = make_model(tmp_path, make_card(config, label_map="brats2023"), LOW)
        prediction = model.predict([make_scan()])[0]
        assert set(np.unique(prediction.label)) <= {0, 1, 2, 3}
        assert len(prediction.trust) == 3

    def test_a_missing_modality_is_that_scans_error(self, tmp_path):
        with pytest.raises(ScanError, match="odd: lacks flair") as caught:
            make_model(tmp_path).predict([make_scan(), make_scan(modalities=("t1", "t1c"), name="odd")])
        assert caught.value.code is Code.MISSING_MODALITY

    def test_mirroring_makes_the_answer_of_a_mirrored_head_the_mirrored_answer(self, tmp_path):
        model = make_model(tmp_path, settings=LOW.model_copy(update={"flip": True}))
        slices = torch.randn(3, 2, 16, 16)
        with torch.inference_mode():
            assert torch.allclose(model._forward(slices.flip(3)), model._forward(slices).flip(3), atol=1e-6)
        model.settings = LOW
        with torch.inference_mode():
            assert not torch.allclose(model._forward(slices.flip(3)), model._forward(slices).flip(3), atol=1e-3)


class TestVolumes:
    """A 3D network: patches slide over each scan's volume."""

    CONFIG = tiny_config(
        network=NetworkConfig(dimensions=3, widths=(8, 8), norm="group"), prepare=PrepareConfig(size=32, patch=(4, 16, 16))
    )

    def test_the_answer_lies_on_the_native_grid(self, tmp_path):
        model = make_model(tmp_path, make_card(self.CONFIG), SegmentConfig(threshold=1e-6))
        for order, depth in (("LPS", 5), ("ASR", 9), (None, 2)):
            scan = make_scan((depth, 30, 26), order=order)
            label = model.predict([scan])[0].label
            assert label.shape == scan.grid.shape
            assert label[tuple(slice(a, b) for a, b in scan.box)].all()

    def test_scans_together_are_answered_exactly_as_each_alone(self, tmp_path):
        model = make_model(tmp_path, make_card(self.CONFIG), LOW)
        scans = [make_scan((n, 30 + n, 24), seed=n, name=str(n)) for n in (3, 6)]
        for scan, together in zip(scans, model.predict(scans), strict=True):
            assert np.array_equal(together.label, model.predict([scan])[0].label)

    def test_one_head_gets_one_answer_in_whatever_orientation_it_is_stored(self, tmp_path):
        model = make_model(tmp_path, make_card(self.CONFIG), LOW)
        plain = model.predict([make_scan(order="LPS")])[0]
        assert 0 < plain.label.sum() < make_scan().image[0].size
        scan = make_scan(order="ASR")
        assert np.array_equal(to_canonical(model.predict([scan])[0].label, scan.grid), plain.label)

    def test_mirroring_makes_the_answer_of_a_mirrored_patch_the_mirrored_answer(self, tmp_path):
        model = make_model(tmp_path, make_card(self.CONFIG), LOW.model_copy(update={"flip": True}))
        patches = torch.randn(2, 2, 4, 16, 16)
        with torch.inference_mode():
            assert torch.allclose(model._forward(patches.flip(4)), model._forward(patches).flip(4), atol=1e-6)

    def test_memory_that_runs_out_halves_what_goes_through_together(self, tmp_path):
        model = make_model(tmp_path, make_card(self.CONFIG), LOW)
        expected = model.predict([make_scan((9, 30, 26))])[0]
        model.network = Small(model.network, most=3)
        assert np.array_equal(model.predict([make_scan((9, 30, 26))])[0].label, expected.label)
        assert max(n for n in model.network.asked if n <= 3) >= 2

    def test_the_patch_decides_an_answer(self):
        card = make_card(self.CONFIG)
        other = card.model_copy(update={"prepare": PrepareConfig(size=32, patch=(4, 16, 32))})
        assert fingerprint_of(card) != fingerprint_of(other)


class Small(nn.Module):
    """A network on a device that holds no more than some slices at a time."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.asked = network, most, []

    def forward(self, x):
        self.asked.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("no room")
        return self.network(x)


class TestOutOfMemory:
    def test_the_batch_is_halved_until_it_fits(self, tmp_path):
        model = make_model(tmp_path, settings=LOW)
        scans = [make_scan((9, 30, 26))]
        expected = model.predict(scans)[0]
        model.network = Small(model.network, most=3)
        answer = model.predict(scans)[0]
        assert np.array_equal(answer.label, expected.label)
        assert max(n for n in model.network.asked if n <= 3) >= 2
        assert sum(n for n in model.network.asked if n <= 3) == scans[0].image.shape[1]

    def test_it_is_not_tried_again_with_what_did_not_fit(self, tmp_path):
        model = make_model(tmp_path, settings=LOW)
        model.network = Small(model.network, most=3)
        model.predict([make_scan((9, 30, 26))])
        too_many = [n for n in model.network.asked if n > 3]
        assert len(too_many) == len(set(too_many))
        model.network.asked.clear()
        model.predict([make_scan((9, 30, 26), seed=1)])
        assert model.network.asked
        assert max(model.network.asked) <= 3

    def test_where_not_even_one_slice_fits_it_is_said(self, tmp_path):
        model = make_model(tmp_path)
        model.network = Small(model.network, most=0)
        with pytest.raises(torch.OutOfMemoryError):
            model.predict([make_scan()])


class TestTrust:
    """A network that says one probability of everything makes every figure known beforehand."""

    def certain(self, folder, probability, threshold=0.5):
        card = make_card()
        network = make_network(card)
        nn.init.zeros_(network.head.weight)
        nn.init.constant_(network.head.bias, math.log(probability / (1 - probability)))
        save_model(str(folder), card, network.state_dict())
        return load_model(str(folder), SegmentConfig(threshold=threshold), CPU)

    def test_of_a_mask_everywhere(self, tmp_path):
        scan = make_scan((5, 30, 26))
        head = (scan.image != 0).any(axis=0)
        trust = self.certain(tmp_path, 0.8).predict([scan])[0].trust[0]
        assert trust["mean_probability"] == pytest.approx(0.8, abs=1e-4)
        assert trust["mean_entropy"] == pytest.approx(-(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2)), abs=1e-4)
        assert trust["outside_head_fraction"] == pytest.approx(1 - head.mean(), abs=1e-6)

    @pytest.mark.parametrize("probability", [1e-5, 0.003, 0.5, 0.9, 0.9996, 0.99999])
    def test_its_entropy_is_as_near_however_sure_it_is(self, tmp_path, probability):
        trust = self.certain(tmp_path, probability).predict([make_scan()])[0].trust[0]
        bits = -(probability * math.log2(probability) + (1 - probability) * math.log2(1 - probability))
        assert trust["mean_entropy"] == pytest.approx(bits, rel=0.005)

    def test_of_a_mask_nowhere(self, tmp_path):
        prediction = self.certain(tmp_path, 0.8, threshold=0.9).predict([make_scan()])[0]
        assert not prediction.label.any()
        assert prediction.trust[0]["mean_probability"] is None
        assert prediction.trust[0]["outside_head_fraction"] is None
        assert prediction.trust[0]["mean_entropy"] > 0

    def test_the_background_of_a_shifted_image_is_no_head(self, tmp_path):
        scan = make_scan()
        shifted = replace(scan, image=scan.image - 50, background=(-50.0, -50.0))
        model = self.certain(tmp_path, 0.8)
        assert model.predict([shifted])[0].trust == model.predict([scan])[0].trust


def test_a_split_knows_its_patients_and_nobody_else():
    split = Split(train=("a",), validation=("b",), test=("c",))
    assert [split.part_of(p, "scan") for p in ("a", "b", "c", "d", None)] == ["train", "validation", "test", None, None]
    by_scan = Split(unit="scan", train=("s1",))
    assert by_scan.part_of("s1", "s2") is None
    assert by_scan.part_of(None, "s1") == "train"


def test_a_model_takes_no_more_room_than_its_files(tmp_path):
    make_model(tmp_path)
    assert [storage.name_of(e.uri) for e in storage.list_files(str(tmp_path))] == [CARD, WEIGHTS]
    assert isinstance(load_model(str(tmp_path), SegmentConfig()), Model)
