"""How long the command line takes to answer `--help`: the goal is half a second."""

import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.bench


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "brainseg.cli", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    print(f"\nbrainseg --help: best of 5 {min(seconds):.2f} s, goal 0.50 s")
    assert min(seconds) < 1.0
