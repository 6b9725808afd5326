"""The loss with the right picture and with another one, against the loss of training."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from efficap.batch import CaptionBatch
from efficap.evaluation.grounding import exchanged
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training.gap import GapProbe
from efficap.training.losses import batch_loss

REFERENCES = {
    "a": ["a red picture", "red"],
    "b": ["all of it is green"],
    "c": ["blue and grey", "a", "it is"],
}
TOKENIZER = CaptionTokenizer.learn([text for texts in REFERENCES.values() for text in texts], vocab_size=300)


@pytest.fixture
def captioner() -> CaptionModel:
    captioner = build_model(tiny_model(), TOKENIZER.vocab_size).eval()
    for block in captioner.decoder.h:
        torch.nn.init.normal_(block.get_submodule("crossattention").c_proj.weight)  # else it reads no memory
    return captioner


def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)


def probe_of(captioner: CaptionModel, images: torch.Tensor, *, pictures: int = 9) -> GapProbe:
    probe = GapProbe(captioner, TOKENIZER, pictures=pictures, max_tokens=12)
    with torch.no_grad():
        probe.keep(list(REFERENCES), captioner.encode(images))
    return probe


def training_loss(captioner: CaptionModel, image: torch.Tensor, captions: list[str]) -> float:
    encoded, _ = TOKENIZER.encode(captions, 12)
    lengths = torch.tensor([[len(ids) for ids in encoded]])
    tokens = torch.full((1, len(encoded), int(lengths.max())), TOKENIZER.pad_id)
    for number, ids in enumerate(encoded):
        tokens[0, number, : len(ids)] = torch.tensor(ids)
    batch = CaptionBatch(image[None], tokens, lengths, ["x"])
    with torch.no_grad():
        return float(batch_loss(captioner, batch, label_smoothing=0.0))


def test_the_losses_are_those_of_training_with_the_picture_and_with_another(captioner: CaptionModel) -> None:
    images = pictures()
    losses = probe_of(captioner, images).losses(REFERENCES)
    own = [
        training_loss(captioner, image, REFERENCES[name]) for name, image in zip("abc", images, strict=True)
    ]
    other_of = exchanged(list(REFERENCES))
    other = [training_loss(captioner, images["abc".index(other_of[i])], REFERENCES[i]) for i in "abc"]
    assert losses.own == pytest.approx(own, abs=1e-5)
    assert losses.other == pytest.approx(other, abs=1e-5)
    assert losses.own != pytest.approx(losses.other, abs=1e-2)


def test_a_model_that_reads_no_memory_has_no_gap(captioner: CaptionModel) -> None:
    captioner.decoder.silence_cross_attention()
    losses = probe_of(captioner, pictures()).losses(REFERENCES)
    assert losses.own == losses.other


def test_a_picture_that_comes_again_or_has_no_references_changes_nothing(captioner: CaptionModel) -> None:
    images = pictures()
    probe = probe_of(captioner, images)
    before = probe.losses({**REFERENCES, "b": []})
    with torch.no_grad():
        probe.keep(["a", "b"], captioner.encode(images[[2, 2]]))
    assert probe.losses({**REFERENCES, "b": []}) == before
    assert len(before.own) == 2
    assert probe.losses({**REFERENCES, "a": [], "b": []}) == ([], [])


def test_the_pictures_kept_are_drawn_evenly_from_all(captioner: CaptionModel) -> None:
    counts = dict.fromkeys(range(20), 0)
    for trial in range(400):
        probe = GapProbe(captioner, TOKENIZER, pictures=5, max_tokens=12)
        for start in range(0, 20, 4):  # in batches
            names = [f"{trial}/{number}" for number in range(start, start + 4)]
            probe.keep(names, torch.zeros(4, 1, 1))
        assert len(probe._kept) == 5
        for name in probe._kept:
            counts[int(name.partition("/")[2])] += 1
    expected = 400 * 5 / 20
    assert all(abs(count - expected) < 4 * (expected * 0.75) ** 0.5 for count in counts.values())


def test_who_encodes_the_pictures_and_in_what_order_does_not_matter(captioner: CaptionModel) -> None:
    names = [f"{number}.jpg" for number in range(50)]
    memories = torch.arange(50.0)[:, None, None]
    alone = GapProbe(captioner, TOKENIZER, pictures=7, max_tokens=12)
    alone.keep(names, memories)
    parts = [GapProbe(captioner, TOKENIZER, pictures=7, max_tokens=12) for _ in range(2)]
    parts[0].keep(names[::-2], memories.flip(0)[::2])
    parts[1].keep(names[::2], memories[::2])
    for name, memory in parts[1]._kept.items():
        parts[0].keep([name], memory[None])
    assert {n: float(m) for n, m in parts[0]._kept.items()} == {n: float(m) for n, m in alone._kept.items()}
    assert len(alone._kept) == 7


def test_no_picture_is_kept_where_none_is_asked_for(captioner: CaptionModel) -> None:
    assert probe_of(captioner, pictures(), pictures=0).losses(REFERENCES) == ([], [])
