"""Scans: whatever the files, one checked Scan comes out or one reason why not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from brainseg.errors import Code, ScanError
from brainseg.formats.images import write_png
from brainseg.formats.nifti import write_nifti
from brainseg.geometry import Grid
from brainseg.layouts import FoundScan, Inventory, Source, sliced
from brainseg.manifest import index_archive
from brainseg.scans import Scan, load_label, load_scan

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
SHAPE = (6, 8, 10)
HEAD = (slice(1, 5), slice(2, 7), slice(3, 8))
BOX = ((1, 5), (2, 7), (3, 8))


# --- the factory of synthetic scans


def volume(seed: int = 0, kind: str = "i2", background: float = 0) -> NDArray[Any]:
    """A head of positive voxels, all different from the background around it."""
    out = np.full(SHAPE, background, kind)
    out[HEAD] = np.random.default_rng(seed).integers(1, 100, out[HEAD].shape)
    return out


def tumour(value: int = 1) -> NDArray[np.uint8]:
    label = np.zeros(SHAPE, np.uint8)
    label[2:4, 3:5, 4:6] = value
    return label


def source(path: Path, role: str, *, modality: str | None = None, index: int | None = None) -> dict[str, Any]:
    return {"uri": str(path), "role": role, "modality": modality, "index": index, "size_bytes": 0, "tag": ""}


def row_of(reader: str, modalities: Sequence[str], sources: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    body = {
        "scan_id": "scan-1",
        "reader": reader,
        "modalities": list(modalities),
        "sources": list(sources),
        "label_map": "brats2020",
    }
    return body | {"has_label": any(s["role"] != "image" for s in sources), "problem_code": None, "problem": None} | more


def volumes_row(
    folder: Path,
    volumes: Mapping[str, NDArray[Any]],
    label: NDArray[Any] | None = None,
    affines: Mapping[str, NDArray[np.float64]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a NIfTI a modality (and `label`), each at LPS unless `affines` says otherwise."""
    sources = []
    for name, array in {**volumes, **({} if label is None else {"label": label})}.items():
        path = folder / f"{name}.nii.gz"
        path.write_bytes(write_nifti(array, Grid.of(array.shape, (affines or {}).get(name, LPS))))
        is_label = name == "label"
        sources.append(source(path, "label" if is_label else "image", modality=None if is_label else name))
    return row_of("volumes", list(volumes), sources, **more)


def stack_row(
    folder: Path, image: NDArray[Any], label: NDArray[Any] | None = None, modalities: Sequence[str] = ("t1",), **more: Any
) -> dict[str, Any]:
    """Write `(D, H, W)` or `(D, H, W, C)` as a TIFF a slice, and the label likewise."""
    sources = []
    for role, planes in (("image", image), ("label", label)):
        for index, plane in enumerate(() if planes is None else planes):
            path = folder / f"{role}_{index}.tif"
            tifffile.imwrite(path, plane, photometric="rgb" if plane.ndim == 3 else "minisblack")
            sources.append(source(path, role, index=index))
    return row_of("stack", modalities, sources, **{"label_map": "binary"} | more)


def h5_row(folder: Path, image: NDArray[Any], mask: NDArray[Any], **more: Any) -> dict[str, Any]:
    """Write `(D, i, j, C)` and `(D, i, j, V)` as an HDF5 file a slice."""
    sources = []
    for index, (plane, hot) in enumerate(zip(image, mask, strict=True)):
        path = folder / f"slice_{index}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=plane, compression="gzip")
            file.create_dataset("mask", data=hot, compression="gzip")
        sources.append(source(path, "both", index=index))
    return row_of("h5slices", ("flair", "t1", "t1c", "t2"), sources, **more)


def refusal(row: Mapping[str, Any]) -> ScanError:
    with pytest.raises(ScanError) as caught:
        load_scan(row)
    return caught.value


def codes(scan: Scan) -> list[str]:
    return [line.split(":")[0] for line in scan.warnings]


# --- volumes


