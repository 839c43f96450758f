"""The HTTP side: three routes, who is let in, and errors in OpenAI's form.

Everything here runs in one event loop; images are opened in threads, answers are written in one.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from jinja2 import TemplateError
from PIL import Image

from eagle_moe.limits import Limits
from eagle_moe.serving.request import parse_request, prepare_messages

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from eagle_moe.serving.engine import Engine

CHAT = "/v1/chat/completions"
OPENERS = 2
"""Images that are decoded at the same time: each may need `Limits.image_pixels` times 3 bytes."""
LONGEST_MESSAGE = 500
"""Characters of an error that a client gets back: it may quote the request."""

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that gets `status` and a message. (A `ValueError` is status 400.)"""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Door:
    """ASGI middleware: lets a request in if it is meant for this server and there is room.

    - `hosts`: names that requests may be addressed to; none: any. A page in a browser can make its
      own name point to this machine, but not change what its requests are addressed to.
    - `most`: chats that are under way or wait at the same time.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], most: int) -> None:
        self.app = app
        self.hosts = hosts
        self.most = most
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts and _hostname(host) not in self.hosts:
            refusal = _error(421, f"this server is not {host!r}.")
            await refusal(scope, receive, send)
        elif scope["path"] != CHAT:
            await self.app(scope, receive, send)
        elif self.inside >= self.most:
            refusal = _error(429, f"{self.inside} requests are waiting already. Try again later.")
            refusal.headers["Retry-After"] = "5"
            await refusal(scope, receive, send)
        else:
            self.inside += 1
            try:  # until the last byte of the answer is sent, or the client has gone
                await self.app(scope, receive, send)
            finally:
                self.inside -= 1


class ChatServer:
    """The routes. `image_folder`: where `file:` addresses may point; None: nowhere."""

    def __init__(self, engine: Engine, limits: Limits, image_folder: Path | None = None) -> None:
        self.engine = engine
        self.limits = limits
        self.image_folder = image_folder
        self._openers = ThreadPoolExecutor(OPENERS, "image")

    def build_app(self, hosts: frozenset[str], most: int) -> Starlette:
        """The ASGI app behind its `Door`."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.requests import ClientDisconnect
        from starlette.routing import Route

        handlers: dict[Any, Any] = {
            HTTPException: lambda _, error: _error(error.status_code, str(error.detail)),
            Refused: lambda _, error: _error(error.status, str(error)),
            ValueError: lambda _, error: _error(400, str(error)),
            TemplateError: lambda _, error: _error(400, f"messages: {error}"),
            ClientDisconnect: lambda _, error: _error(400, "request: it broke off."),
            Exception: lambda _, error: _error(500, "The server failed; its log says why."),
        }
        return Starlette(
            routes=[
                Route(CHAT, self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
            ],
            middleware=[Middleware(Door, hosts=hosts, most=most)],
            exception_handlers=handlers,
        )

    async def health(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        model = {"id": self.engine.name, "object": "model", "created": 0, "owned_by": "eagle_moe"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        # A page in a browser may send other types to this machine without being asked for leave.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise Refused(415, "Send the request as Content-Type: application/json.")
        asked = parse_request(await self._read(request), self.limits)
        if asked.model not in (None, self.engine.name):
            raise Refused(
                404, f"model: {asked.model!r} is not served here; {self.engine.name!r} is."
            )
        messages = await asyncio.get_running_loop().run_in_executor(
            self._openers, prepare_messages, asked, self.limits, self.image_folder, self._canvas
        )
        response: Any = await self.engine.reply(asked, messages, f"chatcmpl-{uuid4().hex}")
        if asked.stream:
            response.body_iterator = finished(response.body_iterator)
        return response

    async def _read(self, request: Request) -> bytes:
        """The body; reading ends as soon as it is too long."""
        most, body = self.limits.request_bytes, bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise Refused(413, f"request: more than the limit of {most:,} bytes.")
        return bytes(body)

    def _canvas(self, image: Image.Image) -> Any:
        """(3,S,S) uint8: an image that waits is no larger than what the model sees of it."""
        inputs = self.engine.processor.image_processor(images=image, return_tensors="pt")
        return inputs["pixel_values"][0]


async def finished(stream: AsyncGenerator[str]) -> AsyncGenerator[str]:
    """The engine's stream of events with the end that clients wait for, and errors as JSON.

    The engine puts an error's text between quotes as it is, whatever quotes there are in it.
    """
    async with aclosing(stream) as events:
        async for event in events:
            if event.startswith('data: {"error"'):
                logger.error("generation failed: %s", event.strip())
                yield f"data: {json.dumps(_body(500, 'The server failed; its log says why.'))}\n\n"
            else:
                yield event
    yield "data: [DONE]\n\n"


def _error(status: int, message: str) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(_body(status, message), status_code=status)


def _body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} ..."
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _hostname(host: str) -> str | None:
    """Of a Host header, which may hold a port: `[::1]:8000` -> `::1`."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
