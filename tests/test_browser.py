"""Browser: the pages in a real one. Skips where there is no Chromium or no Playwright to drive it."""

import json
import re

import numpy as np
import pytest
from browsed import WIDTHS, column, names_of, opened
from rows_as_runs import SHAPE, failed_row, scan_row, tumour, typical_rows, write_run

from brainseg import report
from brainseg.report.view import build_view

HOSTILE = "\"><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7 * 7 }} 'é/#%&"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """130 scans of two regions; one of them hostile, some missed, spurious, empty, unlabelled, failed."""
    base = typical_rows(16)
    rows = [
        dict(base[i % 16], scan_id=f"copy-{i:03d}", patient_id=f"c{i:03d}", attributes=[("site", "AB"[i % 2])])
        for i in range(110)
    ]
    evil = scan_row(HOSTILE, patient="evil", label=tumour((2, 18, 16), 6), prediction=tumour((2, 18, 12), 6))
    return write_run(tmp_path_factory.mktemp("browser") / "run", [*base, *rows, evil, failed_row("lost", patient="lost")])


@pytest.fixture(scope="module")
def page_file(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "report.html"
    report.build_report([run], str(place), compare=run, reference=run)
    return place


@pytest.fixture
def page(browser, page_file):
    yield from opened(browser, page_file)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_in_the_console_and_fits_the_screen(browser, page_file, width, scheme):
    for page in opened(browser, page_file, width, scheme):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelectorAll('*').length") < 6000
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_table_is_sorted_by_the_column_that_is_clicked(page):
    page.click("[data-view=table]")
    for name, number in (("Dice", 5), ("Label mL", 9)):
        page.click(f"#rows th button:text-is('{name}')")
        if page.locator(f"#rows th:nth-child({number})").get_attribute("aria-sort") != "ascending":
            page.click(f"#rows th button:text-is('{name}')")
        shown = [float(v.replace(",", "")) for v in column(page, number) if v not in ("–", "")]
        assert shown == sorted(shown)
        page.click(f"#rows th button:text-is('{name}')")
        shown = [float(v.replace(",", "")) for v in column(page, number) if v not in ("–", "")]
        assert shown == sorted(shown, reverse=True)
        assert len(shown) > 10


def test_pages_of_pictures_and_table_show_every_scan_once(page):
    for view, each in (("pictures", 12), ("table", 50)):
        page.click(f"[data-view={view}]")
        shown = []
        while True:
            here = names_of(page) if view == "pictures" else [x.strip() for x in column(page, 1)]
            assert 0 < len(here) <= each
            shown += here
            if page.is_disabled("#next"):
                break
            page.click("#next")
        assert len(shown) == len(set(shown)) == 131
        page.click("#back")
        assert page.locator("#where").inner_text().endswith("of 131")


def test_filters_by_words_and_state_leave_what_fits(page):
    page.fill("#find", "copy-00")
    assert page.locator("#where").inner_text() == "1 to 10 of 10"
    page.fill("#find", "")
    page.select_option("#state", "missed")
    page.click("[data-view=table]")
    assert set(column(page, 4)) == {"missed"}
    page.select_option("#state", "")
    page.select_option("#split", "test")
    assert set(column(page, 3)) == {"test"}
    page.fill("#find", "nobody is called this")
    assert page.locator("#where").inner_text() == "0 to 0 of 0"


def test_a_point_opens_its_scan_and_the_arrows_go_on_from_there(page):
    data = json.loads(page.locator("#data").inner_text())
    for chart in ("dice", "volume-0", "bland-0", "hd95-0", "versus-0"):
        svg = page.locator(f"figure[data-chart={chart}] svg")
        svg.focus()
        page.keyboard.press("ArrowRight")
        said = page.locator("#tip b").inner_text()
        page.keyboard.press("Enter")
        assert page.locator("#scan-title").inner_text() == said
        assert said in {row[0] for row in data["rows"]}
        assert page.locator("#scan-body svg.slice").count() == 3
        page.keyboard.press("Escape")
        assert not page.locator("#scan").is_visible()


def test_a_click_on_a_dot_opens_the_scan_whose_figures_it_stands_for(page):
    svg = page.locator("figure[data-chart=volume-0] svg")
    svg.scroll_into_view_if_needed()
    path = svg.locator("path.dots").first
    x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)", path.get_attribute("d")).groups())
    at = svg.evaluate("(s, p) => { const q = new DOMPoint(...p).matrixTransform(s.getScreenCTM()); return [q.x, q.y] }", [x, y])
    page.mouse.click(*at)
    data = json.loads(page.locator("#data").inner_text())
    row = next(r for r in data["rows"] if r[0] == page.locator("#scan-title").inner_text())
    assert row[4][0][1] == pytest.approx((236 - 38 - y) / (236 - 38 - 18), abs=0.002)
    page.click("#scan-next")
    assert page.locator("#scan-title").inner_text() != row[0]
    page.click("#scan-back")
    assert page.locator("#scan-title").inner_text() == row[0]
    page.click("#scan-close")


