"""Self-critical sequence training: captions that the model samples, rewarded by CIDEr-D.

B images, K references and n samples of each, T tokens of the longest sample, D width, V vocabulary, m valid targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficap.batch import CaptionBatch, next_token_places
from efficap.decoding import Beam, Decoded, Decoding, Greedy, Nucleus
from efficap.errors import InputError
from efficap.evaluation.cider_d import CiderD
from efficap.models.captioner import CaptionModel, DecodingState
from efficap.tokenizer import CaptionTokenizer
from efficap.training.losses import memory_loss, shared_loss, summed_cross_entropy
from efficap.training.module import CaptionModule
from efficap.training.reward import above_the_others, words_of

SAMPLINGS = ("beam", "random")
BASELINES = ("leave_one_out", "greedy")
_Words = list[list[list[int]]]  # ids, by picture and caption
_NO_RULES: dict[str, Any] = {
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "banned": [],
    "prefix": "",
}


class SelfCriticalModule(CaptionModule):
    """Raises the expected CIDEr-D of a trained captioner's samples by REINFORCE.

    Self-critical sequence training (Rennie et al. 2017, https://arxiv.org/abs/1612.00563): the gradient of a sample's
    log-probability is weighed by how far its reward lies above a baseline. That is the reward of the greedy caption,
    or, without another decoding, the mean reward of the picture's other samples (Luo 2020,
    https://arxiv.org/abs/2003.09971, after Kool et al. 2019).

    By ``beam`` the samples are the likeliest captions that beam search finds (Cornia et al. 2020,
    https://arxiv.org/abs/1912.08226): what beams write is what is learned of. By ``random`` they are drawn, and the
    gradient is that of the expected reward.

    The captioner stays in evaluation mode. The samples and their log-probabilities must come from the same
    distribution, which dropout would draw anew for each; and with a batch's own BatchNorm statistics it would be
    another one than that which captions are later written from.

    Args:
        captioner, tokenizer, decoding, optimizer: as of `CaptionModule`. Samples have decoding's `max_tokens` at most;
            its other rules are left to it, for a rule would change the samples' distribution but not the model's.
        reward: scores samples, without BOS, with EOS where they have it, against the captions of the batch.
        samples: n.
        sampling: ``beam``, with n beams, or ``random``.
        baseline: ``leave_one_out`` or ``greedy``.
        temperature: of the samples, and of the distribution that is trained.
        lr_scale: of the optimiser's learning rates, which are those of training from scratch.
        cross_entropy: weight of the cross-entropy of the batch's own captions beside the reward's loss, as in Paulus et
            al. (2018, https://arxiv.org/abs/1705.04304): it keeps captions varied, which the reward alone does not.
        seed: with the step and the image id, decides the samples: a resumed training draws them again.

    Raises:
        InputError: a setting out of its range.
    """

    def __init__(
        self,
        captioner: CaptionModel,
        tokenizer: CaptionTokenizer,
        decoding: Decoding,
        *,
        optimizer: Mapping[str, Any],
        reward: CiderD,
        samples: int,
        sampling: str = "random",
        baseline: str,
        temperature: float,
        lr_scale: float,
        seed: int,
        cross_entropy: float = 0.0,
    ) -> None:
        check_settings(
            samples=samples,
            sampling=sampling,
            baseline=baseline,
            temperature=temperature,
            lr_scale=lr_scale,
            cross_entropy=cross_entropy,
        )
        scaled = {part: lr_scale * lr for part, lr in optimizer["lr"].items()}
        super().__init__(
            captioner, tokenizer, decoding, optimizer={**optimizer, "lr": scaled}, label_smoothing=0.0
        )
        self.captioner.eval()
        self.reward, self.baseline, self.seed = reward, baseline, seed
        self.cross_entropy = cross_entropy
        self.greedy = Greedy(max_tokens=decoding.max_tokens, **_NO_RULES)
        self.temperature = temperature
        self.sampling = _sampling(sampling, samples, decoding.max_tokens, temperature)

    def train(self, mode: bool = True) -> SelfCriticalModule:
        """Like any module's, but the captioner stays in evaluation mode."""
        super().train(mode)
        self.captioner.eval()
        return self

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        memory = self.captioner.encode(batch.images)  # (B, N, D), for samples, baseline and gradient alike
        # Nothing can be sampled from what is not finite; the loss is not either then, and the step is left out.
        finite = memory.detach().nan_to_num(0.0, 0.0, 0.0)
        sampled, baseline = self._written(finite, batch.image_ids)
        # Read here: on a GPU, what another thread reads comes after all that this one asks for meanwhile.
        candidates = words_of(sampled.tokens, sampled.lengths)
        greedy = words_of(baseline.tokens, baseline.lengths) if baseline is not None else None
        references = words_of(batch.tokens, batch.lengths)
        with ThreadPoolExecutor(max_workers=1) as thread:  # the forward pass goes on meanwhile
            rewards = thread.submit(self._rewards, candidates, greedy, references)
            tokens = sampled.tokens[..., :-1]
            lengths = sampled.lengths.cpu()  # sampling has waited for them already
            places = self._to_device(next_token_places(lengths, sampled.tokens.shape[2]))  # (m,)
            hidden = self.captioner.hidden_states(memory, tokens, places)  # (m, D)
            reward, advantage = self._to_device(rewards.result())  # (B, n) each
        loss = self_critical_loss(
            hidden,
            self.captioner.decoder.wte.weight,
            sampled.tokens[..., 1:].flatten()[places],
            advantage[..., None].expand(tokens.shape).flatten()[places],
            temperature=self.temperature,
        )
        self.log("train/reward", reward.mean(), prog_bar=True, batch_size=len(batch), sync_dist=True)
        self.log("train/length", sampled.lengths.float().mean(), batch_size=len(batch), sync_dist=True)
        self.log("train/ended", sampled.ended.float().mean(), batch_size=len(batch), sync_dist=True)
        loss = shared_loss(loss, len(places))[0]
        if not self.cross_entropy:
            return loss
        read = batch.tokens[..., :-1]
        own = memory_loss(self.captioner, memory, read, batch.places, batch.targets, label_smoothing=0.0)
        own, shown = shared_loss(own, len(batch.places))
        self.log("train/loss", shown, batch_size=len(batch))
        return loss + self.cross_entropy * own

    def _written(self, memory: Tensor, image_ids: list[str]) -> tuple[Decoded, Decoded | None]:
        """The samples, and the greedy captions where they are the baseline."""
        sampling, decoder = self.sampling, self.captioner.decoder
        if isinstance(sampling, Nucleus):
            sampling = replace(sampling, seed=(self.seed << 32) + self.global_step)
        device = memory.device.type
        if torch.is_autocast_enabled(device):
            decoder.keep_head(torch.get_autocast_dtype(device))
        sampled = self._decode(sampling, memory, image_ids)
        greedy = self._decode(self.greedy, memory, image_ids) if self.baseline == "greedy" else None
        decoder.drop_head()
        return sampled, greedy

    @torch.no_grad()
    def _decode(self, decoding: Decoding, memory: Tensor, image_ids: list[str]) -> Decoded:
        tokenizer = self.writer.tokenizer
        return decoding.decode(
            DecodingState(self.captioner.decoder, memory, decoding.max_tokens),
            image_ids,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            device=memory.device,
        )

    def _rewards(self, candidates: _Words, greedy: _Words | None, references: _Words) -> Tensor:
        """(2, B, n) rewards of the samples, and how far they lie above the baseline."""
        if greedy is not None:
            candidates = [[*ours, *theirs] for ours, theirs in zip(candidates, greedy, strict=True)]
        rewards = self.reward(candidates, references)  # (B, n), with the greedy one's
        if greedy is None:
            advantages = above_the_others(rewards)
        else:
            rewards, baseline = rewards[:, :-1], rewards[:, -1:]
            advantages = rewards - baseline
        return torch.from_numpy(np.stack([rewards, advantages])).float()

    def _to_device(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda":  # from page-locked memory the copy waits for nothing
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


def _sampling(sampling: str, samples: int, max_tokens: int, temperature: float) -> Beam | Nucleus:
    """How samples are written, drawn ones by a seed that is still to be set."""
    if sampling == "beam":
        return Beam(
            max_tokens=max_tokens,
            num_beams=samples,
            num_return_sequences=samples,
            length_penalty=1.0,  # the likeliest word by word, as conf/decoding/beam.yaml has it
            early_stopping=False,
            num_beam_groups=1,
            diversity_penalty=0.0,
            **_NO_RULES,
        )
    return Nucleus(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=None,
        top_p=1.0,
        min_p=0.0,
        num_return_sequences=samples,
        seed=0,
        **_NO_RULES,
    )


def check_settings(
    *,
    samples: int,
    sampling: str = "random",
    baseline: str,
    temperature: float,
    lr_scale: float,
    cross_entropy: float = 0.0,
) -> None:
    """Raises InputError where a setting of `SelfCriticalModule` is out of its range."""
    if sampling not in SAMPLINGS:
        raise InputError(f"training.sampling={sampling} must be one of {', '.join(SAMPLINGS)}")
    if baseline not in BASELINES:
        raise InputError(f"training.baseline={baseline} must be one of {', '.join(BASELINES)}")
    least = 1 if (baseline, sampling) == ("greedy", "random") else 2  # a single beam is the greedy caption
    if not isinstance(samples, int) or samples < least:
        way_out = "; training.baseline=greedy training.sampling=random does with 1" if samples == 1 else ""
        raise InputError(f"training.samples={samples} must be a whole number of at least {least}{way_out}")
    if not 0.01 <= temperature <= 100:
        raise InputError(
            f"training.temperature={temperature} must be from 0.01 to 100; 1 trains the model's own distribution"
        )
    if sampling == "beam" and temperature != 1:
        raise InputError(
            f"training.temperature={temperature} changes no beam; use 1, or training.sampling=random"
        )
    if lr_scale <= 0:
        raise InputError(f"training.lr_scale={lr_scale} must be above 0; 1 keeps optimizer.lr")
    if cross_entropy < 0:
        raise InputError(f"training.cross_entropy={cross_entropy} must be at least 0; 0: the reward alone")


def self_critical_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor, *, temperature: float
) -> Tensor:
    """-advantage * log p of each sampled token, EOS among them, the mean over those of the batch.

    Args:
        hidden: (m, D), what the decoder made of the tokens before.
        head: (V, D), the output layer's weight.
        targets: (m,) int64.
        advantages: (m,) float32, the sample's reward less the baseline.
        temperature: that the samples were drawn at.
    """
    total = summed_cross_entropy(hidden / temperature, head, targets, advantages, label_smoothing=0.0)
    return total / max(1, len(targets))
