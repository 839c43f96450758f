"""Searching given tables: the published one, per-item ones, ledgers, and bad ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.paper_search import BASE, FIG_4, POOL
from train.search.given import read_scores
from train.search.replay import main, replay
from train.search.rules import NoiseAware, Plain

ROOT = Path(__file__).parent.parent


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def paper(tmp_path):
    """Fig. 4 of arXiv 2408.15998, members in the order in which they were added."""
    rows = [
        {"members": [*BASE, *reversed(more.split())], "score": row[0], "cost": {"flops": row[2]}}
        for more, row in FIG_4.items()
    ]
    return write(tmp_path / "paper.json", rows)


@pytest.fixture
def rows():
    """All mixtures of three with the base z: a helps, b does nothing, c harms."""
    rng = np.random.default_rng(0)
    shares = {t: rng.random(400) for t in ("read", "count")}
    table = []
    for n in range(4):
        for more in combinations("abc", n):
            level = 0.5 + 0.1 * ("a" in more) - 0.1 * ("c" in more)
            items = {
                task: [int(v) for v in share + 0.1 * rng.standard_normal(400) < level]
                for task, share in shares.items()
            }
            table.append({"members": ["z", *more], "items": items})
    return table


def test_the_command_as_the_issue_states_it(paper, tmp_path):
    out = tmp_path / "out" / "choice.json"
    command = [sys.executable, "-m", "train.search.replay", str(paper)]
    command += ["--base", "clip,convnext", "--strategy", "greedy", "--rule", "plain"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["chosen"][:2] == list(BASE)
    assert set(data["chosen"]) == set(POOL) - {"dinov2"}
    assert [len(r["candidates"]) for r in data["rounds"]] == [4, 3, 2, 1]
    kept = [r["chosen"] and set(r["chosen"]) for r in data["rounds"]]
    assert kept[0] == {*BASE, "eva02"} and kept[1] == {*BASE, "eva02", "pix2struct"}
    assert kept[3] is None and "10.3 below" in data["rounds"][3]["reason"]
    assert "clip+convnext+eva02" in done.stdout and "690.7" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "95 %" not in done.stdout, "columns of which nothing is known are left out"


def test_the_pool_is_in_order_of_appearance_or_as_told(paper):
    table = read_scores(paper)
    assert table.names[:2] == BASE
    choice = replay(table, BASE, ("sam", "convnext", "clip", "eva02"), "greedy", Plain())
    assert choice.chosen == ("convnext", "clip", "eva02"), "of SAM and EVA-02 the better, then stop"
    with pytest.raises(ValueError, match='pool: "sm" .* Did you mean "sam"'):
        replay(table, BASE, ("clip", "convnext", "sm"), "greedy", Plain())


def test_candidates_that_the_table_lacks_are_shown_and_the_round_goes_on(paper, capsys):
    assert main([str(paper), "--base", "clip,convnext", "--strategy", "exhaustive"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not in the table: clip+convnext+dinov2+sam," in out
    assert "Without a score: 5 of 15." in out
    assert out.endswith("chosen: clip, convnext, sam, pix2struct, eva02")
    table = read_scores(paper)
    backward = replay(table, BASE, (), "backward", Plain())
    assert {"eva02", "pix2struct", "sam"} < set(backward.chosen)


def test_a_round_of_which_nothing_is_there_stops(tmp_path, capsys):
    rows = [{"members": ["a"], "score": 1}, {"members": ["a", "b", "c"], "score": 3}]
    assert main([str(write(tmp_path / "t.json", rows)), "--base", "a"]) == 0
    assert "Stop: none of the 2 candidates is in the table." in capsys.readouterr().out


def test_by_items_the_useless_expert_stays_out(rows, tmp_path, capsys):
    path = write(tmp_path / "items.json", rows)
    choice = replay(read_scores(path), ["z"], (), "greedy", NoiseAware())
    assert choice.chosen == ("z", "a")
    assert main([str(path), "--base", "z", "--rule", "noise_aware"]) == 0
    out = capsys.readouterr().out
    assert "better" in out and "worse" in out and "Looking back" in out
    every = NoiseAware(first_seeds=9)
    for strategy in ("backward", "exhaustive"):
        assert "a" in replay(read_scores(path), ["z"], (), strategy, every).chosen


def test_rows_of_several_seeds_are_runs_of_one_mixture(tmp_path):
    rows = [
        {"members": members, "score": score, "seed": seed}
        for members, scores in ((["z"], (50, 52, 51)), (["a", "z"], (60, 61)), (["b", "z"], (51,)))
        for seed, score in enumerate(scores)
    ]
    table = read_scores(write(tmp_path / "t.json", rows))
    assert table.seeds == (0, 1, 2)
    first = replay(table, ["z"], (), "greedy", NoiseAware(first_seeds=3)).rounds[0]
    assert first.incumbent.score.mean == 51 and first.incumbent.seeds == (0, 1, 2)
    assert {c.changed: (c.score.mean, c.seeds, c.error) for c in first.candidates} == {
        "a": (60.5, (0, 1), ""),
        "b": (51, (0,), ""),
    }
    assert first.chosen == ("z", "a")


def test_noise_aware_needs_noise(paper, capsys):
    assert main([str(paper), "--base", "clip,convnext", "--rule", "noise_aware"]) == 2
    error = capsys.readouterr().err
    assert "nothing is known of the noise" in error and "decide by rule plain" in error


def test_a_ledger_is_a_table(rows, tmp_path):
    lines = [
        {"key": str(n), "status": "done", "seed": 0, "budget": 1.0, "score": None, **row}
        for n, row in enumerate(rows)
    ]
    for line in lines:
        line["score"] = float(np.mean([np.mean(v) for v in line["items"].values()]))
    cheap = {**lines[1], "key": "cheap", "budget": 0.25, "score": 0.0, "items": {}}
    failed = {"key": "f", "status": "failed", "members": ["z", "d"], "seed": 0, "error": "lost"}
    path = tmp_path / "ledger.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in (*lines, cheap, failed))
    path.write_text(text + '{"key": "torn', encoding="utf-8")
    choice = replay(read_scores(path), ["z"], (), "greedy", NoiseAware())
    assert choice.chosen == ("z", "a")
    lost = next(c for c in choice.rounds[0].candidates if c.changed == "d")
    assert lost.verdict == "failed" and lost.error == "lost"


def test_a_row_that_is_there_twice_counts_once_and_must_not_disagree(tmp_path):
    rows = [{"members": ["a", "b"], "score": 1.0}, {"members": ["b", "a"], "score": 1.0}]
    assert read_scores(write(tmp_path / "t.json", rows)).names == ("a", "b")
    rows[1]["score"] = 2.0
    with pytest.raises(ValueError, match="row 2: the same members and seed as in .* row 1"):
        read_scores(write(tmp_path / "t.json", rows))


def test_a_score_beside_items_must_follow_from_them(tmp_path):
    def row(score):
        return [{"members": ["a"], "items": {"x": [1, 1, 0], "y": [1, 0]}, "score": score}]

    read_scores(write(tmp_path / "t.json", row(0.5833)))
    read_scores(write(tmp_path / "t.json", row(0.6)))  # as it would be printed with one digit
    for wrong in (0.60001, 58.33, 0.584):
        with pytest.raises(ValueError, match=r"does not follow .* is 0.583333\. Leave"):
            read_scores(write(tmp_path / "t.json", row(wrong)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"members": ["a"]}, "expected a list of rows"),
        ([], "expected a list of rows"),
        (["a"], "row 1: 'a'. Expected {\"members\""),
        ([{"members": "clip", "score": 1}], "row 1: members 'clip'. Expected a list of names"),
        ([{"members": ["a", 1], "score": 1}], "Expected a list of names"),
        ([{"members": [], "score": 1}], "Name at least one"),
        ([{"members": ["a", "a"], "score": 1}], "none twice"),
        ([{"members": ["a"], "itmes": {}}], 'neither "score" nor "items". It has: members, itmes'),
        ([{"members": ["a"], "score": float("nan")}], "score nan is not a number"),
        ([{"members": ["a"], "score": "681"}], "score '681' is not a number"),
        ([{"members": ["a"], "score": True}], "score True is not a number"),
        ([{"members": ["a"], "items": {"x": [1, None]}}], 'item 1 of task "x", None'),
        ([{"members": ["a"], "items": {"x": []}}], 'task "x" has no items'),
        ([{"members": ["a"], "items": [1, 2]}], "items. Expected"),
        ([{"members": ["a"], "score": 1, "seed": "0"}], "seed '0'. Give a whole number"),
        ([{"members": ["a"], "score": 1, "cost": {"params": 1}}], 'cost "params". Known: param'),
        ([{"members": ["a"], "score": 1, "cost": {"flops": -1}}], "flops -1 is not a number above"),
        (
            [
                {"members": ["a"], "items": {"x": [1, 0]}},
                {"members": ["b"], "items": {"x": [1, 0, 1]}},
            ],
            'row 2 has 3 items of task "x", .* row 1 has 2',
        ),
        (
            [{"members": ["a"], "items": {"x": [1, 0]}}, {"members": ["b"], "score": 1}],
            'row 2 has 0 items of task "x"',
        ),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_scores(write(tmp_path / "bad.json", rows))


def test_mistakes_end_in_one_line(paper, tmp_path, capsys):
    (tmp_path / "no.json").write_text("members: a")
    for arguments, message in (
        ([str(tmp_path / "no.json")], "not JSON"),
        ([str(tmp_path / "none.json")], "no such file"),
        ([str(paper), "--base", "clip,convnxt"], 'base: "convnxt" .* Did you mean "convnext"'),
        ([str(paper), "--base", "eva02"], '"eva02", with which .* not in the table'),
        ([str(paper), "--base", "clip,convnext", "--level", "0.9"], "rule plain has none"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error), error
