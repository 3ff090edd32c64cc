"""Split: nobody stands on two sides, and where that cannot be known it is refused."""

import pyarrow as pa
import pytest
from factory import FEW, make_row, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from brainseg.audit import audit_split
from brainseg.errors import LeakageError, PreflightError
from brainseg.folds import FoldPlan, deal
from brainseg.split import BLOCK, split_rows
from brainseg.tables import MANIFEST

PARTS = ("train", "validation", "test")


def by_patient(patients, scans=2, folds=4, **changes):
    """Rows of some patients with several scans each, folds by patient."""
    return [make_row(f"p{p}-{s}", f"p{p}", fold=p % folds, **changes) for p in range(patients) for s in range(scans)]


def unnamed(count, folds=4, run=20):
    """Rows of unknown patients whose folds are given, in runs of neighbouring scans."""
    return [make_row(f"s{n:03}", None, fold=n // run % folds) for n in range(count)]


def patients_of(rows):
    return {r["patient_id"] for r in rows}


@FEW
@given(
    patients=st.integers(6, 40),
    scans=st.integers(1, 3),
    held_out=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 50),
)
def test_no_patient_stands_on_two_sides_and_no_scan_is_lost(patients, scans, held_out, share, seed):
    rows = by_patient(patients, scans)
    split, parts = split_rows(rows, tiny_config(folds_held_out=held_out, validation_share=share, seed=seed))
    assert sorted(r["scan_id"] for part in PARTS for r in parts[part]) == sorted(r["scan_id"] for r in rows)
    sides = [patients_of(parts[part]) for part in PARTS]
    assert sum(map(len, sides)) == len(set.union(*sides)) == patients
    assert [set(getattr(split, part)) for part in PARTS] == sides
    assert {r["fold"] for r in parts["test"]} == {held_out}
    assert bool(parts["validation"]) == bool(share)


@FEW
@given(fold_of=st.lists(st.integers(0, 3), min_size=12, max_size=30), named=st.lists(st.booleans(), min_size=30, max_size=30))
def test_given_folds_that_divide_a_patient_are_refused_however_few_patients_are_known(fold_of, named):
    """Whatever a table of folds says, and whether some scans are nameless: either no patient is shared, or it is an error."""
    rows = [make_row(f"s{n}", f"p{n // 3}" if named[n] else None, fold=f) for n, f in enumerate(fold_of)]
    try:
        _, parts = split_rows(rows, tiny_config(validation_share=0.2))
    except (LeakageError, PreflightError):
        return
    sides = [patients_of(parts[part]) - {None} for part in PARTS]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_a_patient_divided_by_the_folds_is_named():
    rows = [*by_patient(8), make_row("extra", "p1", fold=0)]
    with pytest.raises(LeakageError, match="p1"):
        split_rows(rows, tiny_config())
    mixed = [*rows, make_row("nameless", None, fold=2)]
    with pytest.raises(LeakageError, match="p1"):
        split_rows(mixed, tiny_config())
    split, _ = split_rows(rows, tiny_config(accept_leakage=True))
    assert split.unit == "scan"
    assert split.part_of("p1", "extra") == "test"
    others = [r["scan_id"] for r in rows if r["patient_id"] == "p1" and r["scan_id"] != "extra"]
    assert {split.part_of("p1", name) for name in others} <= {"train", "validation"}


def test_unknown_patients_without_folds_are_refused_unless_accepted():
    rows = [make_row(f"s{n}", None, fold=None) for n in range(40)]
    with pytest.raises(LeakageError, match="40 of 40 scans have neither a patient nor a fold, such as s0"):
        split_rows(rows, tiny_config())
    split, parts = split_rows(rows, tiny_config(accept_leakage=True))
    assert split.unit == "scan"
    assert sum(map(len, parts.values())) == 40
    assert all(parts.values())


def test_one_unknown_patient_among_many_is_enough_to_refuse():
    with pytest.raises(LeakageError, match=r"1 of 17 .* such as odd"):
        split_rows([*by_patient(8), make_row("odd", None, fold=None)], tiny_config())


def test_known_patients_without_folds_are_folded_by_patient():
    for held_out in range(5):
        rows = [make_row(f"p{n // 2}-{n % 2}", f"p{n // 2}", fold=None) for n in range(100)]
        split, parts = split_rows(rows, tiny_config(folds_held_out=held_out, validation_share=0.2))
        assert all(len(parts[part]) >= 4 for part in PARTS)
        assert not set(split.train) & set(split.test)
        assert len(split.train) + len(split.validation) + len(split.test) == 50


def test_given_folds_serve_where_patients_are_unknown_and_validation_takes_neighbours_together():
    split, parts = split_rows(unnamed(400, run=100), tiny_config(validation_share=0.3))
    assert split.unit == "scan"
    runs = [sorted(int(r["scan_id"][1:]) for r in parts["validation"])]
    assert len(runs[0]) % BLOCK == 0
    for start in range(0, len(runs[0]), BLOCK):
        block = runs[0][start : start + BLOCK]
        assert block == list(range(block[0], block[0] + BLOCK))


def single_images(patients, count):
    """Slices as scans of their own, 10 a patient, as `index --unit slice` makes them; whose they are may be unknown."""
    file = {"uri": "/a", "role": "both", "modality": None, "index": 0, "size_bytes": 1, "tag": "t"}
    who = [f"p{n // 10}" if patients else None for n in range(count)]
    return [make_row(f"p_{n:03d}", p, None, [file], reader="stack") for n, p in enumerate(who)]


@pytest.mark.parametrize("patients", [True, False])
def test_slices_dealt_at_random_are_refused_whether_patients_are_known_or_not(patients):
    table = pa.Table.from_pylist(single_images(patients, 300), schema=MANIFEST)
    dealt = deal(table, FoldPlan(by="scan", accept_leakage=True)).manifest.to_pylist()
    says = "patients stand on two sides" if patients else "neighbouring slices as often as a random split would"
    with pytest.raises(LeakageError, match=says):
        split_rows(dealt, tiny_config())
    _, parts = split_rows(dealt, tiny_config(accept_leakage=True))
    assert len(parts["test"]) == 60
    assert audit_split(parts).verdict == "leaks"
    whose = {part: {r["patient_id"] for r in rows} for part, rows in parts.items()}
    assert not patients or whose["validation"] <= whose["train"]  # a random split keeps nobody out as a whole


def test_slices_dealt_by_patient_are_as_good_as_whole_scans():
    table = pa.Table.from_pylist(single_images(patients=True, count=300), schema=MANIFEST)
    _, parts = split_rows(deal(table, FoldPlan()).manifest.to_pylist(), tiny_config(validation_share=0.2))
    found = audit_split(parts)
    assert (found.shared_patients, found.neighbours, found.neighbours_across) == (0, 270, 0)


def test_the_same_rows_and_seed_give_the_same_split_in_any_order_of_patients():
    rows, config = by_patient(30), tiny_config(validation_share=0.2)
    assert split_rows(rows, config)[0] == split_rows(rows[::-1], config)[0]
    seeds = {split_rows(rows, tiny_config(validation_share=0.2, seed=s))[0].validation for s in range(4)}
    assert len(seeds) > 1


def test_a_new_patient_moves_no_other():
    before, after = (split_rows(by_patient(n), tiny_config(validation_share=0.2))[0] for n in (30, 34))
    for part in PARTS:
        assert set(getattr(before, part)) <= set(getattr(after, part))


def test_scans_without_a_usable_label_are_left_out():
    rows = [
        *by_patient(8),
        make_row("bare", "p1", fold=1, has_label=False),
        make_row("bad", "p2", fold=2, problem_code="CORRUPT"),
    ]
    _, parts = split_rows(rows, tiny_config())
    assert {"bare", "bad"}.isdisjoint(r["scan_id"] for part in PARTS for r in parts[part])


def test_without_labels_there_is_nothing_to_train_on():
    with pytest.raises(PreflightError, match="none of the manifest's 4 scans has a usable label"):
        split_rows(by_patient(2, has_label=False), tiny_config())


def test_a_fold_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(PreflightError, match=r"nothing for test; the manifest has folds \[0, 1, 2, 3\]"):
        split_rows(by_patient(8), tiny_config(folds_held_out=7))


def test_a_small_set_lends_a_patient_to_validation():
    split, parts = split_rows(by_patient(3, folds=3), tiny_config(validation_share=0.001))
    assert (len(split.train), len(split.validation), len(split.test)) == (1, 1, 1)
    assert len(parts["validation"]) == 2


def test_a_small_set_leaves_a_patient_to_train_on():
    for seed in range(20):
        _, parts = split_rows(by_patient(3, folds=3), tiny_config(validation_share=0.9, seed=seed))
        assert [len(parts[part]) for part in PARTS] == [2, 2, 2]
