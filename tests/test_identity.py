"""eval/identity.py: equal when nothing that matters changed, different when anything did."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.answer import CheckpointAnswerer
from eval.identity import Identity, describe_machine, hash_weights, identify, library_versions
from eval.items import read_items
from tests.suites import write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=2)


@pytest.fixture
def answerer(tiny_model, tiny_processor) -> CheckpointAnswerer:
    return CheckpointAnswerer(tiny_model, tiny_processor)


def make(folder, suite, answerer, limit=None, batch_size=4) -> Identity:
    return identify(folder, answerer, read_items(suite, limit), suite, batch_size)


def test_says_what_produced_the_score(tiny_folder, suite, answerer):
    identity = make(tiny_folder, suite, answerer)
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert identity.model_type == "eagle_moe"
    assert (identity.task.name, identity.task.version, identity.task.seed) == (
        "eagle_skills",
        "3",
        5,
    )
    assert (identity.task.split, identity.task.images) == ("test", "keep")
    assert (identity.batch_size, identity.dtype, identity.device) == (4, "float32", "cpu")
    assert identity.decoding["max_new_tokens"] == 16
    assert identity.decoding["do_sample"] is False
    assert read_items(suite)[0].question in identity.prompt
    assert identity.versions["torch"] == torch.__version__.split("+")[0]
    assert Identity.parse(identity.dump(), "card") == identity


def test_everything_that_can_change_a_score_changes_it(tiny_folder, suite, answerer, tmp_path):
    same = make(tiny_folder, suite, answerer)
    assert make(tiny_folder, suite, answerer).sha256 == same.sha256

    other_weights = tmp_path / "weights"
    shutil.copytree(tiny_folder, other_weights)
    save_file({"a": torch.zeros(1)}, other_weights / "model.safetensors")
    with_recipe = tmp_path / "recipe"
    shutil.copytree(tiny_folder, with_recipe)
    (with_recipe / "recipe.yaml").write_text("seed: 1\n")
    other_data = write_suite(tmp_path / "suite", per_skill=2)
    (other_data / "suite.json").write_text('{"version": 4, "seed": 5}')
    blind = CheckpointAnswerer(answerer.model, answerer.processor, images="drop")
    longer = CheckpointAnswerer(answerer.model, answerer.processor, max_new_tokens=17)
    changed = [
        make(other_weights, suite, answerer),
        make(with_recipe, suite, answerer),
        make(tiny_folder, other_data, answerer),
        make(tiny_folder, suite, answerer, limit=3),
        make(tiny_folder, suite, answerer, batch_size=8),
        make(tiny_folder, suite, blind),
        make(tiny_folder, suite, longer),
    ]
    assert len({identity.sha256 for identity in [same, *changed]}) == len(changed) + 1
    assert changed[1].recipe == {"seed": 1}


def test_where_the_files_lie_is_no_part_of_it(tiny_folder, suite, answerer, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copytree(suite, tmp_path / "suite")
    moved = make(tmp_path / "model", tmp_path / "suite", answerer)
    assert moved == make(tiny_folder, suite, answerer)


def test_weights_in_several_files_hash_as_sha256sum_prints_them(tmp_path):
    for name in ("model-00002-of-00002", "model-00001-of-00002"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(tmp_path.glob("*.safetensors"))
    ]
    assert hash_weights(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors file in it"):
        hash_weights(tmp_path)


def test_versions_and_machine():
    assert {"python", "torch", "transformers"} <= library_versions().keys()
    assert "core" in describe_machine()
