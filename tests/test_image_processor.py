from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_moe.canvas import to_canvas
from eagle_moe.image_processor import EagleMixImageProcessor

SIZE = {"height": 32, "width": 32}


@pytest.fixture
def processor() -> EagleMixImageProcessor:
    return EagleMixImageProcessor(size=SIZE, fit="crop", fill=[1, 2, 3])


def test_any_kind_of_image_becomes_the_same_canvas(processor, make_image, tmp_path):
    image = make_image(50, 40)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = to_canvas(image, 32, "crop")
    for source in (image, str(tmp_path / "a.png"), array, tensor, tensor.float() / 255):
        pixels = processor(source, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels[0], expected)


def test_nested_lists_are_flattened_in_order(processor, make_image):
    images = [make_image(seed=i) for i in range(3)]
    pixels = processor([images[:2], images[2:]], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.stack([to_canvas(i, 32, "crop") for i in images]))


def test_settings_survive_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = EagleMixImageProcessor.from_pretrained(tmp_path)
    assert (dict(again.size), again.fit, list(again.fill)) == (SIZE, "crop", [1, 2, 3])
    assert again.to_dict() == processor.to_dict()


def test_settings_can_be_given_per_call(processor, make_image):
    image = make_image(50, 20)
    pixels = processor(image, fit="pad", size={"height": 16, "width": 16}, return_tensors="pt")
    assert torch.equal(pixels["pixel_values"][0], to_canvas(image, 16, "pad", (1, 2, 3)))


def test_transparent_and_turned_images_are_handled(processor):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert processor(clear, return_tensors="pt")["pixel_values"].eq(255).all()


def test_bad_input_is_explained(processor, tmp_path):
    with pytest.raises(ValueError, match=r"absent.png: no such image file"):
        processor(str(tmp_path / "absent.png"))
    with pytest.raises(ValueError, match="images: got int"):
        processor(3)
    with pytest.raises(ValueError, match="the canvas is square"):
        EagleMixImageProcessor(size={"height": 32, "width": 16})
    with pytest.raises(ValueError, match='fit: "padd"'):
        EagleMixImageProcessor(size=SIZE, fit="padd")(Image.new("RGB", (8, 8)))
