"""A run's weights in a model of another picture size, number of blocks, positions or vocabulary.

N latent positions, T of tokens, V words, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from efficap.errors import InputError
from efficap.models.bridge import BridgeBlock, interpolated
from efficap.models.captioner import CaptionModel

_LATENT, _POSITIONS, _WORDS = "bridge.positions.weight", "decoder.wpe.weight", "decoder.wte.weight"
_BLOCKS = "bridge.blocks."


@dataclass(slots=True)
class Transfer:
    """What became of each weight, by name.

    Attributes:
        loaded: as it was.
        resized: and how.
        fresh: the run had none.
        dropped: the model has no use for it.
    """

    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def transfer_weights(
    captioner: CaptionModel, weights: Mapping[str, Tensor], *, grid: tuple[int, int], rows: Sequence[int]
) -> Transfer:
    """Load a run's weights, those of another size resized; more blocks than it had change nothing at first.

    Args:
        captioner: with fresh weights.
        weights: the run's.
        grid: (h, w) of the run's latent positions.
        rows: for each of the captioner's V words the run's row for it, -1 where it had none.

    Raises:
        InputError: they are another model's.
    """
    fitted, transfer = dict(weights), Transfer()
    own = captioner.state_dict()
    if own.keys() & weights.keys() & {_LATENT, _POSITIONS, _WORDS} == {_LATENT, _POSITIONS, _WORDS}:
        for name, value, how in (
            (_LATENT, _latent(weights[_LATENT], grid, captioner.encoder.grid), "interpolated"),
            (_POSITIONS, _positions(weights[_POSITIONS], own[_POSITIONS]), "the first ones kept"),
            (_WORDS, _words(weights[_WORDS], own[_WORDS], rows), "by their tokens"),
        ):
            if value is not weights[name]:
                fitted[name] = value
                transfer.resized[name] = f"{len(weights[name]):,} to {len(value):,} rows, {how}"
    for name, value in own.items():
        if name in fitted and fitted[name].shape == value.shape:
            transfer.loaded += [name] if name not in transfer.resized else []
        elif name not in fitted and name.startswith(_BLOCKS):
            transfer.fresh.append(name)
        else:
            shape = f"of shape {tuple(fitted[name].shape)}" if name in fitted else "missing"
            raise InputError(f"{name} is {shape} in the run; the model needs {tuple(value.shape)}")
    transfer.dropped = [name for name in fitted if name not in own]
    if strange := [name for name in transfer.dropped if not name.startswith(_BLOCKS)]:
        raise InputError(f"{strange[0]} of the run has no place in the model")
    captioner.load_state_dict({name: fitted[name] for name in own if name in fitted}, strict=False)
    for number in {int(name.split(".")[2]) for name in transfer.fresh}:
        _silence(captioner.bridge.blocks[number])
    return transfer


def _latent(table: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """(N, D) positions of one grid as those of another; rows around it, which `OriginalBridge` has, stay."""
    edge = (len(table) - before[0] * before[1]) // 2
    if before == after or edge < 0:
        return table
    inner = table[edge : len(table) - edge]
    return torch.cat([table[:edge], interpolated(inner, before, after), table[len(table) - edge :]])


def _positions(table: Tensor, own: Tensor) -> Tensor:
    """(T, D); those beyond the run's last are fresh."""
    if len(table) == len(own):
        return table
    kept = min(len(table), len(own))
    return torch.cat([table[:kept], own[kept:]])


def _words(table: Tensor, own: Tensor, rows: Sequence[int]) -> Tensor:
    """(V, D); words that the run did not have are fresh."""
    if list(rows) == list(range(len(table))):
        return table
    places = torch.tensor(rows)
    known = places >= 0
    words = own.clone()
    words[known] = table[places[known]]
    return words


def _silence(block: nn.Module) -> None:
    """Let a fresh block add nothing at first, so that what was learned goes on to work."""
    assert isinstance(block, BridgeBlock)
    for last in (block.attention_out, block.mlp[-1]):
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
