"""A headless browser for the pages that this project writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 60_000  # milliseconds: a busy machine is slow, and no test asserts how slow


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's browser; the test skips where there is none or no Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(
            executable_path=browser, chromium_sandbox=False, args=QUIET, timeout=PATIENCE
        ) as opened,
    ):
        yield opened


@contextmanager
def browser_tab(browser: Any, **options: Any) -> Iterator[Any]:
    """A page of a browser that knows nothing of its others.

    Args:
        browser: of `open_browser`.
        options: of Playwright's `new_context`, such as ``viewport`` and ``color_scheme``.
    """
    with browser.new_context(**options) as context:
        context.set_default_timeout(PATIENCE)
        yield context.new_page()


def eventually(tab: Any, expression: str) -> None:
    """Wait until an expression is true in the page. Playwright's own way needs eval, which the pages forbid."""
    limit = time.monotonic() + PATIENCE / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < limit, f"never true: {expression}"
        time.sleep(0.05)
