"""Numbers: what the page says is what the Parquet says, computed once more by other means; and every format says the same."""

import csv
import io
import json
import re
import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from rows_as_runs import SHAPE, Page, make_page, scan_row, tumour, typical_rows, write_run
from scipy.stats import ks_2samp, spearmanr, wilcoxon

from brainseg import report
from brainseg.errors import Code, UsageError
from brainseg.report import measured
from brainseg.report.advice import ADVICE, UNKNOWN, what_to_do
from brainseg.report.agreement import surprise
from brainseg.report.facts import load
from brainseg.report.texts import leaves


def with_sites(rows):
    return [{**row, "attributes": [("site", "AB"[i % 2]), ("age", str(i))], "fold": i % 3} for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def rows():
    return with_sites(typical_rows(24))


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("numbers") / "run", rows)


@pytest.fixture(scope="module")
def worse_run(rows, tmp_path_factory):
    """The same scans, each prediction a little smaller; two of them missing."""
    changed = []
    for i, row in enumerate(rows[:24]):
        label, answer = tumour((2, 18, 16), 5 + i % 4), tumour((2, 19, 16 + (24 - i) // 4), 4 + i % 4)
        changed.append(scan_row(row["scan_id"], patient=row["patient_id"], label=label, prediction=answer, seed=i))
    return write_run(tmp_path_factory.mktemp("worse") / "run", changed[2:])


def flat(run, columns="scan_id, patient_id, fold, attributes"):
    """Scan x region by DuckDB, straight from the parts."""
    return f"(select {columns}, unnest(regions, recursive := true) from '{run}/scans/*.parquet' where status = 'ok')"


def test_the_json_in_the_page_holds_every_figure_of_the_parquet(run, tmp_path):
    html = make_page(run, tmp_path)[1]
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))
    wanted = duckdb.sql(
        "select scan_id, region, state, dice, precision, recall, hd95_mm, label_volume_mm3 / 1000, "
        "prediction_volume_mm3 / 1000,"
        f" mean_probability, mean_entropy from {flat(run)}"
    ).fetchall()
    shown = {(row[0], name): entry for row in data["rows"] for name, entry in zip(data["regions"], row[4], strict=True)}
    assert len(shown) == len(wanted) == 2 * len(data["rows"])
    for scan_id, region, state, *values in wanted:
        entry = shown[scan_id, region]
        assert entry[0] == state
        for here, there in zip(entry[1:], values, strict=True):
            there = "inf" if there == np.inf else there
            assert here == (pytest.approx(there, rel=6e-4) if isinstance(there, float) else there)


def test_headline_figures_are_those_of_a_database(run):
    group = report.summary([run])["groups"][0]
    wanted = duckdb.sql(
        f"select region, avg(dice), median(dice), quantile_cont(dice, 0.25), count(dice), avg(recall), "
        f"2 * sum(tp) / sum(2 * tp + fp + fn), count(distinct patient_id) filter (dice is not null) from {flat(run)} "
        "where state <> 'no_label' group by region"
    ).fetchall()
    found = {r["region"]: r for r in group["regions"]}
    assert len(wanted) == len(found) == 2
    for region, mean, median, q1, number, recall, pooled, patients in wanted:
        r = found[region]
        assert (r["num_scored"], r["num_patients_scored"]) == (number, patients)
        for here, there in ((r["dice"]["mean"], mean), (r["dice"]["median"], median), (r["dice"]["q1"], q1)):
            assert here == pytest.approx(there)
        assert (r["recall"]["mean"], r["pooled_dice"]) == pytest.approx((recall, pooled))


@pytest.mark.parametrize("room_bytes", [measured.ROOM_BYTES, 600], ids=["whole", "a column at a time"])
def test_a_finished_run_is_read_from_its_flat_table_and_gives_the_same(rows, tmp_path, monkeypatch, room_bytes):
    from brainseg import runs
    from brainseg.card import Split

    monkeypatch.setattr(measured, "ROOM_BYTES", room_bytes)
    done = write_run(tmp_path / "run", rows)
    before = report.summary([done])
    runs.write_metrics(done, Split(test=tuple(r["patient_id"] for r in rows)))
    (tmp_path / "run" / "_SUCCESS.json").write_text("{}")
    assert load([done]).runs[0].is_flat
    assert report.summary([done]) == before


