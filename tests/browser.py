"""Debian's Chromium, headless, for the tests of what runs in a browser; whatever leaves this machine fails the test.

`pip install playwright` brings the driver only: no browser is downloaded. `apt-get install chromium` brings that.
"""

import os
import re
from urllib.parse import urlsplit

import pytest

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]
CONTROLS = r"button|checkbox|combobox|link|listbox|radio|searchbox|slider|spinbutton|switch|tab|textbox|img"


@pytest.fixture(scope="module")
def browser():
    """A browser for the tests of one module. Not of the session: its event loop is in the way of others."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip("needs Debian's Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page in a fresh profile. The test fails on a request to another host and on an error of a script."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        urls, errors = [], []
        context.on("request", lambda request: urls.append(request.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = context.new_page()
        page.on("websocket", lambda socket: urls.append(socket.url))
        page.set_default_timeout(60_000)  # milliseconds
        yield page
        assert [url for url in urls if is_foreign(url)] == []
        assert errors == []


def is_foreign(url: str) -> bool:
    """Whether a request for this address leaves the machine."""
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob", "about") and parts.hostname not in ("127.0.0.1", "localhost")


def unlabeled_controls(page) -> list[str]:
    """The visible controls and pictures that a screen reader could name by their role alone."""
    snapshot = page.locator("body").aria_snapshot()
    snapshot = re.sub(r'^( *- button "[^"\n]+"):\n +- img$', r"\1", snapshot, flags=re.MULTILINE)  # an icon
    return re.findall(rf"^ *- ((?:{CONTROLS})\b(?! [\"/]).*)$", snapshot, re.MULTILINE)


def overflow(page, width: int = 360) -> int:
    """By how many pixels the page is wider than a phone's window of this width."""
    page.set_viewport_size({"width": width, "height": 740})
    too_wide = 0
    for _ in range(20):  # until scripts have laid it out
        page.wait_for_timeout(250)  # milliseconds
        too_wide = page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")
        if too_wide <= 0:
            return 0
    return too_wide
