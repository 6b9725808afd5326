"""``POST /caption``: a picture in, JSON out. What stands in its models is what its OpenAPI page says."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from efficap.data.pictures import PictureError
from efficap.demo.batching import OverloadError
from efficap.demo.service import Captioned, CaptionService
from efficap.errors import InputError
from efficap.evaluation.attention import Word


class Question(BaseModel):
    """What to do with the picture. Settings that are left out are as the decoding's file in conf/decoding/ has them."""

    model_config = ConfigDict(extra="forbid")

    run: str | None = Field(None, description="which of the runs; left out: the first")
    decoding: Literal["greedy", "beam", "diverse", "nucleus", "constrained"] | None = Field(
        None, description="left out: as the run was validated"
    )
    attention: bool = Field(False, description="also tell where each word looked")

    max_tokens: int | None = Field(None, description="the longest caption, begin and end counted")
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    banned: list[str] | None = Field(None, description="words and phrases that no caption has")
    prefix: str | None = Field(None, description="how every caption begins")
    evidence: float | None = Field(None, description="weight of what the picture alone says for a word")
    num_beams: int | None = Field(None, description="of beam, diverse and constrained")
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: int | None = Field(None, description="captions of the picture; greedy has one")
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    required: list[str] | None = Field(None, description="of constrained: what every caption has")
    temperature: float | None = Field(None, description="of nucleus, as the rest")
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def changes(self) -> dict[str, Any]:
        """The settings that were given."""
        return self.model_dump(exclude_unset=True, exclude={"run", "decoding", "attention"})


class AnswerWord(BaseModel):
    """A word of a caption, or a mark such as a comma."""

    text: str
    probability: float = Field(description="0 … 1, after the words before it")
    attention: list[list[float]] | None = Field(
        description="how much the model looked at each place of the square, row after row; null unless asked for"
    )


class AnswerCaption(BaseModel):
    """A caption."""

    text: str
    score: float = Field(description="in nats, as the decoding defines it")
    ended: bool = Field(description="false where it was cut at max_tokens")
    tokens: list[int] = Field(description="ids of the tokenizer, begin and end included")
    token_log_probs: list[float] = Field(description="of each of them, in nats; 0 for the beginning")
    words: list[AnswerWord]


class Square(BaseModel):
    """The square that the model sees, in pixels of the picture as shown."""

    left: int
    top: int
    side: int


class Answer(BaseModel):
    """What a run says of a picture."""

    run: str
    width: int = Field(description="of the picture as shown, in pixels")
    height: int
    square: Square
    captions: list[AnswerCaption] = Field(description="the best first; of nucleus, as they were drawn")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: Any


_DESCRIPTION = """The body is the file itself (JPEG, PNG, WebP, GIF or BMP), not a form:

    curl --data-binary @dog.jpg 'http://127.0.0.1:7860/caption?decoding=beam&num_beams=3'
"""
_PICTURE = {
    "required": True,
    "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    408: {"model": Problem, "description": "the picture did not arrive in time"},
    413: {"description": "the file has too many bytes"},
    422: {
        "model": Problem,
        "description": "no picture, one with too many pixels or too narrow, or settings that cannot be",
    },
    503: {
        "model": Problem,
        "description": "too many requests at once",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}},
    },
}


def caption_routes(service: CaptionService, *, max_seconds: float) -> APIRouter:
    """The route of ``/caption``.

    Args:
        max_seconds: in which a picture must have arrived.
    """
    router = APIRouter()
    first = next(iter(service.captioners))

    @router.post(
        "/caption",
        summary="Caption a picture",
        description=_DESCRIPTION,
        openapi_extra={"requestBody": _PICTURE},
        responses=_PROBLEMS,
    )
    async def caption(request: Request, question: Annotated[Question, Query()]) -> Answer:
        try:
            with service.place():
                data = await _body(request, max_seconds)
                [answer] = await service.caption(
                    data,
                    [question.run or first],
                    question.decoding,
                    question.changes(),
                    attention=question.attention,
                )
        except OverloadError as error:
            raise HTTPException(503, str(error), {"Retry-After": str(error.retry_after)}) from None
        except (InputError, PictureError) as error:
            raise HTTPException(422, str(error)) from None
        return _answer(answer)

    return router


async def _body(request: Request, max_seconds: float) -> bytes:
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(422, "the body is a form; send the picture itself, as curl --data-binary does")
    try:
        async with asyncio.timeout(max_seconds):
            return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"the picture did not arrive in {max_seconds:g} s") from None


def _answer(found: Captioned) -> Answer:
    across = found.width / found.cut.width  # pixels of the picture for one of the resized
    down = found.height / found.cut.height
    return Answer(
        run=found.run,
        width=found.width,
        height=found.height,
        square=Square(
            left=round(found.cut.left * across),
            top=round(found.cut.top * down),
            side=round(found.square.shape[-1] * across),
        ),
        captions=[
            AnswerCaption(**caption.as_row(), words=[_word(word) for word in words])
            for caption, words in zip(found.captions, found.words, strict=True)
        ],
    )


def _word(word: Word) -> AnswerWord:
    look = None if word.attention is None else word.attention.tolist()
    return AnswerWord(text=word.text.strip(), probability=word.probability, attention=look)
