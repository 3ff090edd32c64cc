"""Pages as a browser shows them, and what it said of them."""

WIDTHS = (1280, 390)
"""Pixels of a desk's screen and of a phone's."""


def opened(browser, place, width=1280, scheme="light", fragment=""):
    """A page with everything that its console and its network say collected in `page.said`."""
    made = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    made.said, made.asked = [], []
    made.on("console", lambda line: made.said.append(line.text) if line.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: made.said.append(str(error)))
    made.on("request", lambda request: made.asked.append(request.url))
    made.goto(place.as_uri() + fragment)
    yield made
    assert made.said == []
    assert [url for url in made.asked if not url.startswith(("file:", "data:"))] == []
    made.close()


def names_of(page):
    return [name.strip() for name in page.locator("#cards h4").all_inner_texts()]


def column(page, number):
    return page.locator(f"#rows tbody td:nth-child({number})").all_inner_texts()