def test_modalities_come_in_the_order_of_the_row_cropped_to_the_head(tmp_path):
    t1, flair = volume(1), volume(2)
    row = volumes_row(tmp_path, {"t1": t1, "flair": flair}, tumour(4))
    row["modalities"] = ["flair", "t1"]
    scan = load_scan(row)
    assert scan.modalities == ("flair", "t1")
    assert (scan.box, scan.grid.shape, scan.grid.orientation) == (BOX, SHAPE, "LPS")
    assert scan.image.dtype == np.int16
    assert scan.image.flags.c_contiguous
    np.testing.assert_array_equal(scan.image, np.stack([flair[HEAD], t1[HEAD]]))
    np.testing.assert_array_equal(scan.label, tumour(4))
    assert (scan.background, scan.duplicated, scan.warnings) == ((0.0, 0.0), (), ())


@given(st.lists(st.tuples(*(st.integers(0, n - 1) for n in SHAPE)), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_crop_put_back_on_its_background_is_the_whole_volume(tmp_path_factory, places):
    array = np.full(SHAPE, -3.5, np.float32)
    for place in places:
        array[place] = 1.0
    scan = load_scan(volumes_row(tmp_path_factory.mktemp("scan"), {"t1": array}))
    back = np.full(SHAPE, scan.background[0], np.float32)
    back[tuple(slice(*span) for span in scan.box)] = scan.image[0]
    np.testing.assert_array_equal(back, array)


def test_the_box_holds_what_any_modality_shows(tmp_path):
    left, right = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.int16)
    left[1, 2, 3] = right[4, 6, 7] = 9
    assert load_scan(volumes_row(tmp_path, {"t1": left, "t2": right})).box == BOX


@pytest.mark.parametrize(("kind", "background"), [("f4", -3.16), ("i2", -1024), ("f8", -0.6), ("u1", 0)])
def test_background_is_what_the_corners_share_but_zero_for_unsigned(tmp_path, kind, background):
    scan = load_scan(volumes_row(tmp_path, {"t1": volume(kind=kind, background=background)}))
    assert scan.box == BOX
    assert scan.background == (float(np.array(background, scan.image.dtype)),)


def test_a_volume_of_noise_has_background_zero_and_keeps_its_whole_box(tmp_path):
    noise = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    scan = load_scan(volumes_row(tmp_path, {"t1": noise}))
    assert scan.background == (0.0,)
    np.testing.assert_array_equal(scan.image[0], noise)


def test_mixed_and_double_types_become_float32_and_others_are_kept(tmp_path):
    for kinds, expected in ((("i2", "u1"), "f4"), (("f8", "f8"), "f4"), (("u2", "u2"), "u2"), (("i8", "i8"), "f4")):
        pair = {f"t{i + 1}": volume(i, kind) for i, kind in enumerate(kinds)}
        scan = load_scan(volumes_row(tmp_path, pair))
        assert scan.image.dtype == expected
        np.testing.assert_array_equal(scan.image, np.stack([v[HEAD] for v in pair.values()]))


def test_a_copied_modality_is_refused_and_named(tmp_path):
    error = refusal(volumes_row(tmp_path, {"t1": volume(1), "t2": volume(2), "flair": volume(1)}))
    assert error.code is Code.DUPLICATE_CONTENT
    assert "found flair equal" in error.message


def test_a_label_of_255_in_a_volume_is_read_as_its_map_says_and_told(tmp_path):
    scan = load_scan(volumes_row(tmp_path, {"t1": volume()}, tumour(255), label_map="binary"))
    np.testing.assert_array_equal(scan.label, tumour(1))
    assert codes(scan) == ["BAD_LABELS"]


def test_the_label_is_read_only_on_request(tmp_path):
    row = volumes_row(tmp_path, {"t1": volume()}, tumour(7))
    assert load_scan(row, with_label=False).label is None
    assert refusal(row).code is Code.BAD_LABELS


@pytest.mark.parametrize(("name", "shift"), [("t2", 0.1), ("label", 0.1)])
def test_another_grid_is_refused_and_every_grid_is_named(tmp_path, name, shift):
    moved = LPS.copy()
    moved[0, 3] += shift
    error = refusal(volumes_row(tmp_path, {"t1": volume(), "t2": volume(1)}, tumour(), {name: moved}))
    assert error.code is Code.AFFINE_MISMATCH
    assert all(f"{each} is 6x8x10 voxels" in error.message for each in ("t1", "t2", "label"))


def test_rounding_in_an_affine_is_no_other_grid(tmp_path):
    moved = LPS + 1e-4
    moved[3] = [0, 0, 0, 1]
    assert load_scan(volumes_row(tmp_path, {"t1": volume(), "t2": volume(1)}, affines={"t2": moved})).warnings == ()


def test_another_shape_is_refused(tmp_path):
    error = refusal(volumes_row(tmp_path, {"t1": volume(), "t2": volume(1)[:-1]}))
    assert error.code is Code.SHAPE_MISMATCH
    assert "t2 is 5x8x10 voxels" in error.message


@pytest.mark.parametrize(
    ("value", "place", "code"),
    [
        (np.nan, HEAD, Code.NON_FINITE),
        (-np.inf, (0, 0, 0), Code.NON_FINITE),
        (1e300, HEAD, Code.NON_FINITE),
        (0.0, HEAD, Code.EMPTY_VOLUME),
    ],
)
def test_a_modality_that_shows_nothing_usable_is_refused(tmp_path, value, place, code):
    array = volume(kind="f8")
    array[place] = value
    error = refusal(volumes_row(tmp_path, {"t1": volume(), "t2": array}))
    assert error.code is code
    assert "t2" in error.message


def test_values_whose_square_overflows_are_told(tmp_path):
    array = volume(kind="f4")
    array[2, 3, 4] = 1e30
    assert codes(load_scan(volumes_row(tmp_path, {"t1": array}))) == ["OUTLIER"]


@pytest.mark.parametrize(("off", "expected"), [(0.0, []), (5e-7, []), (1e-4, ["MASK_NOT_INTEGER"])])
def test_a_label_in_floats_is_rounded_where_it_is_whole(tmp_path, off, expected):
    label = tumour(4).astype(np.float64)
    label[label > 0] -= off
    scan = load_scan(volumes_row(tmp_path, {"t1": volume()}, label))
    np.testing.assert_array_equal(scan.label, tumour(4))
    assert codes(scan) == expected


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.5, Code.MASK_NOT_INTEGER), (np.nan, Code.NON_FINITE), (3.0, Code.BAD_LABELS), (1e30, Code.BAD_LABELS)],
)
def test_a_label_that_is_no_label_is_refused(tmp_path, value, code):
    label = tumour(1).astype(np.float32)
    label[2, 3, 4] = value
    error = refusal(volumes_row(tmp_path, {"t1": volume()}, label))
    assert error.code is code
    assert error.message.startswith("label.nii.gz: ")


