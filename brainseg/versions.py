"""Versions: what software made a result, for every run and model to record."""

import platform
from importlib.metadata import PackageNotFoundError, version

RECORDED = ("brainseg", "ray", "torch", "numpy", "pyarrow", "nibabel", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found
