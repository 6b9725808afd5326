"""Where a command computes, and in which precision: what the settings ask for, and what null stands for."""

from __future__ import annotations

import sys
from typing import Any

import torch

from efficap.errors import InputError
from efficap.models.linear import bfloat16_is_slow

_NO_BFLOAT16 = "which does not compute in bfloat16"


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


def training_device(trainer: dict[str, Any]) -> torch.device:
    """The one that conf/trainer's values choose for this process."""
    device, devices = choose_device(trainer["accelerator"]), trainer["devices"]
    return torch.device("cuda", devices[0]) if device.type == "cuda" and isinstance(devices, list) else device


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
    if device.type == "cpu" and bfloat16_is_slow():
        print(
            f"precision=bfloat16 is slow on this CPU, {_NO_BFLOAT16}; precision=float32 is faster",
            file=sys.stderr,
        )
    return torch.bfloat16


def used_precision(trainer: dict[str, Any]) -> Any:
    """The precision that a training computes in: trainer.precision, and what null stands for.

    On a CPU that does not compute in bfloat16 bf16-mixed is 32-true: torch would emulate it, which is slower.
    """
    precision = trainer["precision"]
    on_gpu = trainer["accelerator"] != "cpu" and torch.cuda.is_available()
    if precision is None and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    is_on_cpu = choose_device(trainer["accelerator"]).type == "cpu"
    if is_on_cpu and precision == "16-mixed":  # which Lightning would make of it
        precision = "bf16-mixed"
    if precision is None or (precision == "bf16-mixed" and is_on_cpu and bfloat16_is_slow()):
        return "32-true"
    return precision


def say_if_slow(trainer: dict[str, Any]) -> None:
    """Say on stderr that this CPU does not compute in the bfloat16 that was asked for, where it does not."""
    asked = trainer["precision"]
    used = used_precision(trainer)
    if asked is not None and used != asked:
        why = f", {_NO_BFLOAT16}" if used == "32-true" else ""
        print(f"trainer.precision={asked} is {used} on this CPU{why}", file=sys.stderr)
