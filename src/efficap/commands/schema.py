"""The form of all settings: what kind of value each is, checked before anything is done with it.

Defaults stand in conf/; here stands what a default cannot tell, such as what else a null may be. What needs more than
the value itself, such as a range that depends on another setting, is checked where it is used.
"""

from __future__ import annotations

from typing import Any

from efficap.commands.kinds import (
    FLAG,
    NAME,
    PATH,
    SETTINGS,
    TEXT,
    Form,
    Kind,
    check_form,
    either,
    list_of,
    mapping_of,
    number,
    optional,
    or_null,
    whole,
)

_WIDEST = 1 << 16  # of a size that memory is taken for; the largest GPT-2 is 1,600 wide

_SIDE = Kind("bicubic or bilinear", lambda value: value in ("bicubic", "bilinear"))
_PRECISION = Kind("float32, bfloat16", lambda value: value in ("float32", "bfloat16"))
_SHARE = number(0.01, 1)
_COLOUR = list_of(number(-255, 255), "three numbers", 3)
_CONTRAST = list_of(number(1e-6, 255), "three numbers above 0", 3)
_PATHS = either(PATH, list_of(PATH, "paths"))

_ENCODER: Form = {
    "name": TEXT,
    "pretrained": FLAG,
    "weights_file": or_null(PATH),
    "frozen": FLAG,
    "drop_path_rate": number(0, 1),
    "output_stride": optional(whole()),
    "mean": or_null(_COLOUR),
    "std": or_null(_CONTRAST),
    "interpolation": or_null(_SIDE),
    "crop_pct": or_null(_SHARE),
}
_BRIDGE: Form = {
    "n_blocks": whole(0, 1000),
    "n_heads": or_null(whole(1, _WIDEST)),
    "dropout": number(0, 1),
}
MODEL: Form = {
    "image_size": whole(1, 4096),
    "pretrained": FLAG,
    "arithmetic": optional(TEXT),
    "encoder": _ENCODER,
    "bridge": _BRIDGE,
    "decoder": {
        "name": or_null(PATH),
        "pretrained": FLAG,
        "n_layer": whole(1, 1000),
        "n_head": whole(1, _WIDEST),
        "n_embd": whole(1, _WIDEST),
        "n_positions": whole(1, _WIDEST),
        "dropout": number(0, 1),
    },
    "tokenizer": {"name": or_null(PATH), "vocab_size": whole(1, 1 << 24)},
    "lr": {"encoder": number(), "bridge": number(), "decoder": number()},
}

OPTIMIZER: Form = {
    "lr": {"encoder": number(), "bridge": number(), "decoder": number()},
    "betas": list_of(number(0, 0.999999), "two numbers from 0 to below 1", 2),
    "eps": number(0),
    "weight_decay": number(),
    "clip_value": optional(or_null(number())),
    "layer_decay": number(),
    "warmup_steps": whole(0),
    "final_lr": number(0, 1),
    "matrix_lr": optional(or_null(number(0))),
    "momentum": optional(number(0, 1)),
}

# Bounds of what takes memory; all else a decoding checks itself.
_DECODING: Form = {
    "max_tokens": optional(whole(most=_WIDEST)),
    "num_beams": optional(whole(most=4096)),
    "num_beam_groups": optional(whole(most=4096)),
    "num_return_sequences": optional(whole(most=4096)),
}

_LIMIT = either(whole(1), Kind("-1 for no limit", whole(-1, -1).holds))
_BATCHES = optional(or_null(number(0)))
_TRAINER: Form = {
    "accelerator": TEXT,
    "strategy": optional(or_null(TEXT)),
    "max_epochs": _LIMIT,
    "max_steps": _LIMIT,
    "max_time": or_null(TEXT),
    "gradient_clip_val": or_null(number(0)),
    "accumulate_grad_batches": whole(1),
    "check_val_every_n_epoch": or_null(whole(1)),
    "val_check_interval": or_null(either(TEXT, number(0))),
    "limit_train_batches": _BATCHES,
    "limit_val_batches": _BATCHES,
    "log_every_n_steps": whole(1),
    "enable_progress_bar": FLAG,
}

_TRAINING: Form = {
    "objective": TEXT,
    "label_smoothing": optional(number()),
    "token_dropout": optional(number()),
    "hidden_captions": optional(either(number(), list_of(number(), "two numbers", 2))),
    "start_size": optional(or_null(whole())),
    "unfreeze_encoder_at": optional(or_null(number())),
    "ema_decay": optional(or_null(number())),
    "samples": optional(whole()),
    "sampling": optional(TEXT),
    "baseline": optional(TEXT),
    "temperature": optional(number()),
    "lr_scale": optional(number()),
    "cross_entropy": optional(number()),
    "max_bad_steps": optional(or_null(whole())),
}

TRAIN: Form = {
    "name": TEXT,
    "seed": whole(0, (1 << 32) - 1),
    "init_from": or_null(PATH),
    "resume": or_null(PATH),
    "checkpoint": {"every_minutes": or_null(number()), "every_steps": or_null(whole())},
    "compile": FLAG,
    "gradient_checkpointing": FLAG,
    "output_dir": PATH,
    "model": MODEL,
    "data": {},
    "training": _TRAINING,
    "optimizer": OPTIMIZER,
    "decoding": _DECODING,
    "trainer": _TRAINER,
    "logger": or_null(SETTINGS),
    "callbacks": mapping_of(or_null(SETTINGS), "callbacks, each by its settings"),
    "overrides": optional(list_of(TEXT, "what was said, as KEY=VALUE")),
}

