"""A captioner's decoder as transformers loads it, and the command line of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from toys import GREEDY, GPT2Pair, captions, ids

from efficap.commands.export import _published
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel, DecodingState
from efficap.models.pretrained.__main__ import main
from efficap.models.pretrained.export_transformers import check_transformers, export_transformers
from efficap.models.pretrained.gpt2 import gpt2_state_dict, transformers_state_dict
from efficap.models.pretrained.onnx_graphs import DecoderStep, EncoderGraph
from efficap.tokenizer import CaptionTokenizer

TOKENIZER = CaptionTokenizer.learn(["a red picture", "all of it is green"], vocab_size=270)
MAX_TOKENS = 10


def random_captioner(**changes: Any) -> CaptionModel:
    torch.manual_seed(3)
    captioner = build_model(tiny_model(**changes), TOKENIZER.vocab_size).eval()
    for parameter in captioner.decoder.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    eos = captioner.decoder.wte.weight.data[TOKENIZER.eos_id]
    captioner.decoder.ln_f.bias.data = 3 * eos / eos.dot(eos)  # captions of several lengths
    return captioner


@pytest.mark.parametrize("arithmetic", ["gpt2", "original_no_past"])
def test_transformers_gives_the_same_logits_and_greedy_captions(tmp_path: Path, arithmetic: str) -> None:
    from transformers import GPT2LMHeadModel

    decoder = random_captioner(arithmetic=arithmetic).decoder
    export_transformers(decoder, TOKENIZER, tmp_path, max_tokens=MAX_TOKENS)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    memory = torch.randn(6, 5, 32) + 2 * torch.randn(6, 1, 32)  # (B, N, D)
    tokens = torch.randint(TOKENIZER.vocab_size, (6, 9))
    with torch.no_grad():
        ours = decoder.logits(decoder(tokens, decoder.project_memory(memory)))
        torch.testing.assert_close(
            theirs(tokens, encoder_hidden_states=memory).logits, ours, atol=2e-4, rtol=0
        )
        assert check_transformers(decoder, tmp_path, memory, tokens) < 2e-4
        greedy = build_decoding(GREEDY | {"max_tokens": MAX_TOKENS}).decode(
            DecodingState(decoder, memory, MAX_TOKENS),
            ids(6),
            bos_id=TOKENIZER.bos_id,
            eos_id=TOKENIZER.eos_id,
            device="cpu",
        )
        start = torch.full((6, 1), TOKENIZER.bos_id)
        # No length and no special token is given: they are in the directory.
        generated = theirs.generate(
            start, attention_mask=torch.ones_like(start), encoder_hidden_states=memory
        )
    assert generated.tolist() == greedy.tokens[:, 0].tolist()
    assert len({tuple(of[0]) for of in captions(greedy)}) > 1


def test_transformers_tokenises_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_transformers(random_captioner().decoder, TOKENIZER, tmp_path, max_tokens=MAX_TOKENS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "all of it is a red picture"
    words = theirs(text).input_ids
    assert [TOKENIZER.bos_id, *words, TOKENIZER.eos_id] == TOKENIZER.encode([text], 99)[0][0]
    assert theirs.decode([*words, theirs.eos_token_id], skip_special_tokens=True).strip() == text
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == TOKENIZER.eos_id


def test_names_and_order_of_weights_go_there_and_back() -> None:
    pair = GPT2Pair(0, eos_id=1)
    exported = transformers_state_dict(pair.ours.state_dict())
    theirs = {key: value for key, value in pair.theirs.state_dict().items() if key != "lm_head.weight"}
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[key], theirs[key]) for key in theirs)
    back = gpt2_state_dict(exported)
    assert all(torch.equal(back[key], value) for key, value in pair.ours.state_dict().items())


@pytest.mark.parametrize("arithmetic", ["gpt2", "original", "original_no_past"])
def test_the_step_that_onnx_takes_is_the_models_own(arithmetic: str) -> None:
    """With its cache by rows, beside the model's by pictures; beams change their parents."""
    captioner = random_captioner(arithmetic=arithmetic)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        ours = captioner.start(images, MAX_TOKENS)
        memory = EncoderGraph(captioner)(images)  # (L, B, H, N, d) twice
        layers, _, heads, _, d = memory[0].shape
        past = [torch.zeros(layers, 2, heads, 0, d)] * 2
        step = DecoderStep(captioner.decoder)
        for rows, parents in ((2, None), (6, [0, 0, 0, 1, 1, 1]), (6, [2, 0, 0, 3, 5, 4]), (6, None)):
            newest = torch.randint(TOKENIZER.vocab_size, (rows,))
            expected = ours(newest, None if parents is None else torch.tensor(parents))
            past = past if parents is None else [part[:, parents] for part in past]
            logits, *past = step(newest.view(2, -1), *memory, *past)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_what_transformers_cannot_compute_is_refused(tmp_path: Path) -> None:
    decoder = random_captioner().decoder
    decoder.empty_slot = True
    with pytest.raises(InputError, match=r"empty place .*arithmetic=original.*--format onnx"):
        export_transformers(decoder, TOKENIZER, tmp_path / "out", max_tokens=MAX_TOKENS)
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_noticed(tmp_path: Path) -> None:
    decoder = random_captioner().decoder
    export_transformers(decoder, TOKENIZER, tmp_path, max_tokens=MAX_TOKENS)
    decoder.h[1].get_submodule("mlp.c_proj").bias.data[0] += 0.1
    with pytest.raises(InputError, match=r"logits differ from the run's by .*, more than 0.0002"):
        check_transformers(decoder, tmp_path, torch.randn(1, 5, 32), torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=nowhere", "--format=onnx"], "error: --run=nowhere does not exist; give a run directory"),
    ],
)
def test_bad_input_ends_with_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *options, f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_an_export_appears_as_a_whole_in_a_directory_that_is_new_or_empty(
    tmp_path: Path, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    was = out.stat().st_ino if there else None
    with _published(out) as directory:
        (directory / "tokenizer").mkdir()
        (directory / "config.json").touch()
    assert sorted(part.name for part in out.iterdir()) == ["config.json", "tokenizer"]
    assert was in (None, out.stat().st_ino), "where a disk may begin"
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError), _published(tmp_path / "other") as directory:
        directory.mkdir()
    assert not list((tmp_path / "other").iterdir())


def test_a_directory_that_holds_something_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").touch()
    files = [f"--{name}={tmp_path}/{name}" for name in ("encoder", "decoder", "config")]
    assert main(["import-original", *files, f"--out={tmp_path}"]) == 1
    assert "exists and is no empty directory; name a new or an empty one\n" in capsys.readouterr().err
    assert main(["import-original", *files, f"--out={tmp_path}/new"]) == 1
    assert "empty directory" not in capsys.readouterr().err
