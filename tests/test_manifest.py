"""Manifest: an archive becomes one table, patients are never divided, and what is no manifest is refused."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tifffile
from factory import cohort

from brainseg.audit import audit_folds
from brainseg.cli import main
from brainseg.contents import with_contents
from brainseg.errors import ConfigError, LeakageError, PreflightError, UsageError
from brainseg.folds import FoldPlan, assign_folds
from brainseg.manifest import (
    AUDIT_KEY,
    fingerprint,
    index_archive,
    read_manifest,
    recorded_audit,
    take_stock,
    write_manifest,
)
from brainseg.runs import content_tag
from brainseg.tables import MANIFEST

Run = Callable[..., dict[str, Any]]


def tiff(plane: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, plane)
    return file.getvalue()


def archive(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return str(folder)


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
            index_archive(str(archive(tmp_path, "1.png")), layout="nrrd")

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

        assert index_archive(root, FoldPlan(accept_leakage=True))[0]["fold"].to_pylist() == [0, 1, 1]

    def test_folds_stay_unknown_where_patients_are(self, tmp_path: Path) -> None:
        stock = take_stock(archive(tmp_path, "1.png", "2.png", "3.png"), FoldPlan())
        assert stock.manifest["fold"].null_count == 3
        assert "nobody says whose" in stock.folds

    def test_every_slice_can_be_a_scan_of_its_own(self, tmp_path: Path) -> None:
        name = "TCGA_CS_4941_19960909"
        root = archive(tmp_path, *(f"{name}/{name}_{n}{m}.tif" for n in (1, 2, 10, 3, 4, 5, 6, 7, 8, 9) for m in ("", "_mask")))
        rows = index_archive(root, unit="slice")[0].to_pylist()
        assert [row["scan_id"] for row in rows] == [f"{name}_{n:03d}" for n in range(10)]
        assert rows[9]["sources"][0]["uri"].endswith("_10.tif")
        assert {(row["patient_id"], row["has_label"], row["fold"], len(row["sources"])) for row in rows} == {
            ("TCGA_CS_4941", True, 0, 2)
        }
        with pytest.raises(UsageError, match=r"1 scans are stored as volumes, such as 'a'"):
            index_archive(archive(tmp_path / "volumes", "a_t1.nii"), unit="slice")


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

    def test_the_audit_of_the_folds_travels_in_the_file_and_changes_nothing_else(self, tmp_path: Path) -> None:
        table = assign_folds(cohort(["a", "b", "c"]))
        audit = audit_folds(table, contents_compared=False)
        write_manifest(f"{tmp_path}/m.parquet", table, audit)
        assert recorded_audit(f"{tmp_path}/m.parquet") == audit
        assert read_manifest(f"{tmp_path}/m.parquet").schema.equals(MANIFEST, check_metadata=True)
        write_manifest(f"{tmp_path}/bare.parquet", read_manifest(f"{tmp_path}/m.parquet"))
        assert recorded_audit(f"{tmp_path}/bare.parquet") is None

    @pytest.mark.parametrize("noted", [b"", b"no json", b"[1]", b'{"of": 1}', b'{"of": "", "audit": {}}'])
    def test_an_audit_that_cannot_be_read_is_none(self, tmp_path: Path, noted: bytes) -> None:
        table = cohort(["a"])
        pq.write_table(table.replace_schema_metadata({AUDIT_KEY: noted}), tmp_path / "m.parquet")
        assert recorded_audit(f"{tmp_path}/m.parquet") is None

    def test_an_audit_of_other_folds_or_scans_is_none(self, tmp_path: Path) -> None:
        table = assign_folds(cohort(["a", "b", "c"]))
        write_manifest(f"{tmp_path}/m.parquet", table, audit_folds(table, contents_compared=True))
        whole = pq.read_table(tmp_path / "m.parquet")
        assert json.loads(whole.schema.metadata[AUDIT_KEY])["audit"]["verdict"] == "clean"
        pq.write_table(whole.slice(1), tmp_path / "fewer.parquet")
        assert recorded_audit(f"{tmp_path}/fewer.parquet") is None
        moved = whole.set_column(whole.schema.get_field_index("fold"), MANIFEST.field("fold"), pa.array([0, 0, 0], pa.int32()))
        pq.write_table(moved, tmp_path / "moved.parquet")
        assert recorded_audit(f"{tmp_path}/moved.parquet") is None
        with pytest.raises(UsageError, match="not a manifest"):
            recorded_audit(f"{tmp_path}/absent.parquet")

    def test_a_manifest_of_an_earlier_version_without_hashes_is_read(self, tmp_path: Path) -> None:
        rows = cohort(["a", "b"]).to_pylist()
        for row in rows:
            for source in row["sources"]:
                del source["sha256"]
        known = [f for f in MANIFEST.field("sources").type.value_type if f.name != "sha256"]
        kind = pa.list_(pa.struct(known))
        older = pa.schema([f.with_type(kind) if f.name == "sources" else f for f in MANIFEST])
        pq.write_table(pa.Table.from_pylist(rows, schema=older), tmp_path / "m.parquet")
        assert read_manifest(f"{tmp_path}/m.parquet").equals(cohort(["a", "b"]))

    def test_hashes_change_neither_fingerprint_nor_content_tags(self, tmp_path: Path) -> None:
        root = archive(tmp_path, "a/a_t1.nii", "b/b_t1.nii", "c/c_t1.nii")
        table = index_archive(root)[0]
        hashed = with_contents(table)
        assert not hashed.equals(table)
        assert fingerprint(hashed) == fingerprint(table)
        assert [content_tag(r) for r in hashed.to_pylist()] == [content_tag(r) for r in table.to_pylist()]

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


class TestCommand:
    """`brainseg index` from its words to the file: two patients of eight slices; the second is blank, the third the same."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
        monkeypatch.chdir(tmp_path)
        for n, name in enumerate(("TCGA_CS_4941_19960909", "TCGA_DU_5851_19950428")):
            (tmp_path / "archive" / name).mkdir(parents=True)
            for number in range(1, 9):
                plane = np.zeros((8, 8), np.uint8)
                if number != 2:
                    plane[number - 1, 3 if number == 3 else n] = 200
                (tmp_path / "archive" / name / f"{name}_{number}.tif").write_bytes(tiff(plane))

        def call(*words: str) -> dict[str, Any]:
            line = ["brainseg", "index", "archive", "--out", "m.parquet", "--json", "--folds", "2", *words]
            monkeypatch.setattr(sys, "argv", line)
            with pytest.raises(SystemExit) as ended:
                main()
            out, err = capsys.readouterr()
            return {"code": ended.value.code, "err": err, **json.loads(out or "{}")}

        return call

    def test_it_says_how_folds_came_about_and_records_what_leaks(self, run: Run) -> None:
        said = run()
        assert (said["folds"], said["stratified_by"]) == ("2 by patient, not stratified", None)
        audit = recorded_audit("m.parquet")
        assert audit is not None
        assert said["audit"] == audit.to_json()

    def test_what_is_blank_or_once_there_has_no_hash_and_no_hash_means_not_compared(self, run: Run) -> None:
        assert run("--unit", "slice")["audit"]["contents_compared"]
        hashed = {r["scan_id"][-3:]: r["sources"][0]["sha256"] for r in read_manifest("m.parquet").to_pylist()}
        assert hashed["001"] is None
        assert run("--no-hash")["audit"]["reason"] == "contents were not compared"

    def test_identical_slices_of_two_patients_are_found_across_folds(self, run: Run) -> None:
        audit = run("--unit", "slice")["audit"]
        assert (audit["verdict"], audit["identical"], audit["identical_across"], audit["identical_patients"]) == (
            "leaks",
            1,
            1,
            1,
        )
        assert audit["identical_examples"] == ["TCGA_CS_4941_19960909_002 and TCGA_DU_5851_19950428_002"]

    def test_a_random_slice_split_needs_to_be_asked_for_twice_and_is_told(self, run: Run) -> None:
        refused = run("--unit", "slice", "--folds-by", "scan")
        assert (refused["code"], Path("m.parquet").exists()) == (2, False)
        assert "Pass --accept-leakage" in refused["err"]
        told = run("--unit", "slice", "--folds-by", "scan", "--accept-leakage")
        assert told["folds"] == "2 by scan, not stratified"
        assert told["audit"]["shared_patients"] == 2

    def test_folds_and_attribute_of_ones_own(self, run: Run) -> None:
        Path("folds.csv").write_text("patient,fold\nTCGA_CS_4941,1\nTCGA_DU_5851,0\n")
        assert run("--folds-from", "folds.csv")["folds"] == "as folds.csv says"
        assert read_manifest("m.parquet")["fold"].to_pylist() == [1, 0]
        assert run("--stratify", "site")["stratified_by"] == "site"
        assert "there are: site" in run("--stratify", "colour")["err"]


def test_three_real_patients_fall_into_three_folds(data_dir: Path) -> None:
    table, inventory = index_archive(str(data_dir / "brats2013"))
    assert (table.num_rows, pc.count_distinct(table["patient_id"]).as_py(), table["problem"].null_count) == (3, 3, 3)
    assert sorted(table["fold"].to_pylist()) == [0, 1, 2]
    assert len(inventory.ignored) == 6
