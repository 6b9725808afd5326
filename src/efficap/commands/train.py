"""Train a captioner: data, model and trainer from one configuration, a run directory at the end."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from efficap.commands.init_from import load_from, with_model_of
from efficap.commands.job import recorded
from efficap.commands.loggers import build_loggers, finish_wandb
from efficap.commands.resume import (
    is_finished,
    leave_no_trace,
    log_until,
    named_run,
    same_run,
    with_settings_of,
)
from efficap.commands.run_dir import RunDirectory, check_accelerator, choose_device, write_run
from efficap.data.module import CaptionData
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.evaluation.scores import check_java
from efficap.models.build import (
    build_model,
    load_pretrained_parts,
    preprocessing,
    resolve_model,
)
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training.callbacks import BestCheckpoint, ProgressBar, RunMetrics, SampleCaptions
from efficap.training.checkpoints import ResumePoint, Stopped, checkpoint_of
from efficap.training.ema import ExponentialMovingAverage
from efficap.training.feature_cache import cache_features, check_feature_cache
from efficap.training.objective import build_module, check_objective
from efficap.training.summary import print_summary

_PATHS = {
    "table",
    "image_dir",
    "root",
    "quarantine",
    "shards",
    "val_shards",
    "test_shards",
    "index_dir",
    "feature_cache_dir",
}


def train(cfg: dict[str, Any]) -> Path:
    """Train as the plain, resolved values of conf/train.yaml say; returns the run directory.

    Raises:
        InputError: before the first step, whatever can be known to be wrong by then.
    """
    _leave_out_lightnings_chatter()
    asked = Path(cfg["output_dir"])
    with recorded(asked):
        resolved, init_from, resumed = _resolved(cfg)
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
    _check_numbers(cfg["trainer"])
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
    if init_from and not resumed:
        load_from(init_from, captioner, tokenizer)
    elif not resumed:
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

    checkpoint = checkpoint_of(resumed.path) if resumed else None
    log = log_until(resumed, checkpoint) if resumed and checkpoint else None
    write_run(run_dir, {**cfg, "resume": None}, tokenizer)
    _print_plan(captioner, cfg, tokenizer, data)
    module = build_module(cfg, captioner, tokenizer, decoding, data)
    try:
        loggers = build_loggers(cfg, run_dir, log)
        trainer = _build_trainer(cfg["trainer"], loggers, _build_callbacks(cfg, run_dir, data), run_dir)
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


def _resolved(cfg: dict[str, Any]) -> tuple[dict[str, Any], RunDirectory | None, RunDirectory | None]:
    """The settings with all that they leave to other things, the run to start from, and the run to go on with."""
    resumed = named_run(cfg)
    if resumed:
        cfg = with_settings_of(resumed, cfg)
    init_from = RunDirectory(cfg["init_from"], "init_from") if cfg["init_from"] is not None else None
    if not resumed:
        cfg = with_model_of(init_from, cfg) if init_from else {**cfg, "model": resolve_model(cfg["model"])}
        cfg = {**cfg, "data": _with_absolute_paths(cfg["data"])}
        resumed = same_run(cfg)
        cfg = with_settings_of(resumed, cfg) if resumed else cfg
    return cfg, init_from, resumed


def _tokenizer(
    settings: dict[str, Any], data: CaptionData, resumed: RunDirectory | None, init_from: RunDirectory | None
) -> CaptionTokenizer:
    if resumed:
        return resumed.tokenizer()
    if init_from and settings == init_from.config["model"]["tokenizer"]:
        return init_from.tokenizer()
    return build_tokenizer(settings, data)


def _leave_out_lightnings_chatter() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*irectory .* exists and is not empty"
    )  # Hydra's files, a resumed run
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.* is deprecated"
    )  # Lightning's own, under torch 2.15
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")  # the data module counts
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start")  # a frozen encoder, SCST
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # data.num_workers chooses


def _check_numbers(trainer: dict[str, Any]) -> None:
    """Raises InputError where a number that Lightning only uses later is none."""
    for key in ("max_epochs", "max_steps", "accumulate_grad_batches", "log_every_n_steps"):
        if not isinstance(trainer[key], int) or trainer[key] < -1:
            raise InputError(f"trainer.{key}={trainer[key]} must be a whole number")
    clip = trainer["gradient_clip_val"]
    if clip is not None and (not isinstance(clip, int | float) or clip < 0):
        raise InputError(f"trainer.gradient_clip_val={clip} must be a number of at least 0, or null")


def _with_absolute_paths(data: dict[str, Any]) -> dict[str, Any]:
    """The data settings as the run directory keeps them, so that it evaluates from any folder."""
    data = {key: _absolute(value) if key in _PATHS else value for key, value in data.items()}
    if "sources" in data:
        data["sources"] = {name: _with_absolute_paths(source) for name, source in data["sources"].items()}
    return data


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_absolute(below) for below in value]
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) else value


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


def _build_trainer(
    settings: dict[str, Any], loggers: list[Logger], callbacks: list[Callback], run_dir: Path
) -> pl.Trainer:
    settings = dict(settings)
    if settings["precision"] is None:
        on_gpu = settings["accelerator"] != "cpu" and torch.cuda.is_available()
        settings["precision"] = (
            "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    if settings["enable_progress_bar"]:
        callbacks = [*callbacks, ProgressBar()]
    return pl.Trainer(
        **settings,
        default_root_dir=run_dir,
        logger=loggers,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loaders share themselves out
        enable_model_summary=False,
    )


def _build_callbacks(cfg: dict[str, Any], run_dir: Path, data: CaptionData) -> list[Callback]:
    pictures = functools.partial(data.picture, "val")
    callbacks = [instantiate(settings) for settings in cfg["callbacks"].values() if settings]
    if cfg["training"]["ema_decay"] is not None:
        callbacks.append(ExponentialMovingAverage(cfg["training"]["ema_decay"]))
    return [
        *callbacks,
        RunMetrics(run_dir),
        SampleCaptions(run_dir, pictures),
        ResumePoint(run_dir, seed=cfg["seed"], **cfg["checkpoint"]),  # after what counts the step
        BestCheckpoint(run_dir),
    ]
