"""docs/experts.md does what it says: its YAML resolves, and its class works from outside."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from eagle_moe.config import EagleMixVisionConfig
from eagle_moe.experts import EXPERTS, build_expert, presets, resolve_expert
from eagle_moe.experts.check import check_expert
from eagle_moe.experts.registry import load_plugins
from eagle_moe.model import EagleMixVisionModel

PAGE = (Path(__file__).resolve().parents[1] / "docs/experts.md").read_text(encoding="utf-8")


def block(mark: str) -> str:
    """The code block that follows `<!-- test: mark -->` in the page."""
    found = re.search(rf"<!-- test: {mark} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"docs/experts.md has no block marked {mark}"
    return found[1]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The page's module, importable and named in the environment; forgotten afterwards."""
    (tmp_path / "radiograph.py").write_text(block("module"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("EAGLE_MOE_EXPERTS", "radiograph")
    load_plugins.cache_clear()
    yield "radiograph"
    EXPERTS._classes.pop("radiograph", None)
    sys.modules.pop("radiograph", None)
    load_plugins.cache_clear()


def test_entries_of_the_page_resolve():
    entries = yaml.safe_load(block("entries"))["experts"]
    config = EagleMixVisionConfig(experts=entries)
    assert [spec.name for spec in config.expert_specs] == ["clip", "sam-512", "dinov3", "siglip"]
    with torch.device("meta"):
        maps = [build_expert(spec) for spec in config.expert_specs]
    assert [expert.stride for expert in maps] == [14, 32, 16, 16]


def test_class_of_the_page_keeps_the_contract(plugin):
    assert plugin in presets()
    report = check_expert(plugin)
    assert report.passed, report.failures


def test_class_of_the_page_works_in_a_mixture(plugin, tmp_path):
    entries = ["clip-tiny", {"preset": plugin, "name": "xray", "arch": {"layers": 1}}]
    config = EagleMixVisionConfig(
        canvas_size=64, experts=entries, fusion={"kind": "channel_concat", "grid": 8}
    )
    model = EagleMixVisionModel(config).eval()
    canvas = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        tokens = model(canvas)
    assert tokens.shape == (2, 64, 96 + 48)
    model.save_pretrained(tmp_path / "saved")
    again = EagleMixVisionModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(canvas), tokens)


def test_wrong_option_of_a_plugin_names_the_right_one(plugin):
    with pytest.raises(ValueError, match='unknown key `widht`. Did you mean "width"'):
        resolve_expert({"preset": plugin, "arch": {"widht": 3}})


def test_missing_plugin_module_is_an_error(monkeypatch):
    monkeypatch.setenv("EAGLE_MOE_EXPERTS", "no_such_module")
    load_plugins.cache_clear()
    with pytest.raises(ValueError, match="EAGLE_MOE_EXPERTS.*no_such_module"):
        load_plugins()
    load_plugins.cache_clear()


def test_presets_table_of_the_page_is_complete():
    for name in presets():
        assert f"`{name}`" in PAGE, f"docs/experts.md does not name {name}"
