"""Train a captioner: data, model and trainer from one configuration, a run directory at the end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate

from efficap.commands.faults import FOR_RUNS, FOR_SWEEPS, check_writable
from efficap.commands.fit import fit, make_ready
from efficap.commands.init_from import load_from
from efficap.commands.job import recorded
from efficap.commands.kinds import check_form
from efficap.commands.loggers import build_loggers, finish_wandb, log_artifact
from efficap.commands.placement import check_accelerator, choose_device, say_if_slow
from efficap.commands.processes import check_processes, check_sharding, requeue
from efficap.commands.resume import check_limits, check_new, leave_no_trace, log_until
from efficap.commands.run_dir import RunDirectory, write_run
from efficap.commands.saved_parts import DATA_MODULES
from efficap.commands.schema import MODEL, OPTIMIZER, STAGE, TRAIN, check_data
from efficap.commands.settings import resolved_settings
from efficap.commands.stages import naming, stages_of
from efficap.commands.stopped import way_on
from efficap.commands.sweep import is_sweep_job
from efficap.commands.trainer import check_trainer, leave_out_lightnings_chatter
from efficap.commands.words import captions_of, owners, teach_words, tokenizer_of
from efficap.data.caption_data import CaptionData
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.evaluation.scores import check_java
from efficap.launch import launch
from efficap.models.build import build_model, load_first_weights, preprocessing
from efficap.models.captioner import CaptionModel
from efficap.ranks import first_alone, from_first, is_first, join, leave, losses_named, world_size
from efficap.tokenizer import CaptionTokenizer
from efficap.training.checkpoints import Checkpoint, checkpoint_of
from efficap.training.feature_cache import check_feature_cache
from efficap.training.module import as_range
from efficap.training.objective import check_objective
from efficap.training.optim import check_optimizer
from efficap.training.progress import begun, check_free, is_finished, metrics_of
from efficap.training.resume_point import Stopped
from efficap.training.stage import Stage


def train(cfg: dict[str, Any]) -> Path:
    """Train as the plain, resolved values of conf/train.yaml say; returns the run directory.

    Raises:
        InputError: before the first step, whatever can be known to be wrong by then.
    """
    leave_out_lightnings_chatter()
    check_form(cfg, TRAIN)
    check_form(cfg["model"], MODEL, "model.", exact=True)
    join(gpu=cfg["trainer"]["accelerator"] != "cpu" and torch.cuda.is_available())
    asked = Path(cfg["output_dir"])
    if is_sweep_job() and "/" in cfg["name"]:
        raise InputError(f"name={cfg['name']} must be without / in a sweep, where each job is a folder")
    with recorded(asked) as is_done:
        if is_done:  # whatever has become of its run since
            print(f"finished already: {asked}")
            return asked
        resolved, init_from, resumed, finished = from_first(lambda: _settings(cfg, asked))
        if finished:
            print(f"finished already: {resolved['output_dir']}")
        else:
            _train(resolved, init_from, resumed)
    leave()
    return Path(resolved["output_dir"])


def _settings(
    cfg: dict[str, Any], asked: Path
) -> tuple[dict[str, Any], RunDirectory | None, RunDirectory | None, bool]:
    """`resolved_settings`, and whether the training is finished already."""
    resolved, init_from, resumed = resolved_settings(cfg)
    if resumed:
        check_form(resolved, TRAIN)
    if resumed and resumed.path != asked.resolve():
        leave_no_trace(asked)
    finished = bool(resumed and cfg["resume"] in (None, "auto") and is_finished(resumed.path))
    if resumed and not finished:
        check_free(resumed.path)
    elif not resumed:
        check_new(asked)
    return resolved, init_from, resumed, finished


def check_settings(cfg: dict[str, Any]) -> None:
    """Check what can be told of the settings of a training, or of a stage, without its data.

    Raises:
        InputError: a value that is none, out of range, or does not go with another.
    """
    check_form(cfg, STAGE)
    check_form(cfg["optimizer"], OPTIMIZER, "optimizer.", exact=True)
    if cfg["data"].get("_target_") in DATA_MODULES:  # one of the user's own knows its settings
        check_data(cfg["data"])
    _check_validation(cfg["data"])
    check_trainer(cfg["trainer"])
    check_processes(cfg["trainer"])
    check_sharding(cfg)
    check_optimizer(**cfg["optimizer"])
    check_objective(cfg["training"], frozen=cfg["model"]["encoder"]["frozen"])


def _check_growing(cfg: dict[str, Any]) -> None:
    start_size, image_size = cfg["training"].get("start_size"), cfg["model"]["image_size"]
    if start_size is not None and start_size >= image_size:
        raise InputError(
            f"training.start_size={start_size} must be below model.image_size={image_size}, to which pictures grow; "
            "null: no growing"
        )


def _check_validation(data: dict[str, Any]) -> None:
    sources, name, where = data.get("sources"), data.get("evaluate_on"), "data"
    if isinstance(sources, dict) and isinstance(sources.get(name), dict):
        data, where = sources[name], f"data.sources.{name}"
    if "val_shards" in data and data["val_shards"] is None:
        raise InputError(
            f"{where}.val_shards is not given: add {where}.val_shards=SHARDS, which are not learned from"
        )


def best_score(run_dir: Path) -> float | None:
    """The best ``val/CIDEr`` of a run; None where it was never validated."""
    best = metrics_of(run_dir).get("best")
    return best and best["val/CIDEr"]


def _train(cfg: dict[str, Any], init_from: RunDirectory | None, resumed: RunDirectory | None) -> None:
    run_dir, stages = Path(cfg["output_dir"]), stages_of(cfg)
    check_accelerator("trainer.accelerator", cfg["trainer"]["accelerator"])
    if is_first():
        copied = "copy it to a disk that can be written, and resume=COPY goes on there"
        check_writable(run_dir, copied if resumed else FOR_SWEEPS if is_sweep_job() else FOR_RUNS)
        check_java()
        say_if_slow(cfg["trainer"])
        if cfg["resume"] == "auto":  # else it is the run that was found
            print(f"resume=auto: no training of these settings in {run_dir.parent}; a new one begins")
    decoding = build_decoding(cfg["decoding"])
    for name, settings in stages.items():
        with naming(name):
            check_settings(settings)
            if not resumed:  # earlier ones may have it
                _check_growing(settings)
    pl.seed_everything(cfg["seed"], workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what autocast leaves in float32

    checkpoint = from_first(lambda: Checkpoint.read(checkpoint_of(resumed.path))) if resumed else None
    stage = checkpoint.stage if checkpoint else Stage.first(list(stages))
    if checkpoint:
        with naming(stage.name):
            check_limits(checkpoint, stages[stage.name]["trainer"])
    with contextlib.ExitStack() as held:
        from_first(lambda: held.enter_context(begun(run_dir)))
        data = _data(stages)
        shares = (settings["training"].get("hidden_captions") or 0.0 for settings in stages.values())
        hides = any(share for of_stage in shares for share in as_range(of_stage))
        tokenizer = from_first(
            lambda: tokenizer_of(cfg["model"]["tokenizer"], data, resumed, init_from, counts=hides),
            "the tokenizer",
        )
        for its_data, name in owners(data).items():
            with naming(name):
                its_data.prepare(tokenizer, **preprocessing(cfg["model"]), splits=["train", "val"])
        captioner = build_model(cfg["model"], tokenizer.vocab_size)
        _check_length(captioner, "decoding.max_tokens", decoding.max_tokens)
        for name in stages:
            with naming(name):
                _check_length(captioner, "data.max_tokens", data[name].max_tokens)
        _load(captioner, cfg, data, tokenizer, init_from, checkpoint)
        make_ready(captioner, stages[stage.name], data[stage.name])
        log = log_until(resumed, checkpoint) if resumed and checkpoint else None

        def keep_settings() -> None:
            if is_first():
                write_run(run_dir, {**cfg, "resume": None}, tokenizer)

        with _ending(run_dir):
            loggers = build_loggers(cfg, run_dir, log)
            with losses_named():
                fit(stages, stage, checkpoint, data, captioner, tokenizer, decoding, loggers, keep_settings)
    log_artifact(cfg["logger"], run_dir)
    finish_wandb(exit_code=0)
    print(f"run directory: {run_dir}")


def _load(
    captioner: CaptionModel,
    cfg: dict[str, Any],
    data: dict[str | None, CaptionData],
    tokenizer: CaptionTokenizer,
    init_from: RunDirectory | None,
    checkpoint: Checkpoint | None,
) -> None:
    """Give a new captioner the weights that the training begins or goes on with, and make it ready to learn."""
    if checkpoint:
        _load_checkpoint(captioner, checkpoint)  # features are looked up by them
    elif init_from:
        load_from(init_from, captioner, tokenizer)
    else:
        with first_alone("download the weights"):
            load_first_weights(captioner, cfg["model"])
        if not cfg["model"]["decoder"]["pretrained"]:
            teach_words(captioner.decoder, captions_of(data), tokenizer)
    if world_size() > 1 and choose_device(cfg["trainer"]["accelerator"]).type == "cuda":
        captioner.encoder.share_statistics()
    if cfg["gradient_checkpointing"]:
        captioner.checkpoint_gradients()
    if cfg["compile"]:
        captioner.compile_parts()


@contextlib.contextmanager
def _ending(run_dir: Path) -> Iterator[None]:
    """Let a training that a signal stops, or that fails, say how it goes on, and close W&B's run."""
    try:
        yield
    except Stopped as stopped:
        finish_wandb(exit_code=stopped.exit_status)
        if is_first():
            print(f"stopped by {stopped}; {way_on(run_dir)}", file=sys.stderr)
        leave()
        if stopped.by_slurm and launch().rank == 0:
            requeue()
        sys.exit(stopped.exit_status)
    except BaseException as error:
        finish_wandb(exit_code=1)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            print(f"interrupted; what was kept until then: {run_dir}", file=sys.stderr)
        if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes a SystemExit
            raise KeyboardInterrupt from None
        raise