def test_an_unknown_value_names_the_slice_that_holds_it(tmp_path):
    label = tumour(255)
    label[3, 4, 5] = 7
    for kind in (np.uint8, np.float32):
        error = refusal(stack_row(tmp_path, volume(kind="u1"), label.astype(kind)))
        assert error.code is Code.BAD_LABELS
        assert error.message.startswith("label_3.tif: label value 7 is not in the label map 'binary'")
    interpolated = tumour(1).astype(np.float32)
    interpolated[2, 3, 4] = 0.4
    assert refusal(stack_row(tmp_path, volume(kind="u1"), interpolated)).message.startswith(
        "label_2.tif: found label values 0.4"
    )


@pytest.mark.parametrize(("name", "values"), [("brats2013", (1, 2, 3, 4)), ("brats2020", (1, 2, 4)), ("brats2023", (1, 2, 3))])
@pytest.mark.parametrize("kind", ["u1", "i2", "f4", "f8"])
def test_a_data_set_keeps_its_own_values_in_whatever_type_they_are_stored(tmp_path, name, values, kind):
    label = tumour(0)
    label[2, 3, 4 : 4 + len(values)] = values
    row = volumes_row(tmp_path, {"t1": volume()}, label.astype(kind), label_map=name)
    np.testing.assert_array_equal(load_scan(row).label, label)
    foreign = next(v for v in range(1, 9) if v not in values)
    label[3, 3, 4] = foreign
    error = refusal(volumes_row(tmp_path, {"t1": volume()}, label.astype(kind), label_map=name))
    assert error.code is Code.BAD_LABELS
    assert error.message.startswith(f"label.nii.gz: label value {foreign} is not in the label map '{name}'")


