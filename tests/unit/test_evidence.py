"""What a picture alone says for a word: how it is counted, weighed and refused, against whole passes of the model.

B images, T tokens, V words.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, tiny_model, tiny_overrides
from toys import BEAM, DIVERSE, GREEDY, NUCLEUS

from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.models.evidence import FLOOR, EvidentStep
from efficap.tokenizer import CaptionTokenizer
from efficap.training.ensemble import Ensemble, Member
from efficap.training.writer import CaptionWriter
from efficap.word_places import PLACES, save_frequencies

CAPTIONS = ["a red picture", "a blue picture", "all of it is red"]
VOCAB = CaptionTokenizer.learn(CAPTIONS, 300).vocab_size


def counted() -> CaptionTokenizer:
    tokenizer = CaptionTokenizer.learn(CAPTIONS, 300)
    tokenizer.count_places(CAPTIONS)
    return tokenizer


@pytest.fixture
def captioner() -> CaptionModel:
    torch.manual_seed(0)
    model = build_model(tiny_model(), VOCAB).eval()
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_token_is_as_frequent_at_a_place_as_captions_have_it_there_and_a_hundred_have_it_anywhere() -> None:
    tokenizer = counted()
    ids = [words[1:] for words in tokenizer.encode(CAPTIONS, 20)[0]]
    anywhere = Counter(word for words in ids for word in words)
    assert tokenizer.frequencies is not None
    for place in range(8):
        there = Counter(words[place] for words in ids if len(words) > place)
        for word in range(tokenizer.vocab_size):
            smooth = there[word] + 100 * anywhere[word] / anywhere.total()
            expected = smooth / (there.total() + 100)
            found = tokenizer.frequencies[place, word]  # rounded to float16
            assert found == pytest.approx(expected, abs=1e-6, rel=1e-3)


def test_frequencies_of_many_captions_are_of_all_parts_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficap.tokenizer.CAPTIONS", 40)
    tokenizer = CaptionTokenizer.learn(CAPTIONS, 300)
    tokenizer.count_places(["a red picture"] * 60 + ["all of it is red"] * 30)
    [[_, *begins], [_, *ends]] = tokenizer.encode(["a red picture", "all of it is red"], 20)[0]
    assert tokenizer.frequencies is not None
    assert tokenizer.frequencies[0, begins[0]] > tokenizer.frequencies[0, ends[0]] > 0.05, (
        "the last third counts"
    )


def test_frequencies_lie_beside_the_tokenizer_and_come_back(tmp_path: Path) -> None:
    tokenizer = counted()
    tokenizer.save(tmp_path)
    loaded = CaptionTokenizer.load(tmp_path).frequencies
    assert loaded is not None
    assert tokenizer.frequencies is not None
    assert loaded.shape == (PLACES, tokenizer.vocab_size)
    assert (loaded == tokenizer.frequencies).all(), "a resumed training has those that it began with"
    CaptionTokenizer.learn(CAPTIONS, 300).save(tmp_path)
    assert CaptionTokenizer.load(tmp_path).frequencies is None


def test_frequencies_that_are_damaged_of_another_vocabulary_or_none_are_refused(tmp_path: Path) -> None:
    tokenizer = counted()
    tokenizer.save(tmp_path)
    assert tokenizer.frequencies is not None
    for frequencies, message in (
        (tokenizer.frequencies[:, 1:], rf"has the shape \(64, {VOCAB - 1}\), its tokenizer {VOCAB} tokens"),
        (tokenizer.frequencies - 1, "holds what are no frequencies"),
        (tokenizer.frequencies[:0], rf"has the shape \(0, {VOCAB}\)"),
    ):
        save_frequencies(frequencies, tmp_path)
        with pytest.raises(InputError, match=message):
            CaptionTokenizer.load(tmp_path)
    (tmp_path / "places.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match=r"places\.safetensors is damaged"):
        CaptionTokenizer.load(tmp_path)


def test_evidence_is_how_much_likelier_a_word_is_unread_than_usual_also_for_rows_that_moved(
    captioner: CaptionModel,
) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    frequencies = torch.rand(4, VOCAB).softmax(dim=-1)
    rows = torch.randint(0, VOCAB, (2, 2, 6))  # of pictures 0 and 2, two rows each, as they are in the end
    bos = rows[:, :, :1] = 7
    parents = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        step = EvidentStep(captioner.start(images, 7), frequencies, weight=0.8, max_tokens=7, bos_id=bos)
        step(torch.full((3,), bos), None, None)
        every = torch.cat([rows[:1], torch.randint(0, VOCAB, (1, 2, 6)), rows[1:]])  # (3, 2, 6)
        step(every[..., 1].flatten(), parents, None)
        stays = torch.tensor([0, 1, 4, 5])
        given = [step(rows[..., 2].flatten(), stays, torch.tensor([0, 2]))]
        given += [step(rows[..., place].flatten(), None, None) for place in (3, 4)]

        of_two = images[[0, 2]]
        read = captioner(of_two, rows).log_softmax(dim=-1)  # (2, 2, T, V)
        unread = captioner(of_two, torch.full((2, 1, 6), bos)).softmax(dim=-1)  # (2, 1, T, V)
    for place, logits in zip((2, 3, 4), given, strict=True):
        expected = read[:, :, place]
        if place < 4:  # no frequencies are known beyond
            expected = expected + 0.8 * torch.log(
                (unread[:, :, place] + FLOOR) / (frequencies[place] + FLOOR)
            )
        expected = expected.log_softmax(dim=-1)
        assert (logits.log_softmax(dim=-1).view_as(expected) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    "settings",
    [GREEDY, BEAM, BEAM | {"prefix": "a red"}, DIVERSE, NUCLEUS | {"num_return_sequences": 2}],
    ids=["greedy", "beam", "prefix", "diverse", "nucleus"],
)
def test_all_decodings_weigh_words_by_what_was_read_and_by_the_evidence(
    captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], is_compiled: bool
) -> None:
    tokenizer, images = counted(), torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    if is_compiled:  # as far as what is compiled is called, with pictures that fill up a batch
        monkeypatch.setattr(captioner, "_compiled_step", captioner.decoder.step)
    changes = {"max_tokens": 12, "evidence": 0.8, "batch_size": 4}
    changes |= {"top_p": 1.0} if settings["method"] == "nucleus" else {}
    writer = CaptionWriter(captioner, tokenizer, build_decoding(settings | changes))
    first = 1 + len(tokenizer.encode_prefix(str(settings["prefix"])))
    usual = torch.from_numpy(tokenizer.frequencies)
    for image, captions in zip(images[:, None], writer.write(images, list("abcde")), strict=True):
        for caption in captions:
            tokens = torch.tensor(caption.tokens)[None, None]  # (1, 1, T)
            with torch.no_grad():
                read = captioner(image, tokens)[0, 0, :-1]  # (T - 1, V)
                unread = captioner(image, torch.full_like(tokens, tokenizer.bos_id))[0, 0, :-1].softmax(
                    dim=-1
                )
            evidence = ((unread + FLOOR) / (usual[: len(unread)] + FLOOR)).log()
            log_probs = (read + 0.8 * evidence).log_softmax(dim=-1)
            expected = log_probs.gather(1, tokens[0, 0, 1:, None])[first - 1 :, 0]
            given = torch.tensor(caption.token_log_probs[first:])
            assert (given - expected).abs().max() < 1e-3


@pytest.mark.parametrize("value", [-0.1, 11, True, "much"])
def test_a_weight_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=rf"decoding\.evidence={value} must be a number from 0 to 10"):
        build_decoding(GREEDY | {"evidence": value})


def test_evidence_is_refused_where_nothing_is_known_of_it(captioner: CaptionModel) -> None:
    decoding = build_decoding(GREEDY | {"max_tokens": 12, "evidence": 0.5})
    with pytest.raises(InputError, match=r"learned to tell captions unread, by training\.hidden_captions"):
        CaptionWriter(captioner, CaptionTokenizer.learn(CAPTIONS, 300), decoding)
    with pytest.raises(InputError, match="takes a single run, and no ensemble"):
        CaptionWriter(Ensemble([Member(captioner, 0)], [64]), counted(), decoding)


def test_a_training_that_hides_captions_can_be_evaluated_with_evidence(
    colour_table: Path, tmp_path: Path
) -> None:
    runs = {}
    for share in ("0.5", "[0.0,0.0]"):
        overrides = tiny_overrides(colour_table, tmp_path / share.strip("[]").replace(",", "-"))
        runs[share] = train(compose("train", *overrides, f"training.hidden_captions={share}"))
    options = ["split=val", "metrics=[]", "accelerator=cpu", "+decoding.evidence=0.5"]
    scores = evaluate(compose("eval", f"run={runs['0.5']}", *options))
    assert "evidence=0.5" in scores["decoding"]
    with pytest.raises(InputError, match=r"decoding.evidence=0.5 is for a captioner"):
        evaluate(compose("eval", f"run={runs['[0.0,0.0]']}", *options))
