"""The checks of an evaluation: what they need of runs and data, gathered for `efficap.evaluation.grounding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficap.commands.subject import Subject
from efficap.data.csv import CSVDataModule
from efficap.errors import InputError
from efficap.evaluation.grounding import (
    Checks,
    Gap,
    against_references,
    against_training,
    exchanged,
    verdict,
)
from efficap.evaluation.objects import hallucinated_share
from efficap.evaluation.scores import Scores, cider_per_image
from efficap.evaluation.sums import Parts
from efficap.models.captioner import CaptionModel
from efficap.training.gap import GapProbe, Losses

# Settings of data that make it another table than the run's own.
_ELSEWHERE = {"_target_", "table", "root", "sources"}


def loss_probe(subject: Subject, pictures: int) -> GapProbe | None:
    """What reads people's captions with and without their pictures, listening to the writer; None without a loss."""
    captioner = subject.writer.captioner
    if not isinstance(captioner, CaptionModel) or not pictures:
        return None
    max_tokens = min(subject.data.max_tokens, captioner.decoder.wpe.num_embeddings)
    probe = GapProbe(captioner, subject.writer.tokenizer, pictures=pictures, max_tokens=max_tokens)
    subject.writer.on_encoded = probe.keep
    return probe


def own_and_other_cider(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], scores: Scores, parts: Parts
) -> list[tuple[float, float]]:
    """CIDEr of each caption against its picture's references and another's: what a model scores that does not look.

    Nothing where CIDEr failed or was not asked for, and of one picture.
    """
    if not isinstance(scores.get("CIDEr"), float) or len(predictions) < 2:
        return []
    other_of = exchanged(list(predictions))
    others = {image_id: references[other_of[image_id]] for image_id in predictions}
    try:
        of_others = cider_per_image(predictions, others)
    except (OSError, RuntimeError):  # of Java, which has scored before: the scores are not to be lost for it
        return []
    return list(zip(parts["CIDEr"][:, 0].tolist(), of_others.values(), strict=True))


def checks_of(
    subject: Subject,
    cfg: dict[str, Any],
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    losses: Losses | None,
    cider: Sequence[tuple[float, float]],
    instances: Mapping[str, set[str]] | None,
) -> tuple[Checks, list[str]]:
    """All checks that can be had, and of the others a line that says why not.

    Args:
        subject: what was evaluated.
        cfg: the values of conf/eval.yaml.
        predictions, references: of the split.
        losses: of people's captions with and without their picture; None where the model has none.
        cider: of each picture its caption's CIDEr against its own and against another picture's references.
        instances: COCO's, where they are given.
    """
    checks: Checks = {}
    loss_gap = cider_gap = None
    if losses is not None and losses.own:
        loss_gap = Gap.of([other - own for own, other in zip(*losses, strict=True)])
        count = len(losses.own)
        checks["loss"], checks["loss_shuffled"] = sum(losses.own) / count, sum(losses.other) / count
        checks["loss_gap"] = loss_gap.mean
    if cider:
        cider_gap = Gap.of([own - other for own, other in cider])
        checks["CIDEr_gap"] = cider_gap.mean
    checks |= against_references(predictions, references)
    said = verdict(loss_gap, cider_gap)
    if said:
        checks = {"verdict": said, **checks}
    notes = []
    try:
        hallucinated = hallucinated_share(predictions, references, instances)
    except InputError as error:  # the scores are not to be lost for it
        notes.append(str(error))
    else:
        checks |= {} if hallucinated is None else {"hallucinated": hallucinated}
    training, why_not = _training_captions(subject, cfg)
    if why_not:
        notes.append(f"captions are not compared with those of training: {why_not}")
    else:
        checks |= against_training(predictions.values(), training)
    return checks, notes


def _training_captions(subject: Subject, cfg: dict[str, Any]) -> tuple[Sequence[str], str]:
    """The captions that the run learned from, or why they are not to be had."""
    if subject.run is None:
        return [], "an ensemble has those of several runs"
    try:
        # Another table has no captions that the run learned from; its pictures may have moved all the same.
        elsewhere = _ELSEWHERE & cfg["data"].keys()
        data = subject.run.data({}) if elsewhere else subject.data
        if not isinstance(data, CSVDataModule):
            return [], "they lie in shards or in a mixture, where reading all of them would take long"
        return list(data.training_captions()), ""
    except InputError as error:
        return [], str(error)
