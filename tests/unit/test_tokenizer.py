"""Text to ids and back, against transformers' GPT-2 tokenizer where its files are at hand."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from efficap.errors import InputError
from efficap.token_divisions import in_bytes
from efficap.tokenizer import CaptionTokenizer

CAPTIONS = ["a red picture", "all of it is red", "a green picture", "two dogs on the grass"] * 3
LEARNED = CaptionTokenizer.learn(CAPTIONS, vocab_size=300)


def test_a_caption_starts_with_bos_and_ends_with_eos() -> None:
    [ids], cut = LEARNED.encode(["a red picture"], max_tokens=20)
    assert ids[0] == LEARNED.bos_id
    assert ids[-1] == LEARNED.eos_id
    assert cut == 0


def test_a_long_caption_is_cut_so_that_eos_stays_and_is_counted() -> None:
    encoded, cut = LEARNED.encode(["two dogs on the grass " * 5, "red"], max_tokens=6)
    assert len(encoded[0]) == 6
    assert encoded[0][-1] == LEARNED.eos_id
    assert cut == 1


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_way_there_and_back(text: str) -> None:
    [ids], _ = LEARNED.encode([text], max_tokens=10_000)
    if "<|endoftext|>" not in text:
        assert LEARNED.decode(ids) == " ".join(text.split())


def test_ids_stay_below_the_vocabulary_size() -> None:
    encoded, _ = LEARNED.encode([*CAPTIONS, "ÿ€𝄞"], max_tokens=100)
    assert max(max(ids) for ids in encoded) < LEARNED.vocab_size <= 300


def test_a_saved_tokenizer_loads_here_and_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    LEARNED.save(tmp_path)
    again = CaptionTokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    [ids], _ = LEARNED.encode(["a red picture"], max_tokens=20)
    assert again.encode(["a red picture"], max_tokens=20)[0] == [ids]
    assert theirs.decode(ids, skip_special_tokens=True).strip() == "a red picture"
    assert theirs.eos_token_id == again.eos_id


def test_gpt2s_own_tokenizer_equals_transformers(shared: Callable[[str], Path]) -> None:
    from transformers import GPT2TokenizerFast

    folder = shared("gpt2_bpe")
    ours, theirs = CaptionTokenizer.pretrained(str(folder)), GPT2TokenizerFast.from_pretrained(folder)
    captions = ["A man lays on a bench while his dog sits by him .", "naïve café, 3 dogs!", "  two  spaces"]
    expected = [theirs(caption)["input_ids"] for caption in captions]
    assert [ids[1:-1] for ids in ours.encode(captions, max_tokens=99)[0]] == expected
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (50257, 50256, 50256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "model.tokenizer.name=/no/such/folder is no directory; give a directory"),
        ("openai-community/gpt2", "cannot be had from the hub .*model.tokenizer.name=null"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_names_the_way_out(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CaptionTokenizer.pretrained(name)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither tokenizer.json nor vocab.json"):
        CaptionTokenizer.pretrained(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        )
    )
    with pytest.raises(InputError, match=r"no token <\|endoftext\|>"):
        CaptionTokenizer.pretrained(str(tmp_path))


def test_openais_file_names_are_read(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    folder = shared("gpt2_bpe")
    shutil.copyfile(folder / "vocab.json", tmp_path / "encoder.json")
    shutil.copyfile(folder / "merges.txt", tmp_path / "vocab.bpe")
    ours, other = CaptionTokenizer.pretrained(str(tmp_path)), CaptionTokenizer.pretrained(str(folder))
    assert ours.encode(["A man's dog."], 20) == other.encode(["A man's dog."], 20)


def write_french(folder: Path, **changes: dict[str, object]) -> Path:
    """A GPT-2 tokenizer that begins texts with <s> and ends them with </s>; `changes` are files beside it."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}},
        {"special_tokens_map": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}},
        {"config": {"bos_token_id": 0, "eos_token_id": 1}},
        {
            "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"},
            "config": {"bos_token_id": 50256, "eos_token_id": 50256},
        },
    ],
)
def test_bos_and_eos_may_differ_and_are_kept(tmp_path: Path, changes: dict[str, dict[str, object]]) -> None:
    from transformers import AutoTokenizer

    ours = CaptionTokenizer.pretrained(str(write_french(tmp_path / "theirs", **changes)))
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    ours.save(tmp_path / "run")
    again = CaptionTokenizer.load(tmp_path / "run")
    [ids], _ = again.encode(["a red picture"], max_tokens=20)
    assert (ids[0], ids[-1]) == (0, 1)
    assert again.decode([*ids, again.pad_id]) == "a red picture"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert [0, *again.encode_prefix("a red")] == ids[: len(again.encode_prefix("a red")) + 1]


def test_special_tokens_that_nobody_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no token <\|endoftext\|> .* tokenizer_config.json"):
        CaptionTokenizer.pretrained(str(write_french(tmp_path)))


