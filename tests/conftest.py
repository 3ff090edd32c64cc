"""What every test may use: the real scans, where they are; one local Ray for all that need one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from brainseg.environment import prepare_environment

prepare_environment()  # before any test module imports ray

# the same tree passes or fails twice, however busy the machine is; the slow fuzz draws anew
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


LONG = (
    "test_readme",
    "test_segment",
    "test_train",
    "test_kills",
    "test_pretrained",
    "test_bad_company",
    "test_cross_validation",
    "test_sweep",
    "test_the_whole_way_on_s3",
    "test_preflight",
    "test_on_a_gpu",
    "test_isolation",
    "test_specs",
)
"""Files that take minutes or half of one, the longest first: begun last, one of them keeps all other processes waiting."""


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, for the seconds in which Ray's processes wait for one another as they come up."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real scans that BRAINSEG_DATA names; the test is skipped without it."""
    place = os.environ.get("BRAINSEG_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("BRAINSEG_DATA names no folder of real scans")
    return Path(place).resolve()


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for the whole session, started as the product starts it."""
    import ray

    from brainseg.session import connect

    connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; the test is skipped where there is none, or nothing to drive it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install -e '.[browser]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this system: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a real Swift on loopback; the test is skipped where none can be had."""
    from object_stores import swift_server

    with swift_server(tmp_path_factory.mktemp("swift")) as endpoint:
        yield endpoint
