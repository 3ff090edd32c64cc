"""Audit: whatever stands on both sides is found and counted, and nothing is called clean that is not known to be."""

import json
import time

import pyarrow as pa
import pytest
from factory import FEW, make_row
from hypothesis import given
from hypothesis import strategies as st

from brainseg.audit import FEWEST_PAIRS, Audit, audit_folds, audit_split
from brainseg.tables import MANIFEST


def files(*hashes, role="image"):
    return [
        {"uri": f"/{n}", "role": role, "modality": None, "index": n, "size_bytes": 1, "tag": "t", "sha256": digest}
        for n, digest in enumerate(hashes)
    ]


def slices(name, numbers, patient, fold=0, **changes):
    return [make_row(f"{name}_{n:03d}", patient, fold, files(None), reader="stack", **changes) for n in numbers]


def of_folds(rows, *, compared=True):
    return audit_folds(pa.Table.from_pylist(rows, schema=MANIFEST), contents_compared=compared)


def as_parts(rows):
    """The same rows as parts of a split, a part a fold."""
    return {f"fold {k}": [r for r in rows if r["fold"] == k] for k in sorted({r["fold"] for r in rows})}


@FEW
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", None]),
            st.integers(0, 2),
            st.lists(st.sampled_from(["x", "y", "z", None]), max_size=3),
            st.sampled_from(["stack", "volumes"]),
        ),
        min_size=1,
        max_size=25,
    )
)
def test_every_count_is_that_of_comparing_each_with_each(scans):
    rows = [make_row(f"s_{n}", p, fold, files(*hashes), reader=r) for n, (p, fold, hashes, r) in enumerate(scans)]
    audit = of_folds(rows)
    shared = {p for p, f, *_ in scans for q, g, *_ in scans if p is not None and p == q and f != g}
    places = [(h, f, p) for p, f, hashes, _ in scans for h in hashes if h]
    twice = {h for h, *_ in places if sum(h == other for other, *_ in places) > 1}
    across = {h for h, f, _ in places for other, g, _ in places if h == other and f != g}
    owners = {h for h, _, p in places for other, _, q in places if h == other and None not in (p, q) and p != q}
    single = [reader == "stack" and len(hashes) == 1 for _, _, hashes, reader in scans]
    pairs = [n for n in range(len(scans) - 1) if single[n] and single[n + 1] and scans[n][0] == scans[n + 1][0]]
    assert audit.shared_patients == len(shared)
    assert (audit.identical, audit.identical_across, audit.identical_patients) == (len(twice), len(across), len(owners))
    assert (audit.neighbours, audit.neighbours_across) == (
        len(pairs),
        sum(scans[n][1] != scans[n + 1][1] for n in pairs),
    )
    if shared or across:
        assert audit.verdict == "leaks"
    elif None in [p for p, *_ in scans]:
        assert audit.verdict in ("unknown", "leaks")


@FEW
@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 2), st.sampled_from(["x", "y", None])), min_size=1))
def test_a_table_and_the_rows_of_it_are_audited_alike(scans):
    rows = sorted(
        (make_row(f"s_{n}", p, f, files(h), reader="stack") for n, (p, f, h) in enumerate(scans)), key=lambda r: r["fold"]
    )
    compared = any(h for *_, h in scans)
    assert of_folds(rows, compared=compared) == audit_split(as_parts(rows))


def test_folds_by_patient_with_distinct_contents_are_clean():
    rows = [*slices("a", range(5), "A", 0), *slices("b", range(5), "B", 1)]
    audit = of_folds(rows)
    assert (audit.verdict, audit.reason, audit.sides) == ("clean", "", ("fold 0", "fold 1"))
    assert (audit.neighbours, audit.neighbours_across) == (8, 0)
    assert audit.lines()[0] == "leakage audit: clean"


def test_a_patient_on_two_sides_leaks_and_is_named():
    audit = audit_split({"train": slices("a", [1, 2], "A"), "validation": [], "test": slices("a", [3], "A")})
    assert (audit.verdict, audit.shared_patients, audit.shared_patient_examples) == ("leaks", 1, ("A",))
    assert (audit.neighbours, audit.neighbours_across) == (2, 1)
    assert audit.neighbour_examples == ("a_002 and a_003",)


def test_identical_contents_of_different_patients_leak_only_across_sides():
    one, two, three = (make_row(f"s{n}", f"p{n}", sources=files("same")) for n in range(3))
    inside = audit_split({"train": [one, two], "test": [make_row("x", "q", sources=files(None))]})
    assert (inside.verdict, inside.identical, inside.identical_across, inside.identical_patients) == ("clean", 1, 0, 1)
    across = audit_split({"train": [one, two], "test": [three]})
    assert (across.verdict, across.identical_across, across.identical_examples) == ("leaks", 1, ("s0 and s1 and s2",))


