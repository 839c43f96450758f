from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_moe.canvas import load_image, to_canvas
from eagle_moe.model import EagleMixForConditionalGeneration
from eagle_moe.processor import EagleMixProcessor
from tests.conftest import make_config, make_model
from tests.tiny_run import make_world
from train.data import DataSpec
from train.data.write_shards import write_shards
from train.features import FeatureCollator, FeatureDataset, FeatureStore, MapFile, image_of

MODEL = make_model(make_config(grid=4))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_world(tmp_path)
    return tmp_path


def make_store(
    world: Path, processor: EagleMixProcessor, model: EagleMixForConditionalGeneration = MODEL
) -> FeatureStore:
    towers = model.model.vision_tower.towers
    return FeatureStore(world / "features", towers, processor.image_processor)


def dataset(world: Path, processor: EagleMixProcessor, name: str = "questions") -> FeatureDataset:
    return FeatureDataset(DataSpec(path=str(world / f"{name}.jsonl")), processor, None)


def written(world: Path) -> dict[str, int]:
    """Maps on disk by expert."""
    return {
        folder.name.partition("-")[0]: len((folder / "images.jsonl").read_text().splitlines())
        for folder in (world / "features").iterdir()
    }


def test_kept_maps_are_the_experts_maps(world: Path, tiny_processor: EagleMixProcessor) -> None:
    data, store = dataset(world, tiny_processor), make_store(world, tiny_processor)
    store.fill([data], "test")
    batch = FeatureCollator(tiny_processor, store)([data[5], data[0], data[5]])
    canvases = [
        to_canvas(load_image(world / path), 64, "pad", (122, 116, 104))
        for path in (*data.record(5).images, *data.record(0).images, *data.record(5).images)
    ]
    with torch.no_grad():
        maps = MODEL.model.vision_tower.encode(torch.stack(canvases))
    assert list(batch["pixel_values"]) == list(maps)
    for name, expected in maps.items():
        torch.testing.assert_close(batch["pixel_values"][name], expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(maps["clip"][0], maps["clip"][1])


def test_nothing_is_computed_twice(
    world: Path, tiny_processor: EagleMixProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(world, tiny_processor).fill([dataset(world, tiny_processor)], "test")
    assert written(world) == {"clip": 12, "convnext": 12}
    monkeypatch.setattr("train.features._run", lambda *_: pytest.fail("computed again"))
    make_store(world, tiny_processor).fill([dataset(world, tiny_processor)], "test")


def test_other_images_are_added(world: Path, tiny_processor: EagleMixProcessor) -> None:
    make_store(world, tiny_processor).fill([dataset(world, tiny_processor, "test")], "test")
    both = [dataset(world, tiny_processor, name) for name in ("questions", "test")]
    store = make_store(world, tiny_processor)
    store.fill(both, "test")
    assert written(world) == {"clip": 12, "convnext": 12}  # `test` has six of the same pictures
    assert len(store.images) == 12


def test_a_picture_that_changed_is_another_one(
    world: Path, tiny_processor: EagleMixProcessor
) -> None:
    data, store = dataset(world, tiny_processor), make_store(world, tiny_processor)
    store.fill([data], "test")
    path = world / data.record(0).images[0]
    os.utime(path, ns=(1, 1))
    again = make_store(world, tiny_processor)
    again.fill([dataset(world, tiny_processor)], "test")
    assert written(world)["clip"] == 13
    assert image_of(path) in again.images


def test_runs_share_the_experts_that_they_have_in_common(
    world: Path, tiny_processor: EagleMixProcessor
) -> None:
    make_store(world, tiny_processor).fill([dataset(world, tiny_processor)], "test")
    only_clip = make_model(make_config(("clip-tiny",), grid=4))
    state = MODEL.model.vision_tower.towers["clip"].state_dict()
    only_clip.model.vision_tower.towers["clip"].load_state_dict(state)
    make_store(world, tiny_processor, only_clip).fill([dataset(world, tiny_processor)], "test")
    assert written(world) == {"clip": 12, "convnext": 12}


def test_other_weights_have_other_maps(world: Path, tiny_processor: EagleMixProcessor) -> None:
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        next(other.model.vision_tower.towers["clip"].parameters()).add_(1e-3)
    folders = [
        {name: file.folder for name, file in make_store(world, tiny_processor, model).files.items()}
        for model in (MODEL, other)
    ]
    assert folders[0]["clip"] != folders[1]["clip"]
    assert folders[0]["convnext"] == folders[1]["convnext"]


def test_what_a_killed_process_left_half_is_written_anew(tmp_path: Path) -> None:
    images: list[Any] = [(str(i), i, i) for i in range(4)]
    maps = torch.arange(4 * 6, dtype=torch.float32).view(4, 1, 2, 3)
    file = MapFile(tmp_path)
    with file.locked():
        file.add(images[:2], maps[:2])
    with (tmp_path / "maps.bin").open("ab") as half:
        half.write(b"half a map")
    with (tmp_path / "images.jsonl").open("a") as half:
        half.write('["2", 2')
    again = MapFile(tmp_path)
    with again.locked():
        assert list(again.rows) == images[:2]
        again.add(images[2:], maps[2:])
    again.read()
    assert list(again.rows) == images
    assert again.maps is not None and torch.equal(again.maps, maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    maps = torch.randn(3, 2, 2, 2).to(dtype)
    file = MapFile(tmp_path)
    with file.locked():
        file.add([("a", 0, 0), ("b", 0, 0), ("c", 0, 0)], maps)
    file.read()
    assert file.maps is not None and torch.equal(file.maps, maps)


def test_side_by_side_runs_do_each_image_once(
    world: Path, tiny_processor: EagleMixProcessor
) -> None:
    def fill() -> None:
        make_store(world, tiny_processor).fill([dataset(world, tiny_processor)], "test")

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=fill) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert written(world) == {"clip": 12, "convnext": 12}


def test_a_missing_picture_names_its_sample(world: Path, tiny_processor: EagleMixProcessor) -> None:
    data = dataset(world, tiny_processor)
    (world / data.record(3).images[0]).unlink()
    with pytest.raises(ValueError, match=r'questions.jsonl: record 3 \(id "3"\)'):
        make_store(world, tiny_processor).fill([data], "test")


def test_too_little_room_is_said_before_anything_is_written(
    world: Path, tiny_processor: EagleMixProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"cache_features: .* GiB are free"):
        make_store(world, tiny_processor).fill([dataset(world, tiny_processor)], "test")


def test_pictures_in_shards_are_refused(world: Path, tiny_processor: EagleMixProcessor) -> None:
    write_shards(str(world / "questions.jsonl"), world / "shards", None, per_shard=100)
    data = FeatureDataset(DataSpec(path=str(world / "shards")), tiny_processor, None)
    with pytest.raises(ValueError, match=r"shard-00000\.tar/.*cache_features .* takes none from"):
        make_store(world, tiny_processor).fill([data], "test")
