"""What a captioner is trained for: the Lightning module that training.objective names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from efficap.data.caption_data import CaptionData
from efficap.decoding import Decoding
from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training import module, self_critical
from efficap.training.bad_steps import check_limit
from efficap.training.ema import check_decay
from efficap.training.module import CaptionModule
from efficap.training.reward import caption_reward
from efficap.training.self_critical import SelfCriticalModule

# The options of each objective are what its check takes; runs from before one was there lack those with a default.
_CHECKS: dict[str, Callable[..., None]] = {
    "cross_entropy": module.check_settings,
    "scst": self_critical.check_settings,
}
_OPTIONS = {objective: signature(check).parameters for objective, check in _CHECKS.items()}
_OF_ALL = ("objective", "ema_decay", "max_bad_steps")


def check_objective(training: Mapping[str, Any], *, frozen: bool) -> None:
    """Check the values of conf/training.

    Args:
        frozen: whether the encoder is, for good.

    Raises:
        InputError: an unknown objective, an option that is missing, another objective's, out of range, or one that does
            not go with a frozen encoder.
    """
    objective = training.get("objective")
    if objective not in _OPTIONS:
        raise InputError(f"training.objective={objective} must be one of {', '.join(_OPTIONS)}")
    taken = (*_OPTIONS[objective], *_OF_ALL)
    for name, value in training.items():
        if name not in taken:
            raise InputError(
                f"training.{name}={value} is no option of training={objective}, which takes {', '.join(taken)}; "
                "remove it or choose another objective"
            )
    needed = [name for name, option in _OPTIONS[objective].items() if option.default is Parameter.empty]
    missing = [name for name in (*needed, "ema_decay") if name not in training]
    if missing:
        raise InputError(
            f"training.{missing[0]} is missing; conf/training/{objective}.yaml has a default: choose it by "
            f"training={objective}"
        )
    _CHECKS[objective](**_options(training))
    module.check_unfreezing(training.get("unfreeze_encoder_at"), frozen=frozen)
    if training["ema_decay"] is not None:
        check_decay(training["ema_decay"])
    check_limit(training.get("max_bad_steps"))


def build_module(
    cfg: Mapping[str, Any],
    captioner: CaptionModel,
    tokenizer: CaptionTokenizer,
    decoding: Decoding,
    data: CaptionData,
) -> CaptionModule:
    """The module for checked values of conf/train.yaml; `data` gives the captions that rewards are weighed by."""
    training, optimizer = cfg["training"], cfg["optimizer"]
    if training["objective"] == "cross_entropy":
        return CaptionModule(captioner, tokenizer, decoding, optimizer=optimizer, **_options(training))
    return SelfCriticalModule(
        captioner,
        tokenizer,
        decoding,
        optimizer=optimizer,
        reward=caption_reward(data.training_captions(), tokenizer, data.max_tokens),
        seed=cfg["seed"],
        **_options(training),
    )


def _options(training: Mapping[str, Any]) -> dict[str, Any]:
    return {name: training[name] for name in _OPTIONS[training["objective"]] if name in training}
