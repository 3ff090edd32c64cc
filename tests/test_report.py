"""Report: the page and its data say what the Parquet says, keep splits apart, and stay inert whatever a scan is called."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_as_runs import SHAPE, Page, by_three, failed_row, make_page, scan_row, tumour, typical_rows, write_run

from brainseg import report
from brainseg.aggregate import bootstrap_interval
from brainseg.errors import UsageError
from brainseg.report import figures
from brainseg.report.cohort import LOWEST, MAX_ROWS, summarise
from brainseg.report.facts import load
from brainseg.report.gallery import choose


@pytest.fixture(scope="module")
def rows():
    return typical_rows()


def test_the_figures_are_those_of_the_parquet(rows, tmp_path):
    run = write_run(tmp_path / "run", rows)
    flat = [
        {**entry, "patient_id": row["patient_id"], "scan_id": row["scan_id"]}
        for part in sorted((tmp_path / "run" / "scans").iterdir())
        for row in pq.read_table(part, columns=["scan_id", "patient_id", "regions"]).to_pylist()
        for entry in row["regions"] or ()
        if entry["region"] == "WT"
    ]
    flat.sort(key=lambda entry: entry["scan_id"])
    dice = [e["dice"] for e in flat if e["dice"] is not None]
    group = report.summary([run])["groups"][0]
    figure = group["regions"][0]
    assert (group["split"], figure["region"]) == ("test", "WT")
    assert figure["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert [figure["dice"][q] for q in ("q1", "median", "q3")] == pytest.approx(np.quantile(dice, (0.25, 0.5, 0.75)))
    patients = [e["patient_id"] for e in flat if e["dice"] is not None]
    assert tuple(figure["dice_interval"]) == bootstrap_interval(dice, patients)
    for name in ("iou", "precision", "recall"):
        assert figure[name]["mean"] == pytest.approx(np.mean([e[name] for e in flat if e[name] is not None]))
    distances = [e["hd95_mm"] for e in flat if e["hd95_mm"] is not None]
    assert figure["hd95_mm"]["num_infinite"] == np.isinf(distances).sum() == 2
    assert figure["hd95_mm"]["mean_finite"] == pytest.approx(np.mean([d for d in distances if np.isfinite(d)]))
    assert figure["states"] == {"both": 16, "missed": 1, "spurious": 1, "both_empty": 1, "no_label": 0}
    assert figure["dice_mean_failed_as_zero"] == pytest.approx(sum(dice) / (len(dice) + 2))


def test_every_figure_of_the_summary_stands_on_the_page_and_no_other(rows, tmp_path):
    run = write_run(tmp_path / "run", rows, split=by_three(rows), baselines={"nothing": {"WT": 0.0, "ET": 0.0}})
    summary = report.summary([run])
    page = Page(make_page(run, tmp_path)[1])

    def leaves(node):
        if isinstance(node, dict | list):
            for inner in node.values() if isinstance(node, dict) else node:
                yield from leaves(inner)
        elif isinstance(node, float | int | str):
            yield str(node)

    known = set(leaves(summary)) | {str(t["median_volume_mm3"] / 1000) for t in summary["trust"]}
    assert page.values
    assert set(page.values) <= known
    for group in summary["groups"]:
        for figure in group["regions"]:
            wanted = [
                figure["dice"]["mean"],
                figure["dice"]["median"],
                *figure["dice_interval"],
                figure["dice_mean_failed_as_zero"],
            ]
            assert {str(value) for value in wanted if value is not None} <= set(page.values)


def test_the_largest_figures_of_the_page_are_the_mean_dice_of_the_headline_split(rows, tmp_path):
    run = write_run(tmp_path / "run", rows, split=by_three(rows))
    made, html = make_page(run, tmp_path)
    lead = report.summary([run])["groups"][0]
    assert lead["split"] == made.headline
    big = re.findall(r'<div class="big"><data value="([^"]+)">([^<]+)<', html)
    assert (
        [float(value) for value, _ in big] == [figure["dice"]["mean"] for figure in lead["regions"]] == list(made.dice.values())
    )
    assert all(words == f"{float(value):.3f}" for value, words in big)


def test_the_denominators_add_up(rows, tmp_path):
    counts = report.summary([write_run(tmp_path / "run", rows)])["counts"]
    assert counts == {
        "found": 23,
        "eligible": 21,
        "segmented": 20,
        "labelled": 21,
        "evaluated": 19,
        "failed": 3,
        "missing": 0,
        "patients": 23,
    }


def test_held_out_patients_lead_and_training_patients_are_named_as_such(rows, tmp_path):
    run = write_run(tmp_path / "run", rows, split=by_three(rows))
    made, html = make_page(run, tmp_path)
    summary = report.summary([run])
    assert made.headline == summary["headline"] == "test"
    assert [group["split"] for group in summary["groups"]] == ["test", "outside", "validation", "train"]
    assert sum(group["scans"] for group in summary["groups"]) == len(rows)
    assert "Seen in training" in Page(html).text
    by_patient = {who: side for side, patients in by_three(rows).items() for who in patients}
    for row in summary["scans"]["rows"]:
        assert row["split"] == by_patient.get(row["patient_id"], "outside")


def test_patients_who_are_not_named_are_not_counted(rows, tmp_path):
    unnamed = [{**row, "patient_id": None} for row in rows]
    pages = {name: make_page(write_run(tmp_path / name, given), tmp_path)[1] for name, given in (("a", rows), ("b", unnamed))}
    named, said = (re.sub(r"\s+", " ", Page(html).text) for html in pages.values())
    assert re.search(r"labelled scans, \d+ patients", named)
    assert "of patients who are not named" in said
    assert "evaluated, patients not named." in said
    assert not re.search(r"labelled scans, \d+ patients", said)


def test_training_scans_alone_are_no_evaluation(rows, tmp_path):
    split = {"train": [row["patient_id"] for row in rows], "validation": [], "test": []}
    made, html = make_page(write_run(tmp_path / "run", rows, split=split), tmp_path)
    assert made.headline == "train"
    assert "this is no evaluation" in Page(html).text


def test_a_split_by_scan_is_looked_up_by_scan(rows, tmp_path):
    split = {"unit": "scan", "train": ["scan-000"], "validation": [], "test": ["scan-001", "scan-002"]}
    groups = {g["split"]: g["scans"] for g in report.summary([write_run(tmp_path / "run", rows, split=split)])["groups"]}
    assert groups == {"test": 2, "train": 1, "outside": len(rows) - 3}


def test_namesakes_of_scans_that_the_model_met_are_said_in_red(rows, tmp_path):
    split = {"unit": "scan", "train": ["scan-000"], "validation": [], "test": ["scan-001", "scan-002"]}
    trained_on = {"manifest_fingerprint": "a" * 64}
    theirs = write_run(tmp_path / "theirs", rows, split=split, model=trained_on, manifest_fingerprint="a" * 64)
    mine = write_run(tmp_path / "mine", rows, split=split, model=trained_on, manifest_fingerprint="b" * 64)
    named = write_run(tmp_path / "named", rows, model=trained_on, manifest_fingerprint="b" * 64)
    assert report.summary([theirs])["alerts"] == report.summary([named])["alerts"] == []
    (alert,) = report.summary([mine])["alerts"]
    assert alert.startswith("3 scans bear the id of one that the model met in training")


def test_what_must_be_known_before_believing_a_figure_is_said_in_red(rows, tmp_path):
    odd = [dict(row) for row in rows]
    odd[0] |= {"modalities_duplicated": ["t1"]}
    odd[1] |= {"modalities_missing": ["t2"]}
    run = write_run(
        tmp_path / "run", odd, model={"accept_leakage": True, "selection_biased": True}, finished_at=None, counts={"found": 30}
    )
    (tmp_path / "run" / "scans" / "99999.parquet").write_bytes(b"PAR1 torn")
    alerts = " ".join(report.summary([run])["alerts"])
    for words in ("Leakage", "Selection bias", "not finished", "99999.parquet", "7 of 30 scans have no row", "lacked", "twice"):
        assert words in alerts
    page = Page(make_page(run, tmp_path)[1])
    assert "Leakage was accepted" in page.text
    assert "Before you believe a figure" in page.text


def test_a_clean_run_raises_no_alarm(rows, tmp_path):
    run = write_run(tmp_path / "run", rows)
    assert report.summary([run])["alerts"] == []
    assert "Before you believe" not in make_page(run, tmp_path)[1]


def test_a_scan_written_twice_counts_once_and_the_last_row_wins(rows, tmp_path):
    better = scan_row("scan-000", patient="p000", label=tumour((2, 18, 16), 5), prediction=tumour((2, 18, 16), 5), attempt=2)
    once = report.summary([write_run(tmp_path / "once", [better, *rows[1:]])])
    twice = report.summary([write_run(tmp_path / "twice", [better, *rows], counts={"found": len(rows)})])
    assert once["groups"] == twice["groups"]
    assert once["counts"] == twice["counts"]
    assert "stood twice" in " ".join(twice["alerts"])


def test_runs_are_pooled_scan_by_scan(rows, tmp_path):
    rows = sorted(rows, key=lambda row: row["scan_id"])
    first = write_run(tmp_path / "a", rows[:10])
    second = write_run(tmp_path / "b", rows[10:])
    both, whole = report.summary([first, second]), report.summary([write_run(tmp_path / "c", rows)])
    assert both["groups"] == whole["groups"]
    assert len(both["runs"]) == 2
    report.build_report([first, second], str(tmp_path / "both.html"))


def test_the_rule_changes_what_both_empty_counts(rows, tmp_path):
    run = write_run(tmp_path / "run", rows)
    exclude, brats = (report.summary([run], rule=rule)["groups"][0]["regions"][0] for rule in ("exclude", "brats"))
    assert brats["num_scored"] == exclude["num_scored"] + 1
    total = exclude["dice"]["mean"] * exclude["num_scored"] + 1
    assert brats["dice"]["mean"] == pytest.approx(total / brats["num_scored"])
    low, high = brats["dice_interval"]
    assert low < brats["dice"]["mean"] < high


def test_without_labels_the_page_says_so_and_shows_how_far_to_trust_it(tmp_path):
    rows = [scan_row(f"s{i}", patient=f"p{i}", label=None, prediction=tumour((2, 18, 16), 6), seed=i) for i in range(5)]
    for i, row in enumerate(rows):
        row["attributes"] = [("site", "AB"[i % 2])]
    made, html = make_page(write_run(tmp_path / "run", rows), tmp_path)
    assert made.headline is None
    assert made.dice == {}
    text = Page(html).text
    assert "No scan was evaluated" in text
    assert "Least certain" in text
    (by_site,) = report.summary([str(tmp_path / "run")])["subgroups"]
    assert [(v["value"], v["regions"][0]["scans"]) for v in by_site["values"]] == [("A", 3), ("B", 2)]


def test_a_run_without_a_row_still_makes_a_page(tmp_path):
    made, html = make_page(write_run(tmp_path / "run", [], counts={"found": 3}), tmp_path)
    assert made.counts["missing"] == 3
    assert "3 of 3 scans have no row yet" in Page(html).text


def test_a_place_that_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"no run\.json"):
        report.build_report([str(tmp_path)], str(tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()


def test_the_page_needs_nothing_but_itself(rows, tmp_path):
    html = make_page(write_run(tmp_path / "run", rows), tmp_path)[1]
    page = Page(html)
    assert not {"link", "iframe", "img", "object", "base"} & set(page.elements)
    assert "src" not in {name for name, _ in page.attributes}
    for name, value in page.attributes:
        if name == "href":
            assert value.startswith(("#", "data:image/webp;base64,"))
    namespace = "http://www.w3.org/2000/svg"  # a name, never fetched
    bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html).replace(namespace, "")
    assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", bare)


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} \'"&'


def test_a_hostile_scan_id_stays_inert(rows, tmp_path):
    evil = [
        scan_row(
            HOSTILE,
            patient=HOSTILE,
            label=tumour((2, 18, 16), 6),
            prediction=tumour((2, 18, 10), 6),
            warnings=[f"SPACING: {HOSTILE}"],
        ),
        failed_row(f"{HOSTILE}2", patient=None, code=HOSTILE),
        *rows,
    ]
    tame_page = Page(make_page(write_run(tmp_path / "tame", rows), tmp_path)[1])
    html = make_page(write_run(tmp_path / "evil", evil, model={"name": HOSTILE, "dataset": HOSTILE}, run_id=HOSTILE), tmp_path)[
        1
    ]
    page = Page(html)
    assert page.elements.count("script") == tame_page.elements.count("script") == 2
    assert "img" not in page.elements
    assert not {name for name, _ in page.attributes if name.startswith("on")}
    assert HOSTILE in page.text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))
    assert HOSTILE in {row[0] for row in data["rows"]}


def test_the_same_parquet_gives_the_same_bytes(rows, tmp_path):
    run = write_run(tmp_path / "run", rows)
    assert make_page(run, tmp_path)[1] == make_page(run, tmp_path)[1]


def test_more_scans_than_a_table_holds_are_limited_to_the_worst_and_the_page_stays_small(rows, tmp_path):
    many = [{**rows[i % 16], "scan_id": f"scan-{i:05d}", "patient_id": f"p{i:05d}"} for i in range(MAX_ROWS + 200)]
    made, html = make_page(write_run(tmp_path / "run", many, rows_a_part=400), tmp_path)
    assert made.size_bytes == len(html.encode()) < 3_000_000
    summary = report.summary([str(tmp_path / "run")])
    shown = [np.mean([r["dice"] for r in row["regions"]]) for row in summary["scans"]["rows"]]
    assert LOWEST < len(shown) <= MAX_ROWS
    assert shown == sorted(shown)
    assert shown[:LOWEST] == sorted(np.mean([e["dice"] for e in row["regions"]]) for row in many)[:LOWEST]
    assert f"of {len(many):,}" in Page(html).text
    assert len(Page(html).elements) < 20_000


def test_the_quarantine_counts_every_failed_scan_by_its_code(rows, tmp_path):
    run = write_run(tmp_path / "run", rows)
    quarantine = report.summary([run])["quarantine"]
    assert {q["code"]: q["count"] for q in quarantine} == {"CORRUPT": 2, "INTERNAL": 1}
    text = Page(make_page(run, tmp_path)[1]).text
    for name, stage in (("broken-1", "decode"), ("broken-2", "predict"), ("broken-3", "decode")):
        assert f"{name} ({stage}) found a stub, expected a scan" in text


def test_the_gallery_goes_from_the_worst_over_the_median_to_the_best_and_shows_nobody_twice(rows, tmp_path):
    cohort = load([write_run(tmp_path / "run", rows)])
    shelves = choose(cohort, "test")
    ids, dice = cohort.scans["scan_id"].to_pylist(), {}
    for entry in cohort.regions.table().to_pylist():
        dice.setdefault(entry["row"], []).append(entry["dice"])
    chosen = [[np.mean(dice[row]) for row in shelf] for _, shelf in shelves]
    assert [title for title, _ in shelves] == ["Worst", "Median", "Best", "Most surprising"]
    assert max(chosen[0]) <= min(chosen[1])
    assert max(chosen[1]) <= min(chosen[2])
    shown = [row for _, shelf in shelves for row in shelf]
    assert len(shown) == len(set(shown))
    assert "missed" in {ids[row] for row in shelves[0][1]}


def test_of_two_missed_tumours_the_larger_is_shown_first(tmp_path):
    nothing, rows = np.zeros(SHAPE, np.uint8), []
    for name, radius in (("small", 4), ("large", 9), ("middle", 6), ("fine", 5), ("good", 5), ("best", 5)):
        answer = tumour((2, 18, 16), radius) if radius == 5 else nothing
        rows.append(scan_row(name, patient=name, label=tumour((2, 18, 16), radius), prediction=answer))
    cohort = load([write_run(tmp_path / "run", rows)])
    worst = choose(cohort, "test")[0][1]
    assert [cohort.scans["scan_id"][row].as_py() for row in worst] == ["large", "middle"]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7])
def test_a_small_cohort_is_shown_whole_or_by_thirds(number, tmp_path):
    rows = typical_rows()[:number]
    shelves = choose(load([write_run(tmp_path / "run", rows)]), "test")
    shown = [row for _, shelf in shelves for row in shelf]
    assert len(shown) == len(set(shown)) >= min(number, 3)


def test_the_summary_is_plain_json(rows, tmp_path):
    summary = report.summary([write_run(tmp_path / "run", rows)])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summarise(load([str(tmp_path / "run")])) == summary


def test_masks_and_pictures_are_not_read_for_the_numbers(rows, tmp_path):
    cohort = load([write_run(tmp_path / "run", rows)])
    assert not {"mask", "thumbnail"} & set(cohort.scans.column_names)


def corners(path):
    """The closed loops of an outline as lists of (x, y)."""
    loops = []
    for body in re.findall(r"M([^z]*)z", path):
        x, y = map(int, re.match(r"(\d+) (\d+)", body).groups())
        loop = [(x, y)]
        for letter, value in re.findall(r"([hv])(-?\d+)", body):
            x, y = (x + int(value), y) if letter == "h" else (x, y + int(value))
            loop.append((x, y))
        loops.append(loop)
    return loops


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_filling_an_outline_gives_the_mask_back(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    filled = np.zeros((height, width), bool)
    for loop in corners(figures.outline(mask)):
        assert loop[0] == loop[-1]
        for (x0, y0), (x1, y1) in pairwise(loop):
            assert (x0 == x1) != (y0 == y1)
            if x0 == x1:
                filled[min(y0, y1) : max(y0, y1), x0:] ^= True
    assert (filled == mask).all()


@given(st.floats(1e-3, 1e7), st.floats(1, 1e5))
def test_ticks_enclose_their_range_and_are_few(low, factor):
    ticks = figures.log_ticks(low, low * factor)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= figures.MOST_TICKS
    assert ticks[0] <= low <= low * factor <= ticks[-1]


def test_the_template_is_part_of_the_package():
    assert Path(report.__file__).with_name("template.html.j2").is_file()
