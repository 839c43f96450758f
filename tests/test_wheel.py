"""The wheel alone is enough to load a release and ask it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from eagle_moe.hub.consolidate import consolidate

ROOT = Path(__file__).parents[1]

STRANGER = """
import sys
from importlib.util import find_spec
from pathlib import Path
assert find_spec("train") is None and find_spec("eval") is None
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
image = {"type": "image", "image": Image.new("RGB", (48, 32), "red")}
content = [image, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
import eagle_moe
place = Path(eagle_moe.__file__).resolve()
assert Path(sys.prefix).resolve() in place.parents, place
assert list((place.parent / "hub").glob("*.jinja")), "no templates of cards in the wheel"
print("answered", written.shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Of an environment with the wheel, in front of the packages that run these tests."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"  # a build leaves traces where it is made
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "eagle_moe", source / "eagle_moe", ignore=shutil.ignore_patterns("__pycache__")
    )
    venv.create(place / "venv", with_pip=False)
    python = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    run([*pip, "wheel", *options, "--wheel-dir", str(place), str(source)])
    (wheel,) = place.glob("eagle_moe-*.whl")
    run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)])
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([str(python), "-c", code]).strip())
    # A line with a path, unlike `site.addsitedir`, does not run the .pth files that are in there,
    # and so does not bring the checkout along.
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list[str], **options) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_release_answers_where_only_the_wheel_is(python, tiny_folder, tmp_path):
    out = tmp_path / "release"
    consolidate(tiny_folder, out)
    said = run([str(python), "-P", "-c", STRANGER, str(out)], cwd=tmp_path)
    assert said.strip().splitlines()[-1].startswith("answered")
