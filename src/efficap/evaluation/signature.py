"""One line that says how scores came about: two numbers compare where all of it but the decoding is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version

TOKENIZER = "ptb-3.4.1"  # Stanford's, in pycocoevalcap
METEOR = "1.5"


def signature(
    split: str,
    references: Mapping[str, Sequence[str]],
    *,
    decoding: str,
    precision: str,
    seed: int | None,
    resamples: int,
    resample_seed: int,
) -> str:
    """Such as ``efficap:0.1.0|pycocoevalcap:1.2|…|split:test|pictures:300|digest:4b0e…|decoding:greedy: …|…``.

    After sacreBLEU's (Post 2018, https://aclanthology.org/W18-6319).

    Args:
        split: its name.
        references: of each picture scored.
        decoding: its settings in words.
        precision: of the weights.
        seed: of the training; None where there is not one alone.
        resamples, resample_seed: of the intervals.
    """
    parts = {
        "efficap": version("efficap"),
        "pycocoevalcap": version("pycocoevalcap"),
        "tok": TOKENIZER,
        "meteor": METEOR,
        "split": split,
        "pictures": len(references),
        "references": sum(map(len, references.values())),
        "digest": digest(references),
        "decoding": decoding,
        "precision": precision,
        "seed": "-" if seed is None else seed,
        "bootstrap": f"{resamples},{resample_seed}",
    }
    return "|".join(f"{name}:{value}" for name, value in parts.items())


def digest(references: Mapping[str, Sequence[str]]) -> str:
    """Twelve hexadecimal digits of the pictures and their references, whatever their order."""
    rows = sorted([image_id, *sorted(texts)] for image_id, texts in references.items())
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
