"""Phantom heads are what the demo trains on: repeatable, learnable but not by a threshold, laid out as published."""

import csv
import gzip
import io
import re
from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from brainseg.errors import UsageError
from brainseg.manifest import index_archive
from brainseg.phantom import LAYOUTS, MODALITIES, Head, make_head, write_archive
from brainseg.phantom.breakage import BREAKAGES
from brainseg.phantom.fields import ellipsoid, field_at, field_on, tube

SMALL = (10, 48, 48)


@pytest.fixture(scope="module")
def heads() -> list[Head]:
    return [make_head(seed) for seed in range(12)]


def volume_ml(head: Head) -> float:
    return float((head.label > 0).sum() * np.prod(head.spacing_mm) / 1000)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def as_grid(axes: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"))


class TestFields:
    axes = tuple(np.linspace(-40, 50, n, dtype=np.float32) for n in (9, 30, 31))

    def test_a_field_sampled_along_axes_is_close_to_the_same_field_sampled_at_points(self):
        along = field_on(np.random.default_rng(3), self.axes, 20)
        at = field_at(np.random.default_rng(3), as_grid(self.axes), 20)
        assert along.shape == at.shape == (9, 30, 31)
        assert np.corrcoef(along.ravel(), at.ravel())[0, 1] > 0.99

    def test_a_field_has_mean_0_and_deviation_1_whatever_its_scale(self):
        for scale in (6, 11, 20):
            field = field_on(np.random.default_rng(scale), [np.linspace(-60, 60, 64, dtype=np.float32)] * 3, scale)
            assert field.mean() == pytest.approx(0, abs=0.15)
            assert field.std() == pytest.approx(1, abs=0.2)

    def test_the_distance_to_a_ball_is_exact_and_positive_inside(self):
        points = as_grid(self.axes)
        exact = 17 - np.sqrt(((points - np.array((3, -4, 5)).reshape(3, 1, 1, 1)) ** 2).sum(axis=0))
        np.testing.assert_allclose(ellipsoid(points, (3, -4, 5), (17, 17, 17)), exact, atol=0.05)
        np.testing.assert_allclose(tube(points, (3, -4, 5), (3, -4, 5.001), (17, 17)), exact, atol=0.05)


class TestHead:
    def test_a_head_is_int16_modalities_and_a_label_on_one_grid(self, heads):
        for head in heads:
            assert head.image.shape == (len(MODALITIES), 16, 96, 96)
            assert (head.image.dtype, head.label.dtype) == (np.int16, np.uint8)
            assert head.label.shape == head.image.shape[1:]
            assert set(np.unique(head.label)) <= {0, 1, 2, 4}
            assert head.image.min() >= 0

    def test_slices_are_thicker_than_pixels_are_wide(self, heads):
        for head in heads:
            depth, row, column = head.spacing_mm
            assert row == column
            assert depth > 2 * row

    def test_the_same_seed_gives_the_same_head(self, heads):
        again = make_head(7)
        np.testing.assert_array_equal(again.image, heads[7].image)
        np.testing.assert_array_equal(again.label, heads[7].label)
        assert again.spacing_mm == heads[7].spacing_mm

    def test_another_seed_gives_another_head(self, heads):
        assert len({head.image.tobytes() for head in heads}) == len(heads)

    def test_another_shape_shows_the_same_tumour(self, heads):
        for seed in (2, 8):
            finer = make_head(seed, (20, 110, 110))
            assert finer.tumour == heads[seed].tumour
            assert volume_ml(finer) == pytest.approx(volume_ml(heads[seed]), rel=0.25)

    def test_tumours_run_from_none_over_tiny_to_large(self, heads):
        volumes = [volume_ml(head) for head in heads] + [volume_ml(make_head(0, tumour="none"))]
        assert min(volumes) == 0
        assert min(v for v in volumes if v) < 5
        assert max(volumes) > 60

    def test_every_kind_of_tumour_occurs_and_healthy_heads_too(self):
        kinds = [make_head(seed, (8, 24, 24)).tumour for seed in range(60)]
        assert {"rim", "diffuse", "solid", "none"} == set(kinds)
        assert kinds.count("none") < 15

    def test_the_kind_asked_for_is_the_kind_given(self):
        solid, diffuse = make_head(4, tumour="solid"), make_head(6, tumour="diffuse")
        assert 4 in solid.label
        assert 4 not in diffuse.label
        assert not make_head(4, tumour="none").label.any()

    def test_tumours_differ_from_the_brain_as_their_contrast_says(self):
        for seed in (2, 20, 22):
            head = make_head(seed, tumour="rim", skull=False)
            flair, t1, t1c, _ = head.image
            brain = (head.label == 0) & (flair > 0)
            assert flair[head.label == 2].mean() > flair[brain].mean()
            assert t1[head.label == 1].mean() < t1[brain].mean()
            assert t1c[head.label == 4].mean() > t1c[head.label == 1].mean()

    def test_no_threshold_on_flair_segments_them_even_when_the_best_is_chosen_for_each(self, heads):
        stripped = [make_head(seed, skull=False) for seed in range(6)]
        for group in (heads, stripped):
            scores = [self._best_threshold(head) for head in group if head.label.any()]
            assert np.mean(scores) < 0.6

    @staticmethod
    def _best_threshold(head: Head) -> float:
        levels = np.percentile(head.image[0], np.linspace(60, 99.9, 25))
        return max(dice(head.label > 0, head.image[0] > level) for level in levels)

    def test_stripping_the_skull_leaves_the_brain_as_it_was(self, heads):
        stripped = make_head(2, skull=False)
        kept = stripped.image.any(axis=0)
        np.testing.assert_array_equal(stripped.image[:, kept], heads[2].image[:, kept])
        assert 0.1 < kept.mean() < 0.4
        assert not stripped.label[~kept].any()

    def test_left_and_right_are_nearly_alike(self):
        head = make_head(11, tumour="none", skull=False)
        plane = head.image[3, 8].astype(float)
        shifts = [np.corrcoef(plane.ravel(), np.roll(plane[:, ::-1], s, axis=1).ravel())[0, 1] for s in range(-5, 6)]
        assert 0.6 < max(shifts) < 0.99


class TestLayouts:
    def test_lgg_is_a_folder_a_patient_of_colour_slices_and_binary_masks(self, tmp_path):
        write_archive(tmp_path, "lgg", scans=2, shape=SMALL)
        folder = tmp_path / "TCGA_PH_0001_20000202"
        assert len(list(folder.glob("*_mask.tif"))) == SMALL[0]
        for number in range(1, SMALL[0] + 1):
            image = picture(folder / f"{folder.name}_{number}.tif")
            mask = picture(folder / f"{folder.name}_{number}_mask.tif")
            assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((48, 48, 3), np.uint8, (48, 48), np.uint8)
            assert set(np.unique(mask)) <= {0, 255}
        rows = list(csv.DictReader(io.StringIO((tmp_path / "data.csv").read_text())))
        assert [row["Patient"] for row in rows] == ["TCGA_PH_0001", "TCGA_PH_0002"]
        assert {"histological_type", "neoplasm_histologic_grade"} < set(rows[0])

    def test_in_lgg_flair_stands_in_for_a_missing_contrast_scan_now_and_then(self, tmp_path):
        write_archive(tmp_path, "lgg", scans=11, shape=(4, 32, 32))
        middle = [picture(path) for path in sorted(tmp_path.glob("*/*_2.tif"))]
        assert [bool((image[..., 1] == image[..., 2]).all()) for image in middle] == [False] * 10 + [True]

    def test_figshare_is_numbered_grey_slices_that_all_show_a_tumour(self, tmp_path):
        write_archive(tmp_path, "figshare", scans=7, shape=SMALL)
        for number in range(1, 8):
            image, mask = (picture(tmp_path / kind / f"{number}.png") for kind in ("images", "masks"))
            assert (image.shape, image.dtype) == ((48, 48), np.uint8)
            assert set(np.unique(mask)) == {0, 255}
        rows = list(csv.DictReader(io.StringIO((tmp_path / "folds.csv").read_text())))
        assert [row["image"] for row in rows] == [str(n) for n in range(1, 8)]
        assert {row["tumor_type"] for row in rows} <= {"glioma", "meningioma"}
        assert {int(row["fold"]) for row in rows} <= {1, 2, 3, 4, 5}

    def test_brats_is_five_int16_volumes_placed_as_the_challenge_places_them(self, tmp_path):
        write_archive(tmp_path, "brats", scans=1, shape=SMALL)
        folder = tmp_path / "BraTS20_Training_001"
        assert {p.name for p in folder.iterdir()} == {f"{folder.name}_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2", "seg")}
        for path in sorted(folder.iterdir()):
            image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
            assert (image.shape, image.get_data_dtype()) == ((48, 48, 10), np.int16)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            assert image.affine[1, 3] == pytest.approx(47 * image.header.get_zooms()[1], rel=1e-5)
            assert not path.name.endswith("_seg.nii.gz") or set(np.unique(image.dataobj)) <= {0, 1, 2, 4}

    def test_h5slices_hold_the_same_scans_as_brats_with_rows_along_the_first_axis(self, tmp_path):
        for layout in ("brats", "h5slices"):
            write_archive(tmp_path / layout, layout, scans=1, shape=(6, 32, 40), seed=5)
        folder = tmp_path / "brats" / "BraTS20_Training_001"
        names = [f"{folder.name}_{m}.nii.gz" for m in ("flair", "t1", "t1ce", "t2", "seg")]
        volumes = [np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress((folder / n).read_bytes())).dataobj) for n in names]
        for index in range(6):
            with h5py.File(tmp_path / "h5slices" / "data" / f"volume_1_slice_{index}.h5") as file:
                image, mask = file["image"][()], file["mask"][()]
                assert file["image"].compression == "gzip"
            assert (image.dtype, mask.dtype, image.shape, mask.shape) == (np.float64, np.uint8, (40, 32, 4), (40, 32, 3))
            for channel, volume in enumerate(volumes[:4]):
                expected = (volume[:, :, index] - volume.mean()) / volume.std()
                np.testing.assert_allclose(image[..., channel], expected, atol=1e-9)
            np.testing.assert_array_equal(mask, np.stack([volumes[4][:, :, index] == v for v in (1, 2, 4)], axis=-1))
            assert -0.75 < image[0, 0, 0] < -0.4

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_index_finds_every_scan_of_a_whole_archive(self, tmp_path, layout):
        write_archive(tmp_path, layout, scans=5, shape=SMALL)
        table, _ = index_archive(str(tmp_path))
        assert table.num_rows == 5
        assert set(table["layout"].to_pylist()) == {layout}
        assert table["problem"].null_count == 5
        assert all(table["has_label"].to_pylist())


