"""Stages: a scan goes from its files to its finished row; what goes wrong is its own affair."""

import gzip
import hashlib
import re
import socket
import sys
from contextlib import contextmanager
from dataclasses import replace
from threading import Event

import numpy as np
import pyarrow as pa
import pytest
import torch
from factory import make_card, make_model, make_row, make_scan, tiny_config, write_scan
from torch import nn

from brainseg import stages
from brainseg.config import SegmentConfig
from brainseg.errors import Code, ScanError
from brainseg.formats.images import read_image
from brainseg.formats.nifti import read_nifti
from brainseg.geometry import Grid
from brainseg.masks import encode_mask
from brainseg.metrics import score_scan
from brainseg.model import Prediction
from brainseg.regions import label_map
from brainseg.runs import content_tag
from brainseg.stages import Failure, Job, Work, column, decode, finish, guarded, in_groups, pack, predict, unpack, values
from brainseg.tables import SCANS
from brainseg.time_limit import TimeLimit

LOW = SegmentConfig(threshold=0.12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), settings=LOW)


def job_of(model, **settings):
    card = model.card
    return Job("run", "model", LOW.model_copy(update=settings), "run-1", 2, model.fingerprint, "config-1", card)


def predicted(scan):
    """A Work whose prediction is its label, for what comes after the network."""
    trust = {"mean_probability": 0.9, "mean_entropy": 0.1, "outside_head_fraction": 0.0}
    label = scan.label if scan.label is not None else np.ones(scan.grid.shape, np.uint8)
    return Work(make_row(scan.scan_id, modalities=scan.modalities), scan, Prediction(label, (trust,), 0.5), None, 0.25, 0.5)


def same_scan(one, other):
    plain = ("scan_id", "modalities", "background", "grid", "box", "duplicated", "warnings")
    labels = (one.label is None and other.label is None) or np.array_equal(one.label, other.label)
    return all(getattr(one, n) == getattr(other, n) for n in plain) and np.array_equal(one.image, other.image) and labels


class TestTheWholeWay:
    def test_a_scan_becomes_a_row_of_the_table(self, model, tmp_path):
        scan = make_scan(order="RAS", spacing=(1.0, 1.5, 2.0), name="s1")
        row = write_scan(tmp_path, scan, fold=3)
        work = decode(row, with_label=True)
        assert same_scan(work.scan, scan)
        done = finish(predict(model, [work])[0], job_of(model))
        table = pa.Table.from_pylist([done], schema=SCANS)
        assert all(table[f.name].null_count == 0 for f in SCANS if not f.nullable)
        assert done["status"] == "ok"
        assert done.get("error_code") is None
        assert (done["scan_id"], done["patient_id"], done["fold"], done["attributes"]) == ("s1", "of-s1", 3, [("site", "here")])
        assert done["shape"] == list(scan.grid.shape)
        assert done["spacing_mm"] == [2.0, 1.5, 1.0]
        assert done["orientation"] == "RAS"
        assert np.array(done["affine"]).reshape(4, 4) == pytest.approx(scan.grid.matrix)
        assert done["modalities"] == ["flair", "t1c"]
        assert done["modalities_missing"] == done["modalities_duplicated"] == done["warnings"] == []
        assert (done["run_id"], done["attempt"], done["node"]) == ("run-1", 2, socket.gethostname())
        assert done["content_tag"] == content_tag(row)
        assert min(done[f"seconds_{stage}"] for stage in ("decode", "predict", "finish")) > 0

    def test_the_stored_mask_is_the_prediction_and_what_was_scored(self, model, tmp_path):
        scan = make_scan(order="RAS", name="s1")
        work = predict(model, [decode(write_scan(tmp_path, scan), with_label=True)])[0]
        done = finish(work, job_of(model))
        stored = read_nifti(done["mask"], "mask.nii.gz")
        assert np.array_equal(stored.array, work.prediction.label)
        assert stored.grid.same_as(scan.grid)
        assert hashlib.sha256(done["mask"]).hexdigest() == done["mask_sha256"]
        (expected,) = score_scan(scan.label, stored.array, label_map("binary"), ["tumor"], scan.grid)
        assert done["regions"] == [{**expected, **work.prediction.trust[0]}]

    def test_without_a_label_it_is_segmented_all_the_same(self, model, tmp_path):
        row = write_scan(tmp_path, make_scan(name="s1"))
        work = decode(row, with_label=False)
        assert work.scan.label is None
        done = finish(predict(model, [work])[0], job_of(model))
        assert done["status"] == "ok"
        assert done["regions"][0]["state"] == "no_label"
        assert done["thumbnail"]["label"] is None

    def test_thumbnails_can_be_left_out(self, model):
        assert finish(predicted(make_scan()), job_of(model))["thumbnail"]["image"].startswith(b"\x89PNG")
        assert "thumbnail" not in finish(predicted(make_scan()), job_of(model, thumbnails=False))

    def test_a_label_that_does_not_know_a_region_leaves_that_one_unscored(self, tmp_path):
        card = make_card(tiny_config(regions=("WT", "TC", "ET")), label_map="brats2020")
        model = make_model(tmp_path, card, LOW)
        work = predict(model, [Work(make_row(label_map="binary"), make_scan())])[0]
        done = finish(work, job_of(model))
        assert done["status"] == "ok"
        states = {e["region"]: e["state"] for e in done["regions"]}
        assert states["WT"] in ("both", "missed")
        assert states["TC"] == states["ET"] == "no_label"
        assert [e["region"] for e in done["regions"]] == ["WT", "TC", "ET"]