def test_a_tokenizer_of_another_kind_keeps_text_and_bans_by_its_own_spelling(tmp_path: Path) -> None:
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁red", -1.0),
        ("▁a", -1.0),
        ("▁", -2.0),
        ("s", -2.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    ours = CaptionTokenizer.pretrained(str(tmp_path))
    [ids], _ = ours.encode(["a red"], max_tokens=9)
    assert ids == [1, 4, 3, 2]
    assert ours.decode(ids) == "a red"
    assert [3] in ours.spellings("red")


def test_the_vocabulary_ends_at_the_largest_id(tmp_path: Path) -> None:
    file = write_french(tmp_path, config={"bos_token_id": 0, "eos_token_id": 1}) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<pad>", "id": 400})
    content["model"]["vocab"]["<pad>"] = 400
    file.write_text(json.dumps(content))
    assert CaptionTokenizer.pretrained(str(tmp_path)).vocab_size == 401


def test_a_sentencepiece_model_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"sentencepiece model \(spiece.model\) alone, which is not read"):
        CaptionTokenizer.pretrained(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer.json is damaged or no tokenizer"):
        CaptionTokenizer.pretrained(str(tmp_path))


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.tokenizer.vocab_size=100 must be at least 257"):
        CaptionTokenizer.learn(CAPTIONS, vocab_size=100)


# Spellings


def raw(tokenizer: CaptionTokenizer, ids: list[int]) -> str:
    """The text of ids as it is, white space kept."""
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("phrase", ["red", "Red", "a r", "aRe", "é"])
def test_the_ways_to_say_a_phrase_are_all_that_decode_to_it(phrase: str) -> None:
    parts = [i for i in range(LEARNED.vocab_size) if i != LEARNED.bos_id and can_be_part_of(phrase, i)]
    forms = {phrase, phrase.lower(), phrase.capitalize()}
    expected = set()
    for length in range(1, len(phrase.encode()) + 2):
        for ids in itertools.product(parts, repeat=length):
            text = raw(LEARNED, list(ids))
            if text in {f" {form}" for form in forms}:
                expected.add(ids)
            if text in forms:
                expected.add((LEARNED.bos_id, *ids))
    ways = [tuple(ids) for ids in LEARNED.spellings(phrase)]
    assert len(set(ways)) == len(ways)
    assert set(ways) == expected
    assert {LEARNED.decode(ids) for ids in ways} == forms


def can_be_part_of(phrase: str, token: int) -> bool:
    """Whether a token can be in any spelling, so that there are few enough to try them all."""
    return any(
        _spelled(LEARNED, [token]) in in_bytes(f" {form}")
        for form in (phrase, phrase.lower(), phrase.capitalize())
    )


def _spelled(tokenizer: CaptionTokenizer, ids: list[int]) -> str:
    return "".join(tokenizer._tokenizer.id_to_token(token) or "" for token in ids)


def test_a_phrase_with_more_spellings_than_can_be_held_is_refused() -> None:
    with pytest.raises(InputError, match=r"decoding.banned: .* is too long; give single words"):
        LEARNED.spellings("a red picture " * 12)


def test_the_usual_spellings_are_those_of_captions() -> None:
    [inside] = LEARNED.usual_spellings("  red   picture ")
    [ids], _ = LEARNED.encode(["a red picture"], max_tokens=20)
    assert ids[-1 - len(inside) : -1] == inside
    [ids], _ = LEARNED.encode(["red picture"], max_tokens=20)
    assert ids[1:-1] == inside


def test_gpt2_spells_a_captions_first_word_in_its_own_way(shared: Callable[[str], Path]) -> None:
    tokenizer = CaptionTokenizer.pretrained(str(shared("gpt2_bpe")))
    inside, first = tokenizer.usual_spellings("hot dog")
    assert tokenizer.encode(["a hot dog", "hot dog"], max_tokens=9)[0] == [
        [tokenizer.bos_id, *tokenizer.encode_prefix("a"), *inside, tokenizer.eos_id],
        [*first, tokenizer.eos_id],
    ]
    assert {tuple(inside), tuple(first)} <= {tuple(ids) for ids in tokenizer.spellings("hot dog")}


def test_a_prefix_is_encoded_as_a_captions_beginning() -> None:
    [ids], _ = LEARNED.encode(["a red picture"], max_tokens=20)
    prefix = LEARNED.encode_prefix(" a red ")
    assert ids[1 : 1 + len(prefix)] == prefix


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Z", "C"]) | st.just(" "), max_size=40))
def test_words_joined_are_the_text_and_every_id_that_is_seen_is_in_one(text: str) -> None:
    ids = [LEARNED.bos_id, *LEARNED.encode_prefix(text), LEARNED.eos_id]
    words = LEARNED.words(ids)
    assert "".join(word for word, _ in words) == LEARNED.decode(ids)
    places = [place for _, places in words for place in places]
    blank = [place for place, id_ in enumerate(ids) if not LEARNED.decode([id_])]
    assert set(places) | set(blank) == set(range(len(ids)))
    assert all(found for _, found in words)


def test_a_word_in_pieces_is_one_word_and_marks_are_their_own() -> None:
    tokenizer = CaptionTokenizer.learn(["a red zebra, a red dog's zebra"] * 9, vocab_size=280)
    ids = [tokenizer.bos_id, *tokenizer.encode_prefix("a red zebras, naïve dog's 🐶 a.")]
    words = dict(tokenizer.words(ids))
    assert list(words) == ["a", " red", " zebras", ",", " naïve", " dog's", " 🐶", " a", "."]
    assert [ids[place] for place in words[" zebras"]] == tokenizer.encode_prefix("zebras")
    assert len(words[" zebras"]) > 1
    assert len(words[" 🐶"]) >= 4, "each of its bytes"
