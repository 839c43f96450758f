from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_moe.checkpoint import (
    COMPLETE,
    Complete,
    PartRecord,
    SaveFailed,
    read_complete,
    read_parts,
    read_provenance,
    remove_drafts,
    save_expert,
    weight_files,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.experts import ExpertSpec, resolve_expert

MARK = Complete(stage="sft", identity={"seed": 1})


def write(target: Path, text: str = "new") -> None:
    with write_checkpoint(target, MARK) as draft:
        (draft / "deep").mkdir()
        (draft / "deep" / "file.txt").write_text(text)


def test_a_checkpoint_is_there_whole_and_marked(tmp_path: Path) -> None:
    write(tmp_path / "out" / "sft")
    complete = read_complete(tmp_path / "out" / "sft")
    assert complete == MARK.model_copy(update={"files": {"deep/file.txt": 3}})
    assert os.listdir(tmp_path / "out") == ["sft"]


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    with write_checkpoint(tmp_path / "sft", MARK) as draft:
        save_file({"a": torch.zeros(1)}, draft / "model.safetensors")
    modes = {path.stat().st_mode for path in (tmp_path / "sft").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_nothing_is_there_before_it_is_whole(tmp_path: Path) -> None:
    with write_checkpoint(tmp_path / "sft", MARK) as draft:
        (draft / "file.txt").write_text("x")
        assert not (tmp_path / "sft").exists()
        assert read_complete(draft) is None


def test_a_new_one_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "sft", "old")
    write(tmp_path / "sft", "new")
    assert (tmp_path / "sft" / "deep" / "file.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["sft"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),
    ],
    ids=["errno", "quota", "safetensors", "torch"],
)
def test_a_full_disk_is_said_plainly_and_leaves_the_old_one(
    tmp_path: Path, error: Exception
) -> None:
    write(tmp_path / "sft", "old")

    def fail() -> None:
        with write_checkpoint(tmp_path / "sft", MARK) as draft:
            (draft / "half.bin").write_bytes(b"x" * 100)
            raise error

    with pytest.raises(SaveFailed, match="no room to save it.*earlier checkpoints are intact"):
        fail()
    assert (tmp_path / "sft" / "deep" / "file.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["sft"]


def test_another_error_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_checkpoint(tmp_path / "sft", MARK):
            raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        fail()
    assert os.listdir(tmp_path) == []


def _save_under_a_limit(target: Path) -> None:
    """Exit code 7 if saving 1 MB fails as it should where files may have 100 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    tensor = {"x": torch.zeros(250_000)}
    failed = 0
    for save in (
        lambda draft: save_file(tensor, draft / "model.safetensors"),
        lambda draft: torch.save(tensor, draft / "optimizer.pt"),
    ):
        try:
            with write_checkpoint(target, MARK) as draft:
                save(draft)
        except SaveFailed:
            failed += 1
    sys.exit(7 if failed == 2 else 1)


def test_a_real_limit_on_file_size_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "sft", "old")
    child = multiprocessing.get_context("fork").Process(
        target=_save_under_a_limit, args=(tmp_path / "sft",)
    )
    child.start()
    child.join()
    assert child.exitcode == 7
    assert (tmp_path / "sft" / "deep" / "file.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["sft"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.writing").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    remove_drafts(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("content", "said"), [("ne", "has 2 bytes instead of 3"), (None, "is missing")]
)
def test_a_damaged_copy_is_noticed(tmp_path: Path, content: str | None, said: str) -> None:
    write(tmp_path / "sft")
    path = tmp_path / "sft" / "deep" / "file.txt"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=f"file.txt {said}"):
        read_complete(tmp_path / "sft")


def test_provenance_survives_and_its_absence_is_explained(tmp_path: Path) -> None:
    records = {
        "connector": PartRecord(sha256="00", parameters=3, history=["random, seed 1", "sft"])
    }
    write_provenance(tmp_path, records)
    assert read_provenance(tmp_path) == records
    with pytest.raises(ValueError, match="not a checkpoint of `train.run`"):
        read_provenance(tmp_path / "elsewhere")


def test_only_the_parts_asked_for_are_read(tmp_path: Path) -> None:
    names = ["model.vision_tower.towers.clip.w", "model.vision_tower.fusion.w", "lm_head.weight"]
    for shard, name in enumerate(names):
        save_file({name: torch.full((2,), shard)}, tmp_path / f"model-{shard}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert list(read_parts(tmp_path, ["connector"])) == [names[1]]
    assert set(read_parts(tmp_path, ["experts.clip", "language_model"])) == {names[0], names[2]}
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors, which is missing"):
        weight_files(tmp_path)
    assert COMPLETE not in os.listdir(tmp_path)


def test_an_expert_is_saved_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = resolve_expert("clip-tiny")
    fused = torch.arange(8.0).view(4, 2)
    save_expert(tmp_path / "clip", spec, dict(zip("qk", fused.chunk(2), strict=True)))
    assert sorted(os.listdir(tmp_path / "clip")) == ["expert.json", "expert.safetensors"]
    found = load_file(tmp_path / "clip" / "expert.safetensors")
    assert torch.equal(found["q"], fused[:2]) and torch.equal(found["k"], fused[2:])
    written = json.loads((tmp_path / "clip" / "expert.json").read_text())
    assert ExpertSpec.parse(written, "test") == spec

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("eagle_moe.checkpoint.save_file", full)
    with pytest.raises(SaveFailed, match="clip: no room"):
        save_expert(tmp_path / "clip", spec, {"q": torch.zeros(1)})
    assert load_file(tmp_path / "clip" / "expert.safetensors").keys() == {"q", "k"}
    assert len(os.listdir(tmp_path / "clip")) == 2
