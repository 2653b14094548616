"""Pages as a person sees them, in headless Chromium at desktop and phone widths, light and dark."""

from __future__ import annotations

import os
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from made_summary import make_missed_summary, make_summary
from playwright.sync_api import sync_playwright

from mmcompress.report.comparison_pages import write_comparison, write_front
from mmcompress.report.page import write_report
from mmcompress.workspace.folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

SEVERE_IMPACTS = ("serious", "critical")
"""What axe-core finds that keeps people out."""

MAX_PAGE_BYTES = 5_000_000


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("MMCOMPRESS_REQUIRE"):
            pytest.fail("chromium is required here and missing")
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One page of every kind: a run, a missed target, several targets, several methods."""
    folder = tmp_path_factory.mktemp("pages")
    met, missed = make_summary(), make_missed_summary()
    return {
        "report": write_report(met, folder / "met"),
        "missed": write_report(missed, folder / "missed"),
        "front": write_front({"2x": met, "4x": missed}, RunFolder(path=folder)),
        "compare": write_comparison(
            {"searched": met, "random": missed},
            {"searched": "the search", "random": "the control"},
            claims=(),
            folder=RunFolder(path=folder),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["report", "missed", "front", "compare"])
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (390, "light")])
def test_a_page_is_whole_alone_and_accessible(browser, pages, kind, width, scheme):
    assert pages[kind].stat().st_size < MAX_PAGE_BYTES
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = pages[kind].as_uri()
    page.goto(address)
    assert told == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    # Wide tables and charts scroll in their own box, never the page.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = [
        (finding["id"], finding["nodes"][0]["html"])
        for finding in Axe().run(page).response["violations"]
        if finding["impact"] in SEVERE_IMPACTS
    ]
    context.close()
    assert found == []


@pytest.mark.slow
def test_on_a_phone_the_column_after_is_seen_without_scrolling(browser, pages):
    context = browser.new_context(viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.goto(pages["report"].as_uri())
    right = page.evaluate(
        "document.querySelector('table td:last-child').getBoundingClientRect().right"
    )
    context.close()
    assert 0 < right <= 390
