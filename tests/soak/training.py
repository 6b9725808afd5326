"""A tiny training on demo pictures, as CSV or as shards, in a process that others may do anything to."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from started import Started
from torch import Tensor

from efficap.data.demo.writing import write_demo
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import read_table
from efficap.training.checkpoints import LAST, PREVIOUS, damage

PATIENCE = 300  # seconds, after which a process is taken to hang
PICTURES = 96
BATCHES = 12  # an epoch
CLOCK = ["train/pairs_per_second", "train/memory_gib"]  # logged values that differ from run to run
SETTINGS = [
    "name=soak",
    "seed=0",
    "model=tiny",
    "model.image_size=64",
    "model.decoder.n_embd=32",
    "model.decoder.dropout=0.1",
    "model.bridge.dropout=0.1",
    "model.encoder.drop_path_rate=0.1",
    "model.tokenizer.vocab_size=300",
    "data.crop_scale=[0.5,1.0]",
    "data.captions_per_image=2",
    f"data.batch_size={PICTURES // BATCHES}",
    "data.num_workers=1",
    "data.on_bad_sample=raise",  # a sample that was left out would change what is learned
    "training.token_dropout=0.1",
    "training.ema_decay=0.9",
    "decoding.max_tokens=12",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "checkpoint.every_steps=5",
    "logger=wandb",
    "logger.mode=offline",
]


class HangsError(RuntimeError):
    """A process has not ended, or done what it was to do, for so long that it never will."""


class Data:
    """Demo pictures as a table and as shards."""

    def __init__(self, folder: Path) -> None:
        self.table = write_demo(folder / "demo", sizes={"train": PICTURES, "val": 8}, image_size=64)
        self.images, self.shards = self.table.parent / "images", folder / "shards"
        columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
        tables, _ = read_table(self.table, self.images, **columns)
        for split in ("train", "val"):
            write_shards(tables[split], self.shards / split, ShardSettings(32, None, 10**6), workers=1)

    def settings(self, kind: str) -> list[str]:
        """Of train.py, for ``csv`` or ``shards``."""
        if kind == "csv":
            return ["data=csv", f"data.table={self.table}", f"data.image_dir={self.images}"]
        tars = [f"data.shards={self.shards / 'train'}", f"data.val_shards={self.shards / 'val'}"]
        return ["data=webdataset", *tars, "data.caption_field=captions", "data.num_threads=1"]


class Training:
    """One training, from its start or from where it was stopped.

    Args:
        run: its run directory.
        data, kind: what it learns from; ``csv`` or ``shards``.
        epochs: of `BATCHES` steps each; every tenth is validated, and the last.
    """

    def __init__(self, run: Path, data: Data, kind: str, epochs: int) -> None:
        self.run, self.data, self.kind = run, data, kind
        self.settings = [*SETTINGS, *data.settings(kind), f"output_dir={run}", f"trainer.max_epochs={epochs}"]
        self.settings.append("trainer.check_val_every_n_epoch=10")

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / LAST

    @property
    def previous(self) -> Path:
        return self.run / "checkpoints" / PREVIOUS

    def is_finished(self) -> bool:
        file = self.run / "metrics.json"
        return file.is_file() and bool(json.loads(file.read_text())["finished"])

    def start(self) -> Life:
        """Begin it, or go on with it where there is something to go on from."""
        there = any(file.is_file() for file in (self.last, self.previous))
        settings = [f"resume={self.run}"] if there else self.settings
        return Life([*settings, f"hydra.run.dir={self.run.parent / 'hydra'}"], self)


class Life:
    """A process of a training."""

    def __init__(self, settings: list[str], training: Training) -> None:
        self.training, self.began = training, time.time_ns()
        # Without W&B's service of this process, which would outlive the one that is killed.
        without = dict.fromkeys(name for name in os.environ if name.startswith("WANDB_"))
        self.process = Started("train.py", *settings, **{**without, "WANDB_SILENT": "true"})

    @property
    def errors(self) -> str:
        """What it has said on stderr so far."""
        return self.process.errors

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait_for(self, what: Callable[[], object]) -> bool:
        """Wait until something is so; returns False where the process ends before.

        Raises:
            HangsError: neither happens.
        """
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if what():
                return True
            if not self.is_alive():
                return bool(what())
            time.sleep(0.01)
        raise HangsError(f"nothing has happened for {PATIENCE} s; it said:\n{self.errors}")

    def wait_until_at_work(self) -> bool:
        """Wait for the first checkpoint of this process; returns False where it ends before."""

        def is_written() -> bool:
            with contextlib.suppress(FileNotFoundError):  # the moment in which the one before is put aside
                return self.training.last.stat().st_mtime_ns > self.began
            return False

        return self.wait_for(is_written)

    def end(self) -> int:
        """Wait for its end; returns the exit status.

        Raises:
            HangsError: it does not end.
        """
        try:
            return self.process.wait(PATIENCE)
        except TimeoutError as error:
            raise HangsError(str(error)) from None

    def children(self, name: str) -> list[int]:
        """The processes of this name that it has started."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                command, fields = file.read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:  # it has just ended
                continue
            if command == name and int(fields.split()[1]) == self.process.pid:
                found.append(int(file.parent.name))
        return found


def whole(checkpoint: Path) -> bool:
    return checkpoint.is_file() and not damage(checkpoint)


def differences(run: Path, expected: Path) -> list[str]:
    """In what a finished run differs from another one: weights, the last checkpoint, every logged value."""
    found = []
    ours, theirs = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    found += _unequal(ours, theirs, "model.safetensors")
    last, wanted = (torch.load(path / "checkpoints" / LAST, weights_only=True) for path in (run, expected))
    if last["global_step"] == wanted["global_step"]:  # else the disk was full as it was to be written
        for part in ("state_dict", "current_model_state", "averaging_state"):
            found += _unequal(last[part], wanted[part], part)
        moments, others = (state["optimizer_states"][0]["state"] for state in (last, wanted))
        for number in others:
            found += _unequal(moments[number], others[number], f"optimizer {number}")
    log, other = (
        pd.read_csv(path / "metrics.csv")
        .drop(columns=CLOCK)
        .groupby("step")
        .first()
        .dropna(axis=1, how="all")
        for path in (run, expected)
    )
    if not log.sort_index(axis=1).equals(other.sort_index(axis=1)):
        found.append("metrics.csv")
    return found


def _unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> list[str]:
    if ours.keys() != theirs.keys():
        return [where]
    return [f"{where}: {name}" for name, value in ours.items() if not torch.equal(value, theirs[name])]