def _load_checkpoint(captioner: CaptionModel, checkpoint: Checkpoint) -> None:
    try:
        captioner.load_state_dict(checkpoint.captioners_weights())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise InputError(f"{checkpoint.file} does not fit the config.yaml of its run: {reason}") from error


def _data(stages: dict[str | None, dict[str, Any]]) -> dict[str | None, CaptionData]:
    """The data of each stage, ready to be read; where settings are equal, the same."""
    made: dict[str, CaptionData] = {}
    data = {}
    for name, cfg in stages.items():
        with naming(name):
            if "_target_" not in cfg["data"]:
                raise InputError("data=base is no data set by itself; take csv, webdataset, mix or demo")
            key = json.dumps(cfg["data"], sort_keys=True)
            if key not in made:
                made[key] = instantiate(cfg["data"])
                if not isinstance(made[key], CaptionData):
                    raise InputError(
                        f"data._target_={cfg['data']['_target_']} is no data module: none of CaptionData's"
                    )
            data[name] = made[key]
            check_feature_cache(
                data[name],
                frozen=cfg["model"]["encoder"]["frozen"],
                start_size=cfg["training"].get("start_size"),
            )
            with first_alone(f"prepare {key}"):
                data[name].prepare_data()
            # Shards are indexed now, while the others wait for days and not for minutes, as in `from_first`.
            _ = data[name].training_size
    return data


def _check_length(captioner: CaptionModel, setting: str, value: int) -> None:
    n_positions = captioner.decoder.wpe.num_embeddings
    if value > n_positions:
        raise InputError(
            f"{setting}={value} must be at most the decoder's model.decoder.n_positions={n_positions}"
        )