class TestFailures:
    def test_a_broken_file_becomes_a_failed_row_and_the_others_are_unaffected(self, model, tmp_path):
        rows = [write_scan(tmp_path, make_scan(seed=n, name=f"s{n}")) for n in range(3)]
        broken = tmp_path / "s1-t1c.nii.gz"
        broken.write_bytes(gzip.compress(b"no image at all" * 40))
        works = [decode(row, with_label=True) for row in rows]
        done = [finish(work, job_of(model)) for work in predict(model, works)]
        assert [r["status"] for r in done] == ["ok", "failed", "ok"]
        assert done[1]["error_stage"] == "decode"
        assert done[1]["error_code"] in set(Code)
        assert "s1-t1c.nii.gz" in done[1]["error_message"]
        assert "mask" not in done[1]
        alone = finish(predict(model, [decode(rows[0], with_label=True)])[0], job_of(model))
        assert alone["mask_sha256"] == done[0]["mask_sha256"]
        assert pa.Table.from_pylist(done, schema=SCANS)["scan_id"].to_pylist() == ["s0", "s1", "s2"]

    def test_a_missing_file_is_named(self, model, tmp_path):
        row = write_scan(tmp_path, make_scan(name="s1"))
        (tmp_path / "s1-flair.nii.gz").unlink()
        done = finish(decode(row, with_label=True), job_of(model))
        assert (done["error_code"], done["error_stage"]) == ("MISSING_FILE", "decode")
        assert "s1-flair.nii.gz" in done["error_message"]

    def test_what_listing_found_wrong_is_not_even_read(self, model):
        row = make_row(problem_code="MISSING_SLICE", problem="slice 3 is not there")
        done = finish(predict(model, [decode(row, with_label=True)])[0], job_of(model))
        told = [done[f"error_{what}"] for what in ("code", "stage", "message")]
        assert told == ["MISSING_SLICE", "list", "slice 3 is not there"]

    def test_a_missing_modality_fails_one_scan_and_says_which(self, model):
        odd = make_scan(modalities=("t1", "t1c"), name="odd")
        works = [Work(make_row(s.scan_id, modalities=s.modalities), s) for s in (make_scan(name="a"), odd, make_scan(name="b"))]
        done = [finish(w, job_of(model)) for w in predict(model, works)]
        assert [r["status"] for r in done] == ["ok", "failed", "ok"]
        assert (done[1]["error_code"], done[1]["error_stage"]) == ("MISSING_MODALITY", "predict")
        assert done[1]["modalities_missing"] == ["flair"]

    def test_only_the_guilty_fails_whatever_it_raises(self, tmp_path):
        model = make_model(tmp_path, settings=LOW)
        works = [
            Work(make_row(f"s{n}"), make_scan((depth, 30, 26), name=f"s{n}"), seconds_decode=1.5)
            for n, depth in enumerate((3, 9, 4))
        ]
        expected = predict(model, works)
        for error, code in [
            (RuntimeError, "INTERNAL"),
            (torch.OutOfMemoryError, "OUT_OF_MEMORY"),
            (MemoryError, "OUT_OF_MEMORY"),
        ]:
            tried = replace_network(model, Choosy(model.network, most=4, error=error))
            answers = predict(tried, works)
            assert [w.failure and w.failure.code for w in answers] == [None, code, None]
            assert answers[1].failure.stage == "predict"
            assert [w.seconds_decode for w in answers] == [1.5] * 3
            for got, known in ((answers[0], expected[0]), (answers[2], expected[2])):
                assert np.array_equal(got.prediction.label, known.prediction.label)
                assert got.seconds_predict == got.prediction.seconds > 0

    def test_a_failed_scan_keeps_its_failure_through_every_stage(self, model):
        failure = Failure("CORRUPT", "decode", "found rubbish")
        work = predict(model, [Work(make_row(), failure=failure, seconds_decode=2.0)])[0]
        done = finish(work, job_of(model))
        assert work.failure == failure
        assert (done["error_message"], done["seconds_decode"]) == ("found rubbish", 2.0)

    def test_an_internal_error_tells_its_kind_and_place_and_no_more(self, caplog):
        secret = "a name of somebody"

        def call():
            try:
                return {}[secret]
            except KeyError:
                return Grid.of((1, 2, 3), np.eye(7))

        failure = guarded("finish", "s1", call, make_row()).failure
        place = re.fullmatch(r"s1: ValueError inside brainseg \((geometry\.py):(\d+)\); please report it", failure.message)
        assert (failure.code, failure.stage) == ("INTERNAL", "finish")
        lines = (stages.PACKAGE / place[1]).read_text().splitlines()
        assert "reshape" in lines[int(place[2]) - 1]
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert all(
            word in record.getMessage() for word in ("s1", "finish", "geometry.py", "test_stages.py", "KeyError", "ValueError")
        )
        assert secret not in record.getMessage()
        assert str(stages.PACKAGE) not in failure.message

    def test_an_internal_error_that_never_was_in_brainseg_says_so(self):
        error = ValueError("raised nowhere")
        assert stages.innermost(error) == "outside of it"

    def test_a_scan_that_killed_its_processes_is_a_row_like_any_other_failure(self, model):
        done = finish(stages.lost(make_row("s1"), "decode"), job_of(model))
        assert (done["status"], done["error_code"], done["error_stage"]) == ("failed", "WORKER_DIED", "decode")
        assert done["error_message"].startswith("s1: ")

    def test_a_read_that_does_not_end_is_given_up(self, model, tmp_path):
        row = write_scan(tmp_path, make_scan(name="s1"))
        limit = TimeLimit(0.2)
        assert same_scan(decode(row, with_label=True, limit=limit).scan, decode(row, with_label=True).scan)
        release = Event()
        with hanging_opens(release):
            failure = decode(row, with_label=True, limit=limit).failure
        release.set()
        assert (failure.code, failure.stage) == ("TIMEOUT", "decode")
        assert failure.message == "s1: found no end of reading within 0.2 s, expected its files to answer"
        assert decode(row, with_label=True, limit=limit).failure is None

    def test_a_fault_while_finishing_leaves_a_clean_failed_row(self, model):
        scan = make_scan()
        work = predicted(replace(scan, label=scan.label[:-1]))
        done = finish(replace(work, prediction=replace(work.prediction, label=scan.label)), job_of(model))
        assert (done["status"], done["error_code"], done["error_stage"]) == ("failed", "SHAPE_MISMATCH", "finish")
        assert not {"mask", "regions", "shape", "thumbnail"} & done.keys()

    def test_stopping_the_job_is_not_a_scans_failure(self):
        def call():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            guarded("decode", "s1", call, make_row())

    def test_an_error_is_one_line(self):
        error = ScanError(Code.CORRUPT, "found\n  this\tand that")
        assert str(error) == error.message == "found this and that"


