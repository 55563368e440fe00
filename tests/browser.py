"""A real Chromium for tests of pages, and what a page must never do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
MISSING = "there is no Chromium on this machine: pages are not tested (Debian: apt-get install chromium)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed with its module: playwright, while open, runs an event loop in this thread, and others cannot."""
    if not CHROMIUM:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        # no sandbox: root has none, as in containers; nothing but our own pages is opened
        yield (opened := playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]))
        opened.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not CHROMIUM and any(MISSING in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(f"NOT TESTED: {MISSING}", red=True)


@contextmanager
def page_of(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """A page at `url`; at the end: no complaint in the console, no error, nothing asked of another host."""
    own = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | context))
    page = own.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    try:
        page.goto(url)
        yield page
        assert wrong == []
        home = "/".join(page.url.split("/")[:3]) + "/"
        assert [one for one in asked if not one.startswith((home, "data:", "about:blank"))] == []
    finally:
        own.close()
