"""CIDEr-D of ids: against pycocoevalcap's, and by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer

from efficap.evaluation.cider_d import CiderD

EOS = 0


class _AsManyAs(list):
    """The images to score, as many as the documents that the frequencies come from."""

    documents: int

    def __len__(self) -> int:
        return self.documents


def pycocoevalcap(candidates, references, documents):
    """Its scores of several candidates an image, with the document frequencies of other documents."""

    def text(ids):
        return " ".join(f"w{token}" for token in ids)

    corpus = CiderScorer()
    for document in documents:
        corpus += ("", [text(ids) for ids in document])
    corpus.compute_doc_freq()
    scorer = CiderScorer()
    for of_image, expected in zip(candidates, references, strict=True):
        for ids in of_image:
            scorer += (text(ids), [text(reference) for reference in expected])
    scorer.document_frequency = corpus.document_frequency
    scorer.crefs = _AsManyAs(scorer.crefs)
    scorer.crefs.documents = len(documents)
    return np.array(scorer.compute_cider()).reshape(len(candidates), -1)


def sentence(rng, longest=14, words=60):
    return [int(words * rng.random() ** 3) for _ in range(rng.randint(0, longest))]


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_pycocoevalcaps(seed):
    rng = random.Random(seed)
    documents = [[sentence(rng) for _ in range(rng.randint(1, 5))] for _ in range(80)]
    references = documents[:12]
    candidates = [
        [
            rng.choice([sentence(rng), rng.choice(known), rng.choice(known)[:4] + sentence(rng)])
            for _ in range(4)
        ]
        for known in references
    ]
    scores = CiderD(documents)(candidates, references)
    assert scores.shape == (12, 4)
    assert scores.max() > 1, "some are alike"
    np.testing.assert_allclose(scores, pycocoevalcap(candidates, references, documents), atol=1e-6)


ids = st.lists(st.integers(0, 3), max_size=7)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(ids, min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.lists(ids, min_size=2, max_size=2), min_size=4, max_size=4),
)
def test_short_empty_and_repetitive_sequences_are_scored_as_pycocoevalcap_does(documents, candidates):
    candidates = candidates[: len(documents)]
    scores = CiderD(documents)(candidates, documents)
    np.testing.assert_allclose(scores, pycocoevalcap(candidates, documents, documents), atol=1e-6)


def test_frequencies_of_many_documents_are_added_up(monkeypatch):
    rng = random.Random(0)
    documents = [[sentence(rng)] for _ in range(50)]
    candidates = [[sentence(rng) for _ in range(3)] for _ in range(50)]
    whole = CiderD(documents)(candidates, documents)
    monkeypatch.setattr("efficap.evaluation.cider_d._DOCUMENTS_AT_ONCE", 7)
    np.testing.assert_array_equal(CiderD(iter(documents))(candidates, documents), whole)


def test_the_same_words_score_ten():
    documents = [[[1, 2, 3, 4, 5]], [[6, 7]]]
    assert CiderD(documents)([[[1, 2, 3, 4, 5]]], [documents[0]]) == pytest.approx(10.0)


def test_a_word_that_every_document_has_is_worth_nothing():
    assert CiderD([[[1, 2]], [[1, 3]]])([[[1]]], [[[1, 2]]]) == 0.0


def test_closed_form_of_one_shared_word():
    """One of two words, in one of four documents each: a cosine of 1/sqrt(2) at order 1, none above."""
    reward = CiderD([[[1, 2]], [[3]], [[4]], [[5]]])
    cosine = math.log(4) ** 2 / (math.log(4) * math.sqrt(2) * math.log(4))
    penalty = math.exp(-1 / (2 * 6**2))  # 1 token against 2
    assert reward([[[1]]], [[[1, 2]]]) == pytest.approx(10 * cosine / 4 * penalty)


def test_a_word_said_more_often_than_in_the_reference_is_clipped():
    """tf-idf 3 against 1: min(3, 1) * 1 over norms 3 and 1 where the bigrams, (1, 1), are the candidate's alone."""
    reward = CiderD([[[1]], [[2]]])
    assert reward([[[1, 1, 1]]], [[[1]]]) == pytest.approx(10 / 3 / 4 * math.exp(-(2**2) / 72))


def test_an_image_without_references_scores_zero():
    reward = CiderD([[[1, 2]], [[3]]])
    np.testing.assert_array_equal(reward([[[1], [2]], [[1, 2], []]], [[], [[1, 2]]])[0], 0.0)


def test_a_sequence_that_keeps_its_end_scores_higher():
    reward = CiderD([[[1, 2, 3, EOS]], [[4, 5, EOS]], [[2, 6, 7, EOS]]])
    ended, cut = reward([[[1, 2, 3, EOS], [1, 2, 3]]], [[[1, 2, 3, EOS]]])[0]
    assert ended > cut + 1


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="needs a document"):
        CiderD([])
