"""What a server refuses: too much of anything, and files that are not plain images."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from eagle_moe.limits import Limits, check_count, check_text, open_image

SMALL = Limits(image_bytes=20_000, image_pixels=10_000, image_count=2, prompt_characters=5)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_an_image_within_the_limits_is_opened(make_image, tmp_path):
    data = encoded(make_image(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert open_image(source, "a", SMALL).tobytes() == make_image().tobytes()


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_formats_of_the_web_and_of_scanners_are_opened(make_image, kind):
    assert open_image(encoded(make_image(), kind), "a", SMALL).size == (48, 32)


def bad_images() -> dict[str, tuple[bytes, str]]:
    grey = Image.new("L", (8, 8))
    pages = [Image.new("L", (8, 8), shade) for shade in range(200)]
    return {
        "bytes": (bytes(20_001), "20,001 bytes, more than the limit of 20,000"),
        "pixels": (encoded(Image.new("1", (101, 100)), "PNG"), "10,100 pixels"),
        "bomb": (encoded(Image.new("1", (14_000, 14_000)), "PNG"), "smaller"),
        "pages": (encoded(grey, "GIF", save_all=True, append_images=pages[1:]), "200 frames"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG drawing"),
        "text": (b"hello", "not an image"),
        "nothing": (b"", "empty"),
        "cut": (encoded(Image.effect_noise((64, 64), 99), "PNG")[:2000], "damaged"),
        # Pillow would start Ghostscript to draw it
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }


@pytest.mark.parametrize(("data", "message"), bad_images().values(), ids=bad_images())
def test_a_bad_image_is_refused_by_name(data, message, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(ValueError, match=f"^image 3: .*{message}"):
            open_image(source, "image 3", SMALL)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="a: no such image file"):
            open_image(path, "a", SMALL)


def test_texts_and_counts_at_the_limit_pass_and_beyond_do_not():
    check_text("12345", SMALL)
    check_count(2, SMALL)
    with pytest.raises(ValueError, match="text: 1,000,000 characters, more than the limit of 5"):
        check_text("x" * 1_000_000, SMALL)
    with pytest.raises(ValueError, match="images: 3, more than the limit of 2"):
        check_count(3, SMALL)


def test_limits_are_positive_and_known_by_name():
    with pytest.raises(ValueError, match="image_count"):
        Limits.parse({"image_count": 0}, "limits")
    with pytest.raises(ValueError, match='Did you mean "image_pixels"'):
        Limits.parse({"image_pixel": 5}, "limits")
