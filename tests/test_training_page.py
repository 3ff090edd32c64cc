"""The page of a model: it says what card, log and rows say, nothing else, and stays inert and self-contained."""

import json
import re
from html import unescape

import pyarrow as pa
import pytest
from factory import make_card, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from brainseg import storage
from brainseg.aggregate import bootstrap_interval
from brainseg.card import Pretrained, Split, save_card
from brainseg.errors import PreflightError
from brainseg.presets import preset
from brainseg.report import figures
from brainseg.report.folds import write_folds_page
from brainseg.report.training import changes, write_training_page
from brainseg.tables import BASELINES, METRICS

HOSTILE = '</style><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} \'"&'
DICE = [0.9, 0.8, 0.35, 0.71, 0.0, 0.66]
LOG = [
    {
        "epoch": n,
        "epochs": 3,
        "loss": 1.5 / (n + 1),
        "validation_dice": 0.4 + 0.1 * n,
        "best": True,
        "learning_rate": 0.002 / (n + 1),
        "samples_per_s": 12.0 + n,
        "elapsed_s": 60.0 * (n + 1),
    }
    for n in range(3)
]
NEWER = {
    "gradient_norm": 0.5,
    "train_s": 50.0,
    "validate_s": 8.0,
    "checkpoint_s": 2.0,
    "device": "cpu",
    "peak_rss_bytes": 3 << 30,
}
TRAINING = {
    "epochs": 3,
    "best_epoch": 2,
    "seconds": 180.0,
    "wall_s": 240.0,
    "core_hours": 1.25,
    "gpu_hours": 0.0,
    "workers": 2,
    "cpus_per_worker": 2,
    "cpus": 4.0,
    "gpus": 0,
    "nodes": 1,
    "hardware": {"cpu": "A fast one", "cores": 4, "memory_bytes": 8 << 30, "gpus": []},
    "scans": [{"part": "test", "fold": 0, "scans": 6, "patients": 5}],
}
FIGURES = {
    "rule": "per scan, exclude",
    "num_scans": 6,
    "dice_mean": sum(DICE) / 6,
    "dice_median": 0.685,
    "iou_mean": 0.5,
    "precision_mean": 0.7,
    "recall_mean": 0.6,
    "accuracy_mean": 0.99,
    "states": {"both": 5, "missed": 1, "spurious": 0, "both_empty": 0},
}
NOTHING = {**FIGURES, "dice_mean": 0.0, "dice_median": 0.0, "states": {"both": 0, "missed": 6, "spurious": 0, "both_empty": 0}}


def card(**changes):
    plain = {
        "metrics": {"held_out": {"tumor": FIGURES}, "held_out_scans": {"found": 6, "scored": 6, "failed": 0}},
        "baselines": {"nothing": {"tumor": NOTHING}},
        "training": TRAINING,
        "audit": {"verdict": "clean", "reason": ""},
        "versions": {"brainseg": "1", "torch": "2"},
    }
    return make_card(**{**plain, **changes})


def metric_rows(schema, dice, **changes):
    needed = {pa.string(): "", pa.int64(): 0, pa.int32(): 0, pa.float64(): 0.0, pa.bool_(): False}
    blank = {field.name: None if field.nullable else needed.get(field.type, []) for field in schema}
    rows = [
        {**blank, "scan_id": f"s{n}", "patient_id": f"p{n}", "region": "tumor", "split": "test", "dice": value, **changes}
        for n, value in enumerate(dice)
    ]
    return [{**row, "state": "both" if row["dice"] else "missed"} for row in rows]


def write_model(folder, a_card, *, log=LOG, rows=True, pictures=()):
    place = str(folder)
    save_card(place, a_card)
    if log:
        storage.write_text(storage.join(place, "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in log))
    if rows:
        scored = pa.Table.from_pylist(metric_rows(METRICS, DICE), schema=METRICS)
        nothing = pa.Table.from_pylist(metric_rows(BASELINES, [0.0] * 6, baseline="nothing"), schema=BASELINES)
        storage.write_table(storage.join(place, "held_out.parquet"), scored)
        storage.write_table(storage.join(place, "baselines.parquet"), nothing)
    for name in pictures:
        storage.write_bytes(storage.join(place, "overlays", name), b"\x89PNG")
    return place


def page_of(folder, a_card=None, **options):
    place = write_training_page(write_model(folder, a_card or card(), **options))
    return storage.read_text(place)


def text_of(html):
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S))))


