"""Where a command computes, and in which precision: what the settings ask for, and what null stands for."""

from __future__ import annotations

import sys
from typing import Any

import torch

from efficap.errors import InputError
from efficap.models.linear import bfloat16_is_slow


def choose_device(accelerator: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``gpu``.

    Raises:
        InputError: a GPU was asked for and there is none, or an unknown word.
    """
    check_accelerator("accelerator", accelerator)
    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    mps = torch.backends.mps.is_available()
    return torch.device("mps" if mps else "cpu")


def check_accelerator(setting: str, accelerator: str) -> None:
    """Raises InputError where `accelerator` is unknown, or a GPU that is not there."""
    known = ("auto", "cpu", "gpu")
    if accelerator not in known:
        raise InputError(f"{setting}={accelerator} must be one of {', '.join(known)}")
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError(
            f"{setting}=gpu, but torch {torch.__version__} sees no GPU here; use {setting}=cpu or auto"
        )


def choose_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of the weights for ``float32``, ``bfloat16`` or None: bfloat16 on a GPU that computes in it.

    Says on stderr where bfloat16 was asked for and is slow.

    Raises:
        InputError: another word.
    """
    if precision not in (None, "float32", "bfloat16"):
        raise InputError(
            f"precision={precision} must be float32, bfloat16, or null for bfloat16 on a GPU that has it"
        )
    if precision == "float32":
        return torch.float32
    if precision is None:
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if on_gpu else torch.float32
    if device.type == "cpu":
        _say_if_slow("precision=bfloat16", "precision=float32")
    return torch.bfloat16


def used_precision(trainer: dict[str, Any]) -> Any:
    """The precision that a training computes in: trainer.precision, and what null stands for."""
    if trainer["precision"] is not None:
        return trainer["precision"]
    on_gpu = trainer["accelerator"] != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def say_if_slow(trainer: dict[str, Any]) -> None:
    """Say on stderr that a training is slow on this CPU in the precision that was asked for, where it is."""
    precision = str(used_precision(trainer))
    if precision.startswith("bf16") and choose_device(trainer["accelerator"]).type == "cpu":
        _say_if_slow(f"trainer.precision={precision}", "trainer.precision=32-true")


def _say_if_slow(asked: str, faster: str) -> None:
    if bfloat16_is_slow():
        print(
            f"{asked} is slow on this CPU, which does not compute in bfloat16; {faster} is faster",
            file=sys.stderr,
        )
