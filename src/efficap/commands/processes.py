"""How the processes that torchrun or srun started train together: checked against the settings, told to Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from efficap.commands.sweep import is_sweep_job
from efficap.errors import InputError
from efficap.launch import launch
from efficap.training.sharding import ShardedStrategy


def check_processes(trainer: dict[str, Any]) -> None:
    """Check trainer.strategy and trainer.devices against the processes that were started.

    Raises:
        InputError: they do not go together, or not with another setting.
    """
    own, strategy, devices = launch(), trainer.get("strategy"), trainer["devices"]
    if strategy not in (None, "ddp", "fsdp"):
        raise InputError(f"trainer.strategy={strategy} must be ddp, fsdp, or null for one process")
    several = isinstance(devices, int) and devices > 1
    if own.by is None and (strategy or several):
        said = f"trainer.strategy={strategy}" if strategy else f"trainer.devices={devices}"
        raise InputError(
            f"{said} needs a process for each device: torchrun --standalone "
            f"--nproc-per-node={devices if several else 2} train.py trainer={strategy or 'ddp'} …, or srun "
            "(docs/scaling.md); for one process: trainer.strategy=null trainer.devices=1"
        )
    if own.world > 1 and strategy is None:
        raise InputError(
            f"{own.by} started {own.world} processes, and trainer.strategy=null trains in one: add trainer=ddp"
        )
    if strategy is None and not _is_one(devices):  # for several Lightning would itself start others
        raise InputError(
            f"trainer.devices={devices} must be 1 in one process, or [N] for the GPU of that number; several GPUs need "
            "a process for each: torchrun --standalone --nproc-per-node=GPUS train.py trainer=ddp … (docs/scaling.md)"
        )
    if trainer.get("sync_batchnorm"):
        raise InputError(
            "trainer.sync_batchnorm=true would take timm's activations away; leave it out: GPUs that train together "
            "share BatchNorm's statistics as it is"
        )
    if strategy is None:
        return
    if devices != 1:
        raise InputError(f"trainer.devices={devices}: {own.by} gave each process its own; leave it out")
    if is_sweep_job():
        raise InputError(
            f"trainer.strategy={strategy} is not for the jobs of a sweep, which are one process each: start each "
            f"training by {own.by}"
        )
    if isinstance(trainer["val_check_interval"], str):
        raise InputError(
            f"trainer.val_check_interval={trainer['val_check_interval']}: the clocks of several processes differ; "
            "give a number of batches"
        )


def _is_one(devices: Any) -> bool:
    if isinstance(devices, list):
        return len(devices) == 1 and isinstance(devices[0], int) and devices[0] >= 0
    return bool(devices == 1)


def check_sharding(cfg: dict[str, Any]) -> None:
    """Raises InputError where trainer.strategy=fsdp comes with what takes the weights to be whole."""
    if cfg["trainer"].get("strategy") != "fsdp":
        return
    training = cfg["training"]
    for setting, used in (
        ("training.objective=scst", training["objective"] == "scst"),
        (f"training.ema_decay={training['ema_decay']}", training["ema_decay"] is not None),
        ("training.unfreeze_encoder_at", training.get("unfreeze_encoder_at") is not None),
        ("optimizer=muon", cfg["optimizer"].get("matrix_lr") is not None),
        ("stages", cfg["stages"] is not None),
        ("compile=true", cfg["compile"]),
    ):
        if used:
            raise InputError(
                f"{setting} takes the weights to be whole, and trainer.strategy=fsdp shares them out; trainer=ddp "
                "does with it"
            )


def strategy_settings(strategy: str | None, *, some_rest: bool) -> dict[str, Any]:
    """What Lightning's Trainer is told of the processes.

    Args:
        strategy: trainer.strategy, checked.
        some_rest: whether some parameters that learn do not do so in each step.
    """
    if strategy is None:
        # SLURM's variables, where it only lent the machine, would suggest another environment.
        return {"strategy": "auto", "plugins": [LightningEnvironment()]}
    own = launch()
    sharded = strategy == "fsdp"
    return {
        "strategy": ShardedStrategy(own.world) if sharded else DDPStrategy(find_unused_parameters=some_rest),
        "devices": own.local_world,
        "num_nodes": own.nodes,
        "plugins": [TorchElasticEnvironment()],  # `join` tells srun's processes the same as torchrun's
    }


def requeue() -> None:
    """Have SLURM start this job anew, whose command then goes on by resume=auto; it ends the processes of now."""
    job = os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"SLURM does not start job {job} anew: {error}", file=sys.stderr)
