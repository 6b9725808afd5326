"""report.html in a headless browser, used as a person would."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser_tab, eventually, open_browser
from PIL import Image

from efficap.evaluation.page.page import write_page
from efficap.evaluation.pictures import PictureRecord
from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror='attacked = 1'></script><script>attacked = 1</script>"
HEBREW = "כלב חום רץ על החוף"
COUNT = 90
SHOWN = "Array.from(document.querySelectorAll('#all .caption'), caption => caption.textContent)"


def _records() -> list[PictureRecord]:
    """Shades of grey, one of them unreadable; 6 have a zebra, and one each a caption of markup and in Hebrew."""
    chance = random.Random(1)
    records = []
    for number in range(COUNT):
        animal = "zebra" if number % 15 == 0 else "dog"
        caption = {4: EVIL, 5: HEBREW}.get(number, f"a {animal} number {number}" + " very" * (number % 7))
        scores = PictureScores(chance.uniform(0, 4), (0,) * BLEU_COUNTS)
        records.append(PictureRecord(f"{number}.png", caption, [f"a {animal}", EVIL], scores=scores))
    return records


RECORDS = _records()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")

    def picture(image_id: str) -> Path | Image.Image:
        number = int(image_id.removesuffix(".png"))
        return folder / "absent.png" if number == 3 else Image.new("RGB", (200, 100), (2 * number,) * 3)

    failed = {"METEOR": None, "METEOR_error": "java: " + "x" * 300}
    checks = {"verdict": "unsure", "loss": 2.0, "loss_shuffled": 2.1, "loss_gap": 0.1}
    scores = {"images": COUNT, "CIDEr": 2.0, "intervals": {"CIDEr": [1.9, 2.1]}, "checks": checks, **failed}
    path = folder / "report.html"
    write_page(path, title="run: test", scores=scores, records=RECORDS, pictures=picture, limit=COUNT)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def tab(report: Path, browser: Any) -> Iterator[Any]:
    """The open page, which must not complain nor ask for anything."""
    with browser_tab(browser, viewport={"width": 1200, "height": 800}) as tab:
        asked: list[str] = []
        said: list[str] = []
        tab.on("request", lambda request: asked.append(request.url.partition(",")[0]))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(report.as_uri())
        tab.wait_for_selector("body.scripted")
        yield tab
        assert {url for url in asked if not url.startswith("data:image/webp;base64")} == {report.as_uri()}
        assert said == []


def cards(tab: Any, expected: int) -> list[str]:
    """The captions of the gallery once it shows so many pictures, as far as they are laid out."""
    found = f"document.querySelector('output').value == '{expected} of {COUNT} pictures'"
    eventually(tab, f"{found} && document.querySelectorAll('#all figure').length == {expected}")
    tab.locator("#all").evaluate("element => element.scrollIntoView()")
    if expected:
        tab.wait_for_selector("#all .caption")
    return tab.evaluate(SHOWN)


def test_the_best_the_worst_and_random_pictures_stand_above_all_others(tab: Any) -> None:
    ranked = sorted(RECORDS, key=lambda record: -record.scores.cider)
    best = tab.locator("#best .caption").all_text_contents()
    assert best == [record.caption for record in ranked[:12]]
    assert tab.locator("#worst .caption").first.text_content() == ranked[-1].caption
    assert tab.locator("#random figure").count() == 12
    assert (
        tab.locator("#best .note").first.text_content().startswith(f"CIDEr {ranked[0].scores.cider:.2f} · ")
    )
    eventually(tab, "document.querySelector('#best img').naturalWidth == 200")


def test_search_filter_and_order_find_pictures(tab: Any) -> None:
    assert cards(tab, COUNT)[0] == RECORDS[0].caption
    tab.fill("[name=search]", "ZEBRA 5")
    found = [r for r in RECORDS if "zebra" in r.caption and "5" in f"{r.caption} {r.image_id}"]
    assert cards(tab, len(found)) == [record.caption for record in found]
    tab.fill("[name=search]", "onerror=")  # of a reference
    cards(tab, COUNT)
    tab.fill("[name=search]", "giraffe")
    assert cards(tab, 0) == []
    tab.click("[type=reset]")
    cards(tab, COUNT)

    tab.fill("[name=cider-from]", "1")
    tab.fill("[name=cider-to]", "2.5")
    tab.fill("[name=words-from]", "7")
    tab.select_option("[name=order]", "worst")
    found = [r for r in RECORDS if 1 <= round(r.scores.cider, 2) <= 2.5 and len(r.caption.split()) >= 7]
    found.sort(key=lambda record: record.scores.cider)
    shown = cards(tab, len(found))
    assert shown == [record.caption for record in found if record.caption in shown]
    assert len(shown) > 1


def test_a_click_on_a_bar_shows_its_pictures(tab: Any) -> None:
    for number in (0, 5):
        tab.click("[type=reset]")
        bar = tab.locator("[data-field=cider]").nth(number)
        low, high = (float(bar.get_attribute(f"data-{end}")) for end in ("from", "to"))
        bar.locator(".reach").click()
        cards(tab, sum(low <= round(record.scores.cider, 2) <= high for record in RECORDS))
        assert tab.input_value("[name=cider-from]") == f"{low:.2f}"


def test_pictures_are_held_only_near_the_window(tab: Any) -> None:
    held = "Array.from(document.querySelectorAll('#all img'), image => image.hasAttribute('src'))"
    cards(tab, COUNT)
    eventually(tab, f"({held}).some(Boolean)")
    assert tab.locator("#all .caption").count() < COUNT
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    eventually(tab, f"!({held})[0] && document.querySelector('#all').lastChild.querySelector('img[src]')")
    eventually(tab, "document.querySelector('#all').lastChild.querySelector('img').naturalWidth == 200")


def test_captions_are_text_in_their_own_direction_and_an_unreadable_picture_is_a_note(tab: Any) -> None:
    shown = cards(tab, COUNT)
    assert EVIL in shown
    assert tab.evaluate("typeof attacked") == "undefined"
    hebrew = tab.locator("#all .caption").filter(has_text=HEBREW)
    assert hebrew.evaluate("caption => getComputedStyle(caption).direction") == "rtl"
    assert "cannot be read" in tab.locator("#all figure").nth(3).text_content()


@pytest.mark.parametrize("width", [320, 1200])
def test_the_page_fits_narrow_windows_and_is_dark_where_that_is_wanted(
    report: Path, browser: Any, width: int
) -> None:
    options = {"viewport": {"width": width, "height": 700}, "color_scheme": "dark"}
    with browser_tab(browser, **options) as tab:
        tab.goto(report.as_uri())
        tab.wait_for_selector("body.scripted")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 50


def test_without_scripts_the_scores_are_there_and_the_page_says_what_is_missing(
    report: Path, browser: Any
) -> None:
    with browser_tab(browser, java_script_enabled=False) as tab:
        tab.goto(report.as_uri())
        text = tab.locator("body").inner_text()
        assert "1.900 to 2.100" in text
        assert "captions.json beside it" in text
