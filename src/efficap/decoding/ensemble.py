"""Several models as one: the mean of their probabilities at each step.

R rows, V words, M models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efficap.decoding.contract import Step


class AveragedStep:
    """A step function over several models' that share the words: the arithmetic mean of their probabilities.

    Every model reads the same tokens and keeps its own cache, so that models of any shape go together and any decoding
    drives them. Ensembles of captioners: Vinyals et al. 2016, https://arxiv.org/abs/1609.06647.

    The logits that it gives are log-probabilities, and the rules of a decoding that count on the size of logits
    (`repetition_penalty` in greedy and nucleus) therefore see other numbers than with a single model.

    Args:
        steps: the models' own, at least one, started with the same pictures in the same order.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        assert steps, "an ensemble of no models"
        self.steps = list(steps)

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        """Feed each row's newest token, (R,); returns (R, V) logs of the mean probabilities. See `Step`."""
        log_probs = (self._log_probs(step, ids, parents, images) for step in self.steps)  # M of (R, V)
        # In logarithms: a word whose probability no float holds keeps its rank.
        return functools.reduce(torch.logaddexp, log_probs) - math.log(len(self.steps))  # (R, V)

    def _log_probs(self, step: Step, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        logits = step(ids, parents, images).to(ids.device)  # (R, V); an ONNX export's lie on the CPU
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
