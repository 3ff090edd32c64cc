"""Fine-tuning: a training that begins with another model's weights, and answers for whom they have met and on what terms."""

import shutil

import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

from brainseg import commands, learn, manifest, pretrained, storage
from brainseg.card import Terms, load_card, save_card
from brainseg.config import LossConfig, NetworkConfig, OptimiserConfig, PrepareConfig, SegmentConfig, TrainConfig
from brainseg.cross_validation import cross_validate
from brainseg.ensemble import SUMMARY, fold_model
from brainseg.errors import LeakageError, PreflightError, UsageError
from brainseg.model import WEIGHTS, load_model
from brainseg.phantom import write_archive
from brainseg.release import release
from brainseg.train import claim, claimed_before, draft, train_model

RECIPE = TrainConfig(
    name="tiny",
    precision="fp32",
    network=NetworkConfig(widths=(8, 16), norm="group"),
    prepare=PrepareConfig(size=32),
    loss=LossConfig(kind="bce_dice"),
    optimiser=OptimiserConfig(learning_rate=3e-3, warmup_steps=3),
    epochs=6,
    batch_size=6,
    samples_per_epoch=24,
    validate_every=6,
    ema_decay=0.9,
    validation_share=0.2,
)
BOUND = Terms(data="phantoms", licence="CC BY-NC 4.0", commercial=False, unfit_for="patients")


@pytest.fixture(scope="module")
def manifest_uri(tmp_path_factory):
    place = tmp_path_factory.mktemp("pretrained")
    write_archive(place / "archive", "lgg", scans=14, broken=0, shape=(6, 48, 48), seed=11)
    table, _ = manifest.index_archive(str(place / "archive"))
    manifest.write_manifest(str(place / "manifest.parquet"), table)
    return str(place / "manifest.parquet")


@pytest.fixture(scope="module")
def parent(manifest_uri, tmp_path_factory, local_ray):
    out = str(tmp_path_factory.mktemp("parent") / "model")
    train_model(manifest_uri, out, RECIPE, workers=1)
    card = load_card(out)
    save_card(out, card.model_copy(update={"terms": BOUND}))
    return out


def going_on(parent, **changes):
    return RECIPE.model_copy(update={"pretrained": parent, **changes})


def test_it_goes_on_where_the_other_stopped(manifest_uri, parent, tmp_path):
    out = str(tmp_path / "tuned")
    # So small a step that nothing is learnt: what comes out must be what went in
    still = OptimiserConfig(learning_rate=1e-12, warmup_steps=0, weight_decay=0)
    card = train_model(manifest_uri, out, going_on(parent, epochs=1, validate_every=1, optimiser=still, ema_decay=0), workers=2)
    before, after = (load_file(f"{place}/{WEIGHTS}") for place in (parent, out))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert card.baselines["pretrained_weights"] == card.metrics["held_out"]
    rows = storage.read_table(f"{out}/baselines.parquet")
    assert rows.filter(pc.equal(rows["baseline"], "pretrained_weights")).num_rows == len(card.split.test)
    assert card.pretrained.name == "tiny"
    assert card.pretrained.model_fingerprint == load_model(parent, SegmentConfig()).fingerprint


def test_every_worker_begins_with_float16_weights_as_well(parent, tmp_path):
    release(parent, str(tmp_path / "half"), "half", BOUND)
    pretrained.bring(going_on(str(tmp_path / "half")), str(tmp_path / "w.safetensors"))
    begun = load_file(tmp_path / "w.safetensors")
    learner = learn.make_learner(going_on(parent, modalities=("t1", "flair", "t1c")), 24, torch.device("cpu"), learn.Worker())
    learn.begin_with(learner, begun)
    assert all(torch.equal(learner.network.state_dict()[name], value) for name, value in begun.items())
    assert all(torch.equal(learner.averaged[name], value) for name, value in begun.items())


