"""Draw the picture of a report that the README shows.

    python tools/draw_screenshot.py reports/clip_captioner/2x/report.html docs/images/report.png

It needs Chromium, and playwright from the extra `dev`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

VIEW = {"width": 1040, "height": 1370}
"""Pixels of the page that are drawn: from its top to the map of the structure."""

COLORS = 64
"""Colours of the picture: a page has few, and a small file loads quickly."""


def main() -> None:
    """Draw the upper part of a page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        page.goto(arguments.page.resolve().as_uri())
        page.screenshot(path=arguments.picture)
        browser.close()
    with Image.open(arguments.picture) as picture:
        picture.convert("RGB").quantize(COLORS).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
