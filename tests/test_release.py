"""Models that are given away: half as large, answering the same, on terms that nobody can overlook."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from factory import CPU, make_card, make_model, make_scan, tiny_config, write_scan
from rows_as_runs import typical_rows, write_run
from safetensors.torch import load_file

from brainseg import cli, commands, given_away, manifest, report, shipped, storage
from brainseg.card import Terms, load_card
from brainseg.config import How, SegmentConfig
from brainseg.console import Voice
from brainseg.ensemble import find_members, load_segmenter
from brainseg.errors import PreflightError, UsageError
from brainseg.model import WEIGHTS, load_model, save_model
from brainseg.release import described, release
from brainseg.results import shipped_words
from brainseg.segment import take_order
from brainseg.specs import SegmentSpec, read_spec
from brainseg.tables import MANIFEST

FREE = Terms(data="phantoms", licence="CC BY 4.0", commercial=True, unfit_for="patients")
BOUND = Terms(data="phantoms", licence="CC BY-NC 4.0", commercial=False, unfit_for="patients")
SCAN = make_scan((5, 30, 26), name="s0", seed=0)


@pytest.fixture
def trained(tmp_path):
    make_model(tmp_path / "trained", make_card(metrics={"held_out": {}}), seed=3)
    return str(tmp_path / "trained")


@pytest.fixture
def ships(tmp_path, monkeypatch):
    """A package with two models in it, one of them not for commercial use."""
    folder = tmp_path / "package"
    for name, terms in (("free-flair", FREE), ("bound-flair", BOUND)):
        make_model(folder / name, make_card(name=name, terms=terms, split={"train": ("a", "b"), "test": ("c",)}))
    monkeypatch.setattr(shipped, "FOLDER", folder)
    shipped.names.cache_clear()
    yield folder
    shipped.names.cache_clear()


@pytest.fixture
def archive(tmp_path):
    """A manifest of one scan."""
    table = pa.Table.from_pylist([write_scan(tmp_path / "scans", SCAN)], schema=MANIFEST)
    return manifest.write_manifest(str(tmp_path / "m.parquet"), table) or str(tmp_path / "m.parquet")


class TestRelease:
    def test_weights_are_half_as_large_and_answers_the_same_to_a_thousandth(self, tmp_path, trained):
        out = str(tmp_path / "out")
        card = release(trained, out, "phantom-flair", FREE)
        halves = load_file(f"{out}/{WEIGHTS}")
        assert {t.dtype for t in halves.values() if t.is_floating_point()} == {torch.float16}
        before, after = (load_segmenter([uri], SegmentConfig(), CPU) for uri in (trained, out))
        (one,), (other,) = (list(m.probabilities([SCAN])) for m in (before, after))
        assert torch.allclose(one, other, atol=1e-3)
        assert (card.name, card.terms) == ("phantom-flair", FREE)
        assert load_card(out) == card

    def test_a_damaged_model_is_refused(self, tmp_path, trained):
        weights = Path(trained) / WEIGHTS
        weights.write_bytes(weights.read_bytes() + b"x")
        with pytest.raises(PreflightError, match="the folder is damaged or mixed"):
            release(trained, str(tmp_path / "out"), "x", FREE)

    def test_only_weights_and_card_go_along(self, tmp_path, trained):
        storage.write_text(f"{trained}/training.html", "patients")
        release(trained, str(tmp_path / "out"), "x", FREE)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.json", WEIGHTS]

    def test_nothing_is_overwritten(self, tmp_path, trained):
        release(trained, str(tmp_path / "out"), "x", FREE)
        with pytest.raises(UsageError, match="holds a model already"):
            release(trained, str(tmp_path / "out"), "y", FREE)

    def test_a_number_that_float16_cannot_hold_is_refused(self, tmp_path, trained):
        weights = load_file(f"{trained}/{WEIGHTS}")
        weights["head.bias"] = torch.full_like(weights["head.bias"], 1e6)
        save_model(trained, load_card(trained), weights)
        with pytest.raises(PreflightError, match=r"head\.bias holds 1e\+06, more than float16 can"):
            release(trained, str(tmp_path / "out"), "x", FREE)


class TestByName:
    def test_a_name_loads_what_lies_in_the_package(self, ships):
        by_name, by_place = (load_model(uri, SegmentConfig(), CPU) for uri in ("free-flair", str(ships / "free-flair")))
        assert by_name.fingerprint == by_place.fingerprint
        assert find_members(["free-flair"], SegmentConfig()).uris == ("free-flair",)

    def test_a_folder_of_that_name_in_sight_goes_before_it(self, ships, tmp_path, monkeypatch, archive):
        monkeypatch.chdir(tmp_path)
        own = make_card(tiny_config(modalities=("t2",)), name="own")
        make_model(tmp_path / "free-flair", own)
        with pytest.raises(PreflightError, match="model 'own' needs t2"):
            commands.segment(archive, "free-flair", str(tmp_path / "run"), Voice(quiet=True), How(dry_run=True))

    def test_a_name_that_is_none_is_told_those_that_are(self, ships, tmp_path, archive):
        with pytest.raises(PreflightError, match="the models that ship are bound-flair, free-flair"):
            commands.segment(archive, "fre-flair", str(tmp_path / "run"), Voice(quiet=True), How())

    def test_a_spec_may_name_one(self, ships, tmp_path):
        spec = tmp_path / "spec.yaml"
        spec.write_text("archive: /a\nmodel: free-flair\nout: /r\n")
        assert read_spec(SegmentSpec, str(spec)).model == "free-flair"

    def test_they_are_listed_with_what_must_be_known(self, ships, capsys):
        given_away.list_models(Voice())
        said = capsys.readouterr().out
        assert "free-flair: flair, t1c -> tumor" in said
        assert "trained on    2 patients, chosen on 0: phantoms" in said
        assert "licence       CC BY-NC 4.0; no commercial use (--accept-noncommercial)" in said
        assert said.count("not for       patients") == 2

    def test_the_command_line_lists_them_as_json(self, ships, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["brainseg", "models", "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        listed = json.loads(capsys.readouterr().out)["models"]
        assert [model["name"] for model in listed] == ["bound-flair", "free-flair"]
        assert listed[1]["terms"] == FREE.model_dump()


class TestTerms:
    def test_a_model_that_is_not_for_commerce_answers_only_who_says_that_his_use_is_none(self, ships, archive):
        with pytest.raises(UsageError, match=r"under CC BY-NC 4\.0, which allows no commercial use; --accept-noncommercial"):
            take_order(archive, "bound-flair", SegmentConfig(), How())
        assert take_order(archive, "bound-flair", SegmentConfig(), How(accept_noncommercial=True))

    def test_one_of_several_models_binds_all(self, ships, archive):
        both = ["free-flair", "bound-flair"]
        make_model(ships / "free-flair", load_card("free-flair"), seed=5)
        with pytest.raises(UsageError, match="no commercial use"):
            take_order(archive, both, SegmentConfig(), How())
        assert take_order(archive, both, SegmentConfig(), How(accept_noncommercial=True)).members.card.terms == BOUND

    def test_the_run_says_on_what_terms_it_was_made(self, ships, archive, tmp_path):
        order = take_order(archive, "bound-flair", SegmentConfig(), How(accept_noncommercial=True))
        assert order.description(archive, print)["model"]["terms"] == BOUND.model_dump()

    @pytest.mark.parametrize(("terms", "times"), [(FREE, 0), (BOUND, 1), (None, 0)])
    def test_the_report_says_so_to_its_reader(self, tmp_path, terms, times):
        run = write_run(tmp_path, typical_rows(), model={"terms": terms and terms.model_dump()})
        said = report.summary([run])["alerts"]
        assert sum("no commercial use" in line for line in said) == times


class TestThoseThatShip:
    """What lies in the package now."""

    def test_they_take_twenty_megabytes_at_most(self):
        assert sum(p.stat().st_size for p in shipped.FOLDER.rglob("*") if p.is_file()) < 20e6

    @pytest.mark.parametrize("name", shipped.names())
    def test_each_can_be_loaded_and_says_all_that_must_be_known(self, name):
        card = load_card(name)
        assert card.name == name
        assert load_model(name, SegmentConfig(), CPU).network is not None
        known = described(card)
        assert known["terms"]["data"]
        assert known["terms"]["unfit_for"]
        assert all(figures["num_scans"] and figures["dice_mean"] for figures in known["held_out"].values())
        assert known["held_out"]
        assert name in shipped_words(known)

    @pytest.mark.parametrize("name", shipped.names())
    def test_none_holds_a_picture(self, name):
        assert sorted(p.name for p in (shipped.FOLDER / name).iterdir()) == ["model.json", WEIGHTS]
