"""On a GPU. What is checked stands in `gpu_checks`: it gives torch a further device, which no other test should meet."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_nothing_is_mixed_and_the_answers_are_the_cpus():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "gpu_checks.py"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