def test_every_link_leads_somewhere(page):
    targets = page.eval_on_selector_all("a[href]", "all => all.map((a) => a.getAttribute('href'))")
    scans = {t for t in targets if t.startswith("#scan=")}
    assert len(scans) > 12
    for target in set(targets) - scans:
        assert page.locator(target).count() == 1
    ids = set(json.loads(page.locator("#data").inner_text())["charts"])
    assert ids == {
        f for f in page.eval_on_selector_all("figure[data-chart]", "all => all.map((f) => f.dataset.chart)") if f in ids
    }
    for target in list(scans)[:3]:
        page.evaluate("hash => { location.hash = hash }", target)
        page.wait_for_selector("#scan[open]")
        page.click("#scan-close")


def test_a_hostile_scan_can_be_found_opened_and_does_nothing(browser, page_file):
    for page in opened(browser, page_file):
        page.fill("#find", "owned")
        assert names_of(page) == [HOSTILE]
        page.click("#cards a")
        assert page.locator("#scan-title").inner_text() == HOSTILE
        assert "owned" not in page.title()
        assert page.locator("body img").count() == 0
        link = page.url.split("#", 1)[1]
    for page in opened(browser, page_file, fragment=f"#{link}"):
        assert page.locator("#scan-title").inner_text() == HOSTILE


def test_it_prints_to_a_pdf_with_every_region_and_nothing_to_click(page):
    page.emulate_media(media="print")
    assert page.locator("figure[data-region='1'] svg").first.is_visible()
    assert not page.locator("#find").is_visible()
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert 20_000 < len(pdf) < 20_000_000


def test_another_region_changes_charts_and_table(page):
    page.click("[data-choose='1']")
    assert page.locator("figure[data-region='1'] svg").first.is_visible()
    assert not page.locator("figure[data-chart=volume-0]").is_visible()
    assert page.locator("#region").input_value() == "1"


def test_the_page_of_one_scan_goes_through_its_slices(browser, run, tmp_path):
    place = tmp_path / "view.html"
    build_view(run, HOSTILE, str(place))
    for page in opened(browser, place):
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.locator("#said").inner_text().startswith("Slice 3 of 4")
        assert page.locator("#slice path.prediction").count() == 2
        page.keyboard.press("ArrowRight")
        assert page.locator("#said").inner_text().startswith("Slice 4 of 4")
        page.keyboard.press("ArrowRight")
        assert page.locator("#said").inner_text().startswith("Slice 4 of 4")
        page.keyboard.press("Home")
        page.keyboard.press("p")
        assert page.locator("#slice path.prediction").count() == 0
        page.locator("#at").fill("0")
        assert page.locator("#said").inner_text().startswith(f"Slice 1 of {SHAPE[0]}")
        assert np.all([page.locator("#image").is_disabled(), page.locator("#label").is_disabled()])