def test_subgroups_are_those_of_a_database_and_add_up(run):
    summary = report.summary([run])
    columns = {c["column"]: c for c in summary["subgroups"]}
    assert set(columns) == {"site", "fold"}
    for name, how in (("site", "attributes['site']"), ("fold", "fold::varchar")):
        wanted = duckdb.sql(
            f"select {how}, region, avg(dice), median(dice), count(dice), count(*) filter (state = 'missed') from {flat(run)} "
            "where state <> 'no_label' group by all"
        ).fetchall()
        found = {(v["value"], r["region"]): r for v in columns[name]["values"] for r in v["regions"]}
        assert len(found) == len(wanted)
        for value, region, mean, median, number, missed in wanted:
            r = found[value[0] if isinstance(value, list) else value, region]
            assert (r["scored"], r["missed"]) == (number, missed)
            assert (r["dice"]["mean"], r["dice"]["median"]) == pytest.approx((mean, median))
        assert sum(v["scans"] for v in columns[name]["values"]) + columns[name]["unknown"] == 31


def test_volume_agreement_is_bland_and_altman(run):
    for entry in report.summary([run])["volume_agreement"]:
        found = duckdb.sql(
            f"select (prediction_volume_mm3 - label_volume_mm3) / 1000 from {flat(run)} where region = '{entry['region']}'"
            " and state not in ('no_label', 'both_empty')"
        ).fetchall()
        difference = np.array(found)[:, 0]
        assert entry["scans"] == difference.size
        assert entry["bias"] == pytest.approx(difference.mean())
        assert entry["limits"] == pytest.approx(list(difference.mean() + np.array([-1.96, 1.96]) * difference.std(ddof=1)))
        low, high = entry["bias_interval"]
        assert low <= entry["bias"] <= high


def test_trust_is_held_against_dice_by_rank(run):
    for entry in report.summary([run])["trust_against_dice"]:
        found = duckdb.sql(
            f"select mean_probability, dice from {flat(run)} where region = '{entry['region']}' and dice is not null"
            " and mean_probability is not null"
        ).fetchall()
        assert entry["mean_probability"] == pytest.approx(spearmanr(*np.array(found).T).statistic)


