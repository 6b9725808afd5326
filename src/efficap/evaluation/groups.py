"""Scores of parts of a split, such as the domains of nocaps, besides those of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from efficap.errors import InputError, first_of
from efficap.evaluation.scores import Scores, check_metrics, failure, score_tokens, tokenized
from efficap.evaluation.sums import scores_of_sums

if TYPE_CHECKING:
    from rich.table import Table


def check_groups(group_of: Mapping[str, str], image_ids: Sequence[str], column: str) -> None:
    """Raises InputError where a picture is in no group, or a group's name would not do as a part of a score's."""
    without = [image_id for image_id in image_ids if not group_of.get(image_id)]
    if without:
        raise InputError(
            f"by={column}: {len(without):,} of {len(image_ids):,} pictures have no value there: {first_of(without)}; "
            "fill the column or leave out by="
        )
    for group in {group_of[image_id] for image_id in image_ids}:
        if "/" in group:
            raise InputError(
                f"by={column}: the value {group!r} must be without /, which divides it from a score"
            )


def score_groups(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    group_of: Mapping[str, str],
    *,
    metrics: Sequence[str],
) -> Scores:
    """The scores of each group by itself, as ``<group>/<score>``, in the order of the groups' names.

    Java starts once for all groups, however many there are.

    Like any subset, a group takes CIDEr's document frequencies from its own references: what one gets by evaluating a
    file of its pictures alone, and not a share of the whole split's CIDEr. nocaps: Agrawal et al. 2019,
    https://arxiv.org/abs/1812.08658.

    Args:
        predictions, references, metrics: as for `score_captions`.
        group_of: image id -> group, of every picture.

    Returns:
        ``<group>/images`` and what `score_captions` returns, for each group. CIDEr of one picture, which is 0 whatever
        its caption, is None with a reason.

    Raises:
        InputError: as `score_captions`.
    """
    check_metrics(metrics)
    try:
        predicted, expected = tokenized(predictions, references)
    except (OSError, RuntimeError) as error:  # the scores of the whole are not to be lost for it
        failed = {key: value for name in metrics for key, value in failure(name, error).items()}
        groups = sorted({group_of[image_id] for image_id in predictions})
        return {f"{group}/{key}": value for group in groups for key, value in failed.items()}
    of_meteor, parts = score_tokens(predicted, expected, [name for name in metrics if name == "METEOR"])
    members: dict[str, list[int]] = {}
    for place, image_id in enumerate(predictions):
        members.setdefault(group_of[image_id], []).append(place)
    ids = list(predictions)
    scores: Scores = {}
    for group, places in sorted(members.items()):
        own = [ids[place] for place in places]
        found: Scores = {"images": len(own)}
        for name in metrics:
            if name == "METEOR":
                found |= of_meteor  # or why it failed
                if parts:
                    found["METEOR"] = float(
                        scores_of_sums(name, parts[name][places].sum(axis=0), len(own))[name]
                    )
            else:
                of_predicted = {image_id: predicted[image_id] for image_id in own}
                of_expected = {image_id: expected[image_id] for image_id in own}
                found |= score_tokens(of_predicted, of_expected, [name])[0]
        if len(own) == 1 and "CIDEr" in metrics:
            found["CIDEr"] = None
            found["CIDEr_error"] = (
                "one picture alone scores 0 whatever its caption; CIDEr weighs words by how few pictures have them"
            )
        scores |= {f"{group}/{name}": value for name, value in found.items()}
    return scores


def groups_table(scores: Scores, column: str) -> Table:
    """The scores of groups for the screen, a row for each and one for the whole, as computed; reasons below.

    Args:
        scores: of the whole and, as `score_groups` names them, of groups.
        column: by which the groups were made.
    """
    from rich.table import Table
    from rich.text import Text

    groups = list(dict.fromkeys(name.rpartition("/")[0] for name in scores if "/" in name))
    first = [name.rpartition("/")[2] for name in scores if name.startswith(f"{groups[0]}/")]
    names = [name for name in first if not name.endswith("_error")]
    reasons = [
        f"{name.removesuffix('_error')}: {why}" for name, why in scores.items() if name.endswith("_error")
    ]
    table = Table(caption=Text("\n".join(reasons)) if reasons else None)
    table.add_column(Text(column), no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for group in [*groups, ""]:
        values = [scores.get(f"{group}/{name}" if group else name) for name in names]
        table.add_row(Text(group or "entire"), *map(_shown, values))
    return table


def _shown(value: float | int | str | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
