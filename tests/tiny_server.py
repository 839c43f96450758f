"""A server of the tiny model, and the folder of images that its requests may name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from eagle_moe.limits import Limits
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.serving.app import ChatServer
from eagle_moe.serving.engine import Engine
from tests.served import Client, in_thread

LIMITS = Limits(
    image_pixels=1_000_000, image_count=3, prompt_characters=1000, request_bytes=1_500_000
)
HOSTS = frozenset({"localhost", "127.0.0.1"})
QUEUE = 12


def make_images(folder: Path) -> Path:
    """A folder that requests may name files of, and a file beside it that they may not."""
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "red dot.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    return folder / "images"


@contextmanager
def tiny_server(
    model: EagleMixForConditionalGeneration, processor: EagleMixProcessor, images: Path
) -> Iterator[Client]:
    engine = Engine(model, processor, "tiny", max_new_tokens=64)
    with in_thread(ChatServer(engine, LIMITS, images).build_app(HOSTS, QUEUE)) as client:
        yield client
