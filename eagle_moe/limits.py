"""What one request to a server may hold. Web chat and HTTP server refuse the rest, alike.

The sizes are settings; file formats are not: Pillow hands some of them (EPS) to other programs.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from pydantic import PositiveInt

from eagle_moe.canvas import load_image
from eagle_moe.schema import Schema

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are opened for strangers. JPEG holds a phone's MPO too."""


class Limits(Schema):
    """Sizes that one request may have, all its turns together.

    - `image_bytes`: an image's file. `image_pixels`: its width times its height; the default holds
      the photo of a 48-megapixel phone. An image of several frames or pages is always refused.
    - `image_count`: images. `prompt_characters`: characters of all texts.
    - `request_bytes`: all of it as it is sent.
    """

    image_bytes: PositiveInt = 20 * 2**20
    image_pixels: PositiveInt = 50_000_000
    image_count: PositiveInt = 16
    prompt_characters: PositiveInt = 50_000
    request_bytes: PositiveInt = 64 * 2**20


def open_image(source: bytes | Path, name: str, limits: Limits) -> Image.Image:
    """An encoded image, or a file of this machine, as an upright RGB image within `limits`.

    Raises `ValueError` naming `name` and the remedy: too many bytes, pixels or frames, or not an
    image in one of `FORMATS`.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError(f"{name}: no such image file.")
        size = source.stat().st_size
    else:
        size = len(source)
    if size > limits.image_bytes:
        raise ValueError(
            f"{name}: {size:,} bytes, more than the limit of {limits.image_bytes:,}. "
            "Make the image smaller, or save it as JPEG."
        )
    return load_image(source, max_pixels=limits.image_pixels, formats=FORMATS, name=name)


def check_text(text: str, limits: Limits) -> None:
    """Raises `ValueError` if the texts of a request, joined, are longer than `limits` allow."""
    if len(text) > limits.prompt_characters:
        raise ValueError(
            f"text: {len(text):,} characters, more than the limit of "
            f"{limits.prompt_characters:,}. Ask something shorter."
        )


def check_count(count: int, limits: Limits) -> None:
    """Raises `ValueError` if a request holds more images than `limits` allow."""
    if count > limits.image_count:
        raise ValueError(
            f"images: {count}, more than the limit of {limits.image_count}. Send fewer at a time."
        )
