"""Headless Chromium for tests of pages; they skip where there is none, or no playwright."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM = FOUND if importlib.util.find_spec("playwright") else None
"""path of the browser, None where pages cannot be tested"""
WIDER = """() => [...document.querySelectorAll('*')]
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map(e => e.tagName + '.' + e.className + '#' + e.id + ' ' + e.getBoundingClientRect().right)
    .concat(document.documentElement.scrollWidth > document.documentElement.clientWidth
        ? ['page ' + document.documentElement.scrollWidth] : [])"""
"""what reaches over the right edge of a page"""


@contextmanager
def browser() -> Iterator:
    """Yields open_page(address, width, height) -> (page, problems): whatever its console and its requests to
    other machines complain of is added to the list of problems.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_page(address: str, width: int, height: int):
            page, problems = chromium.new_page(viewport={"width": width, "height": height}), []
            page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda r: problems.append(r.url) if _elsewhere(r.url) else None)
            page.goto(address)
            return page, problems

        yield open_page
        chromium.close()


def _elsewhere(url: str) -> bool:
    """Whether an address is of another machine."""
    return url.startswith(("http:", "https:")) and "//127.0.0.1" not in url and "//localhost" not in url
