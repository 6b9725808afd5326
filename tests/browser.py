"""A headless browser for the pages that this project writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 60_000  # milliseconds: a busy machine is slow, and no test asserts how slow


@contextmanager
def browser_tab(profile: Path, **options: Any) -> Iterator[Any]:
    """A Playwright page in a browser of its own; the test skips where there is no browser or no Playwright.

    Args:
        profile: an empty folder for what the browser keeps.
        options: of Playwright's `launch_persistent_context`, such as ``viewport`` and ``color_scheme``.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=browser, chromium_sandbox=False, args=QUIET, timeout=PATIENCE, **options
        )
        context.set_default_timeout(PATIENCE)
        try:
            yield context.new_page()
        finally:
            context.close()


def eventually(tab: Any, expression: str) -> None:
    """Wait until an expression is true in the page. Playwright's own way needs eval, which the pages forbid."""
    limit = time.monotonic() + PATIENCE / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < limit, f"never true: {expression}"
        time.sleep(0.05)
