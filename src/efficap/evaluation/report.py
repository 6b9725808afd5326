"""What a person looks at after a run: the table of scores, the gallery, the contact sheet and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from efficap.evaluation.curves import plot_curves
from efficap.evaluation.gallery import GalleryItem, write_gallery
from efficap.evaluation.scores import Scores
from efficap.evaluation.sheet import contact_sheet

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["GalleryItem", "contact_sheet", "plot_curves", "scores_table", "write_gallery"]

PERCENT = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")  # papers print these ×100
ERROR = "_error"


def scores_table(scores: Scores, intervals: Mapping[str, Sequence[float]] | None = None) -> Table:
    """The scores for the screen, as computed and as papers print them (×100); failed metrics with the reason.

    Args:
        scores: as `score_captions` returns them; ``split``, ``images`` and ``decoding`` go to the title, those of
            groups (``in-domain/CIDEr``) to `groups_table`, all else to rows.
        intervals: by score its lower and upper bound, where there are any.
    """
    from rich.table import Table
    from rich.text import Text

    parts = [str(scores["split"])] if "split" in scores else []
    parts += [f"{scores['images']} images"] if "images" in scores else []
    parts += [str(scores["decoding"])] if scores.get("decoding") is not None else []
    table = Table(title=Text(", ".join(parts)) if parts else None)
    table.add_column("metric", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("×100", justify="right", no_wrap=True)  # noqa: RUF001
    if intervals:
        table.add_column("95 % interval", justify="right", no_wrap=True)
    reasons = {
        name.removesuffix(ERROR): str(why)
        for name, why in scores.items()
        if name.endswith(ERROR) and "/" not in name
    }
    if reasons:
        table.add_column("reason")
    for name, value in scores.items():
        if name in ("split", "images", "decoding") or name.endswith(ERROR) or "/" in name:
            continue
        if value is None:  # BLEU fails as one: its reason stands at the first of its four rows
            reason = reasons.pop(name, "") or reasons.pop(name.split("-")[0], "")
            bounds = [""] if intervals else []
            table.add_row(
                Text(name), Text("failed", style="bold red"), "", *bounds, Text(reason, style="red")
            )
        elif isinstance(value, float):
            cells = [f"{value:.3f}", f"{100 * value:.1f}" if name in PERCENT else ""]
            if intervals and name in intervals:
                cells.append("{:.3f} … {:.3f}".format(*intervals[name]))
            table.add_row(Text(name), *cells)
        else:
            table.add_row(Text(name), Text(str(value)), "")
    return table
