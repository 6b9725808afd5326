"""Which of several processes this one is, as torchrun or SLURM's srun tells each that it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """A process by itself is rank 0 of 1.

    Attributes:
        by: ``torchrun`` or ``srun``; None: started by itself.
        rank, world: this process, and how many there are.
        local_rank: this process among those of its machine.
        nodes: machines.
    """

    by: str | None = None
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1

    @property
    def local_world(self) -> int:
        """Processes of each machine."""
        return self.world // self.nodes


class LostProcessError(RuntimeError):
    """Another process is gone, without which this one cannot go on."""


def launch() -> Launch:
    """What the environment says. A torchrun that srun started has the last word."""
    told = os.environ
    if "TORCHELASTIC_RUN_ID" in told:
        rank, world, local = (int(told[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Launch("torchrun", rank, world, local, world // int(told["LOCAL_WORLD_SIZE"]))
    # Of srun's alone: sbatch tells its script how many tasks there are to be, too.
    if int(told.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
        rank, world, local, nodes = (int(told[name]) for name in names)
        return Launch("srun", rank, world, local, nodes)
    return Launch()
