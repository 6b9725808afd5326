"""The checks of captions against pictures, references and training, on captions short enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficap.errors import InputError
from efficap.evaluation.bootstrap import score_intervals
from efficap.evaluation.grounding import (
    Gap,
    against_references,
    against_training,
    checks_line,
    describe,
    exchanged,
    verdict,
    verdict_line,
    words_of,
)
from efficap.evaluation.objects import hallucinated_share, objects_in, read_instances
from efficap.evaluation.scores import score_split
from efficap.evaluation.signature import signature
from efficap.evaluation.sums import scores_of_sums

LOOKS, LOOKS_NOT, CANNOT_TELL = Gap(0.3, 0.01), Gap(0.0, 0.01), Gap(0.05, 0.1)


def test_captions_are_described_by_what_can_be_counted() -> None:
    captions = ["A dog runs.", "a dog runs.", "A cat's on a mat on a mat on a mat."]
    assert describe(captions) == {
        "distinct": 1.0,  # letters' case counts, as in the scores
        "vocabulary": 6,  # a dog runs cat's on mat
        "mean_words": (3 + 3 + 11) / 3,
        "repetition": 4 / 11,  # of 1 + 1 + 9: "on a mat" twice, "a mat on" and "mat on a" once
    }
    assert describe(["", "a b"])["repetition"] == 0.0


def test_words_are_told_in_other_scripts_too() -> None:
    assert words_of("Zwei Männer, 3 Hunde — l'été; собака_бежит") == [
        "zwei", "männer", "3", "hunde", "l'été", "собака", "бежит"
    ]  # fmt: skip
    assert words_of("एक किताब, मेज़ पर") == ["एक", "किताब", "मेज़", "पर"]


def test_one_reference_of_each_picture_is_counted_for_as_many_captions_are() -> None:
    references = {"a": ["", "a red dog", "some other words"], "b": ["a cat", "more"], "c": []}
    checks = against_references(dict.fromkeys("abc", "a dog"), references)
    assert checks["vocabulary"] == 2
    assert checks["reference_vocabulary"] == 4
    assert (checks["mean_words"], checks["reference_mean_words"]) == (2.0, 2.5)
    assert checks["distinct"] == pytest.approx(1 / 3)
    assert checks["reference_distinct"] == 1.0
    assert "reference_vocabulary" not in against_references({"a": "x"}, {"a": []})


def test_what_stands_in_training_is_copied_and_what_no_caption_there_has_is_new() -> None:
    training = iter(["A dog runs!", "the cat", "a red house"])
    checks = against_training(["a dog runs", "A dog runs.", "a red zebu", ""], training)
    assert checks == {"copied": 0.5, "novel_words": 1 / 5}


def test_a_gap_is_judged_beyond_chance() -> None:
    rng = np.random.default_rng(0)
    assert Gap.of([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / np.sqrt(3)))
    assert Gap.of(rng.normal(0.5, 1.0, 1000).tolist()).verdict(0.05) == "yes"
    assert Gap.of(rng.normal(0.0, 0.1, 1000).tolist()).verdict(0.05) == "no"
    assert Gap.of(rng.normal(0.5, 1.0, 4).tolist()).verdict(0.05) == "unsure"


def test_pictures_are_exchanged_so_that_none_keeps_its_own_and_a_tables_period_is_lost() -> None:
    ids = [f"{number:02}" for number in range(24)]
    other_of = exchanged(ids)
    assert sorted(other_of) == sorted(other_of.values()) == ids
    assert all(own != other for own, other in other_of.items())
    alike = [int(own) % 4 == int(other) % 4 for own, other in other_of.items()]
    assert sum(alike) < 12, "a shift by half of these would exchange each for one of its kind"
    assert exchanged(ids[::-1]) == other_of
    assert exchanged(["a", "b"]) == {"a": "b", "b": "a"}


@pytest.mark.parametrize(
    ("loss", "cider", "said"),
    [
        (LOOKS, LOOKS, "yes"),
        (LOOKS, CANNOT_TELL, "yes"),
        (LOOKS, None, "yes"),
        (None, LOOKS_NOT, "no"),
        (LOOKS_NOT, LOOKS_NOT, "no"),
        (LOOKS, LOOKS_NOT, "unsure"),  # knows its pictures and says the same of all
        (CANNOT_TELL, None, "unsure"),
        (None, None, None),
    ],
)
def test_the_verdict_of_two_gaps(loss: Gap | None, cider: Gap | None, said: str | None) -> None:
    assert verdict(loss, cider) == said


def test_the_lines_on_the_screen() -> None:
    checks: dict[str, Any] = {"verdict": "yes", "loss_gap": 1.314, "CIDEr_gap": 4.6}
    assert verdict_line(checks) == "looks at the picture: yes (loss gap 1.31, CIDEr gap 4.60)"
    assert verdict_line({**checks, "loss_gap": -0.001}).endswith("(loss gap 0.00, CIDEr gap 4.60)")
    del checks["CIDEr_gap"]
    assert verdict_line(checks) == "looks at the picture: yes (loss gap 1.31)"
    assert verdict_line({"distinct": 1.0}) == ""
    line = checks_line({"distinct": 0.5, "reference_distinct": 1.0, "copied": 0.25})
    assert line == "captions: distinct 50% (people 100%), copied from training 25%"


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two dogs and a puppy on a couch", ["dog", "dog", "couch"]),
        ("a man eats a hot dog", ["person", "hot dog"]),
        ("an orange cat with two oranges", ["cat", "orange"]),
        ("a teddy bear beside a bear", ["teddy bear", "bear"]),
        ("blue skies, a train station and the buses", ["bus"]),
        ("two ladies and their babies on ferries", ["person", "person", "boat"]),
        ("a red square left of a circle", []),
    ],
)
def test_objects_are_found_under_all_their_names(caption: str, objects: list[str]) -> None:
    assert objects_in(caption) == objects


def write_instances(file: Path) -> Path:
    """A picture in which a cat and a cup are marked, and one in which nothing is."""
    content = {
        "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "two.jpg"}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 47, "name": "cup"}],
        "annotations": [{"image_id": 1, "category_id": 17}, {"image_id": 1, "category_id": 47}],
    }
    file.write_text(json.dumps(content))
    return file


def test_objects_that_neither_a_reference_nor_an_annotation_has_are_hallucinated(tmp_path: Path) -> None:
    predictions = {"val/one.jpg": "a dog, a cat and a mug", "val/two.jpg": "a man with a kite"}
    references = {"val/one.jpg": ["a puppy", "an animal"], "val/two.jpg": ["a woman outside"]}
    assert hallucinated_share(predictions, references) == 3 / 5  # cat, mug, kite
    instances = read_instances(write_instances(tmp_path / "instances.json"))
    assert hallucinated_share(predictions, references, instances) == 1 / 5
    assert hallucinated_share({**predictions, "three.jpg": "a cat"}, {**references, "three.jpg": []}) == 3 / 5
    assert hallucinated_share({"a": "a red square"}, {"a": ["a square"]}) is None
    with pytest.raises(InputError, match=r"none of the 1 pictures, such as three\.jpg"):
        hallucinated_share({"three.jpg": "a cat"}, {"three.jpg": []}, instances)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("[", "has no instance"), ("{}", "has no instance")]
)
def test_a_file_without_instances_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "captions.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"checks.instances=.*captions.json {message}"):
        read_instances(file)


def test_the_signature_tells_other_references_and_not_another_order() -> None:
    def signed(references: dict[str, list[str]], decoding: str = "greedy: max_tokens=12") -> str:
        return signature(
            "test",
            references,
            decoding=decoding,
            precision="float32",
            seed=0,
            resamples=1000,
            resample_seed=0,
        )

    line = signed({"a": ["x", "y"], "b": ["z"]})
    assert line == signed({"b": ["z"], "a": ["y", "x"]})
    assert len({line, signed({"a": ["x"], "b": ["z", "y"]}), signed({"a": ["x", "y"], "c": ["z"]})}) == 3
    assert line != signed({"a": ["x", "y"], "b": ["z"]}, "beam: num_beams=3")
    assert "|split:test|pictures:2|references:3|digest:" in line
    assert "\n" not in line


# --- intervals ---


def written(pictures: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Scenes of random things, with three references each and a caption that is more or less wrong."""
    rng = np.random.default_rng(0)
    colours, things = (
        ["red", "green", "blue", "grey", "white"],
        ["dog", "cat", "boat", "tree", "house", "car"],
    )
    predictions, references = {}, {}
    for number in range(pictures):
        colour, thing, other = rng.choice(colours), rng.choice(things), rng.choice(things)
        predictions[f"{number}"] = (
            f"a {colour} {thing if rng.random() < 0.6 else rng.choice(things)} and a {other}"
        )
        references[f"{number}"] = [
            f"a {colour} {thing} and a {other}", f"there is a {thing} with a {other}", f"one {colour} {thing}"
        ]  # fmt: skip
    return predictions, references


