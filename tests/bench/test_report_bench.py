"""How long a report of a large cohort takes, how much memory, how large its page is: printed, and held to wide bounds."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
SCANS = 20_000
CODE = """
import resource, sys, time
from brainseg.report import build_report
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
made = build_report([sys.argv[1]], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - started, (peak - before) / 1024, made.size_bytes)
"""


def test_a_report_of_60_000_rows_is_made_in_seconds_and_stays_small(tmp_path):
    run, page = str(tmp_path / "run"), str(tmp_path / "report.html")
    subprocess.run([sys.executable, str(Path(__file__).with_name("million_rows.py")), run, str(SCANS)], check=True)
    done = subprocess.run([sys.executable, "-c", CODE, run, page], check=True, capture_output=True, text=True)
    seconds, mebibytes, size = map(float, done.stdout.split())
    print(f"\n{3 * SCANS:,} rows: {seconds:.1f} CPU s, {mebibytes:.0f} MiB above the imports, page {size / 1e6:.2f} MB")
    assert size < 5_000_000
    assert mebibytes < 400
    assert seconds < 60
