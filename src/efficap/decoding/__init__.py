"""Decoding: from a step function to token ids. Nothing here knows a model, a tokenizer or a data set.

decoding = build_decoding({"method": "beam", "max_tokens": 32, ...})  # as in conf/decoding/beam.yaml
decoded = decoding.decode(step, batch.image_ids, bos_id=bos, eos_id=eos, device="cuda")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from efficap.decoding.beam import Beam
from efficap.decoding.constraints import Constrained
from efficap.decoding.contract import Decoded, Decoding, Step
from efficap.decoding.sampling import Greedy, Nucleus
from efficap.errors import InputError

__all__ = [
    "Beam",
    "Constrained",
    "Decoded",
    "Decoding",
    "Greedy",
    "Nucleus",
    "Step",
    "build_decoding",
    "deciding",
]

METHODS: dict[str, type[Decoding]] = {cls.method: cls for cls in (Greedy, Beam, Nucleus, Constrained)}


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a decoding that captions depend on, for telling whether two are made alike.

    The batch changes none, nor does evidence of no weight, which what earlier versions wrote does not name.
    """
    return {
        name: value
        for name, value in settings.items()
        if name != "batch_size" and (name != "evidence" or value)
    }


def build_decoding(settings: Mapping[str, Any]) -> Decoding:
    """The method that ``settings["method"]`` names, built from the other settings: all its options, no other.

    Raises:
        InputError: an unknown method, an option that is missing, that another method takes, or out of range.
    """
    options = dict(settings)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"decoding.method={method} is no decoding method; use one of {', '.join(METHODS)}")
    taken = [field.name for field in fields(METHODS[method])]
    for name, value in options.items():
        if name not in taken:
            raise InputError(
                f"decoding.{name}={value} is no option of decoding={method}, which takes {', '.join(taken)}; "
                "remove it or choose another method"
            )
    needed = [field.name for field in fields(METHODS[method]) if field.default is MISSING]
    missing = [name for name in needed if name not in options]
    if missing:
        raise InputError(
            f"decoding.{missing[0]} is missing; decoding={method} takes {', '.join(taken)}, and "
            f"conf/decoding/{method}.yaml has a default for each"
        )
    return METHODS[method](**options)