def test_who_is_sure_and_wrong_is_more_surprising_than_anybody_else(tmp_path):
    good, bad = tumour((2, 18, 16), 6), tumour((2, 26, 26), 6)
    rows = []
    for i in range(12):
        row = scan_row(f"s{i:02d}", patient=f"p{i}", label=good, prediction=tumour((2, 18, 16 + i // 2), 6), seed=i)
        for entry in row["regions"]:
            entry |= {"mean_probability": 0.95 - 0.02 * i, "mean_entropy": 0.01 + 0.01 * i}
        rows.append(row)
    sure = scan_row("sure", patient="sure", label=good, prediction=bad)
    for entry in sure["regions"]:
        entry |= {"mean_probability": 0.99, "mean_entropy": 0.001}
    cohort = load([write_run(tmp_path / "run", [*rows, sure])])
    found = surprise(cohort)
    assert np.nanargmax(np.abs(found)) == 12
    assert found[12] == pytest.approx(1.0)
    assert np.all(np.abs(found[:12]) < 0.2)
    assert "surer than right" in make_page(str(tmp_path / "run"), tmp_path)[1]


def test_two_runs_are_compared_pair_by_pair(run, worse_run, tmp_path):
    summary = report.summary([worse_run], compare=run)
    pairs = duckdb.sql(
        f"select a.region, a.dice - b.dice, a.scan_id from {flat(worse_run)} a join {flat(run)} b using (scan_id, region)"
        " where a.dice is not null and b.dice is not null"
    ).fetchall()
    for entry in summary["comparison"]["regions"]:
        differences = {scan: d for region, d, scan in pairs if region == entry["region"]}
        values = np.array(list(differences.values()))
        assert entry["dice"]["num_pairs"] == values.size == 22
        assert entry["dice"]["difference"] == pytest.approx(values.mean())
        assert entry["dice"]["wilcoxon_p"] == pytest.approx(wilcoxon(values).pvalue)
        assert (entry["worse"], entry["better"]) == (int((values < 0).sum()), int((values > 0).sum()))
        named = [line["scan_id"] for line in entry["regressions"]]
        assert named[0] == min(differences, key=lambda scan: (differences[scan], scan))
        assert [differences[scan] for scan in named] == pytest.approx(sorted(differences[scan] for scan in named))
    back = report.summary([run], compare=worse_run)["comparison"]
    for one, other in zip(summary["comparison"]["regions"], back["regions"], strict=True):
        assert one["dice"]["difference"] == pytest.approx(-other["dice"]["difference"])
        assert (one["worse"], one["better"]) == (other["better"], other["worse"])
    report.build_report([worse_run], str(tmp_path / "r.html"), compare=run)
    assert "Regressions".lower() in Page((tmp_path / "r.html").read_text("utf-8")).text


def test_runs_without_a_scan_in_common_are_not_compared(run, tmp_path):
    label = tumour((2, 18, 16), 6)
    other = write_run(tmp_path / "other", [scan_row("elsewhere", patient="x", label=label, prediction=label)])
    with pytest.raises(UsageError, match="--compare"):
        report.summary([run], compare=other)


def test_drift_is_the_largest_gap_between_two_distributions_and_says_which_way(tmp_path):
    def cohort(name, radius, number=30):
        rows = []
        for i in range(number):
            answer = tumour((2, 18, 16), radius + i % 3)
            rows.append(scan_row(f"{name}-{i}", patient=f"{name}-{i}", label=None, prediction=answer, seed=i))
        return write_run(tmp_path / name, rows)

    small, large = cohort("small", 4), cohort("large", 7)
    moved = {(f["figure"], f["region"]): f for f in report.summary([large], reference=small)["drift"]["figures"]}
    volume = moved["prediction_volume", "WT"]
    sizes = [
        np.array(duckdb.sql(f"select prediction_volume_mm3 from {flat(r)} where region = 'WT'").fetchall())
        for r in (large, small)
    ]
    assert volume["ks"] == pytest.approx(ks_2samp(sizes[0][:, 0], sizes[1][:, 0]).statistic)
    assert volume["words"] == "another population, higher here"
    assert moved["mean_probability", "WT"]["words"] == "alike"
    same = report.summary([small], reference=small)["drift"]["figures"]
    assert {f["words"] for f in same} <= {"alike", "not known on both sides"}
    few = report.summary([cohort("few", 4, 5)], reference=small)["drift"]["figures"]
    assert all("too few" in f["words"] or "not known" in f["words"] for f in few)


def test_a_scanner_that_was_changed_shows_in_the_intensities_of_its_modality(tmp_path):
    def cohort(name, gains):
        row = scan_row("s", patient="p", label=None, prediction=tumour((2, 18, 16), 6))
        rng, rows = np.random.default_rng(3), []
        for i in range(30):
            bright = [{"modality": m, "mean": gain * rng.normal(600, 20), "sd": gain * 60.0} for m, gain in gains.items()]
            rows.append({**row, "scan_id": f"{name}-{i}", "patient_id": f"{name}-{i}", "intensities": bright})
        return write_run(tmp_path / name, rows)

    before, after = cohort("before", {"flair": 1.0, "t1c": 1.0}), cohort("after", {"flair": 1.0, "t1c": 1.5})
    drift = report.summary([after], reference=before)["drift"]
    words = {(f["figure"], f["region"]): f["words"] for f in drift["figures"] if f["figure"].startswith("intensity")}
    assert drift["intensities"]
    assert words == {
        ("intensity_mean", "flair"): words["intensity_mean", "flair"],
        ("intensity_mean", "t1c"): "another population, higher here",
        ("intensity_sd", "flair"): "alike",
        ("intensity_sd", "t1c"): "another population, higher here",
    }
    assert "another population" not in words["intensity_mean", "flair"]
    stored = duckdb.sql(
        f"select median(e.mean) from (select unnest(intensities) e from '{after}/scans/*.parquet') where e.modality = 't1c'"
    ).fetchall()[0][0]
    shown = next(f for f in drift["figures"] if (f["figure"], f["region"]) == ("intensity_mean", "t1c"))
    assert (shown["here"]["n"], shown["here"]["median"]) == (30, pytest.approx(stored))


def test_drift_against_a_run_of_an_earlier_version_goes_without_intensities(run, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(run, older)
    for part in (older / "scans").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["intensities"]), part)
    summary = report.summary([run], reference=str(older))
    assert not summary["drift"]["intensities"]
    assert summary["alerts"] == report.summary([run])["alerts"]
    assert {f["ks"] for f in summary["drift"]["figures"] if f["ks"] is not None} == {0.0}


def test_who_marks_something_where_there_is_nothing_gets_worse_by_name(tmp_path):
    nothing, something = np.zeros(SHAPE, np.uint8), tumour((2, 18, 16), 6)
    rows = {
        name: [scan_row("quiet", patient="a", label=nothing, prediction=answer), *typical_rows(6)]
        for name, answer in (("before", nothing), ("after", something))
    }
    before, after = (write_run(tmp_path / name, rows[name]) for name in ("before", "after"))
    for entry in report.summary([after], compare=before)["comparison"]["regions"]:
        assert (entry["worse"], entry["better"]) == (1, 0)
        assert [line["scan_id"] for line in entry["regressions"]] == ["quiet"]
        assert entry["regressions"][0]["difference"] == -1.0
        assert entry["worse"] + entry["equal"] + entry["better"] == entry["dice"]["num_pairs"]


def test_every_format_says_the_same_numbers(run, tmp_path):
    summary = report.summary([run])
    for format_ in ("json", "csv", "md"):
        report.build_report([run], str(tmp_path / f"r.{format_}"), format_=format_)
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == summary
    rows = list(csv.reader(io.StringIO((tmp_path / "r.csv").read_text("utf-8"))))
    wanted = list(leaves({k: v for k, v in summary.items() if k != "scans"}))
    assert rows[0] == ["figure", "value"]
    assert len({row[0] for row in rows}) == len(rows) == len(wanted) + 1
    for (path, text), (name, value) in zip(rows[1:], wanted, strict=True):
        assert path == name
        assert text.removeprefix("'") == ("" if value is None else str(value))
    markdown = (tmp_path / "r.md").read_text("utf-8")
    for r in summary["groups"][0]["regions"]:
        assert f"| {r['region']} | {r['num_scored']} | {r['num_patients_scored']} | {r['dice']['mean']:.4g} |" in markdown
    assert f"| {' | '.join(map(str, summary['counts'].values()))} |" in markdown


def test_hostile_names_stay_text_in_every_format(tmp_path):
    evil = "=cmd()|' /C calc'!A0 <script>alert(1)</script>\n# heading"
    rows = [{**r, "attributes": [("site", evil if i % 2 else "A")]} for i, r in enumerate(typical_rows(8))]
    place = write_run(tmp_path / "run", rows, model={"name": evil}, run_id=evil)
    for format_ in ("csv", "md"):
        report.build_report([place], str(tmp_path / f"r.{format_}"), format_=format_)
    table = list(csv.reader(io.StringIO((tmp_path / "r.csv").read_text("utf-8"))))
    assert not [cell for row in table for cell in row if cell.startswith(("=", "@", "+"))]
    markdown = (tmp_path / "r.md").read_text("utf-8")
    assert "<script>" not in markdown
    assert not [line for line in markdown.splitlines() if line.startswith("# heading")]


def test_every_code_has_its_advice_and_a_strange_one_is_no_error():
    assert set(ADVICE) == set(Code)
    assert all(words.endswith(".") and len(words) < 200 for words in ADVICE.values())
    assert what_to_do("FROM_THE_FUTURE") == what_to_do(None) == UNKNOWN


def test_throughput_is_scans_by_the_clock_without_the_breaks(tmp_path):
    from datetime import timedelta

    label = tumour((2, 18, 16), 6)
    row = scan_row("s", patient="p", label=label, prediction=label)
    seconds = [0, 10, 20, 30, 10_000, 10_010]
    rows = [
        {**row, "scan_id": f"s{i}", "finished_at": row["finished_at"] + timedelta(seconds=s)} for i, s in enumerate(seconds)
    ]
    pace = report.summary([write_run(tmp_path / "run", rows)])["throughput"]
    assert (pace["worked_s"], pace["breaks"], pace["scans_per_hour"]) == (40.0, 1, 360.0)
    assert sum(pace["spans"]["scans"]) == len(seconds)


def test_the_picture_is_the_slice_of_the_largest_tumour(run):
    from brainseg.report.gallery import pictures

    cohort = load([run])
    found = pictures(cohort, list(range(cohort.scans.num_rows)), ["WT", "ET"])
    assert len(found) == 28
    assert {p.slice_index for p in found.values()} <= set(range(SHAPE[0]))
    assert all(len(p.prediction) == 2 for p in found.values())