def test_whom_the_weights_met_is_trained_on_and_their_licence_stays(manifest_uri, parent):
    table = manifest.read_manifest(manifest_uri)
    told = load_card(parent)
    # Half of the archive, in which the other model's training patients are not
    fewer = table.filter(pc.invert(pc.is_in(table["patient_id"], value_set=pc.cast(list(told.split.train[:3]), "string"))))
    card, _ = draft(fewer, going_on(parent))
    assert set(told.split.train) <= set(card.split.train)
    assert card.split.part_of(told.split.train[0], "") == "train"
    assert (card.terms.licence, card.terms.commercial) == ("CC BY-NC 4.0", False)
    assert card.terms.data == "lgg; before that, as 'tiny': phantoms"


def test_a_fold_that_the_weights_have_met_cannot_be_kept_back(manifest_uri, parent):
    table = manifest.read_manifest(manifest_uri)
    with pytest.raises(LeakageError, match=r"has met \d+ of the scans that are kept back"):
        draft(table, going_on(parent, folds_held_out=1))
    card, _ = draft(table, going_on(parent, folds_held_out=1, accept_leakage=True))
    assert card.pretrained.met > 0


def test_accepted_leakage_stands_in_the_audit(manifest_uri, parent, tmp_path, local_ray):
    said = []
    config = going_on(parent, folds_held_out=1, accept_leakage=True, epochs=1, validate_every=1)
    card = train_model(manifest_uri, str(tmp_path / "m"), config, workers=1, say=said.append)
    assert card.audit["verdict"] == "leaks"
    assert "the weights that it began with had met" in card.audit["reason"]
    assert any(line.startswith("WARNING: the split leaks") for line in said)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"network": NetworkConfig(widths=(8, 16), norm="batch")}, "its network.norm is group, here it is batch"),
        ({"modalities": ("flair",)}, "its modalities is t1, flair, t1c, here it is flair"),
        ({"prepare": PrepareConfig(size=32, normalise="slice_max")}, "its prepare.normalise is zscore, here it is slice_max"),
    ],
)
def test_weights_for_something_else_are_refused_in_one_line(manifest_uri, parent, changes, found):
    with pytest.raises(PreflightError, match=found):
        draft(manifest.read_manifest(manifest_uri), going_on(parent, **changes))


def test_a_fold_begins_with_the_model_that_kept_it_back(manifest_uri, parent, tmp_path):
    cv = str(tmp_path / "cv")
    shutil.copytree(parent, fold_model(cv, 0))
    storage.write_json(storage.join(cv, SUMMARY), {"folds": [0]})
    card, _ = draft(manifest.read_manifest(manifest_uri), going_on(cv))
    assert card.pretrained.model_fingerprint == load_model(parent, SegmentConfig()).fingerprint
    assert words(manifest_uri, pretrained=cv, accept_noncommercial=True).network == RECIPE.network
    with pytest.raises(PreflightError, match="no model to begin fold 3 with"):
        draft(manifest.read_manifest(manifest_uri), going_on(cv, folds_held_out=3))


def test_of_a_cross_validation_that_is_not_finished_its_finished_folds_can_be_gone_on_with(manifest_uri, parent, tmp_path):
    cv, out = str(tmp_path / "cv"), str(tmp_path / "tuned")
    shutil.copytree(parent, fold_model(cv, 0))
    storage.write_json(storage.join(cv, SUMMARY), {"folds": [0]})
    short = going_on(cv, epochs=1)
    assert cross_validate(manifest_uri, out, short, folds=[0], workers=1)["folds"] == [0]
    with pytest.raises(PreflightError, match="no model to begin fold 3 with"):
        cross_validate(manifest_uri, out, short, folds=[0, 3], workers=1)
    with pytest.raises(UsageError, match="holds another model"):
        cross_validate(manifest_uri, out, going_on(cv, epochs=2), folds=[0], workers=1)


def test_larger_slices_are_no_hindrance(manifest_uri, parent):
    card, _ = draft(manifest.read_manifest(manifest_uri), going_on(parent, prepare=PrepareConfig(size=48)))
    assert card.prepare.size == 48


def words(manifest_uri, **changes):
    given = {"preset": None, "config": None, "assignments": [], "fold": None, "accept_leakage": False}
    return commands.recipe(manifest_uri, **{**given, **changes})


