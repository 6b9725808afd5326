"""What stands behind train.py, eval.py and caption.py, through their own entry point, in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from conftest import compose, tiny_overrides, write_colour_table, write_random_run
from hypothesis import strategies as st

from efficap.commands.caption import caption
from efficap.commands.entry import run
from efficap.commands.evaluate_runs import evaluate_runs
from efficap.commands.train import train
from efficap.errors import InputError
from fuzz.kinds import Kind
from fuzz.sandbox import Sandbox

COMMANDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "train": train,
    "eval": evaluate_runs,
    "caption": caption,
}
_WORDS = """
null true false -1 0 1 2 3 0.5 1e400 1e-9 nan .nan .inf -.inf [] {} [1] [1,2] [0.5,1] [a,b] [[1],[2]] {a:1}
{a:{b:2}} '' ??? x '5' 1_000 0x10 1e5 cpu gpu tiny mini csv demo beam greedy nucleus a=b ${seed} ${nothing}
${oc.env:A_SECRET_KEY} ${hydra:job.name} 2147483648 -2147483649 [null] {_target_:os.getcwd} os.getcwd [1,2 'x {'a':1}
\\ é 你好 \u200b $ [.nan,.nan] {encoder:1} {encoder:.nan,bridge:1,decoder:1}
"""
VALUES = (
    st.sampled_from(["", " ", "' '", *_WORDS.split()])
    | st.sampled_from(["9" * 30, "9" * 5000, "-" + "9" * 30, "x" * 300, "[" * 500, "{a:" * 200])
    | st.text(st.characters(exclude_characters="/.~\0\r\n,", exclude_categories=["Cs"]), max_size=6)
)
# What only says how long, or where, or starts a compiler for a minute.
_NOT_CHANGED = (
    "output_dir",
    "compile",
    "trainer.max_",
    "hydra",
    "ensemble_dir",
    "out",
    "overrides",
    "data.num_workers",
    "num_workers",
)


def _status(command: str) -> object:
    try:
        run(command, COMMANDS[command])
    except SystemExit as end:
        return end.code
    return 0


@functools.cache
def _defaults(command: str) -> dict[str, Any]:
    """All settings, and the mappings that they lie in, with what they are."""
    given = {"train": ["data=csv", "data.table=t", "data.image_dir=i", "name=x", "output_dir=x"]}
    values = compose(command, *given.get(command, ["run=x"]), *(["images=x"] if command == "caption" else []))
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        for key, below in value.items():
            found[f"{path}{key}"] = below
            if isinstance(below, dict):
                walk(below, f"{path}{key}.")

    walk(values, "")
    return {key: value for key, value in found.items() if not key.startswith(_NOT_CHANGED)}


def _like(value: Any) -> st.SearchStrategy[str]:
    """What a user could well say in place of a default."""
    if isinstance(value, bool) or value is None:
        return st.sampled_from(["true", "false", "null"])
    if isinstance(value, int | float):
        return st.sampled_from(["0", "1", "2", "4", "64", "0.5", "1e-3", str(value)])
    return st.sampled_from(["null", json.dumps(value).replace('"', "'")])


@st.composite
def commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    command = draw(st.sampled_from(["train", "train", "eval", "caption"]))
    overrides = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        key = draw(st.sampled_from(list(_defaults(command))))
        value = draw(_like(_defaults(command)[key]) if draw(st.booleans()) else VALUES)
        if draw(st.integers(0, 9)) == 0:
            key += draw(st.sampled_from([".x", ".0", "x", ".a.b", "@x", "=", " "]))
        how = draw(st.sampled_from([""] * 12 + ["+", "++", "~"]))
        overrides.append(f"~{key}" if how == "~" else f"{how}{key}={value}")
    return command, overrides


def write_run(sandbox: Sandbox) -> Path:
    """A table of colours and a run that was trained on it, copied to the root; returns the run."""
    colours, run = _templates(str(sandbox.root.parent / "template"))
    shutil.copytree(colours, sandbox.root / "colours")
    shutil.copytree(run, sandbox.root / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["table"] = str(sandbox.root / "colours/captions.csv")
    config["data"]["image_dir"] = str(sandbox.root / "colours/images")
    (sandbox.root / "run/config.yaml").write_text(yaml.safe_dump(config))
    return sandbox.root / "run"


@functools.cache
def _templates(folder: str) -> tuple[Path, Path]:
    colours = write_colour_table(Path(folder) / "colours", train=4, val=2, test=2)
    return colours, write_random_run(Path(folder) / "run")


def use(example: tuple[str, list[str]], sandbox: Sandbox) -> Callable[[], object]:
    command, overrides = example
    trained, colours = write_run(sandbox), sandbox.root / "colours"
    given, limits = {
        "train": (
            tiny_overrides(colours, sandbox.root / "new"),
            ["trainer.max_steps=1", "trainer.max_epochs=1", "trainer.max_time=null", "data.num_workers=0"],
        ),
        "eval": (
            [f"run={trained}", "accelerator=cpu", "metrics=[]", "gallery=2"],
            ["+data.num_workers=0"],
        ),
        "caption": (
            [f"run={trained}", "accelerator=cpu", f"images={colours}/images/test_0.jpg"],
            ["num_workers=0"],
        ),
    }[command]

    def call() -> None:
        said = io.StringIO()
        arguments = [f"{command}.py", *given, *overrides, *limits]
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.dict("os.environ"),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            os.environ.pop("HYDRA_FULL_ERROR", None)
            status = _status(command)
        if status == 1:
            errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, said.getvalue()[-2000:]
            assert "Traceback" not in said.getvalue()
            raise InputError(errors[0])
        assert status in (None, 0)

    return call


OVERRIDES = Kind("overrides", commands(), use)
