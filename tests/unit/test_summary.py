"""What is said before the first step."""

from __future__ import annotations

import pytest
from conftest import tiny_model

from efficap.models.build import build_model
from efficap.training.summary import latent_warning, print_summary


def test_a_large_latent_map_gets_a_warning_with_the_size_to_use() -> None:
    captioner = build_model(tiny_model(image_size=1100), 97)
    warning = latent_warning(captioner, 1100)
    assert warning is not None
    assert "35 x 35 = 1,225 latent positions" in warning
    assert "Use model.image_size=1024 or less" in warning
    assert latent_warning(build_model(tiny_model(image_size=1024), 97), 1024) is None


def test_the_summary_counts_what_is_trained_and_what_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(encoder__frozen=True)
    captioner = build_model(model, 97)
    print_summary(
        captioner,
        model,
        vocab_size=97,
        pictures=1234,
        captions_per_image=5,
        max_tokens=12,
        batch_size=4,
        where="CPU, 32-true",
    )
    shown = capsys.readouterr().out
    frozen = sum(parameter.numel() for parameter in captioner.encoder.parameters())
    trained = sum(parameter.numel() for parameter in captioner.parameters()) - frozen
    row = next(line for line in shown.splitlines() if "all" in line)
    assert [f"{number:,}" in row for number in (trained + frozen, trained, frozen)] == [True] * 3
    assert "trained on: CPU, 32-true" in shown
    assert "2 x 2 = 4 latent positions; vocabulary 97; 1,234" in shown.replace("\n", " ")