def test_labels_have_no_say_and_one_scan_may_repeat_itself():
    both = make_row("s", "p", sources=[*files("x", "x"), *files(None, role="label")])
    audit = audit_split({"train": [both], "test": [make_row("t", "q", sources=files(None))]})
    assert (audit.verdict, audit.identical, audit.identical_across) == ("clean", 1, 0)


def test_what_is_not_known_is_not_clean():
    known = [make_row("a", "A", 0), make_row("b", "B", 1)]
    assert of_folds(known).verdict == "clean"
    unknown = {
        "whose 1 of the scans": [*known, make_row("c", None, 1)],
        "1 scans are on no side": [*known, make_row("c", "C", None)],
        "only one side": known[:1],
    }
    for reason, rows in unknown.items():
        audit = of_folds(rows)
        assert audit.verdict == "unknown"
        assert reason in audit.reason
    uncompared = of_folds(known, compared=False)
    assert (uncompared.verdict, uncompared.reason) == ("unknown", "contents were not compared")
    assert "  identical contents: not compared" in uncompared.lines()


def test_a_split_knows_from_the_manifests_audit_that_contents_were_compared():
    parts = {"train": [make_row("a", "A")], "test": [make_row("b", "B")]}
    recorded = of_folds([make_row("a", "A", 0), make_row("b", "B", 1)])
    assert audit_split(parts).verdict == "unknown"
    assert audit_split(parts, recorded=recorded).verdict == "clean"


def test_a_scan_that_cannot_be_used_has_no_say():
    rows = [make_row("a", "A", 0), make_row("b", "B", 1), make_row("c", "A", 1, problem_code="CORRUPT")]
    assert of_folds(rows).verdict == "clean"


@pytest.mark.parametrize("patient", [None, "A"])
def test_neighbours_of_unknown_patients_that_are_dealt_at_random_leak(patient):
    rows = [row for n in range(200) for row in slices("image", [n], patient, fold=(n * 7 // 3) % 5)]
    audit = of_folds(rows)
    assert audit.neighbours_across > 100
    assert (audit.verdict, audit.scattered) == ("leaks", patient is None)


def test_neighbours_divided_only_where_a_patient_ends_leave_the_verdict_open():
    rows = [row for n in range(200) for row in slices("image", [n], None, fold=(n // 10) % 5)]
    audit = of_folds(rows)
    assert (audit.verdict, audit.scattered, audit.neighbours, audit.neighbours_across) == ("unknown", False, 199, 19)


def test_a_handful_of_pairs_proves_nothing():
    rows = [row for n in range(FEWEST_PAIRS) for row in slices("image", [n], None, fold=n % 2)]
    assert not of_folds(rows).scattered


def test_numbers_of_different_sets_series_and_volumes_are_no_neighbours():
    single = files(None)
    rows = [
        make_row("a_1", None, sources=single, reader="stack", dataset="one"),
        make_row("a_2", None, sources=single, reader="stack", dataset="two"),
        make_row("b_3", None, sources=single, reader="stack", dataset="one"),
        make_row("BraTS_001", None, sources=single, reader="volumes"),
        make_row("BraTS_002", None, sources=single, reader="volumes"),
        make_row("c_1", None, sources=files(None, None), reader="stack"),
        make_row("c_2", None, sources=files(None, None), reader="stack"),
        make_row("unnumbered", None, sources=single, reader="stack"),
    ]
    assert of_folds(rows).neighbours == 0


def test_an_audit_survives_json_and_a_later_versions_keys():
    audit = of_folds([*slices("a", range(3), "A", 0), *slices("a", range(3, 5), "A", 1)])
    body = json.loads(json.dumps(audit.to_json()))
    assert Audit.from_json(body) == audit
    assert Audit.from_json({**body, "new": 1}) == audit


@pytest.mark.parametrize("body", [{}, {"verdict": "fine"}, {"verdict": "clean"}, None, []])
def test_what_is_no_audit_is_refused(body):
    with pytest.raises(ValueError, match="not a leakage audit"):
        Audit.from_json(body)


@pytest.mark.slow
def test_a_million_rows_take_seconds():
    count = 1_000_000
    rows = pa.Table.from_pylist(slices("x", [0], "p"), schema=MANIFEST)
    table = rows.take(pa.array([0] * count))
    for name, column in {
        "scan_id": pa.array([f"s_{n:07d}" for n in range(count)]),
        "patient_id": pa.array([f"p{n // 20}" for n in range(count)]),
        "fold": pa.array([n // 20 % 5 for n in range(count)], pa.int32()),
    }.items():
        table = table.set_column(table.schema.get_field_index(name), MANIFEST.field(name), column)
    began = time.perf_counter()
    audit = audit_folds(table, contents_compared=True)
    assert (audit.verdict, audit.patients, audit.neighbours) == ("clean", count // 20, count - count // 20)
    assert time.perf_counter() - began < 30
