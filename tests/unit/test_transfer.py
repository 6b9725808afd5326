"""A run's weights in a model of other sizes: what was learned goes on to work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from efficap.errors import InputError
from efficap.models.bridge import interpolated
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.models.transfer import Transfer, transfer_weights
from efficap.tokenizer import CaptionTokenizer

VOCAB = 97


@pytest.fixture(params=["gpt2", "original"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def captioner(seed: int, vocab_size: int = VOCAB, **changes: Any) -> CaptionModel:
    torch.manual_seed(seed)
    model = build_model(tiny_model(**changes), vocab_size).eval()
    with torch.no_grad():
        for parameter in (*model.bridge.parameters(), *model.decoder.parameters()):
            parameter.normal_(std=0.2)
    return model


def transferred(old: CaptionModel, new: CaptionModel, rows: list[int] | None = None) -> Transfer:
    return transfer_weights(
        new, old.state_dict(), grid=old.encoder.grid, rows=list(range(VOCAB)) if rows is None else rows
    )


def pictures(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)


@torch.no_grad()
def test_equal_sizes_load_everything_exactly(arithmetic: str) -> None:
    old, new = captioner(0, arithmetic=arithmetic), captioner(1, arithmetic=arithmetic)
    transfer = transferred(old, new)
    assert transfer == Transfer(loaded=list(old.state_dict()))
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


@torch.no_grad()
def test_larger_pictures_give_what_the_run_would_give_for_them(arithmetic: str) -> None:
    old = captioner(0, arithmetic=arithmetic)
    new = captioner(1, arithmetic=arithmetic, image_size=96)
    transfer = transferred(old, new)
    assert list(transfer.resized) == ["bridge.positions.weight"]
    edges = 2 * (arithmetic == "original")
    assert transfer.resized["bridge.positions.weight"] == f"{4 + edges} to {9 + edges} rows, interpolated"
    images, tokens = pictures(96), torch.randint(0, VOCAB, (2, 3, 7))
    assert torch.equal(old(images, tokens), new(images, tokens))  # the run interpolates at each picture


@torch.no_grad()
def test_a_finer_map_starts_from_interpolated_positions() -> None:
    old, new = captioner(0), captioner(1, encoder__output_stride=16)
    assert transferred(old, new).resized == {"bridge.positions.weight": "4 to 16 rows, interpolated"}
    assert torch.equal(new.bridge.positions.weight, interpolated(old.bridge.positions.weight, (2, 2), (4, 4)))


@torch.no_grad()
def test_more_blocks_change_nothing_at_first_and_learn(arithmetic: str) -> None:
    old = captioner(0, arithmetic=arithmetic)
    new = captioner(1, arithmetic=arithmetic, bridge__n_blocks=3)
    transfer = transferred(old, new)
    assert {name.rsplit(".", 2)[0].split(".mlp")[0] for name in transfer.fresh} == {
        "bridge.blocks.1",
        "bridge.blocks.2",
    }
    images, tokens = pictures(64), torch.randint(0, VOCAB, (2, 3, 7))
    assert torch.allclose(old(images, tokens), new(images, tokens), atol=1e-6)
    with torch.enable_grad():
        new(images, tokens).square().mean().backward()
    assert new.bridge.blocks[2].mlp[-1].weight.grad.abs().sum() > 0


def test_fewer_blocks_leave_out_the_last() -> None:
    old, new = captioner(0, bridge__n_blocks=3), captioner(1, bridge__n_blocks=1)
    transfer = transferred(old, new)
    assert {name.split(".")[2] for name in transfer.dropped} == {"1", "2"}
    assert not transfer.fresh


@torch.no_grad()
def test_longer_captions_and_a_larger_vocabulary_keep_what_was_learned() -> None:
    old = captioner(0)
    new = captioner(1, vocab_size=120, decoder__n_positions=40)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        place if place < VOCAB else -1 for place in order
    ]  # the tokens have other ids in the new vocabulary
    transfer = transferred(old, new, rows)
    assert transfer.resized == {
        "decoder.wpe.weight": "24 to 40 rows, the first ones kept",
        "decoder.wte.weight": "97 to 120 rows, by their tokens",
    }
    images, tokens = pictures(64), torch.randint(0, VOCAB, (2, 3, 7))
    id_of = torch.tensor([order.index(number) for number in range(VOCAB)])
    assert torch.allclose(old(images, tokens), new(images, id_of[tokens])[..., id_of], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder__n_layer": 3}, "decoder.h.2.* is missing in the run"),
        ({"decoder__n_layer": 1}, "decoder.h.1.* of the run has no place in the model"),
        ({"decoder__n_embd": 64}, r"is of shape \(97, 32\) in the run; the model needs \(97, 64\)"),
        ({"encoder__name": "mnasnet_small"}, "encoder.backbone.conv_stem.weight is of shape"),
    ],
)
def test_another_models_weights_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        transferred(captioner(0), captioner(1, **changes))


def test_tokens_are_found_by_what_they_say_and_the_ends_by_what_they_are() -> None:
    old = CaptionTokenizer.learn(["a red house", "a red boat"] * 3, vocab_size=270)
    new = CaptionTokenizer.learn(["a green house by a green boat"] * 3, vocab_size=290).with_bos(
        ["<|start|>"]
    )
    ids = new.ids_in(old)
    assert len(ids) == new.vocab_size
    assert ids[new.bos_id] == ids[new.eos_id] == old.eos_id
    for text, known in ((" house", True), (" green", False)):
        (number,) = new.encode([text.strip()], 9)[0][0][1:-1]
        assert (ids[number] >= 0) == known
        if known:
            assert old.decode([ids[number]]) == new.decode([number])