def test_the_figures_are_those_of_the_rows_with_the_interval_by_patient(tmp_path):
    html = page_of(tmp_path)
    low, high = bootstrap_interval(DICE, [f"p{n}" for n in range(6)])
    values = [float(v) for v in re.findall(r'<data value="([^"]+)">', html)]
    assert all(any(v == pytest.approx(wanted, abs=1e-9) for v in values) for wanted in (sum(DICE) / 6, low, high))
    assert "6, 6" in text_of(html)


def test_both_baselines_stand_beside_the_model(tmp_path):
    text = text_of(
        page_of(tmp_path, card(baselines={"nothing": {"tumor": NOTHING}, "nearest_training_mask": {"tumor": FIGURES}}))
    )
    assert "nothing 0.000" in text
    assert "nearest training mask 0.570" in text


def test_what_was_chosen_on_validation_has_a_line_of_its_own(tmp_path):
    a_card = card()
    chosen = {"held_out_chosen": {"tumor": {**FIGURES, "dice_mean": 0.777}}}
    text = text_of(page_of(tmp_path, a_card.model_copy(update={"metrics": a_card.metrics | chosen})))
    assert "as chosen on validation 0.777" in text
    assert "as chosen on validation" not in text_of(page_of(tmp_path))


def test_a_clean_training_raises_no_alarm(tmp_path):
    assert "Before you believe a figure" not in page_of(tmp_path)


def test_what_must_be_known_before_believing_a_figure_is_said_in_red(tmp_path):
    worse = {"nearest_training_mask": {"tumor": {**FIGURES, "dice_mean": 0.99}}}
    leaky = card(
        audit={"verdict": "leaks", "reason": "3 patients stand on two sides"},
        accept_leakage=True,
        selection_biased=True,
        baselines=worse,
    )
    html = page_of(tmp_path, leaky)
    alarm = re.search(r'<div class="alerts".*?</div>', html, re.S).group()
    for words in (
        "3 patients stand on two sides",
        "Leakage was accepted",
        "chose the checkpoint",
        "does not beat the baseline",
    ):
        assert words in alarm


def test_time_hardware_and_cost_are_those_recorded(tmp_path):
    text = text_of(page_of(tmp_path, log=[line | NEWER for line in LOG]))
    for words in (
        "A fast one, 4 logical cores",
        "2; 2 CPU(s) each; 1 node(s)",
        "3.0 GiB",
        "of these training 2 min",
        "core-hours 1.25",
    ):
        assert words in text
    assert "not stated (--price-per-hour)" in text


def test_workers_that_came_and_went_are_said_on_average(tmp_path):
    assert "2 at most, 1.5 on average; 2 CPU(s) each" in text_of(page_of(tmp_path, card(training=TRAINING | {"cpus": 3.0})))


def test_a_price_is_only_what_somebody_stated(tmp_path):
    priced = card(training=TRAINING | {"price_per_hour": 2.5, "currency": "EUR", "price": 0.1667})
    assert "0.17 EUR, at 2.50 EUR an hour as stated" in text_of(page_of(tmp_path, priced))


def test_a_model_of_an_older_version_has_a_page_without_what_it_does_not_record(tmp_path):
    old = card(training={"epochs": 3, "best_epoch": 2, "seconds": 180.0}, audit={}, baselines={})
    text = text_of(page_of(tmp_path, old, rows=False))
    assert "0.570" in text
    assert "no interval recorded" in text
    assert "core-hours" not in text
    assert "CPU" not in text
    assert "Leakage audit: not recorded" in text


def test_a_bare_card_has_a_page(tmp_path):
    text = text_of(page_of(tmp_path, make_card(), log=(), rows=False))
    assert "This model records no held-out figure" in text


def test_the_overlays_are_on_the_page_and_the_best_is_named(tmp_path):
    html = page_of(tmp_path, pictures=["epoch-001.png", "epoch-003.png"])
    assert html.count("<img ") == 2
    assert "Epoch 3, the best" in text_of(html)
    assert "Epoch 1, the best" not in text_of(html)


