"""Trainings of several stages: what each changes, completed and checked before any work starts."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException

from efficap.commands.said import said_settings
from efficap.errors import InputError

Settings = dict[str, Any]

_LIMITS: Settings = {"max_epochs": -1, "max_steps": -1, "max_time": None}  # none of them is one
# What a stage may have of its own, None: all of it. The rest is the same for all stages.
_OWN: Settings = {
    "data": None,
    "optimizer": None,
    "training": None,
    "trainer": dict.fromkeys(
        (
            *_LIMITS,
            "gradient_clip_val",
            "accumulate_grad_batches",
            "check_val_every_n_epoch",
            "val_check_interval",
            "limit_train_batches",
            "limit_val_batches",
        )
    ),
    "model": {"encoder": {"frozen": None}},
}
# What names a group's option: with it, changes are the option, and not merged into the one before.
_CHOSEN_BY = ("_target_", "objective")
_GIVEN_WHOLE = ("table", "epochs", "weights")  # settings whose own keys are the user's


def with_whole_stages(cfg: Settings) -> Settings:
    """The values of conf/train.yaml with all settings of each stage, those of the last one as the run's own.

    These are what evaluation, and a training that starts from the run, go by. Limits are a stage's alone: the ones in
    `cfg` hold for a training without stages.

    Raises:
        InputError: a setting that does not exist or is not a stage's, or a stage without a limit.
    """
    if cfg["stages"] is None:
        return cfg
    if not isinstance(cfg["stages"], dict) or not cfg["stages"]:
        raise InputError(
            f"stages={cfg['stages']} must give names to changes, as {{first: {{trainer: {{max_epochs: 1}}}}}}; "
            "null: a training without stages"
        )
    for limit in _LIMITS:
        if f"trainer.{limit}" in said_settings(cfg):
            raise InputError(
                f"trainer.{limit} is each stage's own: {_named(cfg['stages'], f'trainer.{limit}')}"
            )
    base = _own_of(cfg, _OWN)
    base["trainer"] |= _LIMITS
    stages = {name: _changed(base, changes, f"stages.{name}") for name, changes in cfg["stages"].items()}
    for name, stage in stages.items():
        if all(stage["trainer"][limit] in (none, 0) for limit, none in _LIMITS.items()):
            raise InputError(
                f"stages.{name} has no limit: add stages.{name}.trainer.max_epochs=N, max_steps=N or "
                "max_time=DD:HH:MM:SS"
            )
    last = list(stages.values())[-1]
    return _with(cfg, last) | {"stages": stages}


def stages_of(cfg: Settings) -> dict[str | None, Settings]:
    """The settings of each stage of `with_whole_stages`, in turn; of a training without them, `cfg` as None's."""
    if cfg["stages"] is None:
        return {None: cfg}
    return {name: _with(cfg, stage) for name, stage in cfg["stages"].items()}


def is_of_stages(key: str) -> bool:
    """Whether each stage has a value of its own of this setting."""
    return f"{key}.".startswith(tuple(f"{leaf}." for leaf in _leaves(_OWN)))


@contextlib.contextmanager
def naming(stage: str | None) -> Iterator[None]:
    """Let an `InputError` say in which stage it is."""
    try:
        yield
    except (InputError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if stage is None or not isinstance(cause, InputError):
            raise
        raise InputError(f"stages.{stage}: {cause}") from error


def _own_of(settings: Settings, own: Settings) -> Settings:
    return {
        key: settings[key] if below is None else _own_of(settings[key], below) for key, below in own.items()
    }


def _changed(settings: Any, changes: Any, where: str) -> Settings:
    if not isinstance(changes, dict):
        raise InputError(f"{where}={changes} must be settings, as {where}.{next(iter(settings))}")
    changed = dict(settings)
    for key, value in changes.items():
        setting = f"{where}.{key}"
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=3, cutoff=0.6)
            known = f"nearest: {', '.join(near)}" if near else f"it has its own {', '.join(_leaves(_OWN))}"
            raise InputError(f"{setting}={value} is no setting of a stage; {known}")
        chosen = isinstance(value, dict) and any(name in value for name in _CHOSEN_BY)
        merged = isinstance(settings[key], dict) and key not in _GIVEN_WHOLE and not chosen
        changed[key] = _changed(settings[key], value, setting) if merged else value
    return changed


def _with(cfg: Settings, stage: Settings) -> Settings:
    model = {**cfg["model"], "encoder": {**cfg["model"]["encoder"], **stage["model"]["encoder"]}}
    return {**cfg, **stage, "trainer": {**cfg["trainer"], **stage["trainer"]}, "model": model}


def _leaves(own: Settings, above: str = "") -> Iterator[str]:
    for key, below in own.items():
        if below is None:
            yield f"{above}{key}"
        else:
            yield from _leaves(below, f"{above}{key}.")


def _named(stages: Settings, key: str) -> str:
    return ", ".join(f"stages.{name}.{key}" for name in stages)
