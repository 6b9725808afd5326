"""What captions look like before anybody reads them, and which of them are learned."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import PLAIN_TEXT

from efficap.data.text import CaptionText
from efficap.errors import InputError


def text(**changes: Any) -> CaptionText:
    return CaptionText(**{**PLAIN_TEXT, **changes})


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a red picture", "a red picture"),
        ("  a\tred \r\n picture\n", "a red picture"),
        ("a\u2028red\u2029picture\x85\x0b\x0c\x1c.", "a red picture ."),
        ("a\u00a0red\u3000picture", "a red picture"),
        ("Tom &amp; Jerry &lt;3 &#39;n&#x27; &quot;x&quot;", "Tom & Jerry <3 'n' \"x\""),
        ("a&nbsp;b", "a b"),
        ("&amp;amp;", "&amp;"),
        ("R&D & so on", "R&D & so on"),
        ("cafe\u0301", "café"),
        ("a\x00b\x07c\x7f", "abc"),
        ("a\ud83db", "ab"),
        ("\ud83d", ""),
        ("zero\u200bwidth\ufeff\u2060", "zerowidth"),
        ("👩\u200d🚀 in space", "👩\u200d🚀 in space"),
        ("मैं क\u094d\u200dष", "मैं क\u094d\u200dष"),
        ("日本語の写真。", "日本語の写真。"),
        ("\ue000private\U000e0fff", "private"),
        ("&#x2028;x&#10;y", "x y"),
        ("&#0;&#xD800;z", "\ufffd\ufffdz"),
        ("", ""),
        (" \n\u200b ", ""),
    ],
)
def test_captions_are_cleaned(caption: str, cleaned: str) -> None:
    assert text().clean(caption) == cleaned


@given(st.text(st.characters(codec=None)))
def test_what_is_cleaned_is_one_line_of_plain_text_and_stays_as_it_is(caption: str) -> None:
    cleaned = text().clean(caption)
    cleaned.encode("utf-8")
    assert cleaned == " ".join(cleaned.split())
    assert len(f"x{cleaned}x".splitlines()) == 1
    assert not [char for char in cleaned if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    if "&" not in cleaned:
        assert text().clean(cleaned) == cleaned
        assert unicodedata.is_normalized("NFC", cleaned)


@pytest.mark.parametrize(
    ("changes", "caption", "cleaned"),
    [
        ({"lowercase": True}, "A RED Picture, ÄÖ", "a red picture, äö"),
        ({"final_stop": "add"}, "a picture", "a picture."),
        ({"final_stop": "add"}, "a picture.", "a picture."),
        ({"final_stop": "add"}, "a picture?", "a picture?"),
        ({"final_stop": "add"}, "写真。", "写真。"),
        ({"final_stop": "add"}, "", ""),
        ({"final_stop": "remove"}, "a picture.", "a picture"),
        ({"final_stop": "remove"}, "a picture . ..", "a picture"),
        ({"final_stop": "remove"}, "写真。", "写真"),
        ({"final_stop": "remove"}, "a picture!", "a picture!"),
        ({"final_stop": "remove"}, "e.g. this", "e.g. this"),
        ({"final_stop": "remove"}, " . ", ""),
        ({"final_stop": "keep"}, "a picture .", "a picture ."),
        ({"lowercase": True, "final_stop": "add"}, " &Eacute;T&Eacute;\n", "été."),
    ],
)
def test_case_and_the_final_stop_are_as_asked_for(
    changes: dict[str, Any], caption: str, cleaned: str
) -> None:
    assert text(**changes).clean(caption) == cleaned


def test_captions_to_learn_are_chosen_and_the_others_counted() -> None:
    captions = ["one", "one two", "one two three", "one two three four", "", "a DOG here", "a dog here"]
    chooser = text(min_words=2, max_words=3, exclude="[Dd]og")
    left_out = {"fewer than 2 words": 1, "more than 3 words": 1, "empty": 1, "matches [Dd]og": 1}
    assert chooser.learnable(captions) == ([1, 2, 5], left_out)
    assert text().learnable(captions)[0] == [0, 1, 2, 3, 5, 6]
    assert text(min_words=1, max_words=1).learnable(captions)[0] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_stop": "drop"}, r"data.text.final_stop=drop must be keep, add or remove"),
        (
            {"min_words": 5, "max_words": 4},
            r"data.text.min_words=5 and data.text.max_words=4 leave no caption",
        ),
        ({"max_words": 0}, r"data.text.max_words=0 leave no caption"),
        ({"min_words": -1}, r"data.text.min_words=-1"),
        ({"exclude": "("}, r"data.text.exclude=\( is no regular expression"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text(**changes)
