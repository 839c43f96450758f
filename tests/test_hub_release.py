"""eagle_moe/hub/release.py: from a folder to the Hub and back, and every way to be refused."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.utils._http as hub_http
import pytest
import torch
from huggingface_hub import HfApi

from eagle_moe.build import load_model
from eagle_moe.cli import main
from eagle_moe.hub import gate
from eagle_moe.hub.commands import refused
from eagle_moe.hub.gate import GATE
from eagle_moe.hub.push import download_release
from eagle_moe.hub.release import Outcome, ReleaseSettings, Step, run_release
from tests.test_hub_gate import look

CARD = """
licence: apache-2.0
authors: [Ada]
licences: {experts.clip: mit, experts.convnext: mit, connector: mit, language_model: mit}
"""
TO = "me/tiny"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Fresh processes are the subject of test_hub_gate; the library waits between attempts."""
    monkeypatch.setattr(gate, "WAYS", {"package": gate.WAYS["package"]})
    monkeypatch.setattr(gate, "_watch_folder", look)
    real = time.sleep
    monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: real(min(seconds, 0.01)))


@pytest.fixture
def settings(tiny_folder, tmp_path):
    (tmp_path / "card.yaml").write_text(CARD)

    def make(**changes) -> ReleaseSettings:
        given = {"model": tiny_folder, "to": TO, "out": tmp_path / "out"}
        return ReleaseSettings(**{**given, "card": tmp_path / "card.yaml", **changes})

    return make


def run(settings: ReleaseSettings, api: HfApi | None = None) -> tuple[Outcome, dict[str, Step]]:
    seen: dict[str, Step] = {}

    @contextmanager
    def steps(title: str):
        seen[title] = Step(title)
        yield seen[title]

    return run_release(settings, steps, api), seen


def test_a_dry_run_uploads_nothing_and_says_what_it_would(settings, api, hub):
    outcome, steps = run(settings(), api)
    assert outcome.refusals == [] and outcome.pushed is None
    assert not api.repo_exists(TO)
    names = {path.relative_to(outcome.folder).as_posix() for path in outcome.folder.rglob("*")}
    assert outcome.upload is not None and set(outcome.upload) <= names
    assert {"README.md", "release.json", GATE, "model.safetensors"} <= set(outcome.upload)
    assert "MB, to me/tiny" in steps["what a push would send"].finding


def test_pushed_and_checked_again_and_loaded(settings, api, tiny_model, tmp_path):
    outcome, steps = run(settings(push=True), api)
    assert outcome.refusals == [] and outcome.pushed is not None
    assert "checks passed" in steps["check what the Hub has"].finding
    assert api.repo_info(TO).private
    copy = download_release(TO, outcome.pushed.revision, tmp_path / "cache", api=api)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(load_model(copy)(input_ids=ids).logits, tiny_model(input_ids=ids).logits)
    assert not list(tmp_path.glob(".downloaded-*"))
    again, _ = run(settings(push=True), api)
    assert again.pushed is not None and again.pushed.uploaded == []


def test_refusals_are_all_named_and_nothing_is_pushed(settings, api, tmp_path, monkeypatch):
    """A gate that fails, a licence nobody knows, a secret: each one alone is enough."""
    (tmp_path / "bad.yaml").write_text(
        "licence: mit\nauthors: [Ada]\ndescription: hf_" + "abcdefghij" * 4 + "\n"
    )

    def broken(folder: Path, way: str, device: str):
        return look(folder, way, device).model_copy(update={"texts": ["another"] * 4})

    monkeypatch.setattr(gate, "_watch_folder", broken)
    wanted = settings(push=True, card=tmp_path / "bad.yaml")
    outcome, steps = run(wanted, api)
    assert any("greedy text" in reason for reason in steps["gate"].refusals)
    assert any("--accept-licence unknown" in reason for reason in steps["licences"].refusals)
    assert any("token of the Hugging Face Hub" in reason for reason in steps["scan"].refusals)
    assert outcome.pushed is None and not api.repo_exists(TO)
    assert outcome.folder.is_dir()
    assert "must not be pushed" in refused(wanted, outcome)
    assert json.loads((outcome.folder / GATE).read_text())["checks"]


def test_a_licence_that_is_accepted_does_not_refuse(settings, api, tmp_path):
    (tmp_path / "card.yaml").write_text("licence: mit\nauthors: [Ada]\n")
    outcome, _ = run(settings(accepted=["unknown"]), api)
    assert outcome.refusals == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/ti ny", "me/"])
def test_a_name_that_the_hub_would_not_take(settings, name):
    with pytest.raises(ValueError, match="--to"):
        run(settings(to=name))


def test_the_default_folder_is_beside_the_model():
    made = ReleaseSettings(Path("runs/demo/model"), "me/tiny").folder
    assert made == Path("runs/demo/release-tiny")


def test_the_command_ends_with_code_2_and_a_line_per_reason(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["release", str(tiny_folder), "--to", TO, "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 2 and out.is_dir()
    assert "`authors` is missing" in printed.err and "The folder is kept" in printed.err
    assert "checks passed" in printed.out
    assert main(["release", str(tmp_path / "none"), "--to", TO]) == 2
    assert "no such folder" in capsys.readouterr().err
