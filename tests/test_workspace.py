from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import make_world

from eagle_moe.checkpoint import Complete, write_checkpoint
from train.jobs import DirectoryBusy
from train.recipe import parse_recipe
from train.stages import StageRun
from train.workspace import (
    differences,
    is_finished,
    last_point,
    locked,
    mark_of,
    open_workspace,
    remove_workspace,
)


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    return StageRun(parse_recipe(make_world(tmp_path), "recipe"), "sft")


def point(run: StageRun, step: int, mark: Complete) -> Path:
    folder = run.workspace / f"checkpoint-{step}"
    with write_checkpoint(folder, mark) as draft:
        (draft / "state").write_text("x")
    return folder


def test_a_run_continues_from_its_latest_whole_point(run: StageRun) -> None:
    mark = mark_of(run, {"seed": 1})
    assert open_workspace(run, mark, redo=False) is None
    point(run, 9, mark)
    tenth, last = point(run, 10, mark), point(run, 11, mark)
    (run.workspace / "checkpoint-12").mkdir()  # as another program's half-written one
    (last / "state").write_text("damaged")
    assert open_workspace(run, mark, redo=False) == tenth


def test_work_with_other_settings_is_not_thrown_away_unasked(run: StageRun) -> None:
    old, new = mark_of(run, {"seed": 1}), mark_of(run, {"seed": 2})
    open_workspace(run, old, redo=False)
    kept = point(run, 5, old)
    with pytest.raises(ValueError, match=r"seed: 1 -> 2\n.*--redo"):
        open_workspace(run, new, redo=False)
    assert last_point(run.workspace) == kept
    assert open_workspace(run, new, redo=True) is None
    assert last_point(run.workspace) is None


def test_settings_may_change_while_nothing_is_lost(run: StageRun) -> None:
    open_workspace(run, mark_of(run, {"seed": 1}), redo=False)
    assert open_workspace(run, mark_of(run, {"seed": 2}), redo=False) is None
    assert json.loads((run.workspace / "identity.json").read_text()) == {"seed": 2}


def test_finished_means_with_the_same_settings(run: StageRun) -> None:
    mark = mark_of(run, {"seed": 1, "fill": (1, 2)})
    assert not is_finished(run, mark, redo=False)
    with write_checkpoint(run.folder, mark):
        pass
    assert is_finished(run, mark_of(run, {"seed": 1, "fill": (1, 2)}), redo=False)
    other = mark_of(run, {"seed": 2, "fill": (1, 2)})
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        is_finished(run, other, redo=False)
    assert not is_finished(run, other, redo=True)


def test_two_processes_do_not_work_in_one_place(
    run: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.jobs.directory.LOCK_WAIT", 0.0)
    with locked(run), pytest.raises(DirectoryBusy), locked(run):
        pass
    with locked(run):
        pass


def test_a_removed_workspace_leaves_no_empty_folders(run: StageRun) -> None:
    run.workspace.mkdir(parents=True)
    Path(run.recipe.output_dir, "align").mkdir()
    remove_workspace(run)
    assert [path.name for path in Path(run.recipe.output_dir).iterdir()] == ["align"]


def test_differences_are_listed_by_key() -> None:
    old = {"same": 1, "changed": 2, "gone": 3}
    assert differences(old, {"same": 1, "changed": 4, "new": 5}).splitlines() == [
        "  changed: 2 -> 4",
        "  gone: 3 -> (none)",
        "  new: (none) -> 5",
    ]
    assert differences({}, {str(i): i for i in range(20)}, limit=2).endswith("... and 18 more")
