"""Identities of scores: equal when nothing that matters changed, different when anything did."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import save_file

from eagle_moe.answer import Answerer
from eagle_moe.scores.identity import Identity, hash_weights
from eval.identity import describe_machine, identify, library_versions
from tests.test_card import make_identity


@pytest.fixture
def answerer(tiny_model, tiny_processor) -> Answerer:
    return Answerer(tiny_model, tiny_processor, max_new_tokens=16)


def make(folder, answerer, task=None, settings=None, **changes) -> Identity:
    told = make_identity().task if task is None else task
    asked = [{"role": "user", "content": "what is the text"}]
    settings = settings or {"until": ("\n\n",), "max_new_tokens": None, "num_beams": 1}
    return identify(folder, answerer, told, asked, settings, **({"batch_size": 4} | changes))


def test_says_what_produced_the_score(tiny_folder, answerer):
    identity = make(tiny_folder, answerer)
    weights = (tiny_folder / "model.safetensors").read_bytes()
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert identity.model_type == "eagle_moe"
    assert (identity.batch_size, identity.processes) == (4, 1)
    assert (identity.dtype, identity.device) == ("float32", "cpu")
    told = identity.decoding
    assert (told["max_new_tokens"], told["do_sample"], told["num_beams"]) == (16, False, 1)
    assert told["until"] == ["\n\n"]
    assert "what is the text" in identity.prompt
    assert identity.versions["torch"] == torch.__version__.split("+")[0]
    assert Identity.parse(identity.dump(), "card") == identity


def test_everything_that_can_change_a_score_changes_it(tiny_folder, answerer, tmp_path):
    same = make(tiny_folder, answerer)
    assert make(tiny_folder, answerer).sha256 == same.sha256

    other_weights = tmp_path / "weights"
    shutil.copytree(tiny_folder, other_weights)
    save_file({"a": torch.zeros(1)}, other_weights / "model.safetensors")
    with_recipe = tmp_path / "recipe"
    shutil.copytree(tiny_folder, with_recipe)
    (with_recipe / "recipe.yaml").write_text("seed: 1\n")
    longer = Answerer(answerer.model, answerer.processor, max_new_tokens=17)
    settings = {"until": (), "max_new_tokens": 3, "num_beams": 1}
    changed = [
        make(other_weights, answerer),
        make(with_recipe, answerer),
        make(tiny_folder, answerer, make_identity().task.model_copy(update={"data_sha256": "9"})),
        make(tiny_folder, answerer, settings=settings),
        make(tiny_folder, answerer, settings=settings | {"max_new_tokens": 4}),
        make(tiny_folder, answerer, batch_size=8),
        make(tiny_folder, answerer, processes=2),
        make(tiny_folder, longer),
    ]
    assert len({identity.sha256 for identity in [same, *changed]}) == len(changed) + 1
    assert changed[1].recipe == {"seed": 1}


def test_where_the_files_lie_is_no_part_of_it(tiny_folder, answerer, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    assert make(tmp_path / "model", answerer) == make(tiny_folder, answerer)


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
