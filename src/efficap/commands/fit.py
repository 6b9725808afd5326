"""The stages of a training, one after the other, in one run directory and one W&B run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger

from efficap.commands.placement import training_device, used_precision
from efficap.commands.stages import naming
from efficap.commands.stopped import explained
from efficap.commands.trainer import build_callbacks, build_trainer, fitting
from efficap.data.caption_data import CaptionData
from efficap.decoding import Decoding
from efficap.models.build import preprocessing
from efficap.models.captioner import CaptionModel
from efficap.ranks import first_alone
from efficap.tokenizer import CaptionTokenizer
from efficap.training.checkpoints import Checkpoint
from efficap.training.feature_cache import cache_features
from efficap.training.objective import build_module
from efficap.training.run_metrics import RunMetrics
from efficap.training.stage import Stage
from efficap.training.summary import print_summary
from efficap.training.trainer_data import TrainerData

Settings = dict[str, Any]


def fit(
    stages: Mapping[str | None, Settings],
    stage: Stage,
    checkpoint: Checkpoint | None,
    data: Mapping[str | None, CaptionData],
    captioner: CaptionModel,
    tokenizer: CaptionTokenizer,
    decoding: Decoding,
    loggers: list[Logger],
    keep_settings: Callable[[], None],
) -> None:
    """Train from `stage` on; each other stage starts with the weights that the one before ended with.

    Optimiser, schedule and the search for the best weights start anew in each; steps, epochs, pairs, the log and the
    order of the data go on.

    Args:
        stages: the settings of each, by name.
        stage: to begin with; `make_ready` was called for it.
        checkpoint: in it, to go on from; None: from its start.
        data: of each stage, prepared.
        keep_settings: called before the first step, when nothing can refuse them any more.
    """
    names, before = list(stages), None
    if checkpoint:
        data[stage.name].load_state_dict(checkpoint.data_state)
        for its_data in data.values():
            its_data.begun_by = data[stage.name].begun_by
    if len(names) > 1:
        print(f"{len(names)} stages: {', '.join(map(str, names))}")
    while True:
        cfg, its_data = stages[stage.name], data[stage.name]
        run_dir = Path(cfg["output_dir"])
        if stage.name is not None:
            print(f"stage {stage.number + 1} of {len(names)}: {stage.name}")
        said = _print_plan(captioner, cfg, tokenizer, its_data)
        its_data.first_epoch = stage.epochs
        module = build_module(cfg, captioner, tokenizer, decoding, its_data)
        metrics = RunMetrics(run_dir, stage, before)
        callbacks = build_callbacks(cfg, run_dir, its_data, metrics)
        if before is None:
            callbacks.insert(0, LambdaCallback(on_train_start=lambda *_: keep_settings()))
        trainer = build_trainer(
            cfg["trainer"],
            loggers,
            callbacks,
            run_dir,
            first_step=stage.steps,
            some_rest=cfg["training"].get("unfreeze_encoder_at") is not None,
        )
        try:
            with explained(cfg), naming(stage.name), fitting():
                trainer.fit(
                    module,
                    datamodule=TrainerData(its_data),
                    ckpt_path=checkpoint.file if checkpoint else None,
                    weights_only=True,
                )
        finally:
            its_data.end()
        for note in its_data.notes():  # of shards, only training has told what the text's filters left out
            if note not in said:
                print(note)
        if stage.is_last:
            return
        stage = stage.next(names, steps=trainer.global_step, epochs=trainer.current_epoch)
        before, checkpoint = metrics, None
        make_ready(captioner, stages[stage.name], data[stage.name])


def make_ready(captioner: CaptionModel, cfg: Settings, data: CaptionData) -> None:
    """Let a captioner be as a stage begins: what it freezes frozen, nothing left of another stage, features cached.

    Raises:
        InputError: features cannot be cached.
    """
    captioner.encoder.freeze(cfg["model"]["encoder"]["frozen"])
    captioner.train()  # self-critical training leaves it in evaluation mode
    captioner.zero_grad()  # gradients of what is frozen now would be clipped with the others
    with first_alone(f"features {cfg['data']}"):
        cache_features(
            captioner.encoder,
            data,
            name=cfg["model"]["encoder"]["name"],
            preprocessing=preprocessing(cfg["model"]),
            device=training_device(cfg["trainer"]),
        )


def _print_plan(
    captioner: CaptionModel,
    cfg: dict[str, Any],
    tokenizer: CaptionTokenizer,
    data: CaptionData,
) -> list[str]:
    """Print the sizes and the data's notes; returns the notes."""
    print_summary(
        captioner,
        cfg["model"],
        vocab_size=tokenizer.vocab_size,
        pictures=data.training_size,
        captions_per_image=data.captions_per_image,
        max_tokens=data.max_tokens,
        batch_size=data.batch_size,
        where=f"{_name(training_device(cfg['trainer']))}, {used_precision(cfg['trainer'])}",
    )
    notes = data.notes()
    for note in notes:
        print(note)
    return notes


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else {"cpu": "CPU"}.get(device.type, device.type)
    )
