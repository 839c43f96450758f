"""From the command line to a page that is served, and to its end."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_moe.limits import Limits
from eagle_moe.schema import apply_overrides
from eagle_moe.serving.listener import answer, is_loopback, listen

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from eagle_moe.web.desk import Desk
    from eagle_moe.web.pictures import Example

POLICY = "; ".join(
    (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'none'",
    )
)
"""What browsers are told the page may load: nothing from elsewhere, whatever an answer links to.
(Gradio's own scripts are inline and evaluate.)"""
PATIENCE = 2
"""Seconds that open connections have after Ctrl-C."""


@dataclass(frozen=True)
class WebSettings:
    """`port` 0: any that is free. `reference`: over whose images maps of silenced experts are
    averaged, at most `reference_count` of them; None: those of `examples`, a suite's folder; None:
    the pictures that come with the package."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 7860
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    examples: Path | None = None
    reference: Path | None = None
    reference_count: int = 100
    max_new_tokens: int = 512
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must be 0 to 65535.")
        for option in ("max_new_tokens", "reference_count"):
            if getattr(self, option) < 1:
                value, flag = getattr(self, option), option.replace("_", "-")
                raise ValueError(f"--{flag} {value}: must be at least 1.")


def web_command(settings: WebSettings) -> int:
    """Listen, load, answer until interrupted. Mistakes are told before anything is loaded."""
    if find_spec("gradio") is None:
        raise ValueError("the web chat needs gradio. Run: pip install 'eagle-moe[web]'")
    with (
        listen(settings.host, settings.port) as listener,
        tempfile.TemporaryDirectory(prefix="eagle-moe-web-") as folder,
    ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes, too
        app = build_app(settings, Path(folder))
        told = "Ask at {url} in a browser. Ctrl-C ends it."
        answer(app, listener, settings.host, told, PATIENCE)
    return 0


def build_app(settings: WebSettings, folder: Path) -> FastAPI:
    """The page with its model loaded; visitors' files are kept in `folder`."""
    from transformers.utils.logging import disable_progress_bar

    from eagle_moe.chat.session import ChatSession
    from eagle_moe.web.desk import Desk, load_reference
    from eagle_moe.web.pictures import BUILT_IN, choose_examples, reference_images

    limits = Limits.parse(apply_overrides({}, settings.limits), "--limit")
    examples = choose_examples(settings.examples or BUILT_IN)
    source = settings.reference or settings.examples or BUILT_IN
    images = reference_images(source, settings.reference_count)
    if not sys.stderr.isatty():
        disable_progress_bar()
    session = ChatSession.load(settings.model, settings.device, settings.dtype, settings.quantize)
    told = "the example pictures" if source == BUILT_IN else f"from {source.resolve().name}"
    reference = load_reference(session, images, told)
    desk = Desk(session, reference, limits, folder, settings.max_new_tokens)
    return serve_page(desk, examples, settings.host)


def serve_page(desk: Desk, examples: Sequence[Example], host: str) -> FastAPI:
    """The ASGI app of the page, with what is refused before gradio sees it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder)
    import gradio as gr
    from fastapi import FastAPI

    from eagle_moe.serving.app import Door
    from eagle_moe.web.page import CSS, build_page, make_theme

    page = build_page(desk, examples)
    app: FastAPI = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=host,
        show_error=True,
        max_file_size=desk.limits.image_bytes,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        theme=make_theme(),
        css_paths=CSS,
    )
    # Without this gradio takes the page for one that is still being written, and opens whatever
    # file of this machine a request names.
    page.has_launched = page.is_running = True
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else ())
    app.add_middleware(Gate, most=desk.limits.request_bytes)
    app.add_middleware(Door, hosts=hosts, most=1)
    return app


class Gate:
    """ASGI middleware: no request larger than `most` bytes, and a page that loads nothing else."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if (
            scope["method"] in ("GET", "HEAD", "OPTIONS")
            or int(length or self.most + 1) <= self.most
        ):
            await self.app(scope, receive, answer)
        else:
            refusal = PlainTextResponse(
                f"A request may have {self.most:,} bytes; this one has {length or 'no'} length.",
                status_code=413 if length else 411,
            )
            await refusal(scope, receive, answer)
