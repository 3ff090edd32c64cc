"""Layouts: names become scans, and every file is accounted for."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainseg.errors import Code, UsageError
from brainseg.layouts import (
    FoundScan,
    Inventory,
    Layout,
    brats,
    dicom,
    figshare,
    gap,
    h5slices,
    harmless,
    id_fault,
    lgg,
    pictures,
    sliced,
)
from brainseg.regions import LABEL_MAPS
from brainseg.storage import Entry, list_files

ROOT = "/archive"
LAYOUTS: Sequence[Layout] = (lgg, figshare, brats, h5slices, dicom, pictures)  # type: ignore[assignment]
LGG = "TCGA_CS_4941_19960909"


def entries(names: Iterable[str]) -> list[Entry]:
    return [Entry(f"{ROOT}/{name}", 10, "t") for name in sorted(names)]


def find(layout: Layout, *names: str) -> Inventory:
    return layout.find(entries(names), ROOT)


def only(inventory: Inventory) -> FoundScan:
    (scan,) = inventory.scans
    return scan


def slices(name: str, numbers: Iterable[int], masks: Iterable[int] = ()) -> list[str]:
    return [f"{name}/{name}_{n}.tif" for n in numbers] + [f"{name}/{name}_{n}_mask.tif" for n in masks]


class TestEveryLayout:
    NAMES = st.one_of(
        st.sampled_from(
            ["TCGA_A/TCGA_A_1.tif", "TCGA_A/TCGA_A_1_mask.tif", "TCGA_A/TCGA_A_3.tif", "images/1.png", "masks/1.png"]
        ),
        st.sampled_from(
            ["1.png", "01.png", "2_mask.png", "volume_1_slice_0.h5", "volume_1_slice_2.h5", "._1.png", "LICENSE.txt"]
        ),
        st.sampled_from(
            ["p/flair/1.dcm", "p/FLAIR/IM2", "p/s/t1_ce/1.2.3", "p/dwi/1.dcm", "p/q-seg.nii.gz", "p/t1/DICOMDIR", "t2/1.dcm"]
        ),
        st.sampled_from(
            ["a/x_t1.nii", "a/x_t1.nii.gz", "a/x-T1n.nii", "b/x_seg.nii.gz", "b/_flair.nii", "c/con_t2.nii", ".git/y_t1.nii"]
        ),
        st.text("ab_/.-1é\n", min_size=1, max_size=12).map(lambda s: s.strip("/") or "x").map(lambda s: f"{s}_t1.nii.gz"),
    )

    @settings(max_examples=60, deadline=None)
    @given(st.sets(NAMES, max_size=12), st.sampled_from(LAYOUTS))
    def test_every_file_stands_in_one_scan_or_is_ignored_with_a_reason(self, names: set[str], layout: Layout) -> None:
        listed = entries(names)
        inventory = layout.find(listed, ROOT)
        placed = [source.uri for scan in inventory.scans for source in scan.sources] + [uri for uri, _ in inventory.ignored]
        assert sorted(placed) == sorted(entry.uri for entry in listed)
        assert all(reason for _, reason in inventory.ignored)

    @settings(max_examples=60, deadline=None)
    @given(st.sets(NAMES, max_size=12), st.sampled_from(LAYOUTS))
    def test_ids_are_unique_and_safe_and_problems_are_one_line(self, names: set[str], layout: Layout) -> None:
        scans = layout.find(entries(names), ROOT).scans
        assert len({scan.scan_id for scan in scans}) == len(scans)
        for scan in scans:
            assert id_fault(scan.scan_id) is None
            assert (scan.problem_code is None) == (scan.problem is None)
            assert scan.problem is None or scan.problem.isprintable()
            assert scan.label_map in LABEL_MAPS
            assert scan.problem_code or scan.sources

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_its_own_example_is_recognised_by_it_alone(self, layout: Layout) -> None:
        words = [word.strip(",") for word in layout.EXAMPLE.split()]
        example = entries(word for word in words if "." in word)
        assert layout.matches(example) >= 1
        assert [other.matches(example) for other in LAYOUTS if other is not layout] == [0] * (len(LAYOUTS) - 1)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("problem", [Code.OUTSIDE_ROOT, Code.NOT_A_FILE, Code.BAD_ID, Code.UNREADABLE])
    def test_what_listing_saw_reaches_the_scan(self, layout: Layout, problem: Code) -> None:
        good = next(word.strip(",") for word in layout.EXAMPLE.split() if "." in word)
        scan = only(layout.find([Entry(f"{ROOT}/{good}", 0, "", problem)], ROOT))
        assert scan.problem_code == problem

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_what_systems_leave_behind_is_ignored(self, layout: Layout) -> None:
        stray = ["._a_t1.nii", ".DS_Store", "__MACOSX/1.png", ".git/volume_1_slice_0.h5", "LICENSE.txt", "x.csv"]
        inventory = find(layout, *stray)
        assert inventory.scans == []
        assert len(inventory.ignored) == len(stray)

    def test_a_root_inside_a_hidden_folder_is_like_any_other(self) -> None:
        listed = [Entry("/home/u/.cache/set/images/1.png", 1, "t")]
        assert len(figshare.find(listed, "/home/u/.cache/set").scans) == 1


class TestLgg:
    def test_slices_are_ordered_by_number(self) -> None:
        scan = only(find(lgg, *slices(LGG, range(1, 13), range(1, 13))))
        images = [s for s in scan.sources if s.role == "image"]
        assert [s.uri.rsplit("_", 1)[1] for s in images] == [f"{n}.tif" for n in range(1, 13)]
        assert [s.index for s in images] == list(range(12)) == [s.index for s in scan.sources if s.role == "label"]
        assert (scan.scan_id, scan.patient_id, scan.attributes["site"]) == (LGG, "TCGA_CS_4941", "CS")
        assert (scan.modalities, scan.reader, scan.label_map) == (("t1", "flair", "t1c"), "stack", "binary")
        assert scan.has_label
        assert scan.problem is None

    def test_a_scan_without_any_mask_is_unlabelled_and_well(self) -> None:
        scan = only(find(lgg, *slices(LGG, range(1, 4))))
        assert not scan.has_label
        assert scan.problem is None

    @pytest.mark.parametrize(
        ("numbers", "masks", "code", "says"),
        [
            ([1, 2, 4], [1, 2, 4], Code.MISSING_SLICE, "missing: 3"),
            ([2, 3], [2, 3], Code.MISSING_SLICE, "missing: 1"),
            ([1, 2, 3], [1, 3], Code.MISSING_FILE, "slice 2 has no mask"),
            ([1, 3], [1, 2, 3], Code.MISSING_FILE, "slice 2 has a mask and no image"),
            ([1, 999_999_999], [], Code.MISSING_SLICE, "missing: 2 to 999999998"),
        ],
    )
    def test_a_hole_makes_a_problem_and_keeps_the_row(
        self, numbers: list[int], masks: list[int], code: Code, says: str
    ) -> None:
        scan = only(find(lgg, *slices(LGG, numbers, masks)))
        assert scan.problem_code == code
        assert says in str(scan.problem)
        assert len(scan.sources) == len(numbers) + len(masks)

    def test_two_files_for_one_slice_are_a_problem(self) -> None:
        scan = only(find(lgg, *slices(LGG, [1]), f"{LGG}/{LGG}_01.tif"))
        assert scan.problem_code == Code.DUPLICATE_ID

    def test_a_copy_of_the_archive_inside_it_doubles_every_id(self) -> None:
        inventory = find(lgg, *slices(LGG, [1]), *(f"copy/{name}" for name in slices(LGG, [1])))
        assert [scan.problem_code for scan in inventory.scans] == [Code.DUPLICATE_ID] * 2

    def test_a_slice_of_another_patient_is_not_stacked(self) -> None:
        inventory = find(lgg, *slices(LGG, [1]), f"{LGG}/TCGA_DU_5851_19950428_2.tif")
        assert len(only(inventory).sources) == 1
        assert len(inventory.ignored) == 1

    def test_the_table_gives_what_describes_the_tumour_and_not_the_person(self, tmp_path: Path) -> None:
        (tmp_path / LGG).mkdir()
        (tmp_path / LGG / f"{LGG}_1.tif").write_bytes(b"")
        (tmp_path / "data.csv").write_text(
            "Patient,histological_type,neoplasm_histologic_grade,laterality,gender,age_at_initial_pathologic,race,death01\n"
            "TCGA_CS_4941,1,2,,2,67,3,1\n"
        )
        inventory = lgg.find(list(list_files(str(tmp_path))), str(tmp_path))
        assert only(inventory).attributes == {"site": "CS", "histological_type": "1", "neoplasm_histologic_grade": "2"}
        assert "1 patients" in inventory.ignored[0][1]

    @pytest.mark.parametrize("table", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b"Patient\n" + b"x" * 200_000])
    def test_a_broken_table_costs_only_the_attributes(self, tmp_path: Path, table: bytes) -> None:
        (tmp_path / LGG).mkdir()
        (tmp_path / LGG / f"{LGG}_1.tif").write_bytes(b"")
        (tmp_path / "data.csv").write_bytes(table)
        inventory = lgg.find(list(list_files(str(tmp_path))), str(tmp_path))
        assert only(inventory).attributes == {"site": "CS"}
        assert len(inventory.ignored) == 1


class TestPictures:
    def test_a_picture_is_a_scan_of_the_modality_its_folder_is_named_after(self):
        found = find(pictures, "ann/T1ce/left-3.png", "ann/masks/left-3.png", "ann/flair/b.tiff", "bob/T1ce/b.png")
        assert [(s.scan_id, s.patient_id, s.modalities, s.has_label) for s in found.scans] == [
            ("ann_flair_b", "ann", ("flair",), False),
            ("ann_t1c_left-3", "ann", ("t1c",), True),
            ("bob_t1c_b", "bob", ("t1c",), False),
        ]
        assert found.ignored == []

    def test_masks_lie_beside_the_folder_or_in_it(self):
        found = find(pictures, "p/flair/a.png", "p/flair/a_mask.png", "p/flair/b.png", "p/labels/b_mask.tif")
        assert [(s.scan_id, s.has_label) for s in found.scans] == [("p_flair_a", True), ("p_flair_b", True)]

    def test_without_a_folder_above_nobody_knows_the_patient(self):
        assert only(find(pictures, "flair/a.png")).patient_id is None

    def test_a_mask_without_its_image_and_a_picture_of_who_knows_what_are_named(self):
        found = find(pictures, "flair/a.png", "masks/b.png", "holiday/sea.png")
        assert len(found.scans) == 1
        assert {uri.removeprefix(f"{ROOT}/"): reason for uri, reason in found.ignored} == {
            "masks/b.png": "a mask without an image of its name in a modality's folder",
            "holiday/sea.png": "no part of a scan: expected names like patient-7/flair/slice_05.png with "
            "patient-7/masks/slice_05.png, in folders called flair, t1, t1c, t2",
        }

    def test_two_images_of_one_name_are_a_problem(self):
        assert only(find(pictures, "flair/a.png", "flair/a.tif")).problem_code == Code.DUPLICATE_ID

    def test_numbers_in_a_modality_folder_are_not_figshares(self):
        listed = entries(["t1c/1.png", "masks/1.png", "t1c/2.png", "masks/2.png"])
        assert figshare.matches(listed) == 0
        assert pictures.matches(listed) == 4

    def test_figshares_own_names_are_not_these(self):
        assert pictures.matches(entries(["images/1.png", "masks/1.png", "2.png", "2_mask.png"])) == 0


class TestFigshare:
    @pytest.mark.parametrize("form", ["images/{}.png masks/{}.png", "{}.png {}_mask.png", "set/IMAGES/{}.PNG set/masks/{}.png"])
    def test_images_find_their_masks_in_numeric_order(self, form: str) -> None:
        names = [name for n in (1, 2, 10) for name in form.format(n, n).split()]
        scans = find(figshare, *names).scans
        assert [scan.scan_id for scan in scans] == ["figshare_0001", "figshare_0002", "figshare_0010"]
        assert all([s.role for s in scan.sources] == ["image", "label"] for scan in scans)
        assert all(scan.patient_id is None and scan.fold is None and scan.problem is None for scan in scans)

    def test_an_image_alone_is_unlabelled_and_a_mask_alone_a_problem(self) -> None:
        image, mask = find(figshare, "images/1.png", "masks/2.png").scans
        assert (image.has_label, image.problem) == (False, None)
        assert mask.problem_code == Code.MISSING_FILE

    def test_two_spellings_of_one_number_are_a_problem(self) -> None:
        assert only(find(figshare, "1.png", "001.png")).problem_code == Code.DUPLICATE_ID

    def test_folders_of_the_same_numbers_stay_apart(self) -> None:
        scans = find(figshare, "train/images/1.png", "test/images/1.png").scans
        assert [scan.scan_id for scan in scans] == ["test_figshare_0001", "train_figshare_0001"]
        assert [scan.problem for scan in scans] == [None, None]

    def archive(self, folder: Path, table: str) -> Inventory:
        for n in (1, 2, 3):
            (folder / f"{n}.png").write_bytes(b"")
        (folder / "folds.csv").write_text(table)
        return figshare.find(list(list_files(str(folder))), str(folder))

    def test_the_authors_folds_count_from_zero_and_are_remembered_as_given(self, tmp_path: Path) -> None:
        scans = self.archive(tmp_path, "image,tumor_type,fold\n1,glioma,3\n2.png,meningioma,1\n").scans
        assert [scan.fold for scan in scans] == [2, 0, None]
        assert scans[0].attributes == {"tumor_type": "glioma", "authors_fold": "3"}
        assert scans[0].patient_id is None

    @pytest.mark.parametrize("column", ["patient", "patient_id", "PID"])
    def test_a_table_says_whose_an_image_is(self, tmp_path: Path, column: str) -> None:
        scans = self.archive(tmp_path, f"image,{column},age,sex\nimages/1.png,P7,60,F\n2,P7,60,F\n").scans
        assert [scan.patient_id for scan in scans] == ["P7", "P7", None]
        assert scans[0].attributes == {}

    def test_a_fold_that_is_no_number_is_a_usage_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="expected a whole number"):
            self.archive(tmp_path, "image,fold\n1,train\n")

    @pytest.mark.parametrize("table", ["", "a,b\n1,2\n", "image,fold\n1\n", "image\n\n,,,\n", 'image\n"1', "fold,image\n1\n"])
    def test_a_ragged_table_is_no_crash(self, tmp_path: Path, table: str) -> None:
        assert len(self.archive(tmp_path, table).scans) == 3


class TestBrats:
    @pytest.mark.parametrize(
        ("words", "ending"),
        [
            ("_flair _t1 _t1ce _t2 _seg", ".nii.gz"),
            ("_flair _t1 _t1ce _t2 _seg", ".nii"),
            ("-t2f -t1n -t1c -t2w -seg", ".nii.gz"),
            ("_t2f _t1n _t1c _t2w _seg", ".nii.gz"),
            ("-flair -t1 -T1Gd -t2W -seg", ".NII.GZ"),
            ("_FLAIR _T1 _T1GD _T2 _SEG", ".nii"),
        ],
    )
    @pytest.mark.parametrize("folder", ["case7/", ""])
    def test_every_spelling_means_the_same(self, words: str, ending: str, folder: str) -> None:
        scan = only(find(brats, *(f"{folder}case7{word}{ending}" for word in words.split())))
        assert scan.scan_id == scan.patient_id == "case7"
        assert scan.modalities == ("flair", "t1", "t1c", "t2")
        assert [s.modality for s in scan.sources] == ["flair", "t1", "t1c", "t2", None]
        assert [s.role for s in scan.sources] == ["image"] * 4 + ["label"]
        assert scan.problem is None

    @pytest.mark.parametrize(
        ("case", "patient", "dataset", "label_map"),
        [
            ("BraTS20_Training_001", "BraTS20_Training_001", "brats2020", "brats2020"),
            ("BraTS2021_00000", "BraTS2021_00000", "brats2021", "brats2020"),
            ("Brats18_CBICA_AAB_1", "Brats18_CBICA_AAB", "brats2018", "brats2020"),
            ("BraTS-GLI-00000-001", "BraTS-GLI-00000", "brats2023", "brats2023"),
            ("BraTS-MET-00002-000", "BraTS-MET-00002", "brats2023", "brats2023"),
            ("BraTS-GLI-02063-100", "BraTS-GLI-02063", "brats2024", "brats2024"),
            ("TCGA-DU-7294", "TCGA-DU-7294", "brats", "brats2020"),
        ],
    )
    def test_the_case_name_tells_patient_release_and_label_map(
        self, case: str, patient: str, dataset: str, label_map: str
    ) -> None:
        scan = only(find(brats, f"{case}/{case}_flair.nii.gz"))
        assert (scan.scan_id, scan.patient_id, scan.dataset, scan.label_map) == (case, patient, dataset, label_map)

    def test_the_spelling_of_2023_tells_the_label_map_of_an_unknown_case(self) -> None:
        assert only(find(brats, "x/x-t2f.nii.gz", "x/x-seg.nii.gz")).label_map == "brats2023"

    def test_brats_2013_as_deepmedic_ships_it(self) -> None:
        case = "set/brats_2013_pat0003_1"
        files = ["Flair_subtrMeanDivStd", "T1c_subtrMeanDivStd", "OTMultiClass", "brainmask"]
        inventory = find(brats, *(f"{case}/{name}.nii.gz" for name in files), f"{case}/License_CC.txt")
        scan = only(inventory)
        assert (scan.scan_id, scan.patient_id) == ("brats_2013_pat0003_1", "brats_2013_pat0003")
        assert (scan.modalities, scan.label_map, scan.has_label) == (("flair", "t1c"), "brats2013", True)
        assert [reason.split(":")[0] for _, reason in inventory.ignored] == ["no part of a scan", "a brain mask"]

    def test_flat_cases_with_words_around_the_modality(self) -> None:
        flat = find(brats, "A-1_hdbet_native_fla.nii.gz", "A-1_hdbet_native_t1c.nii.gz", "B-2_t2_with-skull.nii.gz").scans
        assert [(scan.scan_id, scan.modalities) for scan in flat] == [("A-1", ("flair", "t1c")), ("B-2", ("t2",))]

    def test_a_missing_modality_is_the_models_business(self) -> None:
        one, two = find(brats, "a/a_t1.nii", "a/a_t2.nii", "b/b_t1.nii").scans
        assert (one.problem, two.problem) == (None, None)
        assert two.modalities == ("t1",)

    @pytest.mark.parametrize("second", ["a/a_t1.nii.gz", "a/a-t1n.nii", "a/a_T1.nii"])
    def test_two_files_for_one_modality_are_a_problem(self, second: str) -> None:
        scan = only(find(brats, "a/a_t1.nii", second))
        assert scan.problem_code == Code.DUPLICATE_ID
        assert len(scan.sources) == 2

    def test_a_label_alone_is_a_problem(self) -> None:
        assert only(find(brats, "a/a_seg.nii.gz")).problem_code == Code.MISSING_MODALITY

    def test_the_one_misnamed_label_of_brats_2020_finds_its_case(self) -> None:
        case = "BraTS20_Training_355"
        scan = only(find(brats, f"{case}/{case}_flair.nii", f"{case}/W39_1998.09.19_Segm.nii"))
        assert (scan.scan_id, scan.has_label, scan.problem) == (case, True, None)

    def test_files_of_one_case_in_two_folders_are_not_mixed(self) -> None:
        scans = find(brats, "site1/x_t1.nii", "site2/x_t2.nii").scans
        assert [scan.problem_code for scan in scans] == [Code.DUPLICATE_ID] * 2

    def test_the_grade_is_the_folder_above(self) -> None:
        assert only(find(brats, "HGG/Brats18_2013_2_1/Brats18_2013_2_1_t1.nii")).attributes == {"grade": "HGG"}


class TestH5Slices:
    def test_slices_become_volumes_in_numeric_order(self) -> None:
        names = [f"data/volume_{v}_slice_{s}.h5" for v in (10, 2) for s in range(11)]
        two, ten = find(h5slices, *names).scans
        assert (two.scan_id, ten.patient_id) == ("volume_2", "volume_10")
        assert [s.uri.split("_")[-1] for s in ten.sources] == [f"{n}.h5" for n in range(11)]
        assert {s.role for s in ten.sources} == {"both"}
        assert ten.has_label
        assert (ten.dataset, ten.label_map, ten.reader) == ("brats2020-h5", "brats2020", "h5slices")

    @pytest.mark.parametrize(("present", "missing"), [([0, 1, 3], "2"), ([1, 2], "0"), ([5], "0 to 4")])
    def test_a_hole_is_a_problem(self, present: list[int], missing: str) -> None:
        scan = only(find(h5slices, *(f"volume_1_slice_{n}.h5" for n in present)))
        assert scan.problem_code == Code.MISSING_SLICE
        assert f"missing: {missing}" in str(scan.problem)


class TestSliced:
    def test_every_slice_keeps_patient_label_and_attributes_and_gets_an_id_of_its_own(self) -> None:
        whole = find(lgg, *slices(LGG, range(1, 12), range(1, 12)))
        parts = sliced(whole).scans
        assert [part.scan_id for part in parts] == [f"{LGG}_{n:03d}" for n in range(11)]
        assert {(p.patient_id, p.has_label, p.attributes["site"], p.problem) for p in parts} == {
            ("TCGA_CS_4941", True, "CS", None)
        }
        assert [[s.role for s in part.sources] for part in parts] == [["image", "label"]] * 11
        assert {s.index for part in parts for s in part.sources} == {0}
        files = [s.uri for part in parts for s in part.sources]
        assert files == [s.uri for scan in whole.scans for s in scan.sources]

    def test_single_images_and_scans_with_a_problem_stay_whole(self) -> None:
        images = find(figshare, "images/1.png", "masks/1.png", "images/2.png")
        assert sliced(images).scans == images.scans
        holed = find(lgg, *slices(LGG, [1, 3]))
        assert sliced(holed).scans == holed.scans

    def test_ids_stay_unique_and_short_enough(self) -> None:
        long = "TCGA_" + "x" * 193
        inventory = sliced(find(lgg, *slices(long, [1, 2])))
        assert [scan.problem_code for scan in inventory.scans] == [Code.BAD_ID] * 2
        assert len({scan.scan_id for scan in inventory.scans}) == 2

    def test_hdf5_slices_are_slices_and_volumes_are_not(self) -> None:
        parts = sliced(find(h5slices, *(f"volume_1_slice_{n}.h5" for n in range(3)))).scans
        assert [(p.scan_id, p.patient_id, p.has_label) for p in parts] == [
            (f"volume_1_{n:03d}", "volume_1", True) for n in range(3)
        ]
        with pytest.raises(UsageError, match="1 scans are stored as volumes, such as 'x'"):
            sliced(find(brats, "x_t1.nii"))


class TestIds:
    @pytest.mark.parametrize(
        "name",
        [
            "../x",
            "/etc/x",
            "..",
            ".",
            "",
            " ",
            "a b",
            "CON",
            "con.x",
            "lpt1",
            "x" * 201,
            "脳" * 70,
            "a\\b",
            "%2e",
            "a\nb",
            "part=1/x",
            *("~root", "_hidden", ".hidden", "-x", "x.", "a\u202eb", "a\0b", "\ud800"),
        ],
    )
    def test_an_id_that_could_do_harm_as_a_file_name_is_refused(self, name: str) -> None:
        assert id_fault(name)

    @pytest.mark.parametrize(
        "name", ["BraTS-GLI-00000-000", "Zoë-脳腫瘍-ñ", "x" * 200, "W39_1998.09.19", "cas-e\u0301", "CONTROL"]
    )
    def test_an_ordinary_id_is_welcome(self, name: str) -> None:
        assert id_fault(name) is None

    def test_a_bad_id_is_replaced_by_a_stable_safe_one(self) -> None:
        first, again = (only(find(brats, "a b_t1.nii")) for _ in range(2))
        assert first.problem_code == Code.BAD_ID
        assert first.scan_id == again.scan_id
        assert first.patient_id is None
        assert "'a b'" in str(first.problem)

    def test_two_spellings_of_the_same_letters_collide(self) -> None:
        inventory = find(brats, "cas-\u00e9/cas-\u00e9_t1.nii", "cas-e\u0301/cas-e\u0301_t1.nii")
        assert [scan.problem_code for scan in inventory.scans] == [Code.DUPLICATE_ID] * 2
        assert len({scan.patient_id for scan in inventory.scans}) == 1

    def test_ids_that_differ_by_case_are_kept_with_a_warning(self) -> None:
        inventory = find(brats, "Case-X/Case-X_t1.nii", "case-x/case-x_t1.nii")
        assert [scan.problem for scan in inventory.scans] == [None, None]
        assert len(inventory.warnings) == 2

    def test_columns_about_the_person_are_left_out(self) -> None:
        row = {
            "tumor_type": " a\n b ",
            "Age": "1",
            "patient_name": "x",
            "death01": "1",
            "date_of_scan": "x",
            "stage": "2",
            "e": "",
        }
        assert harmless(row) == {"tumor_type": "a b", "stage": "2"}


class TestDicom:
    def test_slices_of_a_session_are_ordered_by_name_under_the_modality_of_their_folder(self) -> None:
        files = [f"p/day1/{folder}/IM{n}.dcm" for folder in ("T1 post", "FLAIR", "t2_flair2") for n in (10, 9, 1)]
        inventory = find(dicom, *files, "p/day1/p-seg.nii.gz")
        scan = only(inventory)
        assert (scan.scan_id, scan.patient_id, scan.modalities, scan.reader) == ("p_day1", "p", ("flair", "t1c"), "dicom")
        assert [(s.modality, s.index, s.uri.rsplit("/", 1)[1]) for s in scan.sources] == [
            *(("flair", i, f"IM{n}.dcm") for i, n in enumerate((1, 9, 10))),
            *(("t1c", i, f"IM{n}.dcm") for i, n in enumerate((1, 9, 10))),
            (None, None, "p-seg.nii.gz"),
        ]
        assert scan.has_label
        assert len(inventory.ignored) == 3
        assert all("'t2_flair2' names no modality" in reason for _, reason in inventory.ignored)

    @pytest.mark.parametrize("name", ["1.dcm", "1.DCM", "x.ima", "IM0001", "1.2.840.113619.2.5", "z.dicom"])
    def test_slices_are_known_by_ending_or_by_having_none(self, name: str) -> None:
        assert len(only(find(dicom, f"p/t2/{name}")).sources) == 1

    @pytest.mark.parametrize("name", ["DICOMDIR", "notes.txt", "1.nii.gz", "1.json"])
    def test_what_is_no_slice_is_left_aside(self, name: str) -> None:
        assert [uri for uri, _ in find(dicom, f"p/t2/{name}").ignored] == [f"{ROOT}/p/t2/{name}"]

    def test_two_sessions_are_two_scans_of_one_patient(self) -> None:
        scans = find(dicom, "p/a/t1/1.dcm", "p/b/t1/1.dcm").scans
        assert [(s.scan_id, s.patient_id) for s in scans] == [("p_a", "p"), ("p_b", "p")]

    def test_the_archive_itself_may_be_the_patient(self) -> None:
        scan = only(find(dicom, "t1/1.dcm"))
        assert (scan.scan_id, scan.patient_id) == ("archive", "archive")

    def test_who_the_patient_is_must_not_be_guessed(self) -> None:
        ((uri, reason),) = find(dicom, "site/p/s/t1/1.dcm").ignored
        assert uri.endswith("1.dcm")
        assert "too deep" in reason

    def test_two_folders_of_one_modality_are_a_problem(self) -> None:
        scan = only(find(dicom, "p/t1c/1.dcm", "p/T1_GD/1.dcm"))
        assert scan.problem_code == Code.DUPLICATE_ID
        assert "'T1_GD' and 't1c' both claim to be t1c" in str(scan.problem)

    def test_two_labels_are_a_problem(self) -> None:
        scan = only(find(dicom, "p/t1c/1.dcm", "p/a-seg.nii.gz", "p/b_seg.nii"))
        assert scan.problem_code == Code.DUPLICATE_ID

    def test_a_label_without_images_is_left_aside(self) -> None:
        assert [reason for _, reason in find(dicom, "p/a-seg.nii.gz").ignored] == [
            "a label without a modality folder beside it"
        ]


@settings(max_examples=100)
@given(st.sets(st.integers(0, 60), min_size=1), st.sampled_from([0, 1]))
def test_a_gap_is_said_exactly_when_a_number_lacks(numbers: set[int], first: int) -> None:
    whole = set(range(min(first, *numbers) if first else 0, max(numbers) + 1))
    assert (gap(sorted(numbers), first) is None) == (numbers == whole)


class TestRealArchives:
    def test_lgg(self, data_dir: Path) -> None:
        packed = sorted((data_dir / "lgg").glob("*.tar"))[:3]
        names = []
        for path in packed:
            with tarfile.open(path) as tar:
                names += [f"{path.stem}/{Path(name).stem}.tif" for name in tar.getnames()]
        scans = find(lgg, *names).scans
        assert [scan.scan_id for scan in scans] == [path.stem for path in packed]
        assert all(scan.has_label and scan.problem is None for scan in scans)

    def test_brats_2013_and_the_anisotropic_cases(self, data_dir: Path) -> None:
        old, flat = (
            brats.find(list(list_files(str(data_dir / name))), str(data_dir / name)).scans
            for name in ("brats2013", "anisotropic")
        )
        assert Counter((s.modalities, s.label_map, s.has_label, s.problem) for s in old) == {
            (("flair", "t1c"), "brats2013", True, None): 3
        }
        assert [(s.scan_id, s.modalities, s.has_label) for s in flat] == [
            ("TCGA-DU-7294", ("flair", "t1", "t1c", "t2"), False),
            ("TCGA-FG-6692", ("flair", "t2"), False),
        ]
