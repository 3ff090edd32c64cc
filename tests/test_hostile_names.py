"""Hostile names: whatever a scan is called, nothing leaves its folder, runs in a page, or steers a terminal."""

import csv
import hashlib
import io
import json
import logging
import unicodedata
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import factory
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_stores import BUCKET, moto_store, s3

from brainseg import inflight, manifest, report, runs, stages, storage
from brainseg.clean import clean_run
from brainseg.console import Voice
from brainseg.errors import StorageError, UsageError, one_line
from brainseg.export import export_run
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid
from brainseg.metrics import score_region
from brainseg.tables import MANIFEST, SCANS
from brainseg.verify import verify_run

COMPOSED = "Zo\u00eb"
HOSTILE = [
    "../../x",
    "..",
    "/etc/passwd",
    "//host/share",
    "C:\\Windows\\x",
    "..\\..\\x",
    "s3://other/x",
    "file:///etc/passwd",
    "a/../../b",
    "%2e%2e%2fx",
    "x" * 300,
    "\u00e9" * 150,
    "line\nbreak",
    "carriage\rreturn",
    "tab\tand\0nul",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "CON",
    "aux.nii",
    "com\u00b9",
    "nul ",
    "dot.",
    "space ",
    " space",
    "-rf",
    "--help",
    "~root",
    "=cmd()|' /C calc'!A0",
    "+1+cmd()",
    "@SUM(1)",
    '"><script>alert(1)</script>',
    "<img src=x onerror=alert(1)>",
    "</script><svg onload=alert(1)>",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "$(reboot)`reboot`;reboot",
    "gnp\u202ecod",
    "zero\u200bwidth",
    "\u2028line separator",
    COMPOSED,
    unicodedata.normalize("NFD", COMPOSED),
    "Case",
    "case",
    "",
    ".",
]
STRAY = pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:30])
GRID = Grid.of((2, 4, 4), np.diag([-1.0, -1.0, 2.0, 1.0]))


def manifest_row(name):
    source = {"uri": f"/archive/{name}", "role": "image", "modality": "flair", "index": None, "size_bytes": 10, "tag": "t"}
    return factory.make_row(name, name, sources=[{**source, "sha256": None}], dataset=name, attributes=[("site", name)])


