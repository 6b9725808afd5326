"""Scores of the domains of a split."""

from __future__ import annotations

import pytest
from rich.console import Console
from test_scores import PREDICTIONS, REFERENCES

from efficap.errors import InputError
from efficap.evaluation import java
from efficap.evaluation.groups import check_groups, groups_table, score_groups
from efficap.evaluation.scores import score_captions

DOMAINS = {"dogs.jpg": "out", "bike.jpg": "in", "boat.jpg": "in", "girl.jpg": "out", "snow.jpg": "near"}


def test_a_domain_scores_as_a_split_of_its_pictures_alone_would() -> None:
    scores = score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["BLEU", "CIDEr"])
    assert list(dict.fromkeys(name.split("/")[0] for name in scores)) == ["in", "near", "out"]
    for domain in ("in", "out"):
        own = [image_id for image_id in PREDICTIONS if DOMAINS[image_id] == domain]
        alone = score_captions(
            {image_id: PREDICTIONS[image_id] for image_id in own},
            {image_id: REFERENCES[image_id] for image_id in own},
            metrics=["BLEU", "CIDEr"],
        )
        assert scores[f"{domain}/images"] == 2
        assert {name: scores[f"{domain}/{name}"] for name in alone} == alone


def test_a_domain_of_one_picture_has_no_cider_and_says_why() -> None:
    scores = score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["BLEU", "CIDEr"])
    assert scores["near/images"] == 1
    assert scores["near/CIDEr"] is None
    assert "one picture alone scores 0" in str(scores["near/CIDEr_error"])
    assert isinstance(scores["near/BLEU-1"], float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snow.jpg": ""}, "1 of 5 pictures have no value there: snow.jpg; fill the column"),
        ({"snow.jpg": "a/b"}, "the value 'a/b' must be without /"),
    ],
)
def test_pictures_without_a_domain_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_groups(DOMAINS | change, list(PREDICTIONS), "domain")


def test_the_table_has_a_row_for_each_domain_and_for_the_whole() -> None:
    whole = {"images": 5, **score_captions(PREDICTIONS, REFERENCES, metrics=["CIDEr"])}
    scores = whole | score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["CIDEr"])
    console = Console(record=True, width=120, quiet=False)
    with console.capture() as capture:
        console.print(groups_table(scores, "domain"))
    lines = [line.replace("│", " ").split() for line in capture.get().splitlines()]
    assert [line[0] for line in lines if line and line[0] in {*DOMAINS.values(), "entire"}] == [
        "in",
        "near",
        "out",
        "entire",
    ]
    assert ["near", "1", "-"] in lines


def test_where_java_fails_each_domain_says_so_and_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the PTB tokenizer ended with status 1")

    monkeypatch.setattr("efficap.evaluation.java.tokenize", fail)
    scores = score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["CIDEr"])
    for domain in set(DOMAINS.values()):
        assert scores[f"{domain}/CIDEr"] is None
        assert "status 1" in str(scores[f"{domain}/CIDEr_error"])


def test_java_starts_once_for_all_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tokenize = [], java.tokenize
    monkeypatch.setattr(java, "tokenize", lambda sentences: asked.append(sentences) or tokenize(sentences))
    score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["BLEU", "CIDEr"])
    assert len(asked) == 1


@pytest.mark.usefixtures("small_meteor")
def test_meteor_of_a_domain_is_that_of_its_pictures_alone() -> None:
    scores = score_groups(PREDICTIONS, REFERENCES, DOMAINS, metrics=["METEOR"])
    own = [image_id for image_id in PREDICTIONS if DOMAINS[image_id] == "in"]
    alone = score_captions(
        {image_id: PREDICTIONS[image_id] for image_id in own},
        {image_id: REFERENCES[image_id] for image_id in own},
        metrics=["METEOR"],
    )
    assert scores["in/METEOR"] == pytest.approx(alone["METEOR"], abs=1e-6)
