"""Releases of one expert: prepared from a store, pushed, pulled, and taken by a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eagle_moe.checkpoint import (
    Complete,
    PartRecord,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.cli import main
from eagle_moe.experts import build_expert, resolve_expert
from eagle_moe.hub.card import write_card
from eagle_moe.hub.experts import check_hashes, is_expert_folder, prepare_expert
from eagle_moe.hub.licences import check_licences, read_licences
from eagle_moe.hub.pull import pull
from eagle_moe.hub.push import push_release
from eagle_moe.hub.scan import Machine, scan_folder
from eagle_moe.parts import expert_prefix, part_hashes, tensor_hashes
from tests.loopback_hub import without_xet
from train.sources import _expert_origin

REPO = "me/sam-tiny"
SPEC = resolve_expert("sam-tiny")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    expert = build_expert(SPEC)
    return {expert_prefix("sam") + name: value for name, value in expert.state_dict().items()}


@pytest.fixture
def stored(weights, tmp_path) -> Path:
    """An expert as a search's store keeps it (`train.search.store`), aligned on a named machine."""
    place = tmp_path / "store" / "experts" / "sam-0123456789abcdef"
    place.parent.mkdir(parents=True)
    (hash_,) = part_hashes(tensor_hashes(weights)).values()
    identity = {"data.questions.path": "/home/ada/train.jsonl", "seed": 0}
    with write_checkpoint(
        place, Complete(stage="pre_align", expert="sam", identity=identity)
    ) as draft:
        save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
        history = ["/home/ada/weights/sam", "pre_align/sam"]
        record = PartRecord(sha256=hash_, parameters=366_752, history=history)
        write_provenance(draft, {"experts.sam": record})
        write_json(draft / "expert.json", SPEC.dump())
        recipe = {"output_dir": "/home/ada/runs", "init": {"experts": {"sam": "/home/ada/sam"}}}
        (draft / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (draft / "stage.json").write_text("{}")
    (place / "card.yaml").write_text("licence: apache-2.0\nauthors: Ada\n")
    return place


@pytest.fixture
def pushed(stored, api, tmp_path) -> Path:
    release = prepare_expert(stored, tmp_path / "release")
    write_card(release, REPO)
    push_release(release, REPO, api=api)
    return release


def test_a_prepared_expert_has_the_same_weights_and_no_local_path(stored, tmp_path):
    release = prepare_expert(stored, tmp_path / "release")
    assert is_expert_folder(release) and is_expert_folder(stored)
    weights = (stored / "model.safetensors").read_bytes()
    assert (release / "model.safetensors").read_bytes() == weights
    assert scan_folder(stored, Machine()) and not scan_folder(release, Machine())
    assert not (release / "stage.json").exists()
    recipe = yaml.safe_load((release / "recipe.yaml").read_text())
    assert recipe["init"]["experts"] == {"sam": "sam"}
    check_licences(read_licences(release), [])


def test_its_card_tells_how_to_use_it(stored, tmp_path):
    release = prepare_expert(stored, tmp_path / "release")
    write_card(release, REPO)
    text = (release / "README.md").read_text()
    assert "eagle-moe pull me/sam-tiny experts/sam" in text
    assert "    sam: experts/sam\n" in text
    assert "| Map | 48 x 8 x 8 |" in text
    assert "weights made earlier (sam) → pre_align/sam" in text


def test_what_was_pulled_is_what_was_pushed_and_a_recipe_takes_it(pushed, api, tmp_path):
    lines: list[str] = []
    pulled = pull(REPO, tmp_path / "pulled", api=api, say=lines.append)
    assert pulled.expert == "sam"
    origin = _expert_origin(SPEC, str(pulled.folder))
    assert (origin.kind, origin.place) == ("checkpoint", str(pulled.folder))
    first, second = (load_file(f / "model.safetensors") for f in (pushed, pulled.folder))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = {path.name for path in pulled.folder.iterdir()}
    assert names == {path.name for path in pushed.iterdir()} | {".gitattributes"}
    assert pulled.revision[:12] in lines[-1]
    assert not list(tmp_path.glob(".*"))


def test_the_command_says_what_to_do_next(pushed, api, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eagle_moe.hub.pull.HfApi", lambda: api)
    assert main(["pull", REPO, str(tmp_path / "pulled")]) == 0
    assert f"init.experts.sam={tmp_path / 'pulled'}" in capsys.readouterr().out
    assert main(["pull", REPO, str(tmp_path / "pulled")]) == 2
    assert "exists already" in capsys.readouterr().err


def change_remote(hub, name: str, content: bytes) -> None:
    """Somebody put other bytes of the same size there."""
    repo = hub.repos[REPO]
    files = dict(repo.commits[repo.branches["main"]])
    old = files.get(name)
    large = bool(old and old.large)
    blob = type(next(iter(files.values())))(content, large)
    if large:
        hub.large[blob.sha256] = content
    repo.commit("main", {**files, name: blob})


def test_weights_that_are_not_as_recorded_are_not_put_in_place(pushed, hub, api, tmp_path):
    data = bytearray((pushed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    change_remote(hub, "model.safetensors", bytes(data))
    with pytest.raises(ValueError, match=r"the weights of experts.sam .* not those of its record"):
        pull(REPO, tmp_path / "pulled", api=api)
    assert not (tmp_path / "pulled").exists() and not list(tmp_path.glob(".*"))


def test_pickles_are_not_downloaded(pushed, hub, api, tmp_path):
    change_remote(hub, "pytorch_model.bin", b"\x80\x04.")
    lines: list[str] = []
    pulled = pull(REPO, tmp_path / "pulled", api=api, say=lines.append)
    assert not list(pulled.folder.rglob("*.bin"))
    assert "left out, since they may hold pickles: pytorch_model.bin" in lines[0]
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]


def test_an_interrupted_pull_goes_on(pushed, hub, api, tmp_path, monkeypatch):
    from eagle_moe.hub import pull as pulling

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pulling, "check_release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull(REPO, tmp_path / "pulled", api=api)
    assert not (tmp_path / "pulled").exists()
    assert pull(REPO, tmp_path / "pulled", api=api).expert == "sam"


def test_what_is_no_release_or_has_no_place_is_refused(pushed, hub, api, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exists already"):
        pull(REPO, pushed, api=api)
    with pytest.raises(ValueError, match="the Hub has no such repository"):
        pull("me/other", tmp_path / "a", api=api)
    with pytest.raises(ValueError, match="no such branch, tag or commit"):
        pull(REPO, tmp_path / "a", "v9", api=api)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ValueError, match="but that disk has 0.00 GB free"):
        pull(REPO, tmp_path / "a", api=api)
    monkeypatch.undo()
    repo = hub.repos[REPO]
    repo.commit("main", {"README.md": repo.commits[repo.branches["main"]]["README.md"]})
    with without_xet(), pytest.raises(ValueError, match="no release of this project"):
        pull(REPO, tmp_path / "a", api=api)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("complete.json", "no complete.json in it, so it is no aligned expert"),
        ("expert.json", "no expert.json in it, so it is no aligned expert"),
        ("model.safetensors", "model.safetensors is missing"),
    ],
)
def test_what_is_no_finished_expert_is_not_prepared(stored, tmp_path, file, told):
    (stored / file).unlink()
    if file == "expert.json":
        data = json.loads((stored / "complete.json").read_text())
        del data["files"][file]
        (stored / "complete.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=told):
        prepare_expert(stored, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_weights_of_another_architecture_are_not_prepared(stored, tmp_path):
    spec = SPEC.dump()
    spec["arch"]["mlp_size"] = 128
    size = (stored / "expert.json").stat().st_size
    text = json.dumps(spec)
    (stored / "expert.json").write_text(text + " " * (size - len(text)))
    with pytest.raises(
        ValueError, match=r"the weights are not of the expert in expert.json: .*mlp"
    ):
        prepare_expert(stored, tmp_path / "release")


def test_every_part_is_held_to_its_record(stored, weights):
    assert set(check_hashes(stored)) == set(weights)
    records = json.loads((stored / "provenance.json").read_text())
    records["experts.clip"] = records["experts.sam"]
    (stored / "provenance.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"the weights of experts.clip \(none\) are not those"):
        check_hashes(stored)


def test_a_taken_folder_is_left_alone(stored):
    with pytest.raises(ValueError, match="exists already"):
        prepare_expert(stored, stored.parent)
