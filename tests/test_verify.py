"""Verify: a finished run is proven, and whatever is wrong with one is found and said in lines, whichever byte it is."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import factory
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from object_stores import moto_store

from brainseg import manifest, runs, storage
from brainseg.card import Split
from brainseg.metrics import score_region
from brainseg.runs import Identity
from brainseg.tables import MANIFEST, METRICS, SCANS
from brainseg.verify import verify_run

START = datetime(2026, 1, 1, tzinfo=UTC)
TRUST = {"mean_probability": 0.9, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
NAMES = "abcd"


def manifest_row(scan_id):
    source = {"uri": f"/archive/{scan_id}.nii.gz", "role": "image", "modality": "flair", "index": None, "size_bytes": 10}
    return factory.make_row(scan_id, f"of-{scan_id}", sources=[{**source, "tag": "t", "sha256": None}])


def scan_row(body, scan_id, minute=0, **changes):
    """A row of the `scans` table of the run with this `run.json`, as a stage would hand it over."""
    known, mask = manifest_row(scan_id), f"mask of {scan_id}".encode() * 20
    kept = {k: known[k] for k in ("scan_id", "patient_id", "dataset", "label_map", "fold", "sources", "attributes")}
    entry = score_region("tumor", np.eye(4, dtype=bool)[None], np.ones((1, 4, 4), bool), (1.0, 1.0, 1.0))
    made = {"mask": mask, "mask_encoding": "nii.gz", "mask_sha256": hashlib.sha256(mask).hexdigest(), "shape": [1, 4, 4]}
    whose = {name: body[name] for name in ("run_id", "model_fingerprint", "config_fingerprint")}
    plain = {"status": "ok", "warnings": [], "regions": [{**entry, **TRUST}], "content_tag": runs.content_tag(known)}
    return {**kept, **made, **whose, **plain, "attempt": 1, "finished_at": START + timedelta(minutes=minute), **changes}


def failed(body, scan_id):
    nothing = dict.fromkeys(("mask", "mask_encoding", "mask_sha256", "regions", "shape"))
    return scan_row(body, scan_id, **nothing, status="failed", error_code="CORRUPT", error_stage="decode")


def make_run(run):
    """A finished run of a, b (failed), c, d in the parts a+b and c+d, in which nothing is wrong."""
    table = pa.Table.from_pylist([manifest_row(s) for s in NAMES], schema=MANIFEST)
    identity = Identity(manifest.fingerprint(table), "model-1", "config-1")
    body = runs.open_run(run, identity, {"source": "archive", "model": {"split": {"test": ["of-a"]}}})
    manifest.write_manifest(f"{run}/manifest.parquet", table)
    runs.write_part(run, [scan_row(body, "a"), failed(body, "b")])
    runs.write_part(run, [scan_row(body, "c"), scan_row(body, "d")])
    counts = runs.settle(run, runs.expected_tags(table)) | runs.write_metrics(run, Split(test=("of-a",)))
    runs.finish_run(run, body, counts, {})
    return run


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Every file of a sound run, by name."""
    place = tmp_path_factory.mktemp("sound")
    make_run(str(place))
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.fixture
def run(sound, tmp_path):
    """A sound run that may be spoilt."""
    return copied(sound, tmp_path / "run")


def copied(files, place):
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return str(place)


def part_of(run, *scan_ids):
    return Path(runs.part_uri(run, scan_ids))


def edit(run, scan_ids, change):
    """Rewrite a part with changed rows under its own name, as somebody with our own code could."""
    uri = str(part_of(run, *scan_ids))
    storage.write_table(uri, pa.Table.from_pylist(change(storage.read_table(uri).to_pylist()), schema=SCANS))


def reseal(run):
    """Forge the seals, so that only the content can give a change away."""
    success = storage.read_json(f"{run}/_SUCCESS.json")
    names = [name for name in success["files"] if Path(run, name).exists()]
    storage.write_json(f"{run}/_SUCCESS.json", {**success, "files": runs.seals(run, names)})


def flipped(data, place, bit=0):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def found(run, text):
    """Assert that verify finds something of which a line holds this text, and that every finding is one line."""
    problems = verify_run(run)
    assert any(text in problem for problem in problems), problems
    assert all(len(problem.splitlines()) == 1 for problem in problems)
    return True


def test_a_sound_run_has_no_problem(run):
    assert verify_run(run) == []


