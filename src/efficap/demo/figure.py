"""The square that a model saw with its captions under it, as HTML: pointing at a word shows where the model looked.

S: the side of the square in pixels; h, w: the grid of latent positions.
"""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from efficap.demo.service import Captioned
from efficap.evaluation.attention import Word

_SHADE = (214, 39, 40)  # of the places looked at
_MOST = 0.75  # how opaque the place is that was looked at most

CSS = """
.seen { position: relative; width: min(100%, 420px) }
.seen > img { width: 100%; display: block; border-radius: 8px }
.seen p { margin: 8px 0 0; font-size: 18px; line-height: 1.6 }
.seen small { display: block; color: var(--body-text-color-subdued) }
.seen .word { border-radius: 4px; padding: 1px 3px; cursor: default }
.seen .word img { position: absolute; left: 0; top: 0; width: 100%; aspect-ratio: 1; border-radius: 8px;
  opacity: 0; transition: opacity .15s; pointer-events: none }
.seen .word:hover img, .seen .word:focus img { opacity: 1 }
.seen .word:hover, .seen .word:focus { outline: 2px solid rgb(214 39 40) }
"""


def figure(found: Captioned) -> str:
    """A run's captions of a picture. It needs no script."""
    lines = []
    for caption, words in zip(found.captions, found.words, strict=True):
        cut = "" if caption.ended else ", cut at max_tokens"
        lines.append(
            f'<p dir="auto">{"".join(map(_word, words))}<small>score {caption.score:.2f}{cut}</small></p>'
        )
    return (
        f'<div class="seen"><img alt="what the model saw" src="{_jpeg(found.square)}">{"".join(lines)}</div>'
    )


def _word(word: Word) -> str:
    shade = f"background: rgb(31 119 180 / {0.55 * (1 - word.probability):.2f})"  # the less likely the darker
    title = f"{word.probability:.1%}"
    look = "" if word.attention is None else f'<img alt="" src="{_map(word.attention)}">'
    space = " " if word.text[:1].isspace() else ""
    text = escape(word.text.strip())
    return f'{space}<span class="word" tabindex="0" title="{title}" style="{shade}">{text}{look}</span>'


def _map(attention: NDArray[np.float32]) -> str:
    """A picture of one pixel for each latent position, which the browser makes larger; the more opaque the more."""
    share = attention / max(float(attention.max()), 1e-9)  # (h, w)
    pixels = np.empty((*share.shape, 4), np.uint8)  # (h, w, RGBA)
    pixels[..., :3] = _SHADE
    pixels[..., 3] = np.round(share * _MOST * 255)
    return _data(Image.fromarray(pixels, "RGBA"), "PNG")


def _jpeg(square: Tensor) -> str:
    """(3, S, S) uint8"""
    return _data(Image.fromarray(square.permute(1, 2, 0).contiguous().numpy()), "JPEG")


def _data(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
