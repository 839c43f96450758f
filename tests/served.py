"""Servers in a thread or in a process of their own, and a client that knows only HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from PIL import Image

from eagle_moe.serving.listener import listen

SECONDS = 120
"""A server that has not begun or answered by then never will."""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def answer(self) -> str:
        assert self.status == 200, self.text
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self) -> str:
        assert self.headers["content-type"] == "application/json"
        return self.json["error"]["message"]

    @property
    def events(self) -> list[Any]:
        """Of a stream, without its end."""
        *lines, end = [line for line in self.text.split("\n\n") if line]
        assert end == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


class Client(NamedTuple):
    port: int

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            lower = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, lower, response.read().decode())
        finally:
            connection.close()

    def chat(self, content: Any, **fields: Any) -> Reply:
        """Ask one question."""
        return self.body({"messages": [{"role": "user", "content": content}], **fields})

    def body(self, data: Any) -> Reply:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return self.send("POST", "/v1/chat/completions", body, Content_Type="application/json")


def shown(source: Image.Image | bytes | str) -> dict[str, Any]:
    """The part of a question that shows an image: given itself, or by an address."""
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.save(file, "PNG")
        source = file.getvalue()
    if isinstance(source, bytes):
        source = f"data:image/png;base64,{base64.b64encode(source).decode()}"
    return {"type": "image_url", "image_url": {"url": source}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@contextmanager
def in_thread(app: Any) -> Iterator[Client]:
    """The app on a free port of loopback, in this process."""
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


@contextmanager
def in_process(folder: Path, *options: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """`eagle-moe serve` on a free port of loopback; killed when the block is left."""
    command = [sys.executable, "-m", "eagle_moe.cli", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # empty if the process ends
        assert line.startswith("http://127.0.0.1:"), line
        yield Client(int(line.split(":")[2].split("/")[0])), process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)