def test_a_run_made_before_brightness_was_recorded_is_still_sound(run):
    for part in runs.parts(run):
        storage.write_table(part, storage.read_table(part).drop_columns(["intensities"]))
    reseal(run)
    assert verify_run(run) == []
    storage.write_table(part, storage.read_table(part).drop_columns(["warnings"]))
    reseal(run)
    assert found(run, "columns")


def test_the_proof_holds_on_an_object_store_too():
    with moto_store() as bucket:
        run = make_run(f"{bucket}/runs/first")
        assert verify_run(run) == []
        part = runs.parts(run)[0]
        storage.write_bytes(part, flipped(storage.read_bytes(part), 100))
        assert found(run, "bytes have changed")
        storage.delete(part)
        assert found(run, "part is missing")


class TestBytes:
    """Whatever byte of whatever file is another one, it is found, also where no reader would ever notice."""

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_a_flipped_bit_anywhere_in_the_run(self, sound, tmp_path_factory, data):
        run = copied(sound, tmp_path_factory.mktemp("flipped"))
        name = data.draw(st.sampled_from(sorted(sound)))
        place = data.draw(st.integers(0, len(sound[name]) - 1))
        bit = data.draw(st.integers(0, 7))
        Path(run, name).write_bytes(flipped(sound[name], place, bit))
        if name == "_SUCCESS.json":
            verify_run(run)
        else:
            assert verify_run(run), f"{name}, byte {place}, bit {bit}"

    @pytest.mark.slow
    def test_bytes_all_over_a_part(self, sound, run):
        name = sorted(n for n in sound if n.startswith("scans/"))[0]
        for place in range(0, len(sound[name]), 17):
            Path(run, name).write_bytes(flipped(sound[name], place, place % 7))
            assert verify_run(run), f"byte {place}"

    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_without_seals_a_flipped_bit_never_ends_in_a_foreign_exception(self, sound, tmp_path_factory, data):
        """As in a run of an earlier version, whose _SUCCESS.json names its parts and no more."""
        run = copied(sound, tmp_path_factory.mktemp("flipped"))
        name = data.draw(st.sampled_from(sorted(n for n in sound if n.endswith(".parquet"))))
        last = len(sound[name]) - 1
        place = data.draw(st.integers(0, last) | st.integers(last // 2, last))
        Path(run, name).write_bytes(flipped(sound[name], place, data.draw(st.integers(0, 7))))
        success = storage.read_json(f"{run}/_SUCCESS.json")
        parts = [n.removeprefix("scans/") for n in success.pop("files") if n.startswith("scans/")]
        storage.write_json(f"{run}/_SUCCESS.json", {**success, "parts": parts})
        assert all(isinstance(problem, str) for problem in verify_run(run))

    def test_a_time_zone_that_no_longer_is_one(self, run):
        """What a flipped bit in a footer does: pyarrow reads the column, and fails on its values."""
        uri = str(part_of(run, "c", "d"))
        table = storage.read_table(uri)
        place = table.schema.get_field_index("finished_at")
        nowhere = table["finished_at"].cast(pa.timestamp("us")).cast(pa.timestamp("us", tz="XTC"), safe=False)
        storage.write_table(uri, table.set_column(place, "finished_at", nowhere))
        reseal(run)
        assert found(run, "its columns are not those of a `scans` table")
        expected = runs.expected_tags(manifest.read_manifest(f"{run}/manifest.parquet"))
        assert runs.finished_rows(run, expected).keys() == {"a", "b"}

    @pytest.mark.parametrize("keep", [0, 1, 100, -100, -1])
    def test_a_torn_part(self, run, keep):
        part = part_of(run, "c", "d")
        part.write_bytes(part.read_bytes()[:keep])
        assert found(run, part.name)
        assert found(run, "when it was sealed")
        assert found(run, "c: no row")

    def test_a_longer_part(self, run):
        part = part_of(run, "c", "d")
        part.write_bytes(part.read_bytes() + b"\0")
        assert found(run, "when it was sealed")


class TestContent:
    """What somebody made anew under its own name, with seals that fit, is given away by what it holds."""

    def test_a_missing_scan(self, run):
        edit(run, "ab", lambda rows: rows[:1])
        reseal(run)
        assert found(run, "b: no row")

    def test_a_doubled_scan(self, run):
        edit(run, "cd", lambda rows: [*rows, rows[0]])
        reseal(run)
        assert found(run, "c: 2 rows, expected 1")

    def test_a_scan_in_two_parts(self, run):
        rows = storage.read_table(str(part_of(run, "c", "d"))).to_pylist()
        runs.write_part(run, rows[:1])
        assert found(run, "a part that _SUCCESS.json does not name")
        assert found(run, "c: 2 rows, expected 1")

    def test_a_stranger(self, run):
        edit(run, "cd", lambda rows: [*rows, {**rows[0], "scan_id": "x"}])
        reseal(run)
        assert found(run, "x in ")
        assert found(run, "not a scan of the manifest")

    def test_files_that_have_changed_since(self, run):
        edit(run, "cd", lambda rows: [{**rows[0], "content_tag": "older"}, rows[1]])
        reseal(run)
        assert found(run, "made from files that have changed since")

    @pytest.mark.parametrize("mask", [b"another mask", b"", None])
    def test_a_mask_that_does_not_match_its_hash(self, run, mask):
        edit(run, "cd", lambda rows: [{**rows[0], "mask": mask}, rows[1]])
        reseal(run)
        assert verify_run(run) == [f"c in {part_of(run, 'c', 'd').name}: the mask does not match its sha256"]

    def test_a_mask_without_a_hash(self, run):
        edit(run, "cd", lambda rows: [{**rows[0], "mask": None, "mask_sha256": None}, rows[1]])
        reseal(run)
        assert found(run, "does not match its sha256")

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("model_fingerprint", "its model fingerprint is other, the run's is model-1"),
            ("config_fingerprint", "its config fingerprint is other, the run's is config-1"),
            ("run_id", "its run is other, the run's is "),
        ],
    )
    def test_a_part_of_another_model_config_or_run(self, run, name, says):
        edit(run, "cd", lambda rows: [{**row, name: "other"} for row in rows])
        reseal(run)
        assert found(run, says)

    def test_a_status_that_is_none(self, run):
        edit(run, "cd", lambda rows: [{**rows[0], "status": "fine"}, rows[1]])
        reseal(run)
        assert found(run, "expected ok or failed")

    @pytest.mark.parametrize("spoil", ["fewer", "other"])
    def test_a_part_with_other_columns(self, run, spoil):
        uri = str(part_of(run, "c", "d"))
        table = storage.read_table(uri)
        poorer = pa.array([[], []], pa.list_(pa.struct([("region", pa.string())])))
        place = table.schema.get_field_index("regions")
        table = table.drop_columns(["node"]) if spoil == "fewer" else table.set_column(place, "regions", poorer)
        storage.write_table(uri, table)
        reseal(run)
        assert found(run, "its columns are not those of a `scans` table")

    def test_counts_that_are_not_true(self, run):
        for name in ("run.json", "_SUCCESS.json"):
            body = storage.read_json(f"{run}/{name}")
            storage.write_json(f"{run}/{name}", {**body, "counts": {**body["counts"], "ok": 4, "failed": 0}})
        reseal(run)
        assert verify_run(run) == ["_SUCCESS.json: ok is 4, counted 3", "_SUCCESS.json: failed is 0, counted 1"]

    def test_an_id_that_would_break_the_line_does_not(self, run):
        edit(run, "cd", lambda rows: [*rows, {**rows[0], "scan_id": "x\n\x1b[31mall is well"}])
        assert found(run, "not a scan of the manifest")
        assert not any("\x1b" in problem for problem in verify_run(run))


