"""Page and API as one application, and what holds for every request to it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from efficap.demo.api import caption_routes
from efficap.demo.page import CSS, THEME, build_page
from efficap.demo.service import CaptionService

# The page may load nothing from elsewhere: Gradio's own template names other hosts.
_HEADERS = {
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    b"base-uri 'self'; frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
# What the page and the API's page ask for. Gradio has more routes, for recordings, proxies, monitoring and so on.
_OPEN = re.compile(
    r"/(caption|docs|openapi\.json|static-offline-docs/.*|config|theme\.css|favicon\.ico|manifest\.json"
    r"|assets/.*|static/.*|svelte/.*|gradio_api/(info|upload|upload_progress|file=.*|queue/(join|data)"
    r"|heartbeat/.*|startup-events|cancel|reset))?"
)


class Gate:
    """Lets requests through to routes that are used, and tells the browser that nothing from elsewhere belongs to them.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope.get("path", "").startswith("/gradio_api/file=")
        headers = {**_HEADERS, b"content-security-policy": b"sandbox"} if is_upload else _HEADERS

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers.items()]
            await send(message)

        if scope["type"] == "http":
            is_open = _OPEN.fullmatch(scope["path"])
            app = self._app if is_open else JSONResponse({"detail": "Not Found"}, 404)
            await app(scope, receive, with_headers)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)


def build_app(
    service: CaptionService, *, examples: list[Path], max_bytes: int, max_seconds: float
) -> FastAPI:
    """The application: the page at ``/``, ``POST /caption``, its description at ``/docs`` and ``/openapi.json``.

    Args:
        service: answers both.
        examples: pictures to click on.
        max_bytes: of a request.
        max_seconds: in which a picture must have arrived.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPIOffline(
        title="efficap",
        description="Captions of pictures.",
        redoc_url=None,
        lifespan=lifespan,
        max_body_size=max_bytes,  # of every request, those to the page included
    )
    app.include_router(caption_routes(service, max_seconds=max_seconds))
    app.add_middleware(Gate)
    return gr.mount_gradio_app(
        app,
        build_page(service, examples),
        path="/",
        allowed_paths=[],
        blocked_paths=[],
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=THEME,
        css=CSS,
    )
