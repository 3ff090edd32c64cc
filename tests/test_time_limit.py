"""Time limit: a call that does not come back is given up, the next one is not held up by it."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from brainseg import time_limit
from brainseg.errors import Code, ScanError
from brainseg.time_limit import MOST_LEFT_BEHIND, TimeLimit

ROOT = str(Path(time_limit.__file__).parents[1])


def test_a_call_gives_what_it_gives_and_raises_what_it_raises():
    limit = TimeLimit(5)
    assert [limit.call(lambda n=n: n * n, "s") for n in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        limit.call(lambda: 1 / 0, "s")
    with pytest.raises(MemoryError):
        limit.call(lambda: (_ for _ in ()).throw(MemoryError), "s")
    assert limit.call(lambda: None, "s") is None


def test_a_call_that_hangs_is_given_up_and_the_next_one_is_answered_by_somebody_else():
    release = threading.Event()
    limit = TimeLimit(0.1)
    with pytest.raises(ScanError, match=r"^s1: found no end of reading within 0\.1 s") as caught:
        limit.call(lambda: release.wait(30), "s1")
    assert caught.value.code == Code.TIMEOUT
    assert limit.call(lambda: "next", "s2") == "next"
    release.set()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_ones():
    limit = TimeLimit(0.05)
    for n in range(5):
        with pytest.raises(ScanError):
            limit.call(lambda: time.sleep(0.15) or "late", "s")
        assert limit.call(lambda n=n: n, "s") == n
        time.sleep(0.05)


def test_a_process_in_which_many_hang_should_be_replaced_but_not_one_whose_calls_were_only_slow():
    release = threading.Event()
    limit = TimeLimit(0.02)
    for n in range(MOST_LEFT_BEHIND):
        assert not limit.is_worn, n
        with pytest.raises(ScanError):
            limit.call(lambda: release.wait(30), "s")
    assert limit.is_worn
    release.set()
    deadline = time.monotonic() + 10
    while limit.is_worn:
        assert time.monotonic() < deadline


def test_a_process_that_hangs_with_pythons_lock_held_is_ended():
    code = "import ctypes; from brainseg.time_limit import TimeLimit; "
    code += "TimeLimit(0.2, fatal=True).call(lambda: ctypes.PyDLL(None).sleep(30), 's')"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGALRM
    assert "time_limit.py" in done.stderr
    assert time.monotonic() - started < 20


def test_a_fatal_limit_spares_a_call_that_ends_and_one_that_only_hangs():
    code = "import time; from brainseg.errors import ScanError; from brainseg.time_limit import TimeLimit\n"
    code += "limit = TimeLimit(0.3, fatal=True)\n"
    code += "try: limit.call(lambda: time.sleep(60), 's')\nexcept ScanError: pass\n"
    code += "limit.call(lambda: None, 's'); time.sleep(2); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    assert done.stdout == "alive\n", done.stderr


def test_it_costs_less_than_a_hundredth_of_the_smallest_scan():
    """A single picture takes 10 ms to read and decode."""
    limit = TimeLimit(300)
    limit.call(lambda: None, "s")
    costs = []
    for _ in range(500):
        started = time.perf_counter()
        limit.call(lambda: None, "s")
        costs.append(time.perf_counter() - started)
    assert min(costs) < 0.0001
