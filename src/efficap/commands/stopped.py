"""Why a stage of a training could not go on, where it is not the program's fault, and how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficap.commands.faults import dead_loader
from efficap.commands.resume import has_checkpoint
from efficap.errors import InputError
from efficap.training.memory import is_out_of_memory


@contextlib.contextmanager
def explained(cfg: dict[str, Any]) -> Iterator[None]:
    """Let memory that ran out, and a loader process that died, end a stage of a training with an `InputError`.

    Args:
        cfg: the values of conf/train.yaml.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _memory(cfg) if is_out_of_memory(error) else dead_loader(error)
        if reason is None:
            raise
        raise InputError(f"{reason}; {way_on(Path(cfg['output_dir']))}") from error


def way_on(run_dir: Path) -> str:
    """How a training that has ended early goes on."""
    if not has_checkpoint(run_dir):
        return "there is no checkpoint yet: start anew"
    return f"python train.py resume={run_dir} goes on from the latest checkpoint"


def _memory(cfg: dict[str, Any]) -> str:
    batch, accumulated = cfg["data"].get("batch_size"), cfg["trainer"]["accumulate_grad_batches"]
    helping = [
        f"data.batch_size={max(1, batch // 2)} trainer.accumulate_grad_batches={2 * accumulated}"
        if batch
        else f"smaller data.sources.….batch_size with trainer.accumulate_grad_batches={2 * accumulated}",
        "gradient_checkpointing=true",
        "trainer.precision=bf16-mixed",
        f"a model.image_size below {cfg['model']['image_size']}",
    ]
    if cfg["gradient_checkpointing"]:
        helping.remove("gradient_checkpointing=true")
    if "mixed" in str(cfg["trainer"]["precision"]):
        helping.remove("trainer.precision=bf16-mixed")
    return f"out of memory; what helps: {', '.join(helping[:3])}"
