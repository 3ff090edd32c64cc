"""Calibration: a few scans of an archive say what one costs, and nothing is written."""

import pytest
import torch
from factory import make_model

from brainseg import manifest, segment
from brainseg.calibrate import SAMPLE, measure, sample
from brainseg.config import How, SegmentConfig
from brainseg.phantom import write_archive


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrate")
    write_archive(root / "archive", "lgg", scans=9, broken=2, shape=(4, 48, 48))
    make_model(root / "model")
    table, _ = manifest.index_archive(str(root / "archive"))
    manifest.write_manifest(str(root / "m.parquet"), table)
    return root


def order_of(place):
    how = How()
    return segment.take_order(str(place / "m.parquet"), str(place / "model"), SegmentConfig(), how), how


def test_the_sample_reaches_over_the_whole_archive(place):
    order, _ = order_of(place)
    chosen = [row["scan_id"] for row in sample(order.table)]
    usable = [row["scan_id"] for row in order.table.to_pylist() if not row["problem_code"]]
    assert len(chosen) == SAMPLE
    assert (chosen[0], chosen[-1]) == (usable[0], usable[-1])


def test_every_stage_is_measured_and_nothing_is_written_or_left_changed(place):
    order, how = order_of(place)
    before, threads = sorted(place.rglob("*")), torch.get_num_threads()
    costs = measure(sample(order.table), order.job(str(place / "run"), how))
    assert 1 <= costs.scans < SAMPLE
    assert min(costs.decode_s, costs.predict_s, costs.finish_s) > 0
    assert costs.voxel_bytes > 0
    assert sorted(place.rglob("*")) == before
    assert torch.get_num_threads() == threads


def test_an_archive_of_which_nothing_can_be_segmented_gives_no_figure(place):
    order, how = order_of(place)
    gone = [row | {"sources": [{**s, "uri": s["uri"] + ".gone"} for s in row["sources"]]} for row in sample(order.table)]
    assert measure(gone, order.job(str(place / "run"), how)) is None
