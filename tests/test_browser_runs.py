"""Browser: the pages of whole runs, from files to a reader's clicks, held against the run's own Parquet."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from browsed import WIDTHS, column, names_of, opened

from brainseg import commands, shipped
from brainseg.config import How
from brainseg.console import Voice
from brainseg.phantom import write_archive

MOST_BYTES = 3_000_000
SCANS, BROKEN = 1000, 12
DICE, STATE = 5, 4


def reported(archive, model, place):
    """The archive segmented, and its report made; (the page, the run's figures)."""
    if model not in shipped.names():
        pytest.skip(f"no model called {model} ships with this version")
    run = place / "run"
    commands.segment(str(archive), model, str(run), Voice(quiet=True), How(accept_noncommercial=True))
    commands.report([str(run)], None, Voice(quiet=True))
    return run / "report.html", pq.read_table(run / "metrics.parquet")


@pytest.fixture(scope="module")
def phantoms(browser, local_ray, tmp_path_factory):
    """A thousand synthetic slices, some of them damaged."""
    place = tmp_path_factory.mktemp("phantoms")
    write_archive(place / "archive", "figshare", scans=SCANS, broken=BROKEN)
    return reported(place / "archive", "figshare-t1c", place)


@pytest.fixture(scope="module")
def lgg(browser, local_ray, data_dir, tmp_path_factory):
    """The real LGG patients, all of them."""
    pytest.importorskip("PIL", reason="the real scans are unpacked with Pillow")
    place = tmp_path_factory.mktemp("lgg")
    subprocess.run([sys.executable, str(data_dir / "unpack.py"), "lgg", str(place)], check=True, capture_output=True)
    return reported(place / "kaggle_3m", "lgg-flair", place)


@pytest.fixture(params=[pytest.param("phantoms", marks=pytest.mark.slow), "lgg"])
def whole(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def page(browser, whole):
    yield from opened(browser, whole[0])


def numbers(texts):
    return np.array([float(text) for text in texts if text not in ("–", "")])


@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_small_and_fits_the_screen(browser, whole, width):
    assert whole[0].stat().st_size < MOST_BYTES
    for page in opened(browser, whole[0], width):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelectorAll('*').length") < 6000


def test_sorted_by_dice_it_begins_with_the_parquets_own_worst(page, whole):
    dice = np.sort(whole[1]["dice"].drop_null().to_numpy())
    page.click("[data-view=table]")
    header = page.locator(f"#rows th:nth-child({DICE})")
    assert header.inner_text().startswith("Dice")
    for direction, expected in (("ascending", dice), ("descending", dice[::-1])):
        while header.get_attribute("aria-sort") != direction:
            header.locator("button").click()
        shown = numbers(column(page, DICE))
        assert len(shown) > 10
        np.testing.assert_allclose(shown, expected[: len(shown)], atol=5.1e-4)


def test_its_pages_show_every_scan_of_the_parquet_once(page, whole):
    for view in ("pictures", "table"):
        page.click(f"[data-view={view}]")
        shown = []
        while True:
            shown += names_of(page) if view == "pictures" else [name.strip() for name in column(page, 1)]
            if page.is_disabled("#next"):
                break
            page.click("#next")
        assert len(shown) == len(set(shown))
        assert set(shown) == set(whole[1]["scan_id"].to_pylist())


def test_its_filter_leaves_as_many_as_the_parquet_has(page, whole):
    states = {s["values"]: s["counts"] for s in pc.value_counts(whole[1]["state"]).to_pylist()}
    page.click("[data-view=table]")
    for state in ("both", "missed", "spurious"):
        page.select_option("#state", state)
        assert page.locator("#where").inner_text().endswith(f"of {states.get(state, 0):,}")
        assert set(column(page, STATE)) <= {state}


def test_its_first_figure_is_the_mean_of_the_parquet(page, whole):
    table = whole[1]
    split = next(side for side in ("test", None, "validation", "train") if side in table["split"].to_pylist())
    side = pc.is_null(table["split"]) if split is None else pc.fill_null(pc.equal(table["split"], split), False)
    dice = table.filter(side)["dice"].drop_null().to_numpy()
    assert f"\n{dice.mean():.3f}\n" in page.locator("#figures").inner_text()


def test_its_links_lead_somewhere(page):
    targets = set(page.eval_on_selector_all("a[href]", "all => all.map((a) => a.getAttribute('href'))"))
    scans = sorted(target for target in targets if target.startswith("#scan="))
    assert all(page.locator(target).count() == 1 for target in targets.difference(scans))
    known = {row[0] for row in json.loads(page.locator("#data").inner_text())["rows"]}
    for target in scans[:3]:
        page.evaluate("hash => { location.hash = hash }", target)
        page.wait_for_selector("#scan[open]")
        assert page.locator("#scan-title").inner_text() in known
        assert page.locator("#scan-body svg.slice").count() == 3
        page.click("#scan-close")


def test_it_prints_to_a_pdf(page):
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert 20_000 < len(pdf) < 20_000_000