HANGS: list[Event] = []


@contextmanager
def hanging_opens(release):
    """While inside, whoever opens an image waits, as on a mount that is dead, until `release` is set."""
    if not HANGS:
        sys.addaudithook(lambda event, args: _hang(args[0]) if event == "open" else None)
    HANGS.append(release)
    try:
        yield
    finally:
        HANGS.append(None)


def _hang(path):
    if HANGS[-1] is not None and str(path).endswith(".nii.gz"):
        HANGS[-1].wait(30)


class Choosy(nn.Module):
    """A network that cannot bear more than some slices of one scan: a batch of another length is somebody else's."""

    def __init__(self, network, most, error):
        super().__init__()
        self.network, self.most, self.error = network, most, error
        self.memory_format = network.memory_format

    def forward(self, x):
        if len(x) > self.most:
            raise self.error("too many")
        return self.network(x)


def replace_network(model, network):
    """The same model around another network, without halving: a batch is one scan or it fails."""

    class Whole(type(model)):
        def _forward(self, slices, network=None):
            return self._probabilities(slices, network or self.network)

    return Whole(model.card, network, model.fingerprint, model.device, model.settings)


PACKED = {
    "only a row": Work(make_row()),
    "failed": Work(make_row(), failure=Failure(Code.CORRUPT, "decode", "found ä rubbish"), seconds_decode=0.125),
    "decoded": Work(make_row(), make_scan(order="ASR", warnings=("SPACING: odd",), duplicated=("t1c",)), seconds_decode=1.5),
    "without label or affine": Work(make_row(), make_scan(order=None, label=None)),
    "predicted": predicted(make_scan()),
    "predicted without label": predicted(make_scan(label=None)),
    "float image": Work(make_row(), make_scan(image=np.full((2, 1, 2, 3), 1.5, np.float32), background=(-0.1, 0.0))),
}


