"""Configs: unknown keys are refused by name, values are checked, overrides reach where they point."""

import pytest
import yaml
from pydantic import ValidationError

from brainseg.config import NetworkConfig, PrepareConfig, SegmentConfig, TrainConfig, build, override, read_yaml
from brainseg.errors import ConfigError
from brainseg.presets import PRESETS, preset


def complaint(values, kind=TrainConfig):
    with pytest.raises(ConfigError) as caught:
        build(kind, values, "recipe.yaml")
    return str(caught.value)


def test_an_unknown_key_is_refused_and_the_valid_ones_are_listed():
    text = complaint({"learning_rte": 1})
    assert "unknown key 'learning_rte'" in text
    assert all(name in text for name in TrainConfig.model_fields)


def test_an_unknown_nested_key_lists_the_keys_of_its_own_group():
    text = complaint({"optimiser": {"learning_rte": 1}})
    assert "unknown key 'optimiser.learning_rte'" in text
    assert "learning_rate" in text
    assert "foreground_share" not in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epochs": 0}, "epochs: "),
        ({"loss": {"kind": "focal"}}, "loss.kind: "),
        ({"optimiser": {"learning_rate": ".nan"}}, "optimiser.learning_rate: "),
        ({"optimiser": {"learning_rate": float("inf")}}, "optimiser.learning_rate: "),
        ({"network": {"widths": [0, 8]}}, "network.widths.0: "),
        ({"network": {"widths": [12, 24], "norm": "group"}}, "multiple of 8"),
        ({"prepare": {"size": 40}}, "multiple of 16, at least 32"),
        ({"prepare": {"size": 16}}, "multiple of 16, at least 32"),
        ({"regions": []}, "regions: "),
        ({"regions": ["WT", "WT"]}, "regions must differ"),
        ({"modalities": ["t1", "t1"]}, "modalities must differ"),
        ({"seed": -1}, "seed: "),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(values, says):
    assert says in complaint(values)


def test_a_config_cannot_be_changed_once_made():
    with pytest.raises(ValidationError, match="frozen"):
        SegmentConfig().threshold = 0.1


def test_equal_configs_have_one_fingerprint_and_any_change_gives_another():
    assert SegmentConfig().fingerprint() == SegmentConfig(threshold=0.5).fingerprint()
    changed = [SegmentConfig(threshold=0.4), SegmentConfig(flip=True), SegmentConfig(score=False)]
    assert len({c.fingerprint() for c in [SegmentConfig(), *changed]}) == 4


def test_a_config_survives_the_way_through_json():
    config = preset("brats-strong")
    again = build(TrainConfig, config.model_dump(mode="json"), "there and back")
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_an_override_reaches_one_nested_key_and_leaves_its_argument_alone():
    before = preset("lgg-strong").model_dump(mode="json")
    after = override(before, ["optimiser.learning_rate=1e-3", "augment.flip=false", "network.widths=[8, 16]", "patience=null"])
    config = build(TrainConfig, after, "here")
    assert config.optimiser.learning_rate == 1e-3
    assert config.augment.flip is False
    assert config.network.widths == (8, 16)
    assert config.patience is None
    assert config.optimiser.weight_decay == before["optimiser"]["weight_decay"]
    assert before == preset("lgg-strong").model_dump(mode="json")


def test_an_override_may_hold_an_equals_sign_and_starts_groups_that_are_not_there():
    assert override({}, ["prepare.size=64", "name=a=b"]) == {"prepare": {"size": 64}, "name": "a=b"}


@pytest.mark.parametrize("assignment", ["epochs", "=3", "epochs.more=3", "name=[1", "name={a: b"])
def test_a_malformed_override_is_a_config_error(assignment):
    with pytest.raises(ConfigError, match="--set"):
        override({"epochs": 3}, [assignment])


def test_yaml_is_a_mapping_or_refused():
    assert read_yaml("epochs: 3\nprepare: {size: 64}", "r.yaml") == {"epochs": 3, "prepare": {"size": 64}}
    assert read_yaml("# only a comment", "r.yaml") == {}
    for text in ("- a list", "a: [", "just words"):
        with pytest.raises(ConfigError, match=r"r\.yaml"):
            read_yaml(text, "r.yaml")


def test_yaml_never_makes_an_object():
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml("a: !!python/object/apply:os.getcwd []", "r.yaml")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_named_by_its_key_and_can_be_written_as_yaml(name):
    config = preset(name)
    assert config.name == name
    assert build(TrainConfig, read_yaml(yaml.safe_dump(config.model_dump(mode="json")), name), name) == config


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="lgg-strong"):
        preset("lgg-weak")


def test_the_stride_is_what_the_levels_make_of_a_pixel():
    assert NetworkConfig(widths=(8, 16, 32)).stride == 4
    assert PrepareConfig().size % NetworkConfig().stride == 0


@pytest.mark.parametrize(
    ("network", "prepare", "says"),
    [
        ({"dimensions": 3}, {}, r"needs prepare\.patch"),
        (
            {"dimensions": 3},
            {"patch": [16, 16, 24]},
            r"prepare\.patch is \[16, 16, 24\]; 5 levels need a multiple of 16, at least 32",
        ),
        ({"dimensions": 3, "widths": [4, 8]}, {"size": 32, "patch": [8, 40, 8]}, r"must fit in prepare\.size, 32"),
        ({"dimensions": 3, "context_slices": 1}, {"patch": [32, 32, 32]}, "context_slices must be 0 with dimensions 3"),
        ({}, {"patch": [32, 32, 32]}, "for network.dimensions 3 alone"),
        ({}, {"size": 24}, r"prepare\.size is 24; 5 levels need a multiple of 16, at least 32"),
    ],
)
def test_a_network_and_what_it_is_given_must_fit(network, prepare, says):
    with pytest.raises(ConfigError, match=says):
        build(TrainConfig, {"network": network, "prepare": prepare}, "r.yaml")


def test_a_patch_may_be_deeper_than_a_model_grid_is_wide_and_the_grid_need_not_fit_the_levels():
    values = {"network": {"dimensions": 3, "widths": [4, 8, 8]}, "prepare": {"size": 30, "patch": [64, 16, 24]}}
    assert build(TrainConfig, values, "r.yaml").prepare.patch == (64, 16, 24)
