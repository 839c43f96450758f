"""Images -> the uint8 canvas that every expert looks at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, is_valid_image
from transformers.image_utils import load_image as download_image
from transformers.processing_utils import ImagesKwargs, Unpack

from eagle_moe.canvas import CLIP_MEAN_COLOUR, load_image, to_canvas
from eagle_moe.stubs import PROCESSOR_MAP, ByStub, write_stubs


class EagleMixImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """`fit`: "pad" or "crop"; `fill`: RGB colour around a padded image."""

    fit: str
    fill: list[int] | tuple[int, ...]


class EagleMixImageProcessor(ByStub, PilBackend):
    """Any images -> `pixel_values` (num_images, 3, S, S) uint8, not normalised; none -> no key.

    Takes paths, addresses, PIL images, arrays and tensors. `size` is {"height": S, "width": S};
    each expert cuts and normalises its own view of the canvas inside the model.
    """

    valid_kwargs = EagleMixImageProcessorKwargs
    size: Any = {"height": 1024, "width": 1024}
    rescale_factor = None  # values stay 0..255
    fit = "pad"
    fill = CLIP_MEAN_COLOUR

    def __init__(self, **kwargs: Unpack[EagleMixImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)
        self.auto_map = {key: PROCESSOR_MAP[key] for key in ("AutoImageProcessor",)}
        if self.size.height is None or self.size.height != self.size.width:
            raise ValueError(f"size: the canvas is square, got {dict(self.size)}.")

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the JSON, and the stubs beside it: `save_pretrained` calls it."""
        super().to_json_file(json_file_path)
        write_stubs(Path(json_file_path).parent)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is given by name; leave what is an image already."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            if image_url_or_urls.startswith(("http://", "https://", "data:")):
                return load_image(download_image(image_url_or_urls))
            return load_image(image_url_or_urls)
        if not is_valid_image(image_url_or_urls):
            raise ValueError(
                f"images: got {type(image_url_or_urls).__name__}. "
                "Give file names, addresses, PIL images, arrays or tensors."
            )
        return image_url_or_urls

    def process_image(self, image: ImageInput, **kwargs: Any) -> torch.Tensor:
        """One image -> canvas (3,S,S) uint8."""
        if not isinstance(image, Image.Image):
            image = to_pil_image(image)
        size, fit, fill = kwargs["size"], kwargs["fit"], kwargs["fill"]
        return to_canvas(load_image(image), size.height, fit, tuple(fill))

    def _preprocess(
        self, images: list[torch.Tensor], return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        data = {"pixel_values": torch.stack(images)} if images else {}
        return BatchFeature(data, tensor_type=return_tensors)
