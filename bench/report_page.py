"""The page of an evaluation: how long it takes to write, how large it is, and how it opens, searches and scrolls.

    python bench/report_page.py [--pictures 5000] [--browser chromium] [--short]

Photograph-like JPEGs of 640 x 480 with random captions. The page is opened from the disk in a headless browser with a
window of 1400 x 900 and no GPU; needs `pip install playwright`, and Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from data_files import write_captions, write_photograph

from efficap.evaluation.page.page import PAGE, write_page
from efficap.evaluation.pictures import PictureRecord
from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS

FILES = 100  # different ones; each is made small for every picture that uses it
PATIENCE = 300_000  # milliseconds, for what the page takes
QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
# A frame moves the page by a window; each promise ends when the frame after it is drawn.
FRAME = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
SEARCH = f"""async (word) => {{
  const frame = {FRAME};
  const form = document.querySelector("form");
  const before = form.querySelector("output").value;
  const start = performance.now();
  form.search.value = word;
  form.dispatchEvent(new Event("input"));
  while (form.querySelector("output").value === before) await frame();
  await frame();
  return performance.now() - start;
}}"""
SCROLL = f"""async (frames) => {{
  const frame = {FRAME};
  document.querySelector("form").parentElement.scrollIntoView();
  const times = [];
  for (let number = 0; number < frames; number++) {{
    const start = performance.now();
    scrollBy(0, innerHeight);
    await frame();
    times.push(performance.now() - start);
  }}
  return times.sort((a, b) => a - b);
}}"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=5000, help="on the page (default: 5000)")
    parser.add_argument("--browser", default="chromium", help="name or path (default: chromium)")
    parser.add_argument("--short", action="store_true", help="200 pictures")
    options = parser.parse_args()
    pictures = 200 if options.short else options.pictures
    browser = shutil.which(options.browser)
    if browser is None:
        raise SystemExit(f"--browser {options.browser} is not on the PATH; name one")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / PAGE
        seconds, cores = _write(page, pictures)
        size = page.stat().st_size / 1e6
        print(f"{pictures:,} pictures: written in {seconds:.1f} s, {cores:.1f} s of a core; {size:.1f} MB")
        _open(page, browser, Path(place) / "browser")
    return 0


def _write(page: Path, pictures: int) -> tuple[float, float]:
    """Write the page of so many pictures; the seconds that it took, by the clock and of a core."""
    folder = page.parent
    names = [f"{number}.jpg" for number in range(min(FILES, pictures))]
    for seed, name in enumerate(names):
        write_photograph(folder / name, seed)
    captions = write_captions(folder / "captions.csv", names)
    chance = random.Random(0)
    records = [
        PictureRecord(
            f"{number:06d}",
            chance.choice(captions),
            chance.sample(captions, 5),
            folder / names[number % len(names)],
            PictureScores(min(10.0, chance.expovariate(1.0)), (0,) * BLEU_COUNTS),
        )
        for number in range(pictures)
    ]
    files = {record.image_id: record.image for record in records}
    start, spent = time.perf_counter(), time.process_time()
    write_page(
        page,
        title="bench: test",
        scores={"split": "test", "images": pictures},
        records=records,
        pictures=files.__getitem__,
        limit=pictures,
    )
    return time.perf_counter() - start, time.process_time() - spent


def _open(page: Path, browser: str, profile: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=browser,
            chromium_sandbox=False,
            args=list(QUIET),
            viewport={"width": 1400, "height": 900},
        )
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE)
        start = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector("h1")
        first = time.perf_counter() - start
        tab.wait_for_selector("body.scripted .strip img", state="attached")
        print(f"scores seen after {first:.2f} s, pictures after {time.perf_counter() - start:.2f} s")
        searches = [tab.evaluate(SEARCH, word) for word in ("dog", "dog kitchen", "", "zebra")]
        print(f"search: {_milliseconds(searches)} until the page shows what was found")
        tab.evaluate(SEARCH, "")
        frames: list[float] = tab.evaluate(SCROLL, 200)
        print(
            f"scrolling by a window a frame: median {frames[100]:.0f} ms, 95 % {frames[190]:.0f}, most {frames[-1]:.0f}"
        )
        context.close()


def _milliseconds(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
