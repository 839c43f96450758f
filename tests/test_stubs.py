"""What is saved can be loaded by a program that never imports us, and saved again, and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from eagle_moe.config import EagleMixConfig
from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor
from eagle_moe.stubs import CONFIG_MAP, PROCESSOR_MAP, stub_files


def assert_complete(folder: Path) -> None:
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == stub_files()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == CONFIG_MAP
    assert json.loads((folder / "processor_config.json").read_text())["auto_map"] == PROCESSOR_MAP


def test_every_auto_map_leads_into_a_file():
    for reference in {**CONFIG_MAP, **PROCESSOR_MAP}.values():
        file, name = reference.split(".")
        found: dict = {}
        exec(stub_files()[f"{file}.py"], found)
        assert found[name].__module__.startswith("eagle_moe.")


def test_saved_with_stubs(tiny_folder):
    assert_complete(tiny_folder)


@pytest.mark.parametrize("part", ["config", "processor", "image_processor"])
def test_each_part_alone_brings_them(tiny_config, tiny_processor, tmp_path, part):
    parts = {
        "config": tiny_config,
        "processor": tiny_processor,
        "image_processor": tiny_processor.image_processor,
    }
    parts[part].save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == stub_files().keys()


@pytest.mark.parametrize(
    "ours",
    [
        EagleMixConfig,
        EagleMixForConditionalGeneration,
        EagleMixImageProcessor,
        EagleMixProcessor,
    ],
)
def test_no_class_is_marked_for_copying(ours):
    """What transformers does to a class that came through a stub."""
    ours.register_for_auto_class("AutoAnything")
    assert ours._auto_class is None


def test_the_repository_in_front_of_a_class_is_dropped(tiny_config):
    """transformers puts it there when a config comes from the Hub."""
    fields = tiny_config.to_dict()
    fields["auto_map"] = {"AutoConfig": f"someone/model--{CONFIG_MAP['AutoConfig']}"}
    assert EagleMixConfig(**fields).auto_map == CONFIG_MAP


def test_saved_again_by_a_program_that_knows_us(tiny_folder, tmp_path):
    AutoModelForImageTextToText.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    assert_complete(tmp_path)


STRANGER = """
import sys
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
assert "eagle_moe" not in sys.modules
folder, out, again = sys.argv[1:]
for source, target in ((folder, out), (out, again)):
    options = {"trust_remote_code": True}
    AutoImageProcessor.from_pretrained(source, **options)
    AutoProcessor.from_pretrained(source, **options).save_pretrained(target)
    AutoModelForImageTextToText.from_pretrained(source, **options).save_pretrained(target)
"""


def test_saved_again_by_a_program_that_does_not(tiny_folder, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    out, again = tmp_path / "out", tmp_path / "again"
    command = [sys.executable, "-P", "-c", STRANGER, str(tiny_folder), str(out), str(again)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert_complete(out)
    assert_complete(again)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (tiny_folder / weights).read_bytes()


def test_without_the_package_the_stub_says_what_to_install(tiny_folder, tmp_path):
    stub = (tiny_folder / "modeling_eagle_moe.py").read_text()
    hidden = "import sys; sys.modules['eagle_moe'] = None\n"
    done = subprocess.run([sys.executable, "-c", hidden + stub], capture_output=True, text=True)
    assert done.returncode
    assert "This model needs the package eagle-moe: pip install eagle-moe" in done.stderr
