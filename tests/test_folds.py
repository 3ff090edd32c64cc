"""Folds: patients are never divided unless somebody insists, strata are spread evenly, and a table of folds is obeyed."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from factory import cohort, make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from object_stores import moto_store

from brainseg import storage
from brainseg.errors import LeakageError, UsageError
from brainseg.folds import GROUPING, FoldPlan, assign_folds, check_no_shared_patients, choose_attribute, deal
from brainseg.tables import MANIFEST


def table_of(*rows):
    return pa.Table.from_pylist(list(rows), schema=MANIFEST)


def with_attributes(*attributes):
    """A patient a row, with these attributes."""
    return table_of(*(make_row(f"s{n}", f"p{n}", None, attributes=list(a.items())) for n, a in enumerate(attributes)))


def slices_of(patients, count, reader="stack"):
    """Single images `p0_000`, `p0_001`, ... of some patients, as `index --unit slice` makes them."""
    return table_of(
        *(
            make_row(f"p{p}_{n:03d}", f"p{p}", None, [image(f"/a/p{p}/p{p}_{n + 1}.tif")], reader=reader)
            for p in range(patients)
            for n in range(count)
        )
    )


def image(uri):
    return {"uri": uri, "role": "image", "modality": None, "index": 0, "size_bytes": 1, "tag": "t"}


def folds(table):
    return table["fold"].to_pylist()


# ---- dealing ---------------------------------------------------------------------------------------------------------

PATIENTS = st.lists(st.one_of(st.none(), st.sampled_from([f"p{i}" for i in range(12)])), max_size=40)


@settings(max_examples=60, deadline=None)
@given(PATIENTS, st.integers(2, 7), st.integers(0, 5))
def test_all_scans_of_a_patient_share_the_fold_and_unknown_ones_have_none(patients, count, seed):
    table = assign_folds(cohort(patients), folds=count, seed=seed)
    check_no_shared_patients(table)
    assert all((fold is None) == (patient is None) for fold, patient in zip(folds(table), patients, strict=True))
    assert all(fold is None or 0 <= fold < count for fold in folds(table))
    assert table.schema.equals(MANIFEST)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text("abc", min_size=1), min_size=1, max_size=30), st.integers(2, 7), st.integers(0, 5))
def test_folds_differ_by_at_most_one_patient(patients, count, seed):
    dealt = Counter(folds(assign_folds(cohort(sorted(patients)), folds=count, seed=seed)))
    sizes = [dealt[fold] for fold in range(count)]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("HL"), min_size=1, max_size=40), st.integers(2, 5))
def test_a_stratum_is_spread_evenly(grades, count):
    table = assign_folds(cohort([f"p{i}" for i in range(len(grades))], grades), folds=count, stratify="grade")
    for grade in set(grades):
        dealt = Counter(f for f, g in zip(folds(table), grades, strict=True) if g == grade)
        sizes = [dealt[fold] for fold in range(count)]
        assert max(sizes) - min(sizes) <= 1


def test_the_order_of_rows_changes_nothing_and_the_seed_does():
    table = cohort([f"p{i}" for i in range(20)])
    mirrored = table.take(pa.array(range(19, -1, -1)))
    assert folds(assign_folds(mirrored)) == folds(assign_folds(table))[::-1]
    assert folds(assign_folds(table, seed=1)) != folds(assign_folds(table))


def test_the_same_patients_get_the_same_folds_in_every_version():
    """Folds of published results: whoever changes how they are dealt breaks them, and has to notice."""
    ten = [f"TCGA_CS_{n}" for n in range(4940, 4950)]
    assert folds(deal(cohort(ten), FoldPlan(stratify="none")).manifest) == [1, 1, 0, 2, 2, 0, 4, 4, 3, 3]


@pytest.mark.parametrize("count", [1, 0, -3])
def test_fewer_than_two_folds_are_refused(count):
    with pytest.raises(UsageError, match="2 or more"):
        assign_folds(cohort(["a"]), folds=count)


def test_a_shared_patient_is_named():
    with pytest.raises(LeakageError, match="'a' lies in folds 0 and 2"):
        check_no_shared_patients(cohort(["a", "b", "a"], fold=[0, 1, 2]))


# ---- by what ---------------------------------------------------------------------------------------------------------


def test_the_first_grouping_attribute_that_fits_is_taken_and_said():
    both = [{"grade": "HL"[n % 2], "site": "ABC"[n % 3], "colour": "red"} for n in range(30)]
    dealt = deal(with_attributes(*both), FoldPlan())
    assert (dealt.stratified_by, dealt.how) == ("site", "5 by patient, stratified by site")
    for site in range(3):
        assert Counter(folds(dealt.manifest)[site::3]) == dict.fromkeys(range(5), 2)


@pytest.mark.parametrize("name", [*GROUPING, "Tumor Type", "GRADE"])
def test_every_grouping_attribute_is_known_in_any_case(name):
    assert choose_attribute(with_attributes(*({name: "ab"[n % 2]} for n in range(10))), folds=5) == name


@pytest.mark.parametrize(("values", "count"), [(1, 2), (4, 2), (4, 5), (12, 2)])
def test_an_attribute_of_one_value_or_of_too_many_is_passed_over(values, count):
    """12 patients in `count` folds: at most 12 / count groups."""
    table = with_attributes(*({"site": str(n % values), "grade": "HL"[n % 2]} for n in range(12)))
    fits = 2 <= values <= 12 // count
    assert choose_attribute(table, folds=count) == ("site" if fits else "grade")


def test_without_a_grouping_attribute_or_with_none_folds_are_not_stratified():
    plain = deal(cohort([f"p{n}" for n in range(20)]), FoldPlan())
    graded = cohort([f"p{n}" for n in range(20)], ["HL"[n % 2] for n in range(20)])
    off = deal(graded, FoldPlan(stratify="none"))
    assert (plain.stratified_by, off.stratified_by) == (None, None)
    assert folds(plain.manifest) == folds(off.manifest) != folds(deal(graded, FoldPlan()).manifest)
    assert off.how == "5 by patient, not stratified"


def test_an_attribute_asked_for_is_taken_however_many_values_it_has():
    assert deal(cohort(["a", "b"], ["H", "L"]), FoldPlan(stratify="grade")).stratified_by == "grade"
    with pytest.raises(UsageError, match="there are: grade"):
        deal(cohort(["a"], ["H"]), FoldPlan(stratify="colour"))


def test_declared_folds_are_kept_and_leave_nothing_to_stratify():
    declared = cohort(["a", "b", "c"], ["H", "L", "H"], fold=[2, 0, 2])
    assert folds(deal(declared, FoldPlan()).manifest) == [2, 0, 2]
    with pytest.raises(UsageError, match="declares the folds"):
        deal(declared, FoldPlan(stratify="grade"))


# ---- by scan ---------------------------------------------------------------------------------------------------------


def test_folds_by_scan_divide_patients_and_are_refused_unless_accepted():
    table = slices_of(4, 25)
    with pytest.raises(LeakageError, match=r"scans of one patient will stand on both sides.*--accept-leakage"):
        deal(table, FoldPlan(by="scan"))
    dealt = deal(table, FoldPlan(by="scan", accept_leakage=True)).manifest
    assert Counter(folds(dealt)) == dict.fromkeys(range(5), 20)
    with pytest.raises(LeakageError):
        check_no_shared_patients(dealt)


def test_folds_by_scan_replace_declared_ones_and_need_no_patient():
    dealt = deal(cohort([None] * 10, fold=[0] * 10), FoldPlan(by="scan", accept_leakage=True))
    assert Counter(folds(dealt.manifest)) == dict.fromkeys(range(5), 2)
    assert dealt.how == "5 by scan, not stratified"


# ---- from a table ----------------------------------------------------------------------------------------------------


def told(folder: Path, text: str, table, **plan):
    (folder / "my folds.csv").write_text(text)
    return deal(table, FoldPlan(table=str(folder / "my folds.csv"), **plan))


@pytest.mark.parametrize("column", ["patient_id", "Patient", "SUBJECT", "participant id", "pid"])
def test_a_table_of_patients_gives_every_scan_its_fold(tmp_path, column):
    dealt = told(tmp_path, f"note,{column},Fold\nx,a,1\ny,b,0\n", cohort(["a", "b", "a"]))
    assert folds(dealt.manifest) == [1, 0, 1]
    assert dealt.how == "as my folds.csv says"


@pytest.mark.parametrize(
    "text", ["scan_id,fold\ns0,0\ns1,3\n", "Scan;fold\ns0;0\ns1; 3 \n", "\ufeffcase\tFOLD\ns0\t0\ns1\t3\n\n"]
)
def test_a_table_of_scans_may_be_separated_by_commas_semicolons_or_tabs(tmp_path, text):
    assert folds(told(tmp_path, text, cohort(["a", "b"])).manifest) == [0, 3]


def test_a_scan_may_be_named_by_its_file_its_patient_or_the_scan_it_is_a_slice_of(tmp_path):
    table = slices_of(2, 2)
    for text in (
        "scan,fold\np0,0\np1,1\n",
        "scan,fold\np0_000,0\np0_001,0\np1_000,1\np1_001,1\n",
        "subject,fold\np0,0\np1,1\n",
    ):
        assert folds(told(tmp_path, text, table).manifest) == [0, 0, 1, 1]
    by_file = "image,fold\nimages/p0_1.tif,0\nimages/p0_2.tif,0\nx\\p1_1.tif,1\np1_2,1\n"
    assert folds(told(tmp_path, by_file, table).manifest) == [0, 0, 1, 1]


def test_a_volume_is_never_taken_for_a_slice(tmp_path):
    with pytest.raises(UsageError, match="no fold for 1 of 1 labelled scans, such as 'p0_000'"):
        told(tmp_path, "scan,fold\np0,0\n", table_of(make_row("p0_000", None, None, [image("/a/x.nii")])))


def test_a_table_that_counts_from_one_counts_from_zero_here(tmp_path):
    dealt = told(tmp_path, "patient,fold\na,1\nb,2\n", cohort(["a", "b"]))
    assert folds(dealt.manifest) == [0, 1]
    assert "counted from 1 there and from 0 here" in dealt.how


def test_a_labelled_scan_that_the_table_lacks_is_an_error_and_others_have_no_fold(tmp_path):
    table = cohort(["a", "b", "c", "d"], has_label=[True, True, False, True], problem_code=[None, None, None, "CORRUPT"])
    with pytest.raises(UsageError, match=r"no fold for 1 of 2 labelled scans, such as 's1' \(it names 1, such as 'a'\)"):
        told(tmp_path, "patient,fold\na,0\n", table)
    assert folds(told(tmp_path, "patient,fold\na,0\nb,1\nzz,4\n", table).manifest) == [0, 1, None, None]


def test_a_table_that_divides_a_patient_is_refused_unless_accepted(tmp_path):
    text, table = "scan,fold\ns0,0\ns1,1\n", cohort(["a", "a"])
    with pytest.raises(LeakageError, match="'a' lies in folds 0 and 1"):
        told(tmp_path, text, table)
    assert folds(told(tmp_path, text, table, accept_leakage=True).manifest) == [0, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a column"),
        ("scan\ns0\n", "a column 'fold'; it has: scan"),
        ("who,fold\ns0,1\n", "expected a column 'scan_id' or 'patient_id'"),
        ("scan,fold\ns0,train\n", "found the fold 'train', expected a whole number"),
        ("scan,fold\ns0,-1\n", "expected a whole number"),
        ("scan,fold\ns0\n", "expected a whole number"),
        ("scan,fold\ns0,1\ns0,2\n", "puts 's0' into folds 1 and 2"),
    ],
)
def test_what_is_no_table_of_folds_is_refused(tmp_path, text, says):
    with pytest.raises(UsageError, match=says):
        told(tmp_path, text, cohort(["a"]))


def test_a_table_that_is_not_there_and_a_plan_that_contradicts_itself_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no table of folds"):
        deal(cohort(["a"]), FoldPlan(table=f"{tmp_path}/absent.csv"))
    for more in ({"by": "scan", "accept_leakage": True}, {"stratify": "grade"}):
        with pytest.raises(UsageError, match="leaves nothing to"):
            told(tmp_path, "scan,fold\ns0,0\n", cohort(["a"]), **more)


def test_the_table_may_lie_on_s3():
    with moto_store() as bucket:
        storage.write_text(f"{bucket}/folds.csv", "patient,fold\na,0\nb,2\n")
        assert folds(deal(cohort(["a", "b"]), FoldPlan(table=f"{bucket}/folds.csv")).manifest) == [0, 2]