def scan_row(number, name):
    """A row of the `scans` table in which everything that an archive names is called like this; every fifth has failed."""
    known, mask = manifest_row(name), np.eye(4, dtype=np.uint8)[None].repeat(2, axis=0)
    data = write_nifti(mask, GRID)
    trust = {"mean_probability": 0.9, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
    entry = {**score_region("tumor", mask > 0, np.ones((2, 4, 4), bool), (2.0, 1.0, 1.0)), **trust}
    kept = {k: known[k] for k in ("scan_id", "patient_id", "dataset", "label_map", "fold", "sources", "attributes")}
    whose = {"model_fingerprint": "m", "config_fingerprint": "c", "content_tag": "t", "run_id": "r", "attempt": 1}
    row = {**kept, **whose, "warnings": [f"SPACING: {name}"], "finished_at": datetime(2026, 1, 1, tzinfo=UTC), "node": name}
    if number % 5 == 4:
        return {
            **row,
            "status": "failed",
            "error_code": "CORRUPT",
            "error_stage": "decode",
            "error_message": f"{name}: rubbish",
        }
    made = {"status": "ok", "shape": [2, 4, 4], "spacing_mm": list(GRID.spacing_mm), "affine": list(GRID.affine)}
    told = {"mask": data, "mask_encoding": "nii.gz", "mask_sha256": hashlib.sha256(data).hexdigest(), "regions": [entry]}
    return {**row, **made, **told, "modalities": ["flair"], "orientation": GRID.orientation}


def make_run(run, names):
    """A run folder whose scans have these names, as nobody's own manifest would let them through."""
    model = {"name": names[0], "dataset": names[0], "label_map": "brats2020", "regions": ["tumor"], "modalities": ["flair"]}
    model |= {
        "fingerprint": "m",
        "split": {"unit": "patient", "test": names},
        "selection_biased": False,
        "accept_leakage": False,
    }
    info = {"run_id": names[0], "brainseg_version": "0", "created_at": "2026-03-01T10:00:00+00:00", "source": names[0]}
    info |= {"finished_at": "2026-03-01T12:00:00+00:00", "model": {**model, "metrics": {}}, "counts": {}, "timings": {}}
    storage.write_json(f"{run}/run.json", info)
    for start in range(0, len(names), 8):
        runs.write_part(run, [scan_row(n, name) for n, name in enumerate(names[start : start + 8], start)])
    return run


def everything_below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ---- where they are refused ------------------------------------------------------------------------------------------


@STRAY
def test_a_manifest_lets_no_name_through_that_could_not_safely_name_a_file(name, tmp_path):
    table = pa.Table.from_pylist([manifest_row(name)], schema=MANIFEST)
    if name in (COMPOSED, unicodedata.normalize("NFD", COMPOSED), "Case", "case"):
        manifest.write_manifest(str(tmp_path / "m.parquet"), table)
        assert manifest.read_manifest(str(tmp_path / "m.parquet"))["scan_id"].to_pylist() == [name]
        return
    with pytest.raises(UsageError, match="cannot name a file") as caught:
        manifest.write_manifest(str(tmp_path / "m.parquet"), table)
    assert one_line(str(caught.value)) == str(caught.value)
    storage.write_table(str(tmp_path / "strangers.parquet"), table)
    with pytest.raises(UsageError, match="cannot name a file"):
        manifest.read_manifest(str(tmp_path / "strangers.parquet"))


@STRAY
@pytest.mark.parametrize("base", ["/data/run", "s3://bucket/run"])
def test_no_name_joined_to_a_place_leads_out_of_it(name, base):
    for part in (name, f"{name}.bin", f"scans/{name}"):
        try:
            place = storage.join(base, part)
        except StorageError:
            continue
        inside = place.removeprefix(f"{base}/").replace("\\", "/").split("/")
        assert place.startswith(f"{base}/")
        assert not {"..", ".", ""} & set(inside)


# ---- where they are hashed or quoted ---------------------------------------------------------------------------------


def test_parts_and_notes_are_not_named_by_what_they_hold(tmp_path):
    run = make_run(str(tmp_path / "run"), HOSTILE)
    for name in HOSTILE:
        flight = inflight.Flight(run, "whole", [name])
        flight.begin()
        flight.alone(name, "decode", lambda: None, lambda: None)
    found = everything_below(tmp_path)
    assert len(found) == 1 + -(-len(HOSTILE) // 8) + len(HOSTILE)
    assert all(path.isascii() and path.startswith("run/") and len(path) < 80 for path in found)


@pytest.mark.parametrize("format_", ["nifti", "png"])
def test_export_keeps_every_mask_apart_and_inside_its_folder(tmp_path, format_):
    run = make_run(str(tmp_path / "run"), HOSTILE)
    before = everything_below(tmp_path)
    segmented = sum(number % 5 != 4 for number in range(len(HOSTILE)))
    assert export_run(run, str(tmp_path / "out"), format=format_) == segmented
    written = everything_below(tmp_path) - before
    assert len(written) == segmented * (1 if format_ == "nifti" else 2)
    names = [Path(path).name for path in written]
    assert {str(Path(path).parent) for path in written} == {"out"}
    assert len({unicodedata.normalize("NFD", name).casefold() for name in names}) == len(names)
    for name in names:
        assert len(name.encode()) <= 255
        assert name.isprintable()
        assert name[0] not in "-.=~ "
        assert not set(name) & set('/\\:*?"<>|$`;&@')


def test_export_to_a_bucket_stays_below_its_prefix(tmp_path):
    run = make_run(str(tmp_path / "run"), HOSTILE)
    with moto_store() as bucket:
        storage.write_bytes(f"{bucket}/mine", b"untouched")
        written = export_run(run, f"{bucket}/masks/out")
        keys = [item["Key"] for item in s3().list_objects_v2(Bucket=BUCKET)["Contents"]]
        assert len(keys) == written + 1
        assert all(key == "mine" or (key.startswith("masks/out/") and key.count("/") == 2) for key in keys)


def test_slices_of_one_scan_never_replace_another_scan(tmp_path):
    names = ["a", "a_0", "a_1", "b_1", "b", "c_x", "c"]
    rows = [{**scan_row(0, name), "run_id": "r"} for name in names]
    for order in (rows, rows[::-1]):
        place = tmp_path / order[0]["scan_id"]
        make_run(str(place / "run"), ["seed"])
        for part in runs.parts(str(place / "run")):
            storage.delete(part)
        storage.write_table(str(place / "run/scans/p.parquet"), pa.Table.from_pylist(order, schema=SCANS))
        assert export_run(str(place / "run"), str(place / "out"), format="png") == len(names)
        assert len(everything_below(place / "out")) == 2 * len(names)


def test_verify_and_clean_do_not_follow_names(tmp_path):
    run = make_run(str(tmp_path / "run"), HOSTILE)
    (tmp_path / "x").write_text("mine")
    before = everything_below(tmp_path)
    problems = verify_run(run)
    assert problems
    assert all(problem.isprintable() for problem in problems)
    clean_run(run, older_than_s=0)
    assert everything_below(tmp_path) - before <= {"run/lease.json", "run/lease-000001.json"}


# ---- where they are shown --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: its elements with the names of their attributes, and its links."""

    def __init__(self, html):
        super().__init__()
        self.shapes, self.targets, self.counts = set(), set(), {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.shapes.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.targets |= {value for name, value in attrs if name in ("href", "src", "action", "xlink:href")}


def page_of(folder, names):
    make_run(str(folder / "run"), names)
    report.build_report([str(folder / "run")], str(folder / "report.html"))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_page_of_hostile_names_has_no_element_attribute_or_link_that_a_tame_one_lacks(tmp_path):
    tame_names = [f"scan-{number}" for number in range(len(HOSTILE))]
    tame = Page(page_of(tmp_path / "tame", tame_names))
    html = page_of(tmp_path / "hostile", HOSTILE)
    page = Page(html)
    assert page.shapes == tame.shapes
    assert {t for t in page.targets if not t.startswith(("data:", "#"))} == set()
    assert not {name for _, names in page.shapes for name in names if name.startswith("on")}
    for tag in ("script", "style", "iframe", "img", "form", "link", "object", "meta", "svg"):
        assert page.counts.get(tag) == tame.counts.get(tag), tag


def test_the_data_in_a_page_is_json_that_holds_the_names_as_they_are(tmp_path):
    html = page_of(tmp_path, HOSTILE)
    data = html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    shown = {row[0] for row in json.loads(data)["rows"]}
    assert shown == {name for number, name in enumerate(HOSTILE) if number % 5 != 4}


@STRAY
def test_a_terminal_gets_one_line_and_no_command(name, capsys):
    Voice().say(f"{name}: found [bold]rubbish[/bold]")
    Voice().result({"scan": name}, f"{name}: done")
    Voice(as_json=True).result({"scan": name, name: [name]}, "")
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert "[bold]" in err
    assert all(c.isprintable() or c == "\n" for c in err + out)
    body = json.loads(out[out.index('{\n  "scan"') :])
    assert body == {"scan": name, **({name: [name]} if name != "scan" else {})}


@given(st.text(max_size=60))
def test_no_text_at_all_steers_a_terminal(text):
    line = one_line(text)
    assert line.isprintable()
    assert len(line.splitlines()) <= 1


def test_what_a_foreign_decoder_quotes_reaches_neither_log_nor_row(caplog):
    quoted = "\x1b[31mname of a patient"

    def fault():
        raise RuntimeError(quoted)

    with caplog.at_level(logging.ERROR):
        work = stages.guarded("decode", "scan", fault, manifest_row("scan"))
    assert "fault while doing stage decode" in caplog.text
    assert "of a patient" not in caplog.text + work.failure.message


def test_names_survive_a_table_of_another_tool(tmp_path):
    """Metrics as CSV, as DuckDB or pandas would write them from Parquet: quoted, one record a row."""
    run = make_run(str(tmp_path / "run"), [n for n in HOSTILE if "\0" not in n])
    tables = [storage.read_table(uri, ["scan_id", "status"]) for uri in runs.parts(run)]
    sink = io.BytesIO()
    pacsv.write_csv(pa.concat_tables(tables), sink)
    rows = list(csv.DictReader(io.StringIO(sink.getvalue().decode(), newline="")))
    assert {row["scan_id"] for row in rows} == {n for n in HOSTILE if "\0" not in n}
