"""The original project's training, from shards and then a table, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose, tiny_overrides
from test_resume import log_of

from efficap.commands.train import train
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table

pytestmark = pytest.mark.slow


def test_both_stages_run_with_clipped_gradients_and_a_constant_rate(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    tables, _ = read_table(colour_table / "captions.csv", colour_table / "images", **columns)
    for split in ("train", "val"):
        write_shards(tables[split], tmp_path / "cc3m" / split, ShardSettings(4, None, 10**6), workers=1)
    tiny = [
        o for o in tiny_overrides(colour_table, tmp_path / "run")
        if not o.startswith(("optimizer", "trainer.max_epochs"))
    ]  # fmt: skip
    small = ("batch_size=4", "num_workers=1", "max_tokens=12")
    cc3m = [
        f"stages.cc3m.data.shards={tmp_path / 'cc3m' / 'train'}",
        f"stages.cc3m.data.val_shards={tmp_path / 'cc3m' / 'val'}",
        "stages.cc3m.trainer.val_check_interval=3",
        *(f"stages.cc3m.data.{setting}" for setting in small),
    ]
    gradients: list[tuple[float, float]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients.append(
            (max(float(g.abs().max()) for g in found), float(torch.cat([g.flatten() for g in found]).norm()))
        )
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    clip = ["optimizer.clip_value=1e-3", "trainer.gradient_clip_val=0.02"]  # of a model this small, too
    run = train(compose("train", "experiment=original_recipe", *tiny, *cc3m, *clip))
    metrics = json.loads((run / "metrics.json").read_text())
    assert {key: metrics[key] for key in ("finished", "stage", "steps", "pairs")} == {
        "finished": True,
        "stage": "coco",
        "steps": 6,  # twice two, with a caption of each picture; then two with two
        "pairs": 2 * 8 + 2 * 8,
    }
    assert len(gradients) == 6
    assert max(largest for largest, _ in gradients) <= 1e-3
    assert max(norm for _, norm in gradients) == pytest.approx(0.02, rel=1e-3)
    rates = log_of(run).filter(like="lr-AdamW")
    assert len(rates.columns) == 6
    assert (rates.dropna() == 6.25e-5).all(axis=None)
