"""Train a captioner: data, model and trainer from one configuration, a run directory at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate

from efficap.commands.init_from import load_from
from efficap.commands.job import recorded
from efficap.commands.loggers import build_loggers, finish_wandb
from efficap.commands.resume import is_finished, leave_no_trace, log_until
from efficap.commands.run_dir import RunDirectory, check_accelerator, choose_device, write_run
from efficap.commands.settings import resolved_settings
from efficap.commands.trainer import (
    build_callbacks,
    build_trainer,
    check_trainer,
    leave_out_lightnings_chatter,
)
from efficap.data.module import CaptionData
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.evaluation.scores import check_java
from efficap.models.build import build_model, load_pretrained_parts, preprocessing
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training.checkpoints import Stopped, captioners_weights, checkpoint_of
from efficap.training.feature_cache import cache_features, check_feature_cache
from efficap.training.objective import build_module, check_objective
from efficap.training.summary import print_summary


def train(cfg: dict[str, Any]) -> Path:
    """Train as the plain, resolved values of conf/train.yaml say; returns the run directory.

    Raises:
        InputError: before the first step, whatever can be known to be wrong by then.
    """
    leave_out_lightnings_chatter()
    asked = Path(cfg["output_dir"])
    with recorded(asked):
        resolved, init_from, resumed = resolved_settings(cfg)
        run_dir = Path(resolved["output_dir"])
        if resumed and resumed.path != asked.resolve():
            leave_no_trace(asked)
        if resumed and cfg["resume"] in (None, "auto") and is_finished(resumed):
            print(f"finished already: {run_dir}")
        else:
            _train(resolved, init_from, resumed)
    return run_dir


def _train(cfg: dict[str, Any], init_from: RunDirectory | None, resumed: RunDirectory | None) -> None:
    model, run_dir = cfg["model"], Path(cfg["output_dir"])
    check_accelerator("trainer.accelerator", cfg["trainer"]["accelerator"])
    check_trainer(cfg["trainer"])
    check_java()
    decoding = build_decoding(cfg["decoding"])
    check_objective(cfg["training"])
    pl.seed_everything(cfg["seed"], workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what autocast leaves in float32

    if "_target_" not in cfg["data"]:
        raise InputError("data=base is no data set by itself; take csv, webdataset, mix or demo")
    data = instantiate(cfg["data"])
    check_feature_cache(data, frozen=model["encoder"]["frozen"])
    data.prepare_data()
    tokenizer = _tokenizer(model["tokenizer"], data, resumed, init_from)
    data.prepare(tokenizer, **preprocessing(model), splits=["train", "val"])
    captioner = build_model(model, tokenizer.vocab_size)
    _check_lengths(
        captioner, {"data.max_tokens": data.max_tokens, "decoding.max_tokens": decoding.max_tokens}
    )
    checkpoint = checkpoint_of(resumed.path) if resumed else None
    if checkpoint:
        captioner.load_state_dict(
            captioners_weights(checkpoint)
        )  # Lightning does so too, but features come first
    elif init_from:
        load_from(init_from, captioner, tokenizer)
    else:
        load_pretrained_parts(captioner, model)
    if cfg["gradient_checkpointing"]:
        captioner.checkpoint_gradients()
    if cfg["compile"]:
        captioner.compile_parts()
    cache_features(
        captioner.encoder,
        data,
        name=model["encoder"]["name"],
        preprocessing=preprocessing(model),
        device=choose_device(cfg["trainer"]["accelerator"]),
    )

    log = log_until(resumed, checkpoint) if resumed and checkpoint else None
    write_run(run_dir, {**cfg, "resume": None}, tokenizer)
    _print_plan(captioner, cfg, tokenizer, data)
    module = build_module(cfg, captioner, tokenizer, decoding, data)
    try:
        loggers = build_loggers(cfg, run_dir, log)
        trainer = build_trainer(cfg["trainer"], loggers, build_callbacks(cfg, run_dir, data), run_dir)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except Stopped as stopped:
        finish_wandb(exit_code=stopped.exit_status)
        print(f"stopped by {stopped}; python train.py resume={run_dir} goes on", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except BaseException as error:
        finish_wandb(exit_code=1)
        if isinstance(error, KeyboardInterrupt | SystemExit):  # Lightning makes the one of the other
            print(f"interrupted; what was kept until then: {run_dir}", file=sys.stderr)
        raise
    finish_wandb(exit_code=0)
    print(f"run directory: {run_dir}")


def _tokenizer(
    settings: dict[str, Any], data: CaptionData, resumed: RunDirectory | None, init_from: RunDirectory | None
) -> CaptionTokenizer:
    if resumed:
        return resumed.tokenizer()
    if init_from and settings == init_from.config["model"]["tokenizer"]:
        return init_from.tokenizer()
    return build_tokenizer(settings, data)


def build_tokenizer(settings: dict[str, Any], data: CaptionData) -> CaptionTokenizer:
    """The tokenizer of `settings`: pretrained by name, or learned from the training captions."""
    if settings["name"] is not None:
        return CaptionTokenizer.pretrained(settings["name"])
    return CaptionTokenizer.learn(data.training_captions(), settings["vocab_size"])


def _check_lengths(captioner: CaptionModel, max_tokens: dict[str, int]) -> None:
    n_positions = captioner.decoder.wpe.num_embeddings
    for setting, value in max_tokens.items():
        if value > n_positions:
            raise InputError(
                f"{setting}={value} must be at most the decoder's model.decoder.n_positions={n_positions}"
            )


def _print_plan(
    captioner: CaptionModel, cfg: dict[str, Any], tokenizer: CaptionTokenizer, data: CaptionData
) -> None:
    print_summary(
        captioner,
        cfg["model"],
        vocab_size=tokenizer.vocab_size,
        pictures=data.training_size,
        captions_per_image=data.captions_per_image,
        max_tokens=data.max_tokens,
        batch_size=data.batch_size,
    )
    for note in data.notes():
        print(note)