class TestPacking:
    @pytest.mark.parametrize("work", PACKED.values(), ids=PACKED)
    def test_unpacking_undoes_packing(self, work):
        back = unpack(pack(work), work.row)
        assert back.row is work.row
        assert back.failure == work.failure
        assert (back.seconds_decode, back.seconds_predict) == (work.seconds_decode, work.seconds_predict)
        assert (back.scan is None) == (work.scan is None)
        assert work.scan is None or same_scan(back.scan, work.scan)
        assert work.scan is None or back.scan.image.dtype == work.scan.image.dtype
        assert (back.prediction is None) == (work.prediction is None)
        if work.prediction is not None:
            assert np.array_equal(back.prediction.label, work.prediction.label)
            assert back.prediction.trust == work.prediction.trust
            assert back.prediction.seconds == work.prediction.seconds

    def test_arrays_are_copied_once_and_begin_where_arrows_do(self):
        packed = [pack(work) for work in PACKED.values()]
        for column_of in (column(packed), column(packed[2:])):
            assert [value.address for value in values(column_of)] == [b.address for b in packed[len(packed) - len(column_of) :]]
        for value, work in zip(values(column(packed)), PACKED.values(), strict=True):
            if work.scan is not None:
                place = unpack(value, work.row).scan.image.ctypes.data
                assert place % 64 == 0
                assert 0 < place - value.address < value.size

    @pytest.mark.parametrize("begin", [0, 1, 3])
    def test_a_column_may_have_been_put_together_and_cut(self, begin):
        packed = [pack(work) for work in PACKED.values()]
        whole = pa.chunked_array([column(packed).combine_chunks(), *column(packed).chunks])
        found = [value.to_pybytes() for value in values(whole.slice(begin, 9))]
        assert found == [buffer.to_pybytes() for buffer in (packed * 2)[begin : begin + 9]]

    def test_a_packed_scan_is_segmented_as_it_was(self, model):
        work = Work(make_row(), make_scan(order="RAS"))
        one, other = predict(model, [work])[0], predict(model, [unpack(pack(work), work.row)])[0]
        assert np.array_equal(one.prediction.label, other.prediction.label)
        assert finish(one, job_of(model))["mask"] == finish(unpack(pack(other), work.row), job_of(model))["mask"]


