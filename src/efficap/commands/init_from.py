"""A training that starts from a run's weights: what it takes of that run, and what the user may still change."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from efficap.commands.run_dir import RunDirectory
from efficap.commands.said import is_said, said_settings
from efficap.errors import InputError
from efficap.evaluation.compare.groups import without_data
from efficap.models.build import output_stride
from efficap.models.captioner import CaptionModel
from efficap.models.transfer import Transfer, transfer_weights
from efficap.models.weights import WEIGHTS_FILE, read_weights
from efficap.tokenizer import CaptionTokenizer

# What neither the weights nor the pictures depend on.
_FREE = {"encoder.frozen", "encoder.drop_path_rate", "bridge.dropout", "decoder.dropout"}
# What the weights can be fitted to.
_FITTED = {
    "image_size",
    "encoder.output_stride",
    "bridge.n_blocks",
    "decoder.n_positions",
    "tokenizer.name",
    "tokenizer.vocab_size",
}


def model_name(choice: str, init_from: str) -> str:
    """What names a model that is a run's: the run, without its data, as ``small`` of ``small-csv``; else the choice."""
    try:
        config = RunDirectory(init_from, "init_from").config
    except InputError:
        return choice  # the training tells
    return without_data(config["name"], config["data"])


def with_model_of(run: RunDirectory, cfg: dict[str, Any]) -> dict[str, Any]:
    """The values of conf/train.yaml with the model of a run that the training starts from.

    All of it is the run's, learning rates too, but for what was said (`said_settings`): freezing, regularisation and
    learning rates are taken from there, and sizes that the weights can be fitted to (`load_from`); nothing else may be
    said that differs.

    Raises:
        InputError: another model was asked for.
    """
    theirs, ours = _leaves(run.config["model"]), _leaves(cfg["model"])
    theirs.setdefault("encoder.output_stride", output_stride(run.config["model"]))
    model: dict[str, Any] = dict(theirs)
    said = said_settings(cfg)
    for key in theirs.keys() & ours.keys():
        if not is_said(f"model.{key}", said):
            continue
        if key in _FREE | _FITTED or key.startswith("lr."):
            model[key] = ours[key]
        elif ours[key] is not None and ours[key] != theirs[key]:  # null is filled by what else is chosen
            raise InputError(
                f"model.{key}={ours[key]} must be {theirs[key]}, as in init_from={cfg['init_from']}; leave model out: "
                f"it is that run's; what may change: {', '.join(sorted(f'model.{key}' for key in _FREE | _FITTED))}"
            )
    lr = {
        part: value if _is_own_rate(part, cfg, said) else model[f"lr.{part}"]
        for part, value in cfg["optimizer"]["lr"].items()
    }
    return {
        **cfg,
        "init_from": str(run.path),
        "model": _nested(model),
        "optimizer": {**cfg["optimizer"], "lr": lr},
    }


def load_from(run: RunDirectory, captioner: CaptionModel, tokenizer: CaptionTokenizer) -> None:
    """Load a run's weights into a captioner of its model, perhaps of other sizes, and print what became of them.

    Raises:
        InputError: the run has no weights, or another model's.
    """
    file = run.path / WEIGHTS_FILE
    if not file.is_file():
        raise InputError(
            f"init_from={run.path} holds no {WEIGHTS_FILE}: training writes it at its first validation"
        )
    rows = tokenizer.ids_in(run.tokenizer())
    model = run.config["model"]
    side = -(-model["image_size"] // output_stride(model))
    try:
        transfer = transfer_weights(captioner, read_weights(file), grid=(side, side), rows=rows)
    except InputError as error:
        raise InputError(f"init_from={run.path}: {error}") from error
    _print_transfer(run, transfer)


def _print_transfer(run: RunDirectory, transfer: Transfer) -> None:
    table = Table(title=f"init_from {Path(*run.path.parts[-2:])}")
    table.add_column("weights")
    table.add_column("number", justify="right")
    table.add_column("are")
    for what, names in (
        ("loaded", transfer.loaded),
        ("fresh", transfer.fresh),
        ("left out", transfer.dropped),
    ):
        parts = [name.split(".")[0] if what == "loaded" else ".".join(name.split(".")[:3]) for name in names]
        for part in dict.fromkeys(parts):
            table.add_row(part, f"{parts.count(part):,}", what)
    for name, how in transfer.resized.items():
        table.add_row(name.removesuffix(".weight"), "1", how)
    Console(width=100).print(table)


def _is_own_rate(part: str, cfg: dict[str, Any], said: Collection[str]) -> bool:
    """Whether a learning rate of the optimizer's is one that was given to it, and not the model's."""
    # optimizer=muon gives none: its rates are the model's. An experiment's file may, which shows where they differ.
    is_given = f"optimizer.lr.{part}" in said or "optimizer.lr" in said
    return is_given or cfg["optimizer"]["lr"][part] != cfg["model"]["lr"][part]


def _leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split(".")
        below = nested
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = value
    return nested
