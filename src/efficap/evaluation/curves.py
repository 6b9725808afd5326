"""Learning curves from the metrics.csv of Lightning's CSVLogger."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficap.errors import InputError
from efficap.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VAL, CIDER, BLEU = "#4878a8", "#d9742b", "#3a8f5c", "#8a5aa8"
NEUTRAL = "#80878e"
SMOOTHED_SHARE = 0.05  # of the run's points, that the moving average of the training loss spans


def plot_curves(metrics_csv: Path, png: Path) -> None:
    """Draw the losses over the optimiser steps, and beside them CIDEr and BLEU-4 of the validation.

    The training loss is shown raw (faint) and as an exponential moving average. What the table lacks is left
    out; where it has only losses, or only scores, there is one panel.

    Args:
        metrics_csv: columns ``step`` and any of ``train/loss``, ``val/loss``, ``val/CIDEr``, ``val/BLEU-4``;
            most cells of a row are blank.
        png: the picture; its folder is made.

    Raises:
        InputError: the table cannot be read, or holds none of these columns.
    """
    figure = _figure(metrics_csv)
    with replacing(png) as file:
        figure.savefig(file, format="png")


def curves_png(metrics_csv: Path) -> bytes:
    """The same as a PNG without background, in an ink that is read on a light and on a dark page.

    Raises:
        InputError: as `plot_curves`.
    """
    from matplotlib import rc_context

    ink: dict[Any, str] = {
        f"{part}color": NEUTRAL for part in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.", "grid.")
    }
    with rc_context(ink):
        png = io.BytesIO()
        _figure(metrics_csv).savefig(png, format="png", transparent=True)
    return png.getvalue()


def _figure(metrics_csv: Path) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    table = read_metrics(metrics_csv)
    series = {
        name: logged_values(table, name) for name in ("train/loss", "val/loss", "val/CIDEr", "val/BLEU-4")
    }
    has_losses = len(series["train/loss"]) + len(series["val/loss"]) > 0
    has_scores = len(series["val/CIDEr"]) + len(series["val/BLEU-4"]) > 0
    panels = has_losses + has_scores
    if not panels:
        raise InputError(f"{metrics_csv}: no value of train/loss, val/loss, val/CIDEr or val/BLEU-4 to draw")
    figure = Figure(figsize=(6.0 * panels, 4.0), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if has_losses:
        _losses(axes[0], series["train/loss"], series["val/loss"])
    if has_scores:
        _scores(axes[-1], series["val/CIDEr"], series["val/BLEU-4"])
    for panel in axes:
        panel.set_xlabel("optimiser step")
    return figure


def read_metrics(metrics_csv: Path) -> pd.DataFrame:
    """The table of all logged values.

    Raises:
        InputError: it cannot be read, or has no column ``step``.
    """
    import pandas as pd

    try:
        table = pd.read_csv(metrics_csv)
    except OSError as error:
        raise InputError(f"{metrics_csv}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # pandas' parser errors and wrong encodings are ValueErrors
        raise InputError(f"{metrics_csv}: not a table ({error})") from error
    if "step" not in table:
        raise InputError(f"{metrics_csv}: no column 'step'; metrics.csv of Lightning's CSVLogger is needed")
    return table


def logged_values(table: pd.DataFrame, name: str) -> pd.Series[float]:
    """The values of one column by step; of a step that a resumed run repeats, the last."""
    import pandas as pd

    if name not in table:
        return pd.Series(dtype=float)
    values = pd.DataFrame({"step": table["step"], "value": table[name]}).apply(pd.to_numeric, errors="coerce")
    values = values.dropna().drop_duplicates("step", keep="last").sort_values("step")
    return pd.Series(values["value"].to_numpy(dtype=float), index=values["step"].to_numpy(), name=name)


def _losses(panel: Axes, train: pd.Series[float], val: pd.Series[float]) -> None:
    if len(train):
        smooth = train.ewm(span=max(1.0, SMOOTHED_SHARE * len(train))).mean()
        panel.plot(train.index, train, color=TRAIN, alpha=0.25, linewidth=1)
        panel.plot(smooth.index, smooth, color=TRAIN, label="train", marker="o" if len(train) == 1 else None)
    if len(val):
        panel.plot(val.index, val, color=VAL, marker="o", markersize=4, label="validation")
    panel.set_ylabel("loss")
    panel.legend(frameon=False)
    tidy(panel)


def _scores(panel: Axes, cider: pd.Series[float], bleu: pd.Series[float]) -> None:
    """CIDEr on the left scale and BLEU-4 on the right: one goes to 10, the other to 1."""
    shown = [(cider, "CIDEr", CIDER, "o"), (bleu, "BLEU-4", BLEU, "s")]
    lines = []
    for index, (values, name, colour, marker) in enumerate(entry for entry in shown if len(entry[0])):
        side = panel.twinx() if index else panel
        lines += side.plot(values.index, values, color=colour, marker=marker, markersize=4, label=name)
        side.set_ylabel(name, color=colour)
        side.tick_params(axis="y", colors=colour)
        side.set_ylim(bottom=0)
        tidy(side, right=index > 0)
    panel.legend(handles=lines, frameon=False, loc="lower right")


def tidy(panel: Axes, *, right: bool = False) -> None:
    """No frame but the axes, and a faint grid; `right` for an axis on that side."""
    panel.spines["top"].set_visible(False)
    panel.spines["right"].set_visible(right)
    if not right:
        panel.grid(alpha=0.25)
