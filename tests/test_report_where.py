"""Where: a condition picks the rows that SQL would pick, and whatever is no condition is refused in words."""

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_as_runs import typical_rows, write_run

from brainseg import report
from brainseg.errors import UsageError
from brainseg.report.columns import only
from brainseg.report.facts import load
from brainseg.report.where import parse

TABLE = pa.table(
    {
        "site": pa.array(["A", "B", None, "12", "it's", "A"]),
        "fold": pa.array([0, 1, 2, None, 4, -1], pa.int32()),
        "dice": pa.array([0.5, None, 0.0, 1.0, 0.25, 0.75]),
        "ok": pa.array([True, False, None, True, True, False]),
        "place": pa.array(range(6)),
    }
)
ATOMS = [
    "site = 'A'",
    "site != 'A'",
    "site in ('A', 'it''s')",
    "site not in ('A')",
    "site is null",
    "site is not null",
    "fold = 0",
    "fold <> 1",
    "fold in (0, 1, 4)",
    "dice < 0.5",
    "dice >= 2.5e-1",
    "dice <= 0.75",
    "fold > -1",
    "ok = true",
    "ok != true",
    '"dice" > .3',
]
conditions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or", "AND", "Or"]), inner).map(" ".join),
        inner.map("not ({})".format),
        inner.map("({})".format),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("where") / "run", typical_rows())


@settings(max_examples=150, deadline=None)
@given(conditions)
def test_a_condition_picks_what_a_database_picks(text):
    picked = TABLE.filter(parse(text).mask(TABLE.__getitem__))["place"].to_pylist()
    everything = TABLE  # noqa: F841  duckdb finds it by its name
    assert picked == [row[0] for row in duckdb.sql(f"select place from everything where {text} order by place").fetchall()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a column"),
        ("site", "expected one of"),
        ("site =", "a number or a 'text'"),
        ("fold = 'A'", "fold is of type int32"),
        ("ok > true", "ok is of type bool"),
        ("site = 'A' fold = 0", "expected the end"),
        ("site = 'A'; drop table scans", "cannot read it"),
        ("(" * 60 + "fold = 0" + ")" * 60, "more than 40"),
        ("site in ()", "a number or a 'text'"),
        ('site = "A"', "a number or a 'text'"),
        ("fold = 0 and", "expected a column"),
        ("fold = 1 or " * 3000 + "fold = 1", "cannot read it"),
    ],
)
def test_what_is_no_condition_is_refused_where_it_stops_making_sense(text, says):
    with pytest.raises(UsageError, match="--where") as caught:
        parse(text).mask(TABLE.__getitem__)
    assert says in str(caught.value)


@given(st.text(max_size=40))
def test_no_text_at_all_does_anything_but_pick_or_be_refused(text):
    try:
        mask = parse(text).mask(TABLE.__getitem__)
    except (UsageError, KeyError):
        mask = TABLE["place"]
    assert len(mask) == TABLE.num_rows


def test_a_column_that_is_not_there_is_refused_with_those_that_are(run):
    with pytest.raises(UsageError, match="no column 'sight'") as caught:
        report.summary([run], where="sight = 'A'")
    for name in ("scan_id", "dice", "fold", "site", "split"):
        assert name in str(caught.value)


def test_denominators_and_figures_are_those_of_the_scans_that_were_picked(run):
    whole, part = report.summary([run]), report.summary([run], where="scan_id in ('scan-000', 'missed', 'broken-1')")
    assert part["where"] == "scan_id in ('scan-000', 'missed', 'broken-1')"
    assert part["counts"] == {
        **dict.fromkeys(("found", "labelled", "patients"), 3),
        **{"eligible": 2, "segmented": 2, "evaluated": 2, "failed": 1, "missing": 0},
    }
    assert {row["scan_id"] for row in part["scans"]["rows"]} == {"scan-000", "missed"}
    by_name = {row["scan_id"]: row for row in whole["scans"]["rows"]}
    assert [row["regions"] for row in part["scans"]["rows"]] == [
        by_name[r["scan_id"]]["regions"] for r in part["scans"]["rows"]
    ]


def test_a_condition_on_a_figure_picks_pairs_of_scan_and_region(run):
    cohort = load([run])
    part = only(cohort, "region = 'WT' and dice < 0.8 or state = 'missed'")
    ids = part.scans["scan_id"].to_pylist()
    assert part.regions.num_rows
    for entry in part.regions.table().to_pylist():
        assert (entry["region"] == "WT" and entry["dice"] < 0.8) or entry["state"] == "missed"
    whole = {(cohort.scans["scan_id"][e["row"]].as_py(), e["region"]): e["dice"] for e in cohort.regions.table().to_pylist()}
    for entry in part.regions.table().to_pylist():
        assert whole[ids[entry["row"]], entry["region"]] == entry["dice"]
    assert set(part.regions["row"].to_pylist()) == set(range(len(ids)))


def test_attributes_are_columns_too(run):
    assert report.summary([run], where="site = 'A'")["counts"]["found"] == 23
    assert report.summary([run], where="site is null")["counts"]["found"] == 0
