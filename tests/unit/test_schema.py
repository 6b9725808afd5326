"""The form of settings: every default is of its own form, and a value of another kind is named."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import compose

from efficap.commands.entry import CONF
from efficap.commands.kinds import Form, check_form
from efficap.commands.schema import CAPTION, DEMO, EVAL, MODEL, OPTIMIZER, STAGE, TRAIN, check_data
from efficap.errors import InputError

PLACES = {
    "base": [],
    "csv": ["data.table=t", "data.image_dir=i"],
    "demo": [],
    "webdataset": ["data.shards=s", "data.val_shards=v"],
    "mix": ["data.sources.first.shards=s", "data.sources.second.table=t", "data.sources.second.image_dir=i"],
}


def training(*overrides: str) -> dict[str, Any]:
    return compose("train", "name=x", "output_dir=x", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"model={file.stem}"] for file in sorted((CONF / "model").glob("*.yaml"))),
        *([f"data={name}", *places] for name, places in PLACES.items()),
        ["training=scst"],
        ["optimizer=muon"],
        *([f"trainer={file.stem}"] for file in sorted((CONF / "trainer").glob("*.yaml"))),
        ["experiment=demo"],
        ["experiment=size_comparison"],
    ],
    ids=lambda value: " ".join(value[:1]),
)
def test_the_defaults_of_a_training_are_of_their_form(overrides: list[str]) -> None:
    cfg = training(*overrides)
    check_form(cfg, TRAIN)
    check_form(cfg, STAGE)
    check_form(cfg["model"], MODEL, exact=True)
    check_form(cfg["optimizer"], OPTIMIZER, exact=True)
    check_data(cfg["data"])


@pytest.mark.parametrize(
    ("config", "form", "given"),
    [
        ("eval", EVAL, ["run=x"]),
        ("eval", EVAL, ["run=[x,y]", "decoding=diverse"]),
        ("caption", CAPTION, ["run=x", "images=y", "decoding=nucleus"]),
        ("demo", DEMO, ["run=x"]),
    ],
)
def test_the_defaults_of_the_other_commands_are_of_their_form(
    config: str, form: Form, given: list[str]
) -> None:
    cfg = compose(config, *given)
    if config == "eval":
        cfg["ensemble_dir"] = "x"
    check_form(cfg, form)
    for name in cfg:
        with pytest.raises(InputError, match=f"^{name} is missing"):
            check_form({key: value for key, value in cfg.items() if key != name}, form)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1 must be a whole number from 0 to 4294967295"),
        ("compile=1", "compile=1 must be true or false"),
        (
            "optimizer.lr=3",
            "optimizer.lr=3 must be a mapping of settings, such as optimizer.lr.encoder=VALUE",
        ),
        ("optimizer.lr.bridge=.nan", "optimizer.lr.bridge=.nan must be a number"),
        ("optimizer.lr.bridge=nan", "optimizer.lr.bridge=nan must be a number"),
        ("optimizer.betas=[0.9]", r"optimizer.betas=\[0.9\] must be a list of two numbers from 0 to below 1"),
        ("~optimizer.eps", "optimizer.eps is missing; it must be a number of at least 0"),
        ("~trainer", "trainer is missing"),
        ("model.image_size=true", "model.image_size=true must be a whole number from 1 to 4096"),
        ("+decoding.num_beams=100000", "decoding.num_beams=100000 must be a whole number of at most 4096"),
        ("logger=csv callbacks.lr_monitor=3", "callbacks=.* must be a mapping of callbacks"),
        (f"output_dir={'x' * 256}", "output_dir=x+… must be a path, each of its names of at most 255 bytes"),
        ("model.decoder.name=5", "model.decoder.name=5 must be a path.*, or null"),
        ("name=5", "name=5 must be text; a number as text in inner quotes: \"'5'\""),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_it_must_be(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_form(training(*override.split()), TRAIN)


def test_a_source_of_a_mixture_is_named_with_its_setting() -> None:
    cfg = training("data=mix", *PLACES["mix"], "data.sources.second.text.lowercase=3")
    with pytest.raises(InputError, match=r"data\.sources\.second\.text\.lowercase=3 must be true or false"):
        check_data(cfg["data"])
