"""The page: drop or paste a picture, choose how captions are written, read them by every run side by side."""

from __future__ import annotations

import asyncio
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from gradio.utils import get_upload_folder

from efficap.data.pictures import PictureError
from efficap.demo.batching import OverloadError
from efficap.demo.figure import CSS as FIGURE_CSS
from efficap.demo.figure import figure
from efficap.demo.service import CaptionService, Limits
from efficap.errors import InputError
from efficap.picture_files import read_picture_file

AS_TRAINED = "as trained"
DECODINGS = ("greedy", "beam", "diverse", "nucleus", "constrained")
_NOT_UPLOADED = "a picture must be uploaded"
_LISTS = ("banned", "required")  # written with commas between

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = FIGURE_CSS + ".run h3 { margin: 0 0 6px }"


def build_page(service: CaptionService, examples: list[Path]) -> gr.Blocks:
    """The page, to be mounted; its events join the service's queue."""
    runs, limits = list(service.captioners), service.limits
    first = service.captioners[runs[0]]  # a decoding that is named is the same for all
    defaults = {decoding: limits.lowered(first.settings(decoding)) for decoding in DECODINGS}
    with gr.Blocks(title="efficap", analytics_enabled=False, delete_cache=(60, 600)) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture = gr.Image(
                    label="Picture",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=260,
                    elem_id="picture",
                )
                if examples:
                    gr.Examples([[str(file)] for file in examples], [picture], cache_examples=False)
                decoding = gr.Dropdown(
                    [AS_TRAINED, *DECODINGS], value=AS_TRAINED, label="decoding", elem_id="decoding"
                )
                settings = _setting_components(limits)
            with gr.Column(scale=2), gr.Row():
                results = []
                for number, run in enumerate(runs):
                    with gr.Column(min_width=280, elem_classes="run"):
                        gr.HTML(f"<h3>{escape(run)}</h3>")
                        results.append(gr.HTML(elem_id=f"run-{number}"))

        async def caption(uploaded: dict[str, Any] | None, chosen: str, *values: Any) -> list[str]:
            if uploaded is None:
                return [""] * len(runs)
            method = None if chosen == AS_TRAINED else chosen
            changes = dict(defaults[method]) if method else {}
            for name, value in zip(settings, values, strict=True):
                if name in changes:
                    changes[name] = _as_setting(name, value)
            try:
                with service.place():
                    data = await asyncio.to_thread(_read_upload, uploaded)
                    found = await service.caption(data, runs, method, changes, attention=True)
            except (InputError, PictureError, OverloadError) as error:
                raise gr.Error(escape(str(error)), print_exception=False) from None
            return [figure(of_run) for of_run in found]

        def choose(chosen: str) -> list[Any]:
            if chosen == AS_TRAINED:
                return [gr.update(visible=False) for _ in settings]
            own = defaults[chosen]
            return [
                gr.update(visible=True, value=_as_shown(own[name]))
                if name in own
                else gr.update(visible=False)
                for name in settings
            ]

        inputs = [picture, decoding, *settings.values()]
        options: dict[str, Any] = {
            "fn": caption,
            "inputs": inputs,
            "outputs": results,
            "preprocess": False,  # Gradio would open the picture; the service does, with its own limits
            "trigger_mode": "always_last",
            "concurrency_limit": None,  # they meet in the service's queue
            "api_visibility": "private",
        }
        changed = [
            component.submit if isinstance(component, gr.Textbox) else component.input
            for component in settings.values()
        ]
        gr.on([picture.change, *changed], **options)
        decoding.input(choose, [decoding], list(settings.values()), api_visibility="private").then(**options)
    page.queue(max_size=service.max_requests, default_concurrency_limit=None)
    # A client may name any file, or an address, as its upload. Gradio refuses files that were not uploaded, but only
    # once it has launched a page, which does not happen to one that is mounted; and it fetches what lies at an address.
    page.has_launched = True
    processing_utils.async_ssrf_protected_download = _refuse
    return page


async def _refuse(url: str, cache_dir: str) -> str:
    raise gr.Error(_NOT_UPLOADED, print_exception=False)


def _read_upload(uploaded: object) -> bytes:
    """The bytes of what the client says that it uploaded.

    Gradio looks where a file lies only if the client says that it is one.

    Raises:
        InputError: it lies elsewhere than uploads and examples do, or is gone.
    """
    named = uploaded.get("path") if isinstance(uploaded, dict) else None
    if not isinstance(named, str) or "\0" in named:
        raise InputError(_NOT_UPLOADED)
    file = Path(named).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()):
        raise InputError(_NOT_UPLOADED)
    try:
        return read_picture_file(file)
    except FileNotFoundError:
        raise InputError("pictures are deleted some ten minutes after they came; drop it again") from None
    except (OSError, ValueError) as error:
        raise InputError(_NOT_UPLOADED) from error


def _setting_components(limits: Limits) -> dict[str, Any]:
    """A component for each setting that is offered, by its name; hidden until a decoding that takes it is chosen.

    One that the limits leave no choice has none: Gradio has no slider of a single place.
    """

    def slider(name: str, least: float, most: float, step: float) -> gr.Slider | None:
        if least == most:
            return None
        return gr.Slider(least, most, step=step, label=name, visible=False, elem_id=name)

    def text(name: str, hint: str) -> gr.Textbox:
        return gr.Textbox(
            label=name, placeholder=hint, max_length=limits.letters, visible=False, elem_id=name
        )

    components = {
        "num_beams": slider("num_beams", 1, limits.num_beams, 1),
        "num_return_sequences": slider("num_return_sequences", 1, limits.num_return_sequences, 1),
        "num_beam_groups": slider("num_beam_groups", 1, limits.num_beams, 1),
        "diversity_penalty": slider("diversity_penalty", 0, 3, 0.1),
        "length_penalty": slider("length_penalty", -2, 4, 0.1),
        "temperature": slider("temperature", 0.1, 3, 0.05),
        "top_p": slider("top_p", 0.05, 1, 0.05),
        "min_p": slider("min_p", 0, 1, 0.01),
        "seed": gr.Number(label="seed", precision=0, visible=False, elem_id="seed"),
        "max_tokens": slider("max_tokens", 3, limits.max_tokens, 1),
        "no_repeat_ngram_size": slider("no_repeat_ngram_size", 0, 5, 1),
        "repetition_penalty": slider("repetition_penalty", 0.5, 3, 0.1),
        "required": text("required", "words that come in, with commas between; then Enter"),
        "banned": text("banned", "words that stay out, with commas between; then Enter"),
        "prefix": text("prefix", "how every caption begins; then Enter"),
    }
    return {name: component for name, component in components.items() if component is not None}


def _as_setting(name: str, value: Any) -> Any:
    if name in _LISTS:
        return [phrase.strip() for phrase in (value or "").split(",") if phrase.strip()]
    return value or "" if name == "prefix" else value


def _as_shown(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value