class TestFiles:
    def test_a_run_without_success(self, run):
        storage.delete(f"{run}/_SUCCESS.json")
        assert verify_run(run) == ["_SUCCESS.json is missing: the run has not finished"]

    def test_a_missing_part_and_one_that_was_added(self, run):
        gone = part_of(run, "c", "d")
        gone.rename(gone.with_name("0.parquet"))
        assert verify_run(run) == [
            "scans/0.parquet: a part that _SUCCESS.json does not name",
            f"scans/{gone.name}: part is missing",
        ]

    def test_what_does_not_belong_among_the_parts(self, run):
        Path(run, "scans/notes.txt").write_text("mine")
        Path(run, "scans/link.parquet").symlink_to("/nowhere")
        assert verify_run(run) == [
            "scans/link.parquet: not a file that can be read (NOT_A_FILE)",
            "scans/notes.txt: it does not belong among the parts",
        ]

    def test_a_temporary_file_of_a_killed_writer_is_no_fault_of_the_run(self, run):
        Path(run, f"scans/.tmp-{'0' * 32}").write_bytes(b"half")
        assert verify_run(run) == []

    def test_a_manifest_of_more_or_fewer_scans(self, run):
        table = manifest.read_manifest(f"{run}/manifest.parquet")
        manifest.write_manifest(f"{run}/manifest.parquet", table.slice(0, 3))
        reseal(run)
        assert found(run, "it is not the manifest that the run was made from")
        assert found(run, "d in ")

    def test_a_manifest_with_another_fold(self, run):
        rows = manifest.read_manifest(f"{run}/manifest.parquet").to_pylist()
        changed = pa.Table.from_pylist([{**row, "fold": 3} for row in rows], schema=MANIFEST)
        manifest.write_manifest(f"{run}/manifest.parquet", changed)
        assert found(run, "manifest.parquet: ")

    @pytest.mark.parametrize("name", ["manifest.parquet", "metrics.parquet", "run.json"])
    def test_a_file_that_is_gone_or_rubbish(self, run, name):
        Path(run, name).write_bytes(b"rubbish")
        assert found(run, f"{name}: ")
        Path(run, name).unlink()
        assert found(run, f"{name}: ")

    @pytest.mark.parametrize("name", ["run.json", "_SUCCESS.json"])
    @pytest.mark.parametrize("text", ["[]", "null", '{"files": 3, "parts": "x", "model": {"split": 5}}', "[" * 100_000])
    def test_json_of_another_kind(self, run, name, text):
        Path(run, name).write_text(text)
        assert found(run, name)

    def test_seals_of_another_kind(self, run):
        success = storage.read_json(f"{run}/_SUCCESS.json")
        for seal in (3, {}, {"size_bytes": "x" * 500}, []):
            storage.write_json(f"{run}/_SUCCESS.json", {**success, "files": dict.fromkeys(success["files"], seal)})
            assert found(run, "when it was sealed")


