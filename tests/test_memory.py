"""Memory: a large array's pages are the kernel's again when it goes, whatever the process's environment says."""

import os
import platform
import subprocess
import sys

import pytest

from brainseg.environment import FOR_WORKERS
from brainseg.memory import give_back_from

MEASURED = """
import numpy as np
from brainseg.memory import give_back_from

def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024

if {early}:
    give_back_from(24_000_000)
arrays = [np.ones(size, np.uint8) for size in (60_000_000, 1_000, 60_000_000, 1_000)]
between, before = arrays[1::2], held()
del arrays[::2]
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own knob")
@pytest.mark.parametrize(("early", "least", "most"), [(True, 110_000_000, 130_000_000), (False, -1_000_000, 1_000_000)])
def test_large_arrays_are_handed_back(early, least, most):
    environment = {**os.environ, **FOR_WORKERS}
    code = MEASURED.format(early=early)
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert least < int(said.stdout) < most


def test_where_the_c_library_has_no_such_knob_nothing_happens(monkeypatch):
    asked = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: asked.append(name) or object())
    give_back_from(1 << 20)
    assert asked == [None]
