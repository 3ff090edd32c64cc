"""How much of a core a million rows take: interval, summary, comparison. The goal is seconds, whatever else is running."""

import time

import numpy as np
import pyarrow as pa
import pytest

from brainseg.aggregate import aggregate, bootstrap_interval
from brainseg.comparison import compare_runs

pytestmark = pytest.mark.bench

ROWS = 1_000_000
GOAL_S = 10.0


def timed(what, action):
    started = time.process_time()
    result = action()
    elapsed_s = time.process_time() - started
    print(f"\n{what}: {elapsed_s:.2f} core seconds, goal {GOAL_S:.0f}")
    assert elapsed_s < GOAL_S
    return result


@pytest.mark.parametrize("num_patients", [1_000, 10_000, 100_000, 1_000_000])
def test_an_interval_over_a_million_rows_takes_seconds(num_patients):
    rng = np.random.default_rng(0)
    values, patients = rng.random(ROWS), rng.integers(num_patients, size=ROWS)
    what = f"interval, {ROWS} rows of {num_patients} patients, 10,000 draws"
    low, high = timed(what, lambda: bootstrap_interval(values, patients))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / ROWS**0.5, rel=0.1)


def test_a_million_rows_are_summarised_and_compared_in_seconds():
    rng = np.random.default_rng(1)
    columns = {
        "scan_id": np.char.mod("scan-%d", np.arange(ROWS)),
        "region": np.full(ROWS, "tumor"),
        "patient_id": np.char.mod("patient-%d", rng.integers(10_000, size=ROWS)),
        "state": np.full(ROWS, "both"),
        "dice": rng.random(ROWS),
    }
    run = pa.table(columns)
    other = pa.table({**columns, "dice": columns["dice"] - 0.01})
    summary = timed(f"summary, {ROWS} rows", lambda: aggregate(run)["tumor"])
    assert summary.num_scored == ROWS
    assert summary.dice.mean == pytest.approx(columns["dice"].mean())
    comparison = timed(f"comparison of two runs, {ROWS} rows each", lambda: compare_runs(run, other)["tumor"])
    assert comparison.difference == pytest.approx(0.01)