@pytest.mark.slow
def test_intervals_cover_the_full_splits_scores_in_at_least_93_of_100_subsets() -> None:
    """Of 200 subsets drawn anew; CIDEr with the document frequencies of the full split."""
    scores, parts = score_split(*written(1000), metrics=["BLEU", "ROUGE-L", "CIDEr"])
    rng = np.random.default_rng(1)
    covered = dict.fromkeys(("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"), 0)
    for _ in range(200):
        picked = rng.integers(0, 1000, 250)
        bounds = score_intervals(
            {metric: part[picked] for metric, part in parts.items()},
            resamples=300,
            seed=int(rng.integers(1e6)),
        )
        for name in covered:
            low, high = bounds[name]
            covered[name] += low <= float(scores[name] or 0) <= high
    assert min(covered.values()) >= 186, covered
    assert max(covered.values()) < 200, "as wide as all that would say nothing"


def test_sums_over_all_pictures_are_the_scores() -> None:
    scores, parts = score_split(*written(30), metrics=["BLEU", "ROUGE-L", "CIDEr"])
    of_sums = {
        name: float(value)
        for metric, part in parts.items()
        for name, value in scores_of_sums(metric, part.sum(axis=0), 30).items()
    }
    assert of_sums == pytest.approx(scores, rel=1e-9)
    assert score_intervals({}, resamples=10, seed=0) == {}
