"""Manifest: an archive becomes one table, patients are never divided, and what is no manifest is refused."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.errors import ConfigError, LeakageError, PreflightError, UsageError
from brainseg.manifest import (
    assign_folds,
    check_no_shared_patients,
    fingerprint,
    index_archive,
    patient_fold,
    read_manifest,
    write_manifest,
)
from brainseg.tables import MANIFEST


def archive(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return str(folder)


def cohort(patients: list[str | None], grades: list[str] | None = None) -> pa.Table:
    """A manifest of bare scans: whose each is, and its grade."""
    rows = [
        {
            "scan_id": f"s{i}",
            "patient_id": patient,
            "dataset": "d",
            "layout": "brats",
            "reader": "volumes",
            "label_map": "binary",
            "modalities": ["t1"],
            "sources": [{"uri": f"/a/{i}", "role": "image", "modality": "t1", "index": None, "size_bytes": i, "tag": "t"}],
            "has_label": False,
            "size_bytes": i,
            "attributes": [("grade", grades[i])] if grades else [],
        }
        for i, patient in enumerate(patients)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


class TestIndex:
    def test_every_scan_is_a_row_of_the_schema(self, tmp_path: Path) -> None:
        root = archive(tmp_path, "a/a_t1.nii", "a/a_seg.nii", "b/b_t1.nii", "b/b_t1.nii.gz", "LICENSE.txt")
        table, inventory = index_archive(root)
        assert table.schema.equals(MANIFEST, check_metadata=True)
        table.validate(full=True)
        good, bad = table.to_pylist()
        assert (good["scan_id"], good["has_label"], good["size_bytes"]) == ("a", True, len("a/a_t1.nii") + len("a/a_seg.nii"))
        assert good["sources"][0]["uri"] == f"{root}/a/a_t1.nii"
        assert good["sources"][0]["tag"] == str((tmp_path / "a/a_t1.nii").stat().st_mtime_ns)
        assert (bad["scan_id"], bad["problem_code"]) == ("b", "DUPLICATE_ID")
        assert [uri for uri, _ in inventory.ignored] == [f"{root}/LICENSE.txt"]

    def test_a_person_overrides_what_the_layout_declares(self, tmp_path: Path) -> None:
        root = archive(tmp_path, "a_t1.nii")
        row = index_archive(root, dataset="clinic", label_map="brats2023")[0].to_pylist()[0]
        assert (row["dataset"], row["label_map"], row["layout"]) == ("clinic", "brats2023", "brats")
        with pytest.raises(ConfigError, match="known"):
            index_archive(root, label_map="brats1999")

    def test_a_few_stray_files_do_not_blur_the_layout_but_two_archives_do(self, tmp_path: Path) -> None:
        root = archive(tmp_path, *(f"{n}.png" for n in range(20)), "a_t1.nii")
        table, inventory = index_archive(root)
        assert set(table["layout"].to_pylist()) == {"figshare"}
        assert len(inventory.ignored) == 1
        archive(tmp_path, *(f"{n}_t1.nii" for n in range(20)))
        with pytest.raises(UsageError, match="--layout"):
            index_archive(root)
        assert index_archive(root, layout="brats")[0].num_rows == 21

    def test_nothing_recognised_says_what_was_seen_and_what_is_known(self, tmp_path: Path) -> None:
        root = archive(tmp_path, "x/one.dcm", "x/two.dcm", "scan.nii.gz")
        with pytest.raises(UsageError) as caught:
            index_archive(root)
        said = str(caught.value)
        assert all(
            word in said for word in ("3 files", "2 .dcm", "1 .nii.gz", "x/one.dcm", "lgg", "figshare", "brats", "h5slices")
        )

    def test_nothing_there_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "empty").mkdir()
        for place, says in {"file": "this is a file", "empty": "no file", "absent": "no such folder"}.items():
            with pytest.raises(UsageError, match=says) as caught:
                index_archive(str(tmp_path / place))
            assert "\n" not in str(caught.value)
        with pytest.raises(PreflightError, match="not supported"):
            index_archive("gs://bucket/x")
        with pytest.raises(UsageError, match="known: lgg"):
            index_archive(str(archive(tmp_path, "1.png")), layout="dicom")

    def test_indexing_again_is_the_same_and_a_changed_file_is_not(self, tmp_path: Path) -> None:
        root = archive(tmp_path, *(f"p{n}/p{n}_t1.nii" for n in range(7)))
        first, again = index_archive(root)[0], index_archive(f"{root}/")[0]
        assert first.equals(again)
        assert fingerprint(first) == fingerprint(again)
        (tmp_path / "p3/p3_t1.nii").write_bytes(b"changed")
        assert fingerprint(index_archive(root)[0]) != fingerprint(first)

    def test_declared_folds_are_kept_and_may_not_share_a_patient(self, tmp_path: Path) -> None:
        root = archive(tmp_path, "1.png", "2.png", "3.png")
        (tmp_path / "folds.csv").write_text("image,patient,fold\n1,A,1\n2,A,1\n3,B,2\n")
        assert index_archive(root)[0]["fold"].to_pylist() == [0, 0, 1]
        (tmp_path / "folds.csv").write_text("image,patient,fold\n1,A,1\n2,A,2\n3,B,2\n")
        with pytest.raises(LeakageError, match="'A'"):
            index_archive(root)

    def test_folds_stay_unknown_where_patients_are(self, tmp_path: Path) -> None:
        table, _ = index_archive(archive(tmp_path, "1.png", "2.png", "3.png"))
        assert table["fold"].null_count == 3
        assert sorted(assign_folds(table, folds=3, by_scan=True)["fold"].to_pylist()) == [0, 1, 2]


class TestFolds:
    PATIENTS = st.lists(st.one_of(st.none(), st.sampled_from([f"p{i}" for i in range(12)])), max_size=40)

    @settings(max_examples=60, deadline=None)
    @given(PATIENTS, st.integers(2, 7), st.integers(0, 5), st.booleans())
    def test_all_scans_of_a_patient_share_the_fold(
        self, patients: list[str | None], folds: int, seed: int, by_scan: bool
    ) -> None:
        table = assign_folds(cohort(patients), folds=folds, seed=seed, by_scan=by_scan)
        check_no_shared_patients(table)
        dealt = table["fold"].to_pylist()
        assert all((fold is None) == (patient is None and not by_scan) for fold, patient in zip(dealt, patients, strict=True))
        assert all(fold is None or 0 <= fold < folds for fold in dealt)
        assert table.schema.equals(MANIFEST)

    @settings(max_examples=60, deadline=None)
    @given(st.sets(st.text("abc", min_size=1), min_size=1, max_size=30), st.integers(2, 7), st.integers(0, 5))
    def test_folds_differ_by_at_most_one_patient(self, patients: set[str], folds: int, seed: int) -> None:
        counts = Counter(assign_folds(cohort(sorted(patients)), folds=folds, seed=seed)["fold"].to_pylist())
        sizes = [counts[fold] for fold in range(folds)]
        assert max(sizes) - min(sizes) <= 1

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from("HL"), min_size=1, max_size=40), st.integers(2, 5))
    def test_a_stratum_is_spread_evenly(self, grades: list[str], folds: int) -> None:
        table = assign_folds(cohort([f"p{i}" for i in range(len(grades))], grades), folds=folds, stratify="grade")
        for grade in set(grades):
            counts = Counter(f for f, g in zip(table["fold"].to_pylist(), grades, strict=True) if g == grade)
            sizes = [counts[fold] for fold in range(folds)]
            assert max(sizes) - min(sizes) <= 1

    def test_the_order_of_rows_changes_nothing_and_the_seed_does(self) -> None:
        table = cohort([f"p{i}" for i in range(20)])
        mirrored = table.take(pa.array(range(19, -1, -1)))
        folds = assign_folds(table)["fold"].to_pylist()
        assert assign_folds(mirrored)["fold"].to_pylist() == folds[::-1]
        assert assign_folds(table, seed=1)["fold"].to_pylist() != folds

    def test_a_patients_own_fold_is_fixed_for_ever(self) -> None:
        known = {"TCGA_CS_4941": 0, "TCGA_CS_4943": 0, "Zoë": 2}
        assert {patient: patient_fold(patient, 5, 0) for patient in known} == known

    def test_an_unknown_attribute_lists_those_there_are(self) -> None:
        with pytest.raises(UsageError, match="there are: grade"):
            assign_folds(cohort(["a"], ["H"]), stratify="colour")

    @pytest.mark.parametrize("folds", [1, 0, -3])
    def test_fewer_than_two_folds_are_refused(self, folds: int) -> None:
        with pytest.raises(UsageError, match="2 or more"):
            assign_folds(cohort(["a"]), folds=folds)

    def test_a_shared_patient_is_named(self) -> None:
        table = cohort(["a", "b", "a"])
        table = table.set_column(table.schema.get_field_index("fold"), MANIFEST.field("fold"), pa.array([0, 1, 2], pa.int32()))
        with pytest.raises(LeakageError, match="'a' lies in folds 0 and 2"):
            check_no_shared_patients(table)


class TestFile:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        table = assign_folds(cohort(["a", None, "b"], ["H", "L", "H"]))
        write_manifest(f"{tmp_path}/m.parquet", table)
        back = read_manifest(f"{tmp_path}/m.parquet")
        assert back.equals(table)
        assert back.schema.equals(MANIFEST, check_metadata=True)
        assert fingerprint(back) == fingerprint(table)

    def test_duckdb_may_filter_a_manifest(self, tmp_path: Path) -> None:
        duckdb = pytest.importorskip("duckdb")
        write_manifest(f"{tmp_path}/m.parquet", cohort(["a", "b", "c"], ["H", "L", "H"]))
        query = f"select *, 1 as extra from '{tmp_path}/m.parquet' where attributes['grade'] = 'H'"
        with duckdb.connect() as connection:
            connection.execute(f"copy ({query}) to '{tmp_path}/h.parquet'")
        expected = cohort(["a", "b", "c"], ["H", "L", "H"]).filter(pa.array([True, False, True]))
        assert read_manifest(f"{tmp_path}/h.parquet").equals(expected)

    def test_a_slice_of_a_table_is_written_as_itself(self, tmp_path: Path) -> None:
        table = pa.concat_tables([cohort(["a", "b", "c"]).slice(1, 1), cohort(["a", "b", "c"]).slice(2)])
        write_manifest(f"{tmp_path}/m.parquet", table)
        assert read_manifest(f"{tmp_path}/m.parquet").equals(table)
        assert fingerprint(table) == fingerprint(table.combine_chunks())

    def test_missing_columns_are_named(self, tmp_path: Path) -> None:
        pq.write_table(cohort(["a"]).drop_columns(["sources", "fold"]), tmp_path / "m.parquet")
        with pytest.raises(UsageError, match="sources, fold"):
            read_manifest(f"{tmp_path}/m.parquet")

    @pytest.mark.parametrize(
        ("column", "values", "says"),
        [
            ("scan_id", ["a", "a"], "'a' stands in 2 rows"),
            ("scan_id", ["a", "../../x"], "cannot name a file"),
            ("scan_id", ["a", None], "null in 1 rows"),
            ("has_label", [None, True], "null in 1 rows"),
            ("fold", ["first", "second"], "column 'fold' is string"),
            ("sources", ["x", "y"], "column 'sources' is string"),
            ("sources", [[{"uri": "x"}], []], "column 'sources'"),
            ("sources", [None, None], "sources"),
            ("modalities", [1, 2], "column 'modalities'"),
        ],
    )
    def test_a_wrong_column_is_named(self, tmp_path: Path, column: str, values: list[object], says: str) -> None:
        table = cohort(["p", "q"])
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(values)), tmp_path / "m.parquet")
        with pytest.raises(UsageError, match=says) as caught:
            read_manifest(f"{tmp_path}/m.parquet")
        assert "\n" not in str(caught.value)

    def test_what_is_not_parquet_is_a_usage_error(self, tmp_path: Path) -> None:
        (tmp_path / "m.parquet").write_bytes(b"scan_id\n1\n")
        for name in ("m.parquet", "absent.parquet"):
            with pytest.raises(UsageError, match="not a manifest"):
                read_manifest(f"{tmp_path}/{name}")

    def test_a_fingerprint_sees_ids_uris_sizes_and_tags_and_where_they_stand(self) -> None:
        table = cohort(["a", "b"])
        moved = table.take(pa.array([1, 0]))
        renamed = table.set_column(0, MANIFEST.field(0), pa.array(["s0", "s9"]))
        assert len({fingerprint(t) for t in (table, moved, renamed, table.slice(0, 1))}) == 4
        other_patients = table.set_column(1, MANIFEST.field(1), pa.array(["x", "y"]))
        assert fingerprint(other_patients) == fingerprint(table)


def test_three_real_patients_fall_into_three_folds(data_dir: Path) -> None:
    table, inventory = index_archive(str(data_dir / "brats2013"))
    assert (table.num_rows, pc.count_distinct(table["patient_id"]).as_py(), table["problem"].null_count) == (3, 3, 3)
    assert sorted(table["fold"].to_pylist()) == [0, 1, 2]
    assert len(inventory.ignored) == 6
