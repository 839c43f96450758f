"""What a client may ask: OpenAI's chat completions, as far as this server does them.

A field that would change the answer and that is not done here is an error, not ignored.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from PIL import Image
from pydantic import Field, PositiveInt

from eagle_moe.limits import Limits, check_count, check_text, open_image
from eagle_moe.schema import Schema

_DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.=+-]+)*;base64,", re.ASCII)


class TextPart(Schema):
    type: Literal["text"]
    text: str


class ImageAddress(Schema):
    """`detail` is accepted and changes nothing: every image has the same number of tokens."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Schema):
    type: Literal["image_url"]
    image_url: ImageAddress


class Message(Schema):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(Schema):
    """The last piece of a stream always holds the usage."""

    include_usage: bool = True


class ChatRequest(Schema):
    """The body of a request. Fields that are `Literal` are there for clients that always send them.

    `temperature` above 0 draws the answer at random; 0 and none at all take the likeliest.
    """

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = Field(None, min_length=1, max_length=64)
    user: str | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a `GenerationConfig` that the request changes."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature or None,
            "top_p": self.top_p if self.temperature else None,
            "do_sample": bool(self.temperature),
            "stop_strings": self.stop,
        }
        return {name: value for name, value in given.items() if value is not None}


def parse_request(body: bytes, limits: Limits) -> ChatRequest:
    """The body of a request, with its texts and number of images within `limits`.

    Raises `ValueError` that names the field and what is valid.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"request: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError("request: not a JSON object.")
    request = ChatRequest.parse(data, "request")
    parts = [part for message in request.messages for part in message.parts]
    check_text("".join(part.text for part in parts if isinstance(part, TextPart)), limits)
    check_count(sum(isinstance(part, ImagePart) for part in parts), limits)
    return request


def prepare_messages(
    request: ChatRequest, limits: Limits, folder: Path | None, prepare: Callable[[Image.Image], Any]
) -> list[dict[str, Any]]:
    """The turns with every address replaced by what `prepare` makes of the opened image.

    Raises `ValueError` that says which image is wrong, and why.
    """
    count, messages = 0, []
    for message in request.messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                content.append(part.dump())
            else:
                count += 1
                image = fetch_image(part.image_url.url, f"image {count}", limits, folder)
                content.append({"type": "image_url", "image_url": prepare(image)})
        messages.append({"role": message.role, "content": content})
    return messages


def fetch_image(url: str, name: str, limits: Limits, folder: Path | None) -> Image.Image:
    """The image that a `data:` address holds, or a `file:` address within `folder` names.

    Nothing is downloaded for a client, and no other file of this machine is opened for it.
    Raises `ValueError`, naming `name`.
    """
    if url.startswith("data:"):
        return open_image(_decode(url, name), name, limits)
    if not url.startswith("file:"):
        raise ValueError(
            f"{name}: its address begins with {url[:12]!r}. Send the image itself, as "
            "data:image/png;base64,...: this server fetches nothing."
        )
    if folder is None:
        raise ValueError(
            f"{name}: this server opens no files. Send the image as data:image/png;base64,..., "
            "or start it with --image-folder."
        )
    return open_image(_within(folder, url, name), name, limits)


def _within(folder: Path, url: str, name: str) -> Path:
    try:  # `/` keeps an absolute path as it is; links are followed before the comparison
        path = (folder / unquote(urlsplit(url).path)).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, too long, links in a circle
        raise ValueError(f"{name}: not the name of a file: {error}.") from None
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: lies outside the folder whose images this server opens.")
    return path


def _decode(url: str, name: str) -> bytes:
    head = _DATA.match(url[:256])
    if head is None:
        raise ValueError(f"{name}: write its address as data:image/png;base64,...")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: not valid base64: {error}.") from None
