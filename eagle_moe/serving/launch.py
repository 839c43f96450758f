"""From the command line to a server that listens."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_moe.limits import Limits
from eagle_moe.schema import apply_overrides
from eagle_moe.serving.listener import answer, is_loopback, listen

if TYPE_CHECKING:
    from starlette.applications import Starlette

NEEDED = ("fastapi", "uvicorn", "starlette", "openai")
"""What `transformers serve` imports: the extra `serve`."""
PATIENCE = 5
"""Seconds that answers under way have after Ctrl-C."""


@dataclass(frozen=True)
class ServeSettings:
    """`port` 0: any that is free. `name`: what clients call the model; None: its folder's name."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    name: str | None = None
    max_new_tokens: int = 1024
    queue: int = 32
    image_folder: Path | None = None
    limits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port {self.port}: must be 0 to 65535.")
        for option in ("max_new_tokens", "queue"):
            if getattr(self, option) < 1:
                value, flag = getattr(self, option), option.replace("_", "-")
                raise ValueError(f"--{flag} {value}: must be at least 1.")
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise ValueError(f"--image-folder {self.image_folder}: no such folder.")


def serve_command(settings: ServeSettings) -> int:
    """Listen, load, answer until interrupted. Mistakes are told before anything is loaded."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}. Run: pip install 'eagle-moe[serve]'")
    limits = Limits.parse(apply_overrides({}, settings.limits), "--limit")
    with listen(settings.host, settings.port) as listener:
        app = build_app(settings, limits)
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # a line per request
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)  # and no second one
        told = "{url}/v1 answers chat completions. Ctrl-C ends it."
        answer(app, listener, settings.host, told, PATIENCE)
    return 0


def build_app(settings: ServeSettings, limits: Limits) -> Starlette:
    """The model loaded and the routes before it."""
    from transformers.utils.logging import disable_progress_bar

    from eagle_moe.chat.session import ChatSession
    from eagle_moe.serving.app import ChatServer
    from eagle_moe.serving.engine import Engine, require_engine

    require_engine()
    if not sys.stderr.isatty():
        disable_progress_bar()
    session = ChatSession.load(settings.model, settings.device, settings.dtype, settings.quantize)
    name = settings.name or settings.model.resolve().name
    engine = Engine(session.model, session.processor, name, settings.max_new_tokens)
    server = ChatServer(engine, limits, settings.image_folder)
    loopback = is_loopback(settings.host)
    hosts = frozenset({"localhost", "127.0.0.1", "::1", settings.host} if loopback else ())
    return server.build_app(hosts, settings.queue)