# Of each stage, and of a training without stages.
STAGE: Form = {
    "data": {"_target_": optional(TEXT)},
    "training": _TRAINING,
    "optimizer": OPTIMIZER,
    "trainer": _TRAINER,
}

# What is read of a run's configuration, which may come from anywhere; all that is null in conf/model is filled there.
RUN: Form = {
    "name": NAME,
    "model": {
        **MODEL,
        "encoder": {
            **_ENCODER,
            "mean": _COLOUR,
            "std": _CONTRAST,
            "interpolation": _SIDE,
            "crop_pct": _SHARE,
        },
        "bridge": {**_BRIDGE, "n_heads": whole(1, _WIDEST)},
    },
    "data": {},
    "decoding": _DECODING,
}

DATA: Form = {
    "captions_per_image": optional(whole()),
    "max_tokens": optional(whole(most=_WIDEST)),
    "batch_size": optional(whole()),
    "num_workers": optional(or_null(whole(0, 256))),
    "steps_per_epoch": optional(or_null(whole())),
    "crop_scale": optional(list_of(number(), "two numbers", 2)),
    "crop_ratio": optional(list_of(number(), "two numbers", 2)),
    "flip": optional(FLAG),
    "scaled_decoding": optional(FLAG),
    "on_bad_sample": optional(TEXT),
    "max_bad_fraction": optional(number()),
    "max_pixels": optional(whole(most=1 << 31)),
    "read_timeout": optional(or_null(number())),
    "feature_cache": optional(FLAG),
    "feature_cache_dir": optional(or_null(PATH)),
    "seed": optional(whole(0)),
    "table": optional(or_null(either(PATH, mapping_of(PATH, "splits to files")))),
    "image_dir": optional(or_null(PATH)),
    "allow_absolute": optional(FLAG),
    "image_column": optional(TEXT),
    "caption_column": optional(or_null(TEXT)),
    "split_column": optional(TEXT),
    "train_split": optional(TEXT),
    "val_split": optional(TEXT),
    "test_split": optional(TEXT),
    "quarantine": optional(or_null(PATH)),
    "check_images": optional(FLAG),
    "require_captions": optional(FLAG),
    "root": optional(or_null(PATH)),
    "demo_seed": optional(whole(0)),
    "shards": optional(or_null(_PATHS)),
    "val_shards": optional(or_null(_PATHS)),
    "test_shards": optional(or_null(_PATHS)),
    "caption_field": optional(or_null(TEXT)),
    "index_dir": optional(or_null(PATH)),
    "shuffle_shards": optional(whole()),
    "num_threads": optional(or_null(whole(1, 256))),
    "sources": optional(mapping_of(SETTINGS, "data sets, each by its settings")),
    "epochs": optional(or_null(mapping_of(number(), "data sets to numbers"))),
    "weights": optional(or_null(mapping_of(number(), "data sets to numbers"))),
    "evaluate_on": optional(TEXT),
}

_TEXT_CLEANING: Form = {
    "lowercase": FLAG,
    "final_stop": TEXT,
    "min_words": or_null(whole()),
    "max_words": or_null(whole()),
    "exclude": or_null(TEXT),
}

_PLACE: Form = {"accelerator": TEXT, "precision": or_null(_PRECISION), "compile": FLAG}
EVAL: Form = {
    "run": either(PATH, list_of(PATH, "paths")),
    "ensemble": FLAG,
    "ensemble_dir": PATH,
    "split": TEXT,
    "data": {},
    "metrics": list_of(TEXT, "names"),
    "intervals": {"resamples": whole(0, 10_000_000), "seed": whole(0)},
    "checks": {"loss_pictures": whole(0), "instances": or_null(PATH)},
    "by": or_null(TEXT),
    "decoding": _DECODING,
    "gallery": whole(0),
    **_PLACE,
}
CAPTION: Form = {
    "run": PATH,
    "images": PATH,
    "out": or_null(PATH),
    "num_workers": or_null(whole(0, 256)),
    "decoding": _DECODING,
    "attention": Kind("true, false or by_head", lambda value: isinstance(value, bool) or value == "by_head"),
    "rollout": FLAG,
    **_PLACE,
}

DEMO: Form = {
    "run": either(PATH, list_of(PATH, "paths")),
    "host": TEXT,
    "port": whole(0, 65_535),
    "examples": or_null(PATH),
    "accelerator": TEXT,
    "precision": or_null(_PRECISION),
    **dict.fromkeys(("max_batch", "max_requests", "max_bytes", "max_pixels"), whole()),
    "max_seconds": number(),
    "limits": {
        "num_beams": whole(1),
        "num_return_sequences": whole(1),
        "max_tokens": whole(3),  # BOS, a word and EOS
        "phrases": whole(0),
        "letters": whole(0),
    },
}


def check_data(data: Any, where: str = "data.") -> None:
    """Check the settings of a data set, and in a mixture those of its sources.

    Raises:
        InputError: one is of another kind than it must be.
    """
    check_form(data, DATA, where)
    if "text" in data:
        check_form(data["text"], _TEXT_CLEANING, f"{where}text.")
    for name, source in data.get("sources", {}).items():
        check_data(source, f"{where}sources.{name}.")