class TestMetrics:
    def rewrite(self, run, change):
        rows = storage.read_table(f"{run}/metrics.parquet").to_pylist()
        storage.write_table(f"{run}/metrics.parquet", pa.Table.from_pylist(change(rows), schema=METRICS))

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: [{**rows[0], "dice": 1.0}, *rows[1:]],
            lambda rows: [{**rows[0], "split": None}, *rows[1:]],
            lambda rows: rows[1:],
            lambda rows: [rows[0], *rows],
        ],
        ids=["better", "elsewhere", "fewer", "doubled"],
    )
    def test_figures_that_are_not_those_of_the_parts(self, run, change):
        self.rewrite(run, change)
        assert found(run, "metrics.parquet: ")
        reseal(run)
        assert verify_run(run) == ["a: its figures in metrics.parquet are not those of its row"]

    def test_their_order_does_not_matter(self, run):
        self.rewrite(run, lambda rows: rows[::-1])
        reseal(run)
        assert verify_run(run) == []

    def test_after_an_evaluation_its_own_seals_count(self, run):
        self.rewrite(run, lambda rows: [{**rows[0], "dice": 1.0}, *rows[1:]])
        storage.write_bytes(f"{run}/baselines.parquet", b"figures of the baselines")
        files = runs.seals(run, ["metrics.parquet", "baselines.parquet"])
        storage.write_json(f"{run}/evaluation.json", {"labels": "other.parquet", "files": files})
        assert verify_run(run) == []
        storage.write_bytes(f"{run}/baselines.parquet", b"figures of the Baselines")
        assert found(run, "baselines.parquet: bytes have changed")
        self.rewrite(run, lambda rows: [{**rows[0], "dice": 0.99}, *rows[1:]])
        assert found(run, "metrics.parquet: ")


class TestCommand:
    def call(self, monkeypatch, capsys, *words):
        from brainseg.cli import main

        monkeypatch.setattr("sys.argv", ["brainseg", "verify", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    def test_a_sound_run_ends_with_0_and_leftovers_do_not_change_that(self, run, monkeypatch, capsys):
        Path(run, f"scans/.tmp-{'0' * 32}").write_bytes(b"half")
        code, out = self.call(monkeypatch, capsys, run, "--json")
        assert code == 0
        assert json.loads(out) == {"run": run, "problems": [], "leftovers": [f"{run}/scans/.tmp-{'0' * 32}"]}

    def test_whatever_is_wrong_ends_with_1_and_is_a_line_each(self, run, monkeypatch, capsys):
        storage.delete(str(part_of(run, "c", "d")))
        code, out = self.call(monkeypatch, capsys, run)
        assert code == 1
        assert out.splitlines() == verify_run(run)
        code, out = self.call(monkeypatch, capsys, run, "--json")
        assert (code, json.loads(out)["problems"]) == (1, verify_run(run))
