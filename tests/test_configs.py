"""Every YAML file in configs/ is read by what reads it in earnest, without a network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle_moe.build import build_config, load_model_spec
from eagle_moe.schema import load_yaml
from train.demo import Demo, DemoSettings
from train.jobs.graph import fingerprints
from train.recipe import load_recipe
from train.search.inputs import resolve
from train.search.outlook import most_mixtures
from train.search.settings import load_settings

CONFIGS = Path(__file__).parent.parent / "configs"


def check_model(path: Path) -> None:
    spec = load_model_spec(path)
    assert spec.language_model.config is not None, "give its config, so that it builds offline"
    config = build_config(spec, image_token_id=spec.language_model.config["vocab_size"])
    assert config.num_image_tokens > 0
    assert config.text_config.vocab_size > config.image_token_id


def check_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stages


def check_demo(path: Path) -> None:
    settings = DemoSettings.parse(load_yaml(path), str(path))
    assert fingerprints(Demo(settings, Path("runs/demo")).jobs())
    recipe = load_recipe(settings.recipe, settings.overrides)
    assert set(recipe.experts) == set(settings.pretexts)
    load_recipe(settings.reader, settings.reader_overrides)


def check_search(path: Path) -> None:
    inputs = resolve(load_settings(path))
    assert most_mixtures(inputs.pool, inputs.settings.make_strategy())
    assert inputs.pool.base


READERS: dict[str, Callable[[Path], object]] = {
    "models": check_model,
    "recipes": check_recipe,
    "demo": check_demo,
    "search": check_search,
}
"""Folder of configs/ -> what must succeed on each of its files."""

FILES = sorted(path for ending in ("*.yaml", "*.yml") for path in CONFIGS.rglob(ending))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a configuration was resolved over the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_is_valid(path):
    folder = path.relative_to(CONFIGS).parts[0]
    assert folder in READERS, f"say in READERS what reads configs/{folder}"
    READERS[folder](path)


def test_every_kind_has_a_variant_for_a_cpu():
    for folder in {path.relative_to(CONFIGS).parts[0] for path in FILES}:
        assert any((CONFIGS / folder).glob("mini*.yaml")), f"configs/{folder} has no mini*.yaml"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("folder", "read"), [("models", load_model_spec), ("recipes", load_recipe)]
)
def test_a_typo_is_an_error_that_names_the_key(folder, read, tmp_path):
    for path in FILES:
        if path.relative_to(CONFIGS).parts[0] == folder:
            with pytest.raises(ValueError, match="conector|unknown"):
                read(path, ["conector.kind=mlp"])