@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "f4"])
def test_masks_of_0_and_255_and_of_0_and_1_mean_the_same(tmp_path, kind):
    for value in (1, 255):
        scan = load_scan(volumes_row(tmp_path, {"t1": volume()}, tumour(value).astype(kind), label_map="binary"))
        np.testing.assert_array_equal(scan.label, tumour(1))


def test_the_label_alone_is_checked_as_it_is_with_its_image(tmp_path):
    row = stack_row(tmp_path, volume(kind="u1"), tumour(255))
    np.testing.assert_array_equal(load_label(row)[0], load_scan(row).label)
    bad = tumour(1)
    bad[3, 4, 5] = 7
    row = stack_row(tmp_path, volume(kind="u1"), bad)
    with pytest.raises(ScanError) as caught:
        load_label(row)
    assert caught.value.message == refusal(row).message


def test_an_empty_label_is_a_label_but_told(tmp_path):
    scan = load_scan(volumes_row(tmp_path, {"t1": volume()}, tumour(0)))
    assert scan.label is not None
    assert not scan.label.any()
    assert codes(scan) == ["EMPTY_MASK"]


def test_a_file_that_is_gone_or_a_folder_is_named_without_its_path(tmp_path):
    row = volumes_row(tmp_path, {"t1": volume()})
    path = Path(row["sources"][0]["uri"])
    path.unlink()
    gone = refusal(row)
    assert gone.code is Code.MISSING_FILE
    assert gone.message.startswith("t1.nii.gz: ")
    assert str(tmp_path) not in gone.message
    path.mkdir()
    assert refusal(row).code is Code.NOT_A_FILE


def test_a_modality_without_a_file_is_refused(tmp_path):
    row = volumes_row(tmp_path, {"t1": volume()})
    row["modalities"].append("t2")
    assert refusal(row).code is Code.MISSING_MODALITY


def test_a_problem_seen_while_listing_is_the_answer(tmp_path):
    row = volumes_row(tmp_path, {"t1": volume()}, problem_code="MISSING_SLICE", problem="scan-1: slice 3 is missing")
    error = refusal(row)
    assert (error.code, error.message) == (Code.MISSING_SLICE, "scan-1: slice 3 is missing")


# --- stacks


def test_a_stack_of_colour_pictures_is_a_scan_of_three_modalities(tmp_path):
    image = np.stack([volume(i, "u1") for i in range(3)], axis=-1)
    scan = load_scan(stack_row(tmp_path, image, tumour(255), modalities=("pre", "flair", "post")))
    np.testing.assert_array_equal(scan.image, np.moveaxis(image[HEAD], -1, 0))
    np.testing.assert_array_equal(scan.label, tumour(1))
    assert (scan.grid, scan.box, scan.warnings) == (Grid(SHAPE), BOX, ())
    assert scan.image.flags.c_contiguous


def test_slices_are_put_in_the_order_of_their_index(tmp_path):
    row = stack_row(tmp_path, volume(kind="u1"))
    row["sources"].reverse()
    np.testing.assert_array_equal(load_scan(row).image[0], volume(kind="u1")[HEAD])


def test_three_equal_channels_are_grey_and_unequal_ones_no_single_modality(tmp_path):
    image = np.stack([volume(1, "u1")] * 3, axis=-1)
    np.testing.assert_array_equal(load_scan(stack_row(tmp_path, image)).image[0], image[HEAD][..., 0])
    image[3, 4, 5, 1] ^= 1
    assert refusal(stack_row(tmp_path, image)).code is Code.NOT_GREY


def test_equal_channels_are_named_as_duplicated(tmp_path):
    image = np.stack([volume(1, "u1"), volume(2, "u1"), volume(2, "u1")], axis=-1)
    assert load_scan(stack_row(tmp_path, image, modalities=("pre", "flair", "post"))).duplicated == ("post",)


