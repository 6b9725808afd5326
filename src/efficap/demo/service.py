"""What page and API share: from the bytes of a picture that a stranger sent to captions, within limits.

S: the side in pixels of the square that a model sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from efficap.commands.captioner import Captioner
from efficap.data.pictures import Picture
from efficap.data.transforms import Resized
from efficap.decoding import build_decoding
from efficap.demo.batching import BatchQueue
from efficap.errors import InputError
from efficap.evaluation.attention import Word
from efficap.training.writer import CaptionWriter, WrittenCaption, words_of

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
)  # what the web uses; Pillow's readers of others are less watched
DECODERS = 2  # pictures decoded at a time: each holds its pixels
_COUNTS = ("num_beams", "num_return_sequences", "max_tokens")
_WRITERS = 64  # kept, so that their batch size need not be found again


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of what a request may ask for.

    Attributes:
        pixels: of a picture.
        num_beams, num_return_sequences, max_tokens: of a decoding.
        phrases, letters: how many words or phrases may be banned or required, and how long each, or a prefix, may be.
    """

    pixels: int
    num_beams: int
    num_return_sequences: int
    max_tokens: int
    phrases: int
    letters: int

    def lowered(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a decoding, those that are beyond the limits lowered to what fits them and each other."""
        fitting = dict(settings)
        for name in _COUNTS:
            if name in settings:
                fitting[name] = min(settings[name], getattr(self, name))
        if "num_beams" in fitting:
            groups = fitting["num_beam_groups"] = min(fitting["num_beam_groups"], fitting["num_beams"])
            fitting["num_beams"] -= fitting["num_beams"] % groups
            fitting["num_return_sequences"] = min(fitting["num_return_sequences"], fitting["num_beams"])
            if groups == 1:
                fitting["diversity_penalty"] = 0.0  # nothing is left to differ from
        return fitting

    def check(self, settings: dict[str, Any]) -> None:
        """Raises InputError where settings of a decoding ask for more."""
        for name in _COUNTS:
            value, most = settings.get(name), getattr(self, name)
            if isinstance(value, int) and value > most:
                raise InputError(f"{name}={value} must be at most {most} here")
        for name in ("prefix", "banned", "required"):
            given = settings.get(name) or []
            texts = [given] if isinstance(given, str) else list(given)
            if len(texts) > self.phrases and name != "prefix":
                raise InputError(f"{name} has {len(texts)} phrases; at most {self.phrases} are taken here")
            if any(len(text) > self.letters for text in texts):
                raise InputError(f"{name} is too long; at most {self.letters} letters are taken here")


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture's captions by one run.

    Attributes:
        run: its name.
        width, height: of the picture in pixels, as shown.
        cut: where the square lies in the picture that the model saw.
        square: (3, S, S) uint8, what it saw.
        captions: the best first.
        words: of each caption.
    """

    run: str
    width: int
    height: int
    cut: Resized
    square: Tensor
    captions: list[WrittenCaption]
    words: list[list[Word]]


@dataclass(frozen=True, slots=True)
class _Job:
    """What pictures of one batch have in common; settings as JSON, so that it can be a key."""

    run: str
    settings: str
    attention: bool


class CaptionService:
    """Captions pictures that arrive at any time, those of the same run and decoding together.

    Args:
        captioners: by the names of their runs; the first is asked where nobody names one.
        limits: of what a request may ask for.
        max_batch: pictures captioned at a time.
        max_requests: at a time; more are refused.
    """

    def __init__(
        self, captioners: dict[str, Captioner], limits: Limits, *, max_batch: int, max_requests: int
    ) -> None:
        self.captioners, self.limits, self.max_requests = captioners, limits, max_requests
        self._queue = BatchQueue[_Job, tuple[Tensor, str], list[WrittenCaption]](
            self._work, max_batch=max_batch, max_places=max_requests
        )
        self._writer = functools.lru_cache(_WRITERS)(self._make_writer)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while the context is open."""
        async with self._queue.running():
            yield

    def warm_up(self) -> None:
        """Caption a grey square by each run, so that a run that cannot is found before anybody asks.

        Raises:
            InputError: its weights have diverged, or its decoding does not fit it.
        """
        for run, captioner in self.captioners.items():
            grey = captioner.square(Image.new("RGB", (64, 64), "grey"))
            self._work(_Job(run, _as_key(captioner.settings()), False), [(grey, "grey")])

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A request's place, to be taken before its picture is read.

        Raises:
            OverloadError: there are too many requests.
        """
        with self._queue.place():
            yield

    def settings(self, run: str, decoding: str | None, changes: dict[str, Any]) -> dict[str, Any]:
        """All settings of a decoding, checked.

        Args:
            run: whose own decoding it is where `decoding` is None.
            decoding: as ``caption.py decoding=`` names it.
            changes: some of its settings.

        Raises:
            InputError: they are no decoding's, or beyond the limits.
        """
        settings = self._captioner(run).settings(decoding) | changes
        self.limits.check(settings if decoding else changes)  # a run's own are the operator's choice
        build_decoding(settings)
        return settings

    async def caption(
        self,
        data: bytes,
        runs: Sequence[str],
        decoding: str | None,
        changes: dict[str, Any],
        *,
        attention: bool,
    ) -> list[Captioned]:
        """A picture's captions by each run; to be called with a `place`.

        Args:
            data: the file's bytes.
            runs, decoding, changes: as for `settings`.
            attention: where each word looked, too; of a run that cannot tell it is left out.

        Raises:
            InputError: the settings are no decoding's, or beyond the limits.
            PictureError: it is no picture, too large or too narrow.
        """
        jobs = []
        for run in runs:
            looks = attention and self._captioner(run).grid is not None
            jobs.append(_Job(run, _as_key(self.settings(run, decoding, changes)), looks))
        loop = asyncio.get_running_loop()
        picture, squares = await loop.run_in_executor(self._decoders, self._squares, data, runs)
        name = hashlib.sha256(data).hexdigest()  # sampling draws by it
        written = await asyncio.gather(
            *(self._queue.submit(job, (square, name)) for job, square in zip(jobs, squares, strict=True))
        )
        found = []
        for run, square, captions in zip(runs, squares, written, strict=True):
            captioner = self.captioners[run]
            words = [words_of(caption, captioner.tokenizer) for caption in captions]
            cut = captioner.cut(*picture)
            found.append(Captioned(run, *picture, cut, square, captions, words))
        return found

    def _squares(self, data: bytes, runs: Sequence[str]) -> tuple[tuple[int, int], list[Tensor]]:
        """The picture's width and height, and what each run sees of it."""
        picture = Picture(data, self.limits.pixels, FORMATS)
        pixels = picture.pixels()
        return (picture.width, picture.height), [self.captioners[run].square(pixels) for run in runs]

    def _captioner(self, run: str) -> Captioner:
        if run not in self.captioners:
            raise InputError(f"run={run} must be one of {', '.join(self.captioners)}")
        return self.captioners[run]

    def _make_writer(self, run: str, settings: str) -> CaptionWriter:
        return self.captioners[run].writer(json.loads(settings))

    def _work(self, job: _Job, items: list[tuple[Tensor, str]]) -> list[list[WrittenCaption]]:
        squares = torch.stack([square for square, _ in items]).to(self.captioners[job.run].device)
        names = [name for _, name in items]
        return self._writer(job.run, job.settings).write(squares, names, attention=job.attention)


def _as_key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
