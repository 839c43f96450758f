from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers.trainer_utils import rotate_checkpoints

from eagle_moe.checkpoint import Complete, write_checkpoint
from tests.tiny_run import make_world
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
    retire_points,
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


def test_the_point_of_another_run_is_refused_with_what_differs(run: StageRun) -> None:
    mark = mark_of(run, {"seed": 1, "rate": 0.1})
    open_workspace(run, mark, redo=False)
    point(run, 3, mark)
    foreign = point(run, 9, mark_of(run, {"seed": 1, "rate": 0.2}))  # put there by somebody
    with pytest.raises(ValueError, match=r"checkpoint-9: .*\n  rate: 0.2 -> 0.1\n"):
        open_workspace(run, mark, redo=False)
    shutil.rmtree(foreign)
    assert open_workspace(run, mark, redo=False) == run.workspace / "checkpoint-3"


def test_points_that_are_passed_over_are_named(
    run: StageRun, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = mark_of(run, {"seed": 1})
    good, damaged = point(run, 1, mark), point(run, 2, mark)
    (damaged / "state").unlink()
    (run.workspace / "checkpoint-3").mkdir()
    (run.workspace / "checkpoint-best").mkdir()
    assert open_workspace(run, mark, redo=False) == good
    assert capsys.readouterr().out.splitlines() == [
        f"sft: passed over {run.workspace}/checkpoint-3: it was not written to its end.",
        f"sft: passed over {damaged}: state is missing. The checkpoint is damaged: copy it again.",
    ]


def names(run: StageRun) -> list[str]:
    return sorted(path.name for path in run.workspace.iterdir())


def test_old_points_go(run: StageRun) -> None:
    mark = mark_of(run, {})
    points = [point(run, step, mark) for step in (1, 2, 9, 10)]
    retire_points(run.workspace, None, [])
    retire_points(run.workspace, 0, [])
    assert len(names(run)) == 4
    retire_points(run.workspace, 2, [points[0]])
    assert names(run) == ["checkpoint-1", "checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_damaged_point_never_costs_the_last_good_one(run: StageRun, limit: int) -> None:
    mark = mark_of(run, {})
    points = [point(run, step, mark) for step in (3, 6, 9)]
    (points[2] / "state").write_text("damaged")
    retire_points(run.workspace, limit, [points[1]])  # as after the save at step 6
    assert last_point(run.workspace) == points[1]
    point(run, 9, mark)  # the damaged one is written anew
    retire_points(run.workspace, limit, [points[2]])
    assert last_point(run.workspace) == points[2]
    assert len(names(run)) == limit


def test_the_rotation_of_transformers_would_lose_the_last_good_one(run: StageRun) -> None:
    mark = mark_of(run, {})
    points = [point(run, step, mark) for step in (6, 9)]
    (points[1] / "state").write_text("damaged")
    rotate_checkpoints(str(run.workspace), save_total_limit=1)
    assert last_point(run.workspace) is None


def test_what_a_kill_left_half_done_is_removed(run: StageRun) -> None:
    mark = mark_of(run, {"seed": 1})
    good = point(run, 1, mark)
    for name in (".checkpoint-2.writing", ".checkpoint-1.replaced", ".checkpoint-0.retired"):
        (run.workspace / name).mkdir()
    (run.workspace / ".identity.json.writing").write_text('{"se')
    assert open_workspace(run, mark, redo=False) == good
    assert names(run) == ["checkpoint-1", "identity.json"]


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
