"""The package as transformers sees it: Auto classes and pipelines; and as an import costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import eagle_moe


def test_auto_classes_find_ours(tiny_folder):
    assert type(AutoConfig.from_pretrained(tiny_folder)) is eagle_moe.EagleMixConfig
    assert type(AutoModel.from_pretrained(tiny_folder)) is eagle_moe.EagleMixModel
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(tiny_folder)
        assert type(model) is eagle_moe.EagleMixForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tiny_folder)) is eagle_moe.EagleMixProcessor
    image_processor = AutoImageProcessor.from_pretrained(tiny_folder)
    assert type(image_processor) is eagle_moe.EagleMixImageProcessor
    assert AutoTokenizer.from_pretrained(tiny_folder).image_token == "<image>"


def test_vision_model_by_itself(tiny_config):
    vision = AutoModel.from_config(tiny_config.vision_config)
    assert type(vision) is eagle_moe.EagleMixVisionModel
    canvas = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert vision(canvas).shape == (2, tiny_config.vision_config.num_tokens, 192)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pipeline(tiny_folder, tiny_model, tiny_processor, make_image, tmp_path):
    pipe = pipeline("image-text-to-text", model=str(tiny_folder), device="cpu")
    image = make_image()
    image.save(tmp_path / "a.png")
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs = tiny_processor(text="USER: <image>\nq ASSISTANT:", images=image, return_tensors="pt")
    tokens = tiny_model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    expected = tiny_processor.decode(tokens, skip_special_tokens=True)
    for picture in ({"image": image}, {"path": str(tmp_path / "a.png")}):
        content = [{"type": "image", **picture}, {"type": "text", "text": "q"}]
        chat = [{"role": "user", "content": content}]
        (output,) = pipe(text=chat, return_full_text=False, generate_kwargs=options)
        assert output["generated_text"] == expected
    (output,) = pipe(
        images=image,
        text="USER: <image>\nq ASSISTANT:",
        return_full_text=False,
        generate_kwargs=options,
    )
    assert output["generated_text"] == expected


def run(code: str, argv0: str = "script.py") -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = {argv0!r}; {code}"]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_import_registers_and_stays_light():
    heavy = ("timm", "open_clip", "peft", "matplotlib", "datasets", "gradio")
    code = (
        "import eagle_moe; from transformers import CONFIG_MAPPING; "
        "print('eagle_moe' in CONFIG_MAPPING, [m for m in sys.modules if m in "
        f"{heavy}])"
    )
    assert run(code).split() == ["True", "[]"]


def test_console_script_starts_without_torch():
    code = "import eagle_moe; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(code, argv0="bin/eagle-moe").split() == ["False", "False"]


def test_public_names():
    assert "EagleMixModel" in dir(eagle_moe)
    assert eagle_moe.__version__
    with pytest.raises(AttributeError, match="EagleMoeModel"):
        _ = eagle_moe.EagleMoeModel