def test_a_single_picture_is_a_stack_of_one(tmp_path):
    plane, mask = volume(kind="u1")[3], tumour(255)[3]
    paths = tmp_path / "1.png", tmp_path / "1_mask.png"
    for path, array in zip(paths, (plane, mask), strict=True):
        path.write_bytes(write_png(array))
    sources = [source(paths[0], "image", index=0), source(paths[1], "label", index=0)]
    scan = load_scan(row_of("stack", ["t1c"], sources, label_map="binary"))
    assert scan.image.shape == (1, 1, 5, 5)
    np.testing.assert_array_equal(scan.label, tumour(1)[3:4])


def test_a_single_picture_without_tumour_is_nothing_to_warn_of(tmp_path):
    assert load_scan(stack_row(tmp_path, volume(kind="u1")[3:4], tumour(0)[3:4])).warnings == ()


def test_a_stack_with_a_hole_or_an_odd_slice_is_refused(tmp_path):
    image, label = volume(kind="u1"), tumour(1)
    row = stack_row(tmp_path, image, label)
    holed = {**row, "sources": [s for s in row["sources"] if (s["role"], s["index"]) != ("label", 2)]}
    assert refusal(holed).code is Code.MISSING_SLICE
    tifffile.imwrite(tmp_path / "image_2.tif", image[2][:-1])
    assert refusal(row).code is Code.SHAPE_MISMATCH
    tifffile.imwrite(tmp_path / "image_2.tif", image[2].astype(np.uint16))
    assert refusal(row).code is Code.BAD_DATATYPE
    assert refusal(stack_row(tmp_path, image, label[:, :-1])).code is Code.SHAPE_MISMATCH
    assert refusal(stack_row(tmp_path, image, modalities=("pre", "flair", "post"))).code is Code.SHAPE_MISMATCH


def test_warnings_of_many_slices_are_said_once(tmp_path):
    row = stack_row(tmp_path, volume(kind="u1"))
    for index, plane in enumerate(volume(kind="u1")):
        tifffile.imwrite(tmp_path / f"image_{index}.tif", 255 - plane, photometric="miniswhite")
    scan = load_scan(row)
    assert codes(scan) == ["INVERTED"]
    assert "5 more" in scan.warnings[0]
    np.testing.assert_array_equal(scan.image[0], volume(kind="u1")[HEAD])


