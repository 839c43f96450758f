from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eagle_moe import canvas
from eagle_moe.canvas import (
    CLIP_MEAN_COLOUR,
    ViewSpec,
    _jpeg_decoder,
    _plain_jpeg,
    cut_view,
    load_image,
    resize,
    to_canvas,
)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 5, x * y], -1).astype(np.uint8))


# load_image: what opens


def test_path_bytes_and_image_give_the_same_pixels(tmp_path, make_image):
    image = make_image()
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        assert load_image(source).tobytes() == image.tobytes()


def test_exif_orientation_is_applied(make_image):
    image = make_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to view
    assert load_image(encoded(image, exif=exif)).size == (20, 40)


def test_transparency_is_laid_over_white():
    for mode in ("RGBA", "LA", "PA"):
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
        assert load_image(clear).getpixel((0, 0)) == (255, 255, 255), mode
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (255, 127, 127)


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    assert load_image(encoded(image)).getpixel((0, 0)) == (0, 0, 255)
    assert load_image(encoded(image, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_colour_modes_become_rgb(mode, make_image):
    image = make_image().convert(mode)
    assert load_image(image).tobytes() == image.convert("RGB").tobytes()


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257 * 7], [257 * 128, 65535]], np.uint16)
    image = load_image(encoded(Image.fromarray(values)))
    assert np.asarray(image)[..., 0].tolist() == [[0, 7], [128, 255]]


# load_image: what does not open, and what the message says


def test_files_that_cannot_be_read_are_named(tmp_path, make_image):
    png, jpeg = encoded(make_image(64, 64)), encoded(make_image(64, 64), "JPEG")
    cases = {
        "absent.png": (None, "no such image file"),
        "empty.png": (b"", r"is empty \(0 bytes\)"),
        "cut.png": (png[:-60], "damaged or incomplete"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or incomplete"),
        "head.png": (png[:20], "not an image|damaged or incomplete"),
        "notes.txt": (b"hello", "not an image"),
        "drawing.svg": (b'<?xml version="1.0"?><svg></svg>', "SVG drawing"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: .*({message})"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_several_frames_are_an_error_that_counts_them(format, make_image):
    frames = [make_image(seed=i) for i in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 frames"):
        load_image(data)
    assert load_image(data, frames="first").size == frames[0].size


def test_photo_with_embedded_previews_is_one_image(make_image):
    frames = [make_image(seed=i) for i in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert load_image(data).size == frames[0].size


def test_huge_images_are_refused_before_decoding(make_image, monkeypatch):
    with pytest.raises(ValueError, match=r"48 x 32 = 1,536 pixels, more than the limit of 1,000"):
        load_image(make_image(48, 32), max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns from its limit on, and raises from twice that
        assert load_image(encoded(make_image(48, 32))).size == (48, 32)
        with pytest.raises(ValueError, match=r"\(4096 pixels\).*Make the image smaller"):
            load_image(encoded(make_image(64, 64)))


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point pixels"):
        load_image(Image.new("F", (4, 4)))


# to_canvas


@pytest.mark.parametrize("size", [(90, 48), (48, 90), (64, 64), (37, 37), (200, 333), (1, 70)])
def test_canvas_equals_the_clip_processor(size):
    """The official release: CLIP's processor, on a square padded with the mean colour or as is."""
    image = gradient(*size)
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        do_normalize=False,
        do_rescale=False,
    )

    def official(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(clip(image)["pixel_values"][0]))

    side = max(size)
    square = Image.new("RGB", (side, side), CLIP_MEAN_COLOUR)
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    assert torch.equal(to_canvas(image, 64, "crop"), official(image))
    assert torch.equal(to_canvas(image, 64, "pad"), official(square))
    if size[0] != size[1]:
        assert not torch.equal(to_canvas(image, 64, "pad"), official(image))


def test_padding_has_the_fill_colour_and_keeps_the_content():
    padded = to_canvas(Image.new("RGB", (64, 32), "red"), 64, "pad", (1, 2, 3))
    assert padded.dtype == torch.uint8
    assert padded[:, 0, 0].tolist() == [1, 2, 3]
    assert padded[:, 32, 32].tolist() == [255, 0, 0]
    assert padded.is_contiguous()


def test_unknown_fit_names_the_valid_ones(make_image):
    with pytest.raises(ValueError, match=r'fit: "padd".*Did you mean "pad"'):
        to_canvas(make_image(), 64, "padd")


def test_a_long_strip_does_not_take_the_memory_of_its_square(monkeypatch):
    monkeypatch.setattr(canvas, "MAX_PIXELS", 256**2)
    sizes = []
    new, crop = Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda *args: sizes.append(args[1]) or new(*args))
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or crop(*args))
    strip = new("RGB", (6000, 20), "red")
    padded, cropped = to_canvas(strip, 64, "pad"), to_canvas(strip, 64, "crop")
    assert max(width * height for width, height in sizes) <= 256**2
    assert padded[:, 0, 0].tolist() == list(CLIP_MEAN_COLOUR)
    assert cropped[0].eq(255).all()


# views


def test_view_is_resized_and_normalised():
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    spec = ViewSpec(size=16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (spec.mean, spec.std))
    expected = F.interpolate(pixels / 255, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(cut_view(pixels, spec), (expected - mean) / std)
    torch.testing.assert_close(cut_view(pixels / 255, spec), (expected - mean) / std)
    assert cut_view(pixels, spec, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_equal_size_is_left_alone(interpolation):
    x = torch.rand(1, 3, 8, 8)
    assert resize(x, 8, ViewSpec(size=8, interpolation=interpolation)) is x


# JPEG by simplejpeg


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"quality": 98}])
@pytest.mark.parametrize("size", [(1, 1), (17, 13), (301, 8), (160, 121)])
def test_a_jpeg_has_the_pixels_that_pillow_gives(
    subsampling: str, options: dict[str, object], size: tuple[int, int]
) -> None:
    pytest.importorskip("simplejpeg")
    data = encoded(noise(*size), "JPEG", subsampling=subsampling, **options)
    assert _plain_jpeg(Image.open(io.BytesIO(data))) is not None
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(load_image(data)), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_go_to_pillow(mode: str) -> None:
    data = encoded(noise(40, 30, mode), "JPEG")
    assert _plain_jpeg(Image.open(io.BytesIO(data))) is None
    assert load_image(data).size == (40, 30)


def test_a_jpeg_on_its_side_is_put_upright() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(noise(40, 30), "JPEG", exif=exif)
    assert load_image(data).size == (30, 40)


@pytest.mark.parametrize("keep", [-1, -2, -30, 400])
def test_a_truncated_jpeg_is_refused_as_before(keep: int) -> None:
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_image(encoded(noise(160, 121), "JPEG")[:keep])


def test_a_decoder_with_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decode(*a, **k) ^ 1)
    assert _jpeg_decoder.__wrapped__() is None
