"""What is no release, or a spoilt one: one clear error, and nothing under the target."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eagle_moe.checkpoint import SaveFailed
from eagle_moe.cli import main
from eagle_moe.interop import importer, stream
from eagle_moe.interop.importer import plan_import
from tests.official_layout import TINY_GEOMETRY
from tests.official_release import do_import, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def release(world, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(world / "release", tmp_path / "release"))


def spoil_config(**changes):
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_shard(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model-00003-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def lose_a_tensor(tensors: dict) -> None:
    del tensors["lm_head.weight"]


def misshape_a_tensor(tensors: dict) -> None:
    tensors["model.mm_projector.0.weight"] = torch.zeros(32, 7)


def add_a_tensor(tensors: dict) -> None:
    tensors["model.vision_resampler.weight"] = torch.zeros(2)


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


class Payload:
    def __reduce__(self):
        return (Path("ran-it").touch, ())


def evil_pickle(folder: Path) -> None:
    no_weights(folder)
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": Payload()}, file)


def text_as_weights(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")


SPOILS = {
    "another model": (
        spoil_config(model_type="llava_llama"),
        "not an official Eagle release.*llava",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "unknown tower": (
        spoil_config(mm_vision_tower="clip-448;convnet-1024"),
        'no tower "convnet-1024".*convnext-1024',
    ),
    "unknown projector": (spoil_config(mm_projector_type="resampler"), "mm_projector_type"),
    "image start tokens": (spoil_config(mm_use_im_start_end=True), "mm_use_im_start_end"),
    "missing shard": (drop_shard, "1 of 3 shards are missing: model-00002-of-00003"),
    "cut shard": (cut_shard, "model-00002-of-00003.safetensors: cannot be read"),
    "tensor of the index missing": (change_shard(lose_a_tensor), "lacks 1 tensors.*lm_head"),
    "wrong shape": (
        change_shard(misshape_a_tensor),
        r"wrong shapes: model.mm_projector.0.weight \[32, 7\], expected \[32,",
    ),
    "unknown key": (change_shard(add_a_tensor), "unknown keys: model.vision_resampler.weight"),
    "another vocabulary": (spoil_config(vocab_size=400), "wrong shapes: model.embed_tokens.weight"),
    "no weights": (no_weights, "no weights in it"),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "pickled code": (evil_pickle, "pytorch_model.bin: refused"),
    "text": (text_as_weights, "pytorch_model.bin: a pointer of Git LFS"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoilt_release_is_one_clear_error_and_nothing_is_written(
    name, release, world, tmp_path, capsys, monkeypatch
):
    spoil, message = SPOILS[name]
    spoil(release)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    code = main(
        ["import", str(release), str(out / "ours"), "--geometry", str(world / "geometry.yaml")]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and "Traceback" not in error
    assert re.search(message, error), error
    assert list(out.iterdir()) == []
    assert not (tmp_path / "ran-it").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"clip": {"arch": {"layers": 3}}}}, "nothing in the file for: .*layers.2"),
        ({"experts": {"clip": {"arch": {"layer": 2}}}}, "unknown key `layer`.*layers"),
        ({"experts": {"det": {}}}, "experts.det: the release has no such tower.*eva02"),
        ({"expert": {}}, "unknown key `expert`.*experts"),
        ({"fusion": {"grid": 0}}, "grid"),
    ],
)
def test_a_geometry_that_does_not_fit_is_named(world, tmp_path, change, message):
    geometry = {**TINY_GEOMETRY, **change}
    if "experts" in change:
        geometry["experts"] = {**TINY_GEOMETRY["experts"], **change["experts"]}
        if "clip" in change["experts"]:
            ours = TINY_GEOMETRY["experts"]["clip"]
            arch = {**ours["arch"], **change["experts"]["clip"]["arch"]}
            geometry["experts"]["clip"] = {**ours, "arch": arch}
    path = tmp_path / "geometry.yaml"
    path.write_text(yaml.safe_dump(geometry))
    with pytest.raises(ValueError, match=message):
        plan_import(world / "release", path)


def test_without_a_geometry_other_sizes_are_an_error_that_names_the_remedy(world):
    with pytest.raises(ValueError, match="sizes of a published Eagle.*--geometry"):
        plan_import(world / "release")


def test_a_target_that_is_taken_stays_as_it_is(world, tmp_path):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match="exists already"):
        do_import(world / "release", target, world / "geometry.yaml")
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]


def test_too_little_room_is_known_beforehand(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(importer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 0.00 GB, but that disk has 0.00 GB free"):
        do_import(world / "release", tmp_path / "deep" / "ours", world / "geometry.yaml")
    assert not (tmp_path / "deep").exists()


def test_a_disk_that_fills_up_leaves_nothing(world, tmp_path, monkeypatch):
    calls = []

    def fill_up(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(stream, "save_file", fill_up)
    (tmp_path / "out").mkdir()
    with pytest.raises(SaveFailed, match="no room"):
        do_import(world / "release", tmp_path / "out/ours", world / "geometry.yaml", limit=40_000)
    assert list((tmp_path / "out").iterdir()) == []