class TestBrokenScans:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_breaking_changes_one_file_of_each_named_scan_and_nothing_else(self, tmp_path, layout):
        kinds = BREAKAGES[layout]
        whole, spoilt = tmp_path / "whole", tmp_path / "spoilt"
        scans = len(kinds) + 3
        assert write_archive(whole, layout, scans=scans, shape=SMALL, seed=1) == []
        broken = write_archive(spoilt, layout, scans=scans, broken=len(kinds), shape=SMALL, seed=1)
        assert [says for _, says in broken] == [kind.says for kind in kinds]
        good, bad = contents(whole), contents(spoilt)
        changed = [name for name in good if good[name] != bad.get(name)]
        assert set(bad) <= set(good)
        assert sorted(self._scan_of(name) for name in changed) == sorted(name for name, _ in broken)

    @staticmethod
    def _scan_of(name: str) -> str:
        found = re.search(r"(TCGA_PH_\d+_\d+|BraTS20_Training_\d+|volume_\d+|(?<=s/)\d+(?=\.png))", name)
        assert found, name
        return found.group(1)

    def test_they_lie_anywhere_in_the_archive_and_the_same_arguments_break_the_same(self, tmp_path):
        first = write_archive(tmp_path / "a", "lgg", scans=9, broken=3, shape=(4, 32, 32))
        second = write_archive(tmp_path / "b", "lgg", scans=9, broken=3, shape=(4, 32, 32))
        assert first == second
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert len({name for name, _ in first}) == 3

    def test_an_unknown_layout_names_the_known_ones(self, tmp_path):
        with pytest.raises(UsageError, match="lgg, figshare, brats, h5slices"):
            write_archive(tmp_path, "dicom", scans=1)

    @pytest.mark.parametrize(("scans", "broken"), [(0, 0), (2, 3), (2, -1)])
    def test_counts_that_cannot_be_met_are_refused_before_anything_is_written(self, tmp_path, scans, broken):
        with pytest.raises(UsageError):
            write_archive(tmp_path, "lgg", scans=scans, broken=broken)
        assert not list(tmp_path.iterdir())
