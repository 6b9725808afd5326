"""Every file of conf/experiment composes and passes the checks before data are read; one is Adam to the letter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from conftest import tiny_model
from hydra.utils import instantiate
from omegaconf import OmegaConf

from efficap.commands.entry import CONF, plain
from efficap.commands.stages import stages_of, with_whole_stages
from efficap.commands.train import check_settings
from efficap.commands.trainer import build_trainer
from efficap.decoding import build_decoding
from efficap.models.build import build_model
from efficap.tokenizer import CaptionTokenizer
from efficap.training.feature_cache import check_feature_cache
from efficap.training.module import CaptionModule
from efficap.training.optim import build_optimizer

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def composed(experiment: str) -> dict[str, Any]:
    """Its configuration; what a user has to give names nothing that is there."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", [f"experiment={experiment}", "name=test", "output_dir=out"])
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "none")
    return with_whole_stages(plain(cfg))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_passes_the_checks_before_data_are_read(experiment: str, tmp_path: Path) -> None:
    cfg = composed(experiment)
    build_decoding(cfg["decoding"])
    for settings in stages_of(cfg).values():
        check_settings(settings)
        data = instantiate(settings["data"])
        check_feature_cache(
            data,
            frozen=settings["model"]["encoder"]["frozen"],
            start_size=settings["training"].get("start_size"),
        )
        build_trainer(
            {**settings["trainer"], "accelerator": "cpu"}, [], [], tmp_path, first_step=0, some_rest=False
        )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_header_gives_its_command(experiment: str) -> None:
    first, *lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert any("python train.py" in line and f"experiment={experiment}" in line for line in header)


def test_the_original_recipe_takes_adams_steps_on_gradients_clipped_by_value_and_norm() -> None:
    cfg = composed("original_recipe")
    captioner = build_model(tiny_model(), 300)
    theirs = copy.deepcopy(captioner)
    tokenizer = CaptionTokenizer.learn(["a red picture"], 300)
    module = CaptionModule(
        captioner, tokenizer, build_decoding(cfg["decoding"]), optimizer=cfg["optimizer"], label_smoothing=0.0
    )
    optimizer, schedule = build_optimizer(
        captioner, lambda step: step / 6, fused=True, **module.optimizer_settings
    )
    adam = torch.optim.Adam(theirs.parameters(), lr=6.25e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    before = copy.deepcopy(captioner)
    pairs = list(zip(captioner.parameters(), theirs.parameters(), strict=True))
    for step in range(6):
        for place, (ours, expected) in enumerate(pairs):
            # Elements and norms above 1 in the first steps, below it in the last.
            ours.grad = torch.randn_like(ours) * 10.0 ** (place % 4 - step)
            expected.grad = ours.grad.clamp(-1, 1)
        norm = sum((p.grad.double() ** 2).sum() for _, p in pairs if p.grad is not None) ** 0.5
        for _, expected in pairs:
            assert expected.grad is not None
            expected.grad *= min(1.0, 1.0 / float(norm))
        module.configure_gradient_clipping(optimizer, cfg["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        adam.step()
    for (ours, expected), start in zip(pairs, before.parameters(), strict=True):
        moved = expected.detach() - start
        assert moved.abs().max() > 1e-5
        torch.testing.assert_close(ours.detach() - start, moved, rtol=1e-3, atol=5e-8)


@pytest.mark.parametrize("launcher", sorted(file.stem for file in (CONF / "hydra/launcher").glob("*.yaml")))
def test_a_launcher_composes_and_gives_each_job_the_gpu_that_there_is(launcher: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", [f"hydra/launcher={launcher}", "name=x"], return_hydra_config=True)
    if "submitit" in cfg.hydra.launcher._target_:  # which hides the GPUs of jobs that ask for none
        assert cfg.hydra.launcher.gpus_per_node == 1
