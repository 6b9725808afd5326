"""Why a stage of a training could not go on, where it is not the program's fault, and how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from efficap.commands.faults import dead_loader
from efficap.commands.placement import used_precision
from efficap.commands.resume import has_checkpoint
from efficap.errors import InputError
from efficap.launch import launch
from efficap.models.weights import WEIGHTS_FILE
from efficap.training.memory import is_out_of_memory


@contextlib.contextmanager
def explained(cfg: dict[str, Any]) -> Iterator[None]:
    """Let memory that ran out, and a loader process that died, end a stage of a training with an `InputError`.

    Args:
        cfg: the values of conf/train.yaml.
    """
    # torch has it set once in a process, by the first loader, and Lightning ends a stage by putting back what it found:
    # set before, it stays, and the processes of later loaders, too, are told with what ended them, at once.
    _set_SIGCHLD_handler()
    try:
        yield
    except RuntimeError as error:
        run_dir = Path(cfg["output_dir"])
        if is_out_of_memory(error):
            raise InputError(_out_of_memory(cfg, run_dir)) from error
        if reason := dead_loader(error):
            raise InputError(f"{reason}; {way_on(run_dir)}") from error
        raise


def way_on(run_dir: Path) -> str:
    """How a training that has ended early goes on."""
    if not has_checkpoint(run_dir):
        return "there is no checkpoint yet: start anew"
    own = launch()
    how = "python" if own.by is None else f"{own.by} with as many processes:"
    return f"{how} train.py resume={run_dir} goes on from the latest checkpoint"


def _out_of_memory(cfg: dict[str, Any], run_dir: Path) -> str:
    """What helps in the same training, then what only another one may have: it decides what is learned."""
    helps = [] if cfg["gradient_checkpointing"] else ["gradient_checkpointing=true"]
    trainer, half = cfg["trainer"], "bf16-mixed"
    if "16" not in str(used_precision(trainer)) and used_precision({**trainer, "precision": half}) == half:
        helps.append(f"trainer.precision={half}")
    anew = [f"a model.image_size below {cfg['model']['image_size']}"]
    batch, accumulated = cfg["data"].get("batch_size"), cfg["trainer"]["accumulate_grad_batches"]
    if batch is None:
        anew.insert(
            0, f"smaller data.sources.….batch_size with trainer.accumulate_grad_batches={2 * accumulated}"
        )
    elif batch > 1:
        anew.insert(0, f"data.batch_size={batch // 2} trainer.accumulate_grad_batches={2 * accumulated}")
    if not has_checkpoint(run_dir):
        return f"out of memory; {way_on(run_dir)}; what helps: {', '.join([*helps, *anew])}"
    has_weights = (run_dir / WEIGHTS_FILE).is_file()
    weights = f", which takes the weights by init_from={run_dir}" if has_weights else ""
    what_helps = f", with {' '.join(helps)} in less memory" if helps else ""
    return f"out of memory; {way_on(run_dir)}{what_helps}; for a new training{weights}: {', or '.join(anew)}"