class TestGroups:
    def works(self, *sizes):
        image = np.zeros((1, 1, 1, 1), np.int8)
        scan = make_scan()
        made = [replace(scan, image=np.broadcast_to(image, (1, 1, 1, n))) if n else None for n in sizes]
        return [Work(make_row(f"s{i}"), s) for i, s in enumerate(made)]

    @pytest.mark.parametrize(
        ("sizes", "groups"),
        [
            ([], []),
            ([1, 1, 1], [3]),
            ([stages.VOXELS_TOGETHER, 1], [1, 1]),
            ([stages.VOXELS_TOGETHER - 1, 1, 1], [1, 2]),
            ([1, stages.VOXELS_TOGETHER - 1, 1, 1], [2, 2]),
            ([1, stages.VOXELS_TOGETHER, 1, 1], [1, 1, 2]),
            ([3 * stages.VOXELS_TOGETHER, 0, 0, 1], [1, 3]),
        ],
    )
    def test_scans_share_batches_up_to_a_budget_and_all_of_them_come_through_in_order(self, sizes, groups):
        works = self.works(*sizes)
        grouped = list(in_groups(iter(works)))
        assert [len(g) for g in grouped] == groups
        assert [w for g in grouped for w in g] == works

    @pytest.mark.parametrize(("size", "together"), [(stages.VOXELS_TOGETHER * 3 // 5, 1), (stages.VOXELS_TOGETHER // 3, 3)])
    def test_a_scan_that_would_not_fit_as_well_is_not_read_before_the_group_is_segmented(self, size, together):
        works = iter(self.works(*[size] * 7))
        next(in_groups(works))
        assert len(list(works)) == 7 - together


class TestMaskFiles:
    def test_a_single_image_without_position_is_a_png_and_all_else_a_nifti(self):
        label = np.eye(4, dtype=np.uint8)[None] * 3
        data, kind = encode_mask(label, Grid.of((1, 4, 4)))
        assert kind == "png"
        assert np.array_equal(read_image(data, "mask.png")[0], label[0])
        for grid in (Grid.of((1, 4, 4), np.eye(4)), Grid.of((2, 4, 4))):
            data, kind = encode_mask(np.broadcast_to(label, grid.shape), grid)
            assert kind == "nii.gz"
            assert np.array_equal(read_nifti(data, "mask.nii.gz").array, np.broadcast_to(label, grid.shape))

    def test_equal_masks_are_equal_bytes(self):
        label = make_scan().label
        assert encode_mask(label, make_scan().grid) == encode_mask(label.copy(), make_scan().grid)


def test_a_row_says_how_bright_each_modality_is_inside_the_head():
    scan = make_scan(name="s1")
    found = stages.intensities(scan)
    assert [entry["modality"] for entry in found] == list(scan.modalities)
    for entry, volume, nothing in zip(found, scan.image, scan.background, strict=True):
        head = volume[volume != nothing]
        assert (entry["mean"], entry["sd"]) == pytest.approx((head.mean(), head.std()))
    dark = replace(scan, image=np.full_like(scan.image, 7), background=(7,) * len(scan.modalities))
    assert {(entry["mean"], entry["sd"]) for entry in stages.intensities(dark)} == {(None, None)}


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_the_voxels_that_stand_for_a_large_scan_come_from_everywhere(axis):
    shape = (1, 96, 128, 128)
    ramp = np.broadcast_to(
        np.arange(1, shape[axis] + 1, dtype=np.int16).reshape([-1 if a == axis else 1 for a in range(4)]), shape
    )
    scan = replace(make_scan(name="s1"), modalities=("flair",), image=np.ascontiguousarray(ramp), background=(0,))
    (entry,) = stages.intensities(scan)
    assert entry["mean"] == pytest.approx(ramp.mean(), rel=0.01)
    assert entry["sd"] == pytest.approx(ramp.std(), rel=0.01)