def test_without_a_recipe_the_models_own_is_gone_on_with_at_a_gentler_pace(manifest_uri, parent):
    config = words(manifest_uri, pretrained=parent, fold=2, accept_noncommercial=True)
    assert config.optimiser.learning_rate == RECIPE.optimiser.learning_rate / 4
    assert (config.network, config.pretrained, config.folds_held_out) == (RECIPE.network, parent, 2)
    named = words(manifest_uri, preset="lgg-strong", pretrained=parent, accept_noncommercial=True)
    assert (named.name, named.pretrained) == ("lgg-strong", parent)


@pytest.mark.parametrize("way", [{"pretrained": "PARENT"}, {"assignments": ["pretrained=PARENT"]}])
def test_a_licence_without_commercial_use_is_asked_about_first(manifest_uri, parent, way):
    placed = {
        k: v.replace("PARENT", parent) if isinstance(v, str) else [w.replace("PARENT", parent) for w in v]
        for k, v in way.items()
    }
    with pytest.raises(UsageError, match=r"CC BY-NC 4\.0, which allows no commercial use; --accept-noncommercial"):
        words(manifest_uri, **placed)
    assert words(manifest_uri, **placed, accept_noncommercial=True).pretrained == parent


def test_weights_of_a_split_that_leaks_are_refused_whatever_is_kept_back(manifest_uri, parent, tmp_path):
    shutil.copytree(parent, tmp_path / "leaky")
    save_card(str(tmp_path / "leaky"), load_card(parent).model_copy(update={"accept_leakage": True}))
    with pytest.raises(LeakageError, match="nobody can tell"):
        draft(manifest.read_manifest(manifest_uri), going_on(str(tmp_path / "leaky")))


def test_weights_that_know_others_by_another_kind_of_name_are_said_to(manifest_uri, parent):
    card, _ = draft(manifest.read_manifest(manifest_uri), going_on(parent))
    assert pretrained.line(card, card.pretrained) == "begins with the weights of 'tiny', trained on lgg"
    by_scan = card.pretrained.model_copy(update={"unit": "scan"})
    assert "it knows scans, this training patients" in pretrained.line(card, by_scan)


def test_what_is_given_away_names_whose_weights_it_began_with_and_not_where_they_lay(manifest_uri, parent, tmp_path):
    card, _ = draft(manifest.read_manifest(manifest_uri), going_on(parent))
    shutil.copytree(parent, tmp_path / "tuned")
    tuned = card.model_copy(update={"weights_sha256": load_card(parent).weights_sha256})
    save_card(str(tmp_path / "tuned"), tuned)
    given = release(str(tmp_path / "tuned"), str(tmp_path / "out"), "mine", BOUND)
    assert (given.train.pretrained, given.pretrained.name) == ("tiny", "tiny")
    assert parent not in (tmp_path / "out" / "model.json").read_text()


def test_what_descends_from_it_is_not_given_away_for_commerce(parent, tmp_path):
    with pytest.raises(UsageError, match="these terms would"):
        release(parent, str(tmp_path / "out"), "mine", BOUND.model_copy(update={"commercial": True}))


def test_a_place_without_a_model_is_a_usage_error_that_names_those_that_ship(manifest_uri, tmp_path):
    with pytest.raises(UsageError, match=r"the models that ship are figshare-t1c, lgg-flair"):
        words(manifest_uri, pretrained=str(tmp_path / "nowhere"))


def test_another_parent_in_the_same_place_is_another_training(manifest_uri, parent, tmp_path):
    card, _ = draft(manifest.read_manifest(manifest_uri), going_on(parent))
    other = card.pretrained.model_copy(update={"model_fingerprint": "0" * 64})
    work = str(tmp_path / "m.work")
    storage.write_json(storage.join(work, "training.json"), claim(card))
    assert claimed_before(work, card)
    with pytest.raises(UsageError, match="another config or manifest"):
        claimed_before(work, card.model_copy(update={"pretrained": other}))
