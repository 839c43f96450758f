"""The canvas: one square uint8 RGB tensor per image, and the views that experts cut from it.

`load_image` and `to_canvas` run on the host, once per image, and know nothing about experts.
`cut_view` runs inside the graph, on the canvas's device.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from eagle_moe.schema import Schema, nearest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of CLIP's training images (openai/CLIP, clip/clip.py)."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of ImageNet-1k (torchvision)."""
CLIP_MEAN_COLOUR = (122, 116, 104)
"""`int(255 * CLIP_MEAN)`: what the official release pads with."""
MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: 1/4 GiB of RGB, Pillow's decompression-bomb limit."""

Fit = Literal["pad", "crop"]
ImageSource = str | Path | bytes | Image.Image


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    frames: Literal["one", "first"] = "one",
    formats: tuple[str, ...] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Open a path, encoded bytes or a PIL image as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits.
    Raises `ValueError`, naming the file and the remedy, when it is missing, empty, damaged, not an
    image, larger than `max_pixels`, or has several frames (`frames="first"` takes the first).
    `formats`: Pillow's names of the file formats that are tried; None: all. `name`: what to call
    the image in errors; None: its path, or "image".
    """
    if name is None:
        name = "image" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            # Pillow would warn below its hard limit; `_check` speaks for us.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else _open(source, name, formats)
        _check(image, name, max_pixels, frames)
        return _plain_jpeg(image) or _to_rgb(ImageOps.exif_transpose(image), name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Make the image smaller.") from None
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(
            f"{name}: cannot be read ({error}). The file is damaged or incomplete: "
            "copy or download it again."
        ) from None


def _open(source: str | Path | bytes, name: str, formats: tuple[str, ...] | None) -> Image.Image:
    if isinstance(source, bytes):
        data = source
    elif not Path(source).exists():
        raise ValueError(f"{name}: no such image file. Check the path and the image folder.")
    elif Path(source).is_dir():
        raise ValueError(f"{name}: is a folder, not an image file.")
    else:
        data = Path(source).read_bytes()
    if not data:
        raise ValueError(f"{name}: is empty (0 bytes). Copy or download it again.")
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        what = "an SVG drawing" if b"<svg" in data[:4096] else "not an image that Pillow can read"
        raise ValueError(f"{name}: is {what}. Convert it to PNG or JPEG.") from None


def _check(image: Image.Image, name: str, max_pixels: int, frames: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name}: {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{max_pixels:,}. Make the image smaller, or raise `max_pixels`."
        )
    if width * height == 0:
        raise ValueError(f"{name}: {width} x {height} pixels: there is nothing to see.")
    count = getattr(image, "n_frames", 1)
    # Phones write MPO: a JPEG whose further "frames" are previews of the same photo.
    if count > 1 and image.format != "MPO":
        if frames == "one":
            raise ValueError(
                f"{name}: has {count} frames (animation or pages), one was expected. Save the one "
                'that matters as an image of its own, or pass frames="first".'
            )
        image.seek(0)


def _plain_jpeg(image: Image.Image) -> Image.Image | None:
    """The pixels of an upright RGB JPEG that is not decoded yet, by simplejpeg if it is there.

    They are Pillow's, in three quarters of its time. None: Pillow has to do it, also to say what is
    wrong with a file that simplejpeg refuses.
    """
    source, decode = getattr(image, "fp", None), _jpeg_decoder()
    if image.format != "JPEG" or image.mode != "RGB" or not isinstance(source, io.BytesIO):
        return None
    if decode is None or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        return Image.fromarray(decode(source.getvalue(), colorspace="RGB"))
    except ValueError:
        return None


@cache
def _jpeg_decoder() -> Callable[..., np.ndarray] | None:
    """simplejpeg's, if it gives Pillow's pixels: one may be linked with another libjpeg."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", subsampling=subsampling)
        theirs = decode_jpeg(file.getvalue(), colorspace="RGB")
        if not np.array_equal(theirs, np.asarray(Image.open(file))):
            return None
    return decode_jpeg


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's convert would clip 16-bit grey at 255 instead of scaling it.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name}: pixel values beyond 16 bits. Save it with 8 bits.")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            f"{name}: floating-point pixels have no agreed range. Save it with 8 bits."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name}: {image.mode} pixels: {error}. Save it as RGB.") from None


def to_canvas(
    image: Image.Image,
    size: int,
    fit: Fit = "pad",
    fill: tuple[int, int, int] = CLIP_MEAN_COLOUR,
) -> Tensor:
    """RGB image -> canvas (3,size,size) uint8, as the official release makes its input.

    `pad`: the whole image, centred on a square of colour `fill`, then resized. `crop`: the short
    side resized to `size`, then the middle. Resizing is Pillow's bicubic (antialiased); what does
    not divide goes to the far side.
    """
    if fit not in get_args(Fit):
        raise ValueError(f'fit: "{fit}".{nearest(fit, get_args(Fit))}')
    square = _pad_to_square(image, fill) if fit == "pad" else _crop_to_square(image, size)
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    # band by band, which takes two thirds of the time that permuting the pixels would
    canvas = np.empty((3, size, size), dtype=np.uint8)
    for number, band in enumerate(square.split()):
        canvas[number] = np.asarray(band)
    return torch.from_numpy(canvas)


def _pad_to_square(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    limit = math.isqrt(MAX_PIXELS)
    if side > limit:  # a long strip: its square would be huge, though the image is not
        shrunk = (max(1, image.width * limit // side), max(1, image.height * limit // side))
        image, side = image.resize(shrunk, Image.Resampling.BICUBIC), limit
    square = Image.new("RGB", (side, side), tuple(fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _crop_to_square(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    # Columns of a strip that are sure to be cut are dropped before the resize multiplies them.
    longest = max(1, MAX_PIXELS // size**2) * short
    image = _centre(image, min(image.width, longest), min(image.height, longest))
    width, height = (int(size * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _centre(image, size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ViewSpec(Schema):
    """How an expert cuts its view from the canvas: a square of `size` pixels, normalised.

    `mean` and `std` are in units of the 0..1 pixel range. `align_corners` and `antialias` are as
    in `torch.nn.functional.interpolate`; the official Eagle release resizes with
    `align_corners=True` and without antialiasing.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    align_corners: bool = False
    antialias: bool = True


def resize(x: Tensor, size: int | tuple[int, int], spec: ViewSpec) -> Tensor:
    """Resize float `x` (B,C,H,W) to `size` by the rule of `spec`; nothing is done at equal size."""
    height, width = (size, size) if isinstance(size, int) else size
    if x.shape[-2:] == (height, width):
        return x
    if spec.interpolation == "nearest":
        return F.interpolate(x, (height, width), mode="nearest")
    return F.interpolate(
        x,
        (height, width),
        mode=spec.interpolation,
        align_corners=spec.align_corners,
        antialias=spec.antialias,
    )


def cut_view(canvas: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Resize and normalise `canvas` (B,3,S,S) to `spec`, returning (B,3,size,size) in `dtype`.

    A uint8 canvas is scaled to 0..1 first; a float canvas must be in 0..1 already. The arithmetic
    is fp32 whatever `dtype` is, so that low precision starts after normalisation.
    """
    x = canvas.float()
    if canvas.dtype == torch.uint8:
        x = x * (1.0 / 255.0)
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float32, device=x.device).view(1, 3, 1, 1)
    # Normalising first commutes with the (linear) resize except for rounding; the official code
    # normalises the canvas and then resizes it, and so do we, to reproduce it to the last bits.
    return resize((x - mean) / std, spec.size, spec).to(dtype)