def as_slices(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that `index --unit slice` makes of a row."""
    kept = {k: row[k] for k in ("scan_id", "reader", "label_map", "problem_code", "problem")}
    sources = tuple(Source(**s) for s in row["sources"])
    found = FoundScan(**kept, patient_id=None, dataset="d", layout="l", modalities=tuple(row["modalities"]), sources=sources)
    scans = sliced(Inventory([found])).scans
    return [{**row, "scan_id": s.scan_id, "sources": [asdict(source) for source in s.sources]} for s in scans]


def test_the_slices_of_a_stack_taken_one_by_one_make_up_its_scan(tmp_path):
    image, label = np.stack([volume(i, "u1") for i in range(3)], axis=-1), tumour(255)
    image[0], image[5] = image[1], image[4]
    row = stack_row(tmp_path, image, label, modalities=("pre", "flair", "post"))
    whole, parts = load_scan(row), [load_scan(r) for r in as_slices(row)]
    assert [p.scan_id for p in parts] == [f"scan-1_{n:03d}" for n in range(6)]
    np.testing.assert_array_equal(np.concatenate([p.label for p in parts]), whole.label)
    np.testing.assert_array_equal(np.concatenate([p.image for p in parts], axis=1), whole.image)


# --- HDF5 slices


def h5_parts() -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Slices `(D, i, j, C)` and one-hot `(D, i, j, 3)` of one scan whose arrays are `(D, H = j, W = i)`."""
    image = np.stack([volume(i, "f8", -0.6) for i in range(4)], axis=-1)
    label = tumour(4)
    label[2, 3, 4], label[2, 3, 5] = 1, 2
    hot = np.stack([label == value for value in (1, 2, 4)], axis=-1).astype(np.uint8)
    return image.swapaxes(1, 2), hot.swapaxes(1, 2)


def test_hdf5_slices_are_turned_to_rows_and_columns_of_the_nifti(tmp_path):
    scan = load_scan(h5_row(tmp_path, *h5_parts()))
    expected = np.stack([volume(i, "f4", -0.6)[HEAD] for i in range(4)])
    assert scan.image.dtype == np.float32
    np.testing.assert_array_equal(scan.image, expected)
    assert scan.background == (float(np.float32(-0.6)),) * 4
    assert scan.box == BOX
    label = tumour(4)
    label[2, 3, 4], label[2, 3, 5] = 1, 2
    np.testing.assert_array_equal(scan.label, label)
    assert scan.warnings == ()


def test_hdf5_slices_taken_one_by_one_keep_their_labels(tmp_path):
    row = h5_row(tmp_path, *h5_parts())
    whole, rows = load_scan(row), as_slices(row)
    np.testing.assert_array_equal(np.concatenate([load_scan(r).label for r in rows[1:5]]), whole.label[1:5])
    assert refusal(rows[0]).code is Code.EMPTY_VOLUME


def test_a_mask_that_is_not_one_hot_names_its_file(tmp_path):
    image, hot = h5_parts()
    hot[4, 0, 0] = 1
    error = refusal(h5_row(tmp_path, image, hot))
    assert (error.code, error.message.split(":")[0]) == (Code.BAD_LABELS, "slice_4.h5")


def test_hdf5_slices_of_another_form_are_refused(tmp_path):
    image, hot = h5_parts()
    assert refusal(h5_row(tmp_path, np.moveaxis(image, -1, 1), hot)).code is Code.SHAPE_MISMATCH
    assert refusal(h5_row(tmp_path, image, hot[..., :2])).code is Code.SHAPE_MISMATCH
    assert refusal(h5_row(tmp_path, image, hot[:, :-1])).code is Code.SHAPE_MISMATCH
    assert refusal(h5_row(tmp_path, image, hot * 2)).code is Code.BAD_LABELS
    assert refusal(h5_row(tmp_path, image, np.ones_like(hot))).code is Code.BAD_LABELS
    image[0, 0, 0, 0] = np.nan
    assert refusal(h5_row(tmp_path, image, hot)).code is Code.NON_FINITE


# --- real scans


def test_the_five_values_of_brats_2013_stored_as_floats_are_kept(data_dir):
    row = index_archive(str(data_dir / "brats2013"))[0].to_pylist()[0]
    label = load_scan(row).label
    stored = next(s["uri"] for s in row["sources"] if s["role"] == "label")
    np.testing.assert_array_equal(label, np.asanyarray(nib.load(stored).dataobj).T)
    assert np.asanyarray(nib.load(stored).dataobj).dtype == np.float32
    assert np.unique(label).tolist() == [0, 1, 2, 3, 4]


def test_four_modalities_on_four_grids_are_refused_with_all_four_named(data_dir):
    names = {"fla": "flair", "t1": "t1", "t1c": "t1c", "t2": "t2"}
    sources = [
        source(data_dir / "anisotropic" / f"TCGA-DU-7294_hdbet_native_{suffix}.nii.gz", "image", modality=modality)
        for suffix, modality in names.items()
    ]
    error = refusal(row_of("volumes", list(names.values()), sources))
    assert error.code is Code.SHAPE_MISMATCH
    assert all(f"{modality} is " in error.message for modality in names.values())


def test_a_real_volume_with_skull_is_cropped_without_losing_a_voxel(data_dir):
    path = data_dir / "anisotropic" / "TCGA-FG-6692_t2_with-skull.nii.gz"
    scan = load_scan(row_of("volumes", ["t2"], [source(path, "image", modality="t2")]))
    whole = np.full(scan.grid.shape, scan.background[0], scan.image.dtype)
    whole[tuple(slice(*span) for span in scan.box)] = scan.image[0]
    np.testing.assert_array_equal(whole, np.asanyarray(nib.load(path).dataobj).T)


def test_a_constant_volume_among_the_real_ones_is_refused(data_dir):
    path = data_dir / "broken" / "valid-but-constant.nii.gz"
    assert refusal(row_of("volumes", ["t1"], [source(path, "image", modality="t1")])).code is Code.EMPTY_VOLUME
