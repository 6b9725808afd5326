"""Weights, gradients and the optimiser's state in shards, one a process: torch's FSDP2 through Lightning's strategy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from efficap.models.captioner import CaptionModel


def shard(captioner: CaptionModel, mesh: DeviceMesh) -> None:
    """Leave each process a share of all weights; those of a layer come together only while it computes.

    What is used beyond its own layer's forward, as the embedding is for the logits and the cross-attention for the
    memory, is together from a step's first use on to the end of its backward pass.
    """
    captioner.encoder.to(memory_format=torch.contiguous_format)  # FSDP2 takes no others
    parts: list[nn.Module] = [captioner.encoder, captioner.bridge]
    for block in captioner.decoder.h:
        parts += [block.get_submodule("attn"), block.get_submodule("mlp")]
    for part in (*parts, captioner):
        fully_shard(part, mesh=mesh)
    for name in ("encode", "hidden_states"):
        register_fsdp_forward_method(captioner, name)


def bring_together(captioner: CaptionModel, together: bool) -> None:
    """Let all weights be whole in each process, or shared again: decoding takes as many steps as its captions need."""
    for name, part in captioner.named_modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(bool(name) and not together, recurse=False)
            if together:
                part.unshard()
            else:
                part.reshard()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, but for its checkpoints: these are whole, and as one process writes and reads them."""

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state in the first process, nothing in the others."""
        assert self.model is not None
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_optimizer_state_dict(self.model, inner, options=whole)
        if not found:
            return {}
        groups: list[dict[str, Any]] = found["param_groups"]  # type: ignore[assignment]
        names = itertools.chain.from_iterable(group["params"] for group in groups)
        number = {name: place for place, name in enumerate(names)}  # as torch's optimisers count
        state = {number[name]: value for name, value in found["state"].items()}  # type: ignore[union-attr]
        numbered = [{**group, "params": [number[name] for name in group["params"]]} for group in groups]
        return {"state": state, "param_groups": numbered}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, map_location="cpu", weights_only=True, mmap=True
        )
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=whole)
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = (parameter for group in optimizer.param_groups for parameter in group["params"])
            numbers = (number for group in saved["param_groups"] for number in group["params"])
            name = {number: name_of[parameter] for number, parameter in zip(numbers, own, strict=True)}
            set_optimizer_state_dict(self.model, optimizer, _named(saved, name), options=whole)
        return checkpoint


def _named(saved: Mapping[str, Any], name: Mapping[int, str]) -> dict[str, Any]:
    return {
        "state": {name[number]: value for number, value in saved["state"].items()},
        "param_groups": [
            {**group, "params": [name[number] for number in group["params"]]}
            for group in saved["param_groups"]
        ],
    }