def test_a_recipe_is_compared_with_the_preset_of_its_name():
    shipped = preset("demo")
    as_trained = shipped.model_copy(update={"modalities": ("t1",), "folds_held_out": 3, "accept_leakage": True})
    assert changes(card(train=as_trained)) == []
    assert changes(card(train=shipped.model_copy(update={"epochs": 1}))) == [f"epochs 1 instead of {shipped.epochs}"]
    assert changes(card(train=tiny_config(name="my own"))) is None


def test_three_changes_or_more_stand_in_a_list_below_and_not_in_the_head(tmp_path):
    trained = preset("demo").model_copy(update={"epochs": 1, "batch_size": 2, "ema_decay": 0.5, "pretrained": "/secret/place"})
    parent = {"name": "older", "model_fingerprint": "0" * 64, "dataset": "elsewhere", "unit": "patient"}
    html = page_of(tmp_path, card(train=trained, pretrained=Pretrained(**parent)))
    head, rest = html.split("</header>")
    assert "3 keys changed" in text_of(head)
    assert "beginning with the weights of older (elsewhere)" in text_of(head)
    assert "epochs 1 instead of" not in head
    assert "epochs 1 instead of" in text_of(rest)


def assert_inert(html):
    assert "<script" not in html
    assert "alert(1)</" not in html
    tags = re.findall(r"<[a-z][^>]*>", re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", html))
    assert not [tag for tag in tags if re.search(r"\son\w+=", re.sub(r'"[^"]*"', "", tag))]
    assert not {"link", "iframe", "object", "base"} & {re.match(r"<([a-z0-9]+)", tag).group(1) for tag in tags}
    for tag in tags:
        for target in re.findall(r'\s(?:src|href)="([^"]*)"', tag):
            assert target.startswith(("#", "data:image/png;base64,", "fold-"))
    assert "http" not in re.sub(r"http-equiv", "", html)


def test_a_hostile_card_stays_inert_and_the_page_needs_nothing_but_itself(tmp_path):
    evil = card(
        name=HOSTILE,
        dataset=HOSTILE,
        versions={HOSTILE: HOSTILE},
        audit={"verdict": "leaks", "reason": HOSTILE},
        baselines={HOSTILE: {"tumor": FIGURES}},
        training=TRAINING | {"hardware": {"cpu": HOSTILE, "gpus": [HOSTILE]}},
        split=Split(train=(HOSTILE,)),
    )
    html = page_of(tmp_path, evil, pictures=["epoch-001.png"])
    assert_inert(html)
    assert "{{ 7 * 7 }}" in unescape(html)


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    assert page_of(tmp_path) == page_of(tmp_path)


def test_a_place_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(PreflightError, match="not a model folder"):
        write_training_page(str(tmp_path))


# --- curves ---------------------------------------------------------------------------------------------------------


@given(highest=st.floats(1e-8, 1e8))
def test_even_ticks_start_at_nothing_enclose_the_highest_and_are_few(highest):
    ticks = figures.even_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-6)
    assert 2 <= len(ticks) <= 6
    assert ticks[-2] < highest


@given(epochs=st.integers(1, 5000))
def test_ticks_of_epochs_are_epochs_and_few(epochs):
    ticks = figures.epoch_ticks(epochs)
    assert ticks == sorted(set(ticks))
    assert ticks[0] == 1
    assert ticks[-1] <= max(epochs, 1)
    assert len(ticks) <= 8


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_every_epoch_is_a_dot_within_the_chart(values):
    drawn = figures.curve([(n + 1, v) for n, v in enumerate(values)], len(values), "values")
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([-0-9.]+)" cy="([-0-9.]+)"', drawn)]
    assert len(places) == len(values)
    assert all(0 <= x <= figures.WIDTH and 0 <= y <= figures.HEIGHT for x, y in places)


# --- a cross-validation ---------------------------------------------------------------------------------------------


