"""Telemetry: one table of names, that the dashboard shows to the last; telling fails nobody, and names no scan."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factory import FEW
from hypothesis import given
from hypothesis import strategies as st

from brainseg.telemetry import METERS, PREFIX, SECONDS, BusyShare, Meters, TrainingMeters, exported

CLUSTER = Path(__file__).parents[1] / "cluster"
EPOCH = {"epoch": 0, "epochs": 3, "loss": 0.4, "validation_dice": None, "samples_per_s": 12.0}


def shown():
    """Every name with our prefix that a query of the dashboard asks for, with the labels it picks or groups by."""
    panels = json.loads((CLUSTER / "grafana.json").read_text())["panels"]
    for query in (target["expr"] for panel in panels for target in panel.get("targets", [])):
        names = re.findall(rf"\bray_{PREFIX}\w+", query)
        labels = set(re.findall(r"(\w+)=", query)) | {w for by in re.findall(r"by \(([^)]*)\)", query) for w in by.split(", ")}
        yield from ((name, labels) for name in names)


def test_the_dashboard_shows_every_meter_and_no_other():
    names = {name for name, _ in shown()}
    assert names <= {one for name in METERS for one in exported(name)}
    assert [name for name in METERS if not names & set(exported(name))] == []


def test_the_dashboard_asks_for_labels_that_the_meters_have():
    of = {one: set(meter.labels) for name, meter in METERS.items() for one in exported(name)}
    for name, labels in shown():
        assert labels - {"ray_io_cluster", "le"} <= of[name], name


def test_every_name_begins_alike_and_says_its_unit_where_it_has_one():
    for name, meter in METERS.items():
        assert re.fullmatch(PREFIX + "[a-z_]+", name)
        assert ("seconds" in meter.what) == ("seconds" in name)
        assert not name.endswith("_total"), "Ray adds it to counters"


def test_no_label_grows_with_the_archive_or_names_a_patient():
    assert {label for meter in METERS.values() for label in meter.labels} <= {"run_id", "code", "stage", "model"}


def test_the_buckets_grow():
    assert list(SECONDS) == sorted(set(SECONDS))
    assert SECONDS[0] > 0


def test_the_readme_of_the_cluster_names_every_meter():
    text = (CLUSTER / "README.md").read_text()
    assert [name for name in METERS if f"`{name}`" not in text] == []


def test_nobody_to_tell_is_no_error():
    """Told by a process in which Ray never ran, all meters, with values that make sense and values that do not."""
    code = (
        "from brainseg.telemetry import METERS, Meters\n"
        "for name, meter in METERS.items():\n"
        "    for value in (1, 0, -1, None, float('nan'), float('inf')):\n"
        "        Meters().tell(name, value, **dict.fromkeys(meter.labels, 'x'))\n"
        "        Meters().tell(name, value)\n"
        "print('told')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "told\n", done.stderr


def test_a_meter_that_does_not_exist_is_a_mistake_of_ours():
    with pytest.raises(KeyError):
        Meters().tell("brainseg_nothing", 1)


def test_an_error_inside_goes_its_way():
    with pytest.raises(ZeroDivisionError), Meters(run_id="r").holding(5, "whole"):
        print(1 / 0)


def test_a_line_of_the_log_is_told_with_or_without_a_validation():
    meters = TrainingMeters("model")
    meters.epoch(EPOCH)
    meters.epoch({**EPOCH, "validation_dice": 0.5})
    meters.finish({})
    assert meters.epoch(EPOCH) is None


def test_telling_costs_a_part_next_to_nothing():
    meters, began = Meters(run_id="r"), time.perf_counter()
    for _ in range(100):
        meters.tell("brainseg_scans_left", 5)
    assert (time.perf_counter() - began) / 100 < 0.005


@FEW
@given(spans=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=9))
def test_a_busy_share_is_the_time_inside_by_all_the_time_since_the_last_look(spans):
    now = [0.0]
    busy = BusyShare(lambda: now[0])
    for _ in range(2):
        for outside, inside in spans:
            now[0] += outside
            with busy.inside():
                now[0] += inside
        whole, within = (sum(map(sum, spans)), sum(i for _, i in spans))
        assert busy.look() == pytest.approx(within / whole if whole else 0.0, abs=1e-6)


def test_an_error_inside_the_network_counts_as_busy_too():
    now = [0.0]
    busy = BusyShare(lambda: now[0])

    def fail():
        with busy.inside():
            now[0] += 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    now[0] += 1
    assert busy.look() == 0.75
