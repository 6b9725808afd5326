"""The scores and the checks of an evaluation as tables of the page; whatever scores.json lacks is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from efficap.evaluation.report import ERROR, PERCENT

VERDICTS = {
    "yes": "looks at the picture",
    "no": "does not look at the picture",
    "unsure": "may not look at the picture",
}
FACTS = ("images", "decoding", "precision", "ensemble")  # in the line below the title
NO_METRIC = {"split", *FACTS, "CIDEr-shuffled", "distinct", "intervals", "checks", "signature"}
# Key, name, form ("%" for a share) and meaning.
CHECKS = (
    ("distinct", "distinct captions", "%", ""),
    ("vocabulary", "different words", ",.0f", ""),
    ("mean_words", "words of a caption", ".1f", ""),
    ("repetition", "repetition", "%", "three words in a row that the caption has said before"),
    ("copied", "copied", "%", "captions that training had word for word"),
    ("novel_words", "new words", "%", "of the different words, those that training never had"),
    ("hallucinated", "hallucinated", "%", "of the objects named, those that are not in the picture"),
)


def facts(scores: Mapping[str, Any]) -> str:
    """How many pictures, and how they were captioned."""
    said = [
        f"{scores[name]:,} pictures" if name == "images" else str(scores[name])
        for name in FACTS
        if name in scores
    ]
    return f"<p>{escape(' · '.join(said))}</p>"


def verdict(scores: Mapping[str, Any]) -> str:
    """Whether the model looks at the picture, as the checks found."""
    checks = _mapping(scores, "checks")
    found = checks.get("verdict")
    if found not in VERDICTS:
        return ""
    gap = f" (loss gap {checks['loss_gap']:.2f})" if _is_number(checks.get("loss_gap")) else ""
    return f'<p class="verdict {found}">The model {VERDICTS[found]}{gap}</p>'


def scores_section(scores: Mapping[str, Any]) -> str:
    """Every metric with its interval, failed ones with the reason; those of groups in a table below."""
    names = [name for name in scores if name not in NO_METRIC and not name.endswith(ERROR)]
    if not names:
        return ""
    intervals = _mapping(scores, "intervals")
    columns = ["metric", "score", *(["95 % interval"] if intervals else []), "×100"]  # noqa: RUF001
    whole = [_metric(name, scores, intervals) for name in names if "/" not in name]
    signature = scores.get("signature")
    return (
        f"<section><h2>Scores</h2>{_table(columns, whole)}{_groups(names, scores)}"
        + (f'<p class="signature"><code>{escape(str(signature))}</code></p>' if signature else "")
        + "</section>"
    )


def _metric(name: str, scores: Mapping[str, Any], intervals: Mapping[str, Sequence[float]]) -> str:
    value = scores[name]
    wide = f'colspan="{3 if intervals else 2}"'
    if value is None:
        cells = f'<td class="failed" {wide}>failed: {escape(_reason(name, scores))}</td>'
    elif not _is_number(value):
        cells = f"<td {wide}>{escape(str(value))}</td>"
    else:
        bounds = "{:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""
        percent = f"{100 * value:.1f}" if name in PERCENT else ""
        cells = f"<td>{_shown(value)}</td>{f'<td>{bounds}</td>' if intervals else ''}<td>{percent}</td>"
    return f"<th>{escape(name)}</th>{cells}"


def _reason(name: str, scores: Mapping[str, Any]) -> str:
    """Why a metric failed; BLEU fails as one, and its reason is that of BLEU-1 to BLEU-4."""
    reasons = (scores.get(key + ERROR) for key in (name, name.split("-")[0]))
    return str(next(filter(None, reasons), "no reason is known"))


def _groups(names: Iterable[str], scores: Mapping[str, Any]) -> str:
    """A row for each group, named before the last slash, as `efficap.evaluation.groups.score_groups` does."""
    grouped = [name.rpartition("/") for name in names if "/" in name]
    metrics = dict.fromkeys(metric for *_, metric in grouped)
    rows = [
        f'<th dir="auto">{escape(group)}</th>'
        + "".join(f"<td>{_shown(scores.get(f'{group}/{metric}'))}</td>" for metric in metrics)
        for group in dict.fromkeys(group for group, *_ in grouped)
    ]
    failed = [
        f'<p class="failed">{escape(name.removesuffix(ERROR))} failed: {escape(str(reason))}</p>'
        for name, reason in scores.items()
        if "/" in name and name.endswith(ERROR)
    ]
    return _table(["group", *metrics], rows) + "".join(failed)


def checks_section(scores: Mapping[str, Any]) -> str:
    """What tells a model that looks at pictures from one that says the same of all."""
    rows = [f"<th>{name}</th><td>{value}</td><td>{meaning}</td>" for name, value, meaning in _checked(scores)]
    return f'<section class="checks"><h2>Checks</h2>{_table([], rows)}</section>' if rows else ""


def _checked(scores: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What is checked, its value, and what it means, beside the same of the references."""
    checks = {"distinct": scores.get("distinct"), **_mapping(scores, "checks")}
    known = {name: value for name, value in checks.items() if _is_number(value)}
    if "loss" in known and "loss_shuffled" in known:
        beside = f"of the references; {known['loss_shuffled']:.2f} beside other pictures"
        yield "loss", f"{known['loss']:.2f}", beside
    if _is_number(scores.get("CIDEr-shuffled")):
        yield "CIDEr, shuffled", _shown(scores["CIDEr-shuffled"]), "of the same captions for other pictures"
    for key, name, form, meaning in CHECKS:
        if key in known:
            other = known.get(f"reference_{key}")
            people = "" if other is None else f"references: {_formed(other, form)}"
            yield name, _formed(known[key], form), "; ".join(filter(None, (meaning, people)))


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table of rows of cells, which scrolls by itself where it is too wide; nothing where there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="wide"><table>'
        + (f"<thead><tr>{head}</tr></thead>" if columns else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def _mapping(scores: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = scores.get(name)
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _formed(value: float, form: str) -> str:
    return f"{100 * value:.1f} %" if form == "%" else format(value, form)


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else escape(str(value))