def write_cross_validation(folder, **changes):
    for fold in (0, 1):
        write_model(folder / f"fold-{fold}", card(name=HOSTILE))
    summary = FIGURES | {
        "dice_interval_95": [0.5, 0.6],
        "dice_q1": 0.4,
        "dice_q3": 0.8,
        "dice_mean_failed_zero": 0.5,
        "pooled_dice": 0.6,
        "patient_mean_dice": 0.57,
        "num_patients": 6,
        "num_unnamed": 0,
    }
    body = {
        "name": HOSTILE,
        "manifest_fingerprint": "f" * 64,
        "folds": [0, 1],
        "selection_biased": False,
        "accept_leakage": False,
        "leakage_audit": {"0": "clean", "1": "clean"},
        "regions": {"tumor": {"exclude": summary, "brats": summary}},
        "baselines": {"nothing": {"tumor": {"exclude": summary | {"dice_mean": 0.0, "dice_interval_95": None}}}},
        "per_fold": {
            str(fold): {"held_out": {"tumor": FIGURES}, "scans": {"found": 6, "scored": 6, "failed": 0}, "training": TRAINING}
            for fold in (0, 1)
        },
        "scans": {"found": 13, "with_label": 13, "unusable": 0, "held_out": 12, "scored": 12, "failed": 0},
        "missing": [{"scan_id": HOSTILE, "code": "NOT_TRAINED", "reason": "fold 2 is not finished"}],
    }
    storage.write_json(str(folder / "cross_validation.json"), body | changes)
    return str(folder)


def test_a_cross_validation_leads_to_the_page_of_every_fold(tmp_path):
    html = storage.read_text(write_folds_page(write_cross_validation(tmp_path)))
    links = re.findall(r'href="(fold-[^"]+)"', html)
    assert links == ["fold-0/training.html", "fold-1/training.html"]
    assert all((tmp_path / link).is_file() for link in links)
    assert_inert(html)


def test_its_figures_are_those_of_its_json(tmp_path):
    text = text_of(storage.read_text(write_folds_page(write_cross_validation(tmp_path))))
    assert "0.570" in text
    assert "95 % interval 0.500 to 0.600" in text
    assert f"scans, patients {FIGURES['num_scans']}, 6 " in text
    assert "fold 2 is not finished" in text
    assert "Not finished: 1 labelled scans" in text
    assert "2.50 core-hours" in text


def test_groups_that_a_mean_hides_and_the_chosen_answers_have_lines_of_their_own(tmp_path):
    whole = storage.read_json(storage.join(write_cross_validation(tmp_path / "plain"), "cross_validation.json"))
    summary = whole["regions"]["tumor"]["exclude"]

    def regions(dice):
        return {"tumor": {"exclude": summary | {"num_scans": 2, "dice_mean": dice}}}

    def small(dice):
        return [{"name": "small", "what": "label under 6000 voxels <b>", "regions": regions(dice)}]

    chosen = {"0": {"threshold": 0.3, "smallest_component": "largest"}, "1": {"threshold": 0.5, "smallest_component": 50}}
    more = {"subgroups": small(0.321), "subgroups_chosen": small(0.322), "regions_chosen": regions(0.611), "chosen": chosen}
    html = storage.read_text(write_folds_page(write_cross_validation(tmp_path / "more", **more)))
    text = text_of(html)
    small_ones, all_chosen = "label under 6000 voxels <b>", "as chosen on each fold's validation scans"
    for who, dice in ((small_ones, "0.321"), (all_chosen, "0.611"), (small_ones, "0.322")):
        assert f"{who} 2 {dice} ( 0.500 to 0.600 )" in text
    assert "0: 0.3 and largest; 1: 0.5 and 50." in text
    assert "<b>" not in html.split("<main>")[1].split("<tbody>")[1].split("</tbody>")[0]


def test_a_leaking_fold_is_named_in_red(tmp_path):
    html = storage.read_text(write_folds_page(write_cross_validation(tmp_path, leakage_audit={"0": "clean", "1": "leaks"})))
    assert "the split leaks in fold 1" in re.search(r'<div class="alerts".*?</div>', html, re.S).group()


def test_a_folder_without_a_cross_validation_is_refused(tmp_path):
    with pytest.raises(PreflightError, match="no cross-validation"):
        write_folds_page(str(tmp_path))
