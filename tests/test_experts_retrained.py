"""eval/experts/retrained.py: models trained again without an expert, beside those that have it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_moe.answer import Answerer
from eagle_moe.scores.card import Score
from eagle_moe.scores.identity import hash_weights
from eval.experts import Matrix, measure, read_measured
from eval.experts.__main__ import main
from eval.experts.asking import Asking
from eval.items import read_items
from tests.conftest import make_config
from tests.explained import EXPERTS, resampled, run, save
from tests.suites import write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def clip_alone(tmp_path_factory, tiny_processor) -> list[Path]:
    """What training again without ConvNeXt might have left, with two seeds."""
    folder = tmp_path_factory.mktemp("clip")
    config = make_config(("clip-tiny",))
    return [save(folder / f"seed-{seed}", config, tiny_processor, seed) for seed in (3, 4)]


@pytest.fixture(scope="module")
def again(tmp_path_factory, tiny_processor) -> Path:
    """The whole model with another seed."""
    return save(tmp_path_factory.mktemp("again"), make_config(), tiny_processor, seed=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, suite, clip_alone) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(tiny_folder, suite, out, retrained={"convnext": clip_alone[:1]})
    return out


def log_probs(folder: Path, suite: Path, kept: Path) -> list[float]:
    """Of every question, measured apart from everything else."""
    texts = measure.KeptTexts(kept / f"{folder.parent.name}-{folder.name}.jsonl")
    answerer = Answerer.load(folder, device="cpu")
    found = measure.measure(answerer, read_items(suite), {"all": ()}, {}, texts, batch_size=4)
    return [one.scores["all"]["log_prob"] for one in found]


def test_a_model_trained_again_is_compared_question_by_question(
    finished, clip_alone, suite, tmp_path
):
    matrix = Matrix.load(finished)
    first = [one.scores["all"]["log_prob"] for one in read_measured(finished)]
    second = log_probs(clip_alone[0], suite, tmp_path)
    retrained = matrix.retrained["convnext"]
    lost = retrained.lost["log_prob"]["total"]
    assert lost.value == pytest.approx(np.mean(first) - np.mean(second))
    assert retrained.of_runs("log_prob", "total") == [pytest.approx(lost.value)]
    paired = [one - other for one, other in zip(first, second, strict=True)]
    close = pytest.approx(resampled(paired), abs=0.02 * np.ptp(paired))
    assert (lost.low, lost.high) == close
    crossed = [one - other for one, other in zip(first, reversed(second), strict=True)]
    assert resampled(crossed) != close  # deliberate mistake: other questions' scores
    strongest = matrix.strongest("total")
    least = min(matrix.leave_one_out["log_prob"][name]["total"].value for name in EXPERTS)
    assert matrix.leave_one_out["log_prob"][strongest]["total"].value > least


def test_several_seeds_are_compared_run_by_run(
    tiny_folder, suite, clip_alone, again, finished, tmp_path
):
    out = tmp_path / "out"
    told: set[str] = set()
    matrix = run(
        tiny_folder,
        suite,
        out,
        retrained={"convnext": clip_alone},
        again=[again],
        progress=lambda done, total, note: told.add(note),
    )
    assert {f"questions, {folder}" for folder in (*clip_alone, again)} < told
    retrained = matrix.retrained["convnext"]
    whole = [log_probs(folder, suite, tmp_path) for folder in (tiny_folder, again)]
    alone = [log_probs(folder, suite, tmp_path) for folder in clip_alone]
    each = [np.subtract(*pair) for pair in zip(whole, alone, strict=True)]
    lost = retrained.lost["log_prob"]["total"]
    assert retrained.of_runs("log_prob", "total") == pytest.approx([np.mean(one) for one in each])
    assert lost.value == pytest.approx(np.mean(each))
    together = np.mean(each, axis=0).tolist()
    assert (lost.low, lost.high) == pytest.approx(resampled(together), abs=0.02 * np.ptp(together))
    assert lost.n == len(together), "a question is one question, however many runs answered it"
    places = [(Path(one.model), Path(one.beside)) for one in retrained.runs]
    assert places == [(clip_alone[0], tiny_folder), (clip_alone[1], again)]
    hashes = [(one.weights_sha256, one.beside_sha256) for one in retrained.runs]
    assert hashes == [tuple(map(hash_weights, pair)) for pair in places]
    page = (out / "experts.html").read_text(encoding="utf-8")
    assert "2 training runs each" in page
    assert "convnext" in map(matrix.strongest, matrix.parts)
    assert ")\nruns " in page, "what single runs gave has a line of its own"
    first = Matrix.load(finished).retrained["convnext"].lost["log_prob"]["total"].value
    assert retrained.of_runs("log_prob", "total")[0] == pytest.approx(first)


@pytest.mark.parametrize(
    ("silenced", "lost", "told"),
    [
        ((0.1, 0.3), (0.2, 0.9), "yes"),
        ((-0.3, -0.1), (-0.9, -0.2), "yes"),
        ((0.1, 0.3), (-0.9, -0.2), "no"),
        ((-0.3, -0.1), (0.2, 0.9), "no"),
        ((0.1, 0.3), (-0.1, 0.9), "unclear"),
        ((-0.1, 0.3), (0.2, 0.9), "unclear"),
        ((0.0, 0.3), (0.2, 0.9), "unclear"),
    ],
)
def test_two_losses_agree_where_both_intervals_tell_a_sign(finished, silenced, lost, told):
    assert agreement(finished, silenced, lost, runs=[sum(lost) / 2]) == told


@pytest.mark.parametrize(
    ("runs", "told"), [((0.1, 0.9), "yes"), ((-0.1, 0.9), "unclear"), ((0.0, 0.9), "unclear")]
)
def test_runs_of_different_signs_tell_none(finished, runs, told):
    assert agreement(finished, (0.1, 0.3), (0.2, 0.9), runs) == told


def agreement(finished: Path, silenced: Any, lost: Any, runs: Any) -> str:
    """What the matrix says if these are the intervals, and these the losses of single runs."""
    matrix = Matrix.load(finished)
    retrained = matrix.retrained["convnext"]
    for parts, (low, high) in (
        (matrix.leave_one_out["log_prob"]["convnext"], silenced),
        (retrained.lost["log_prob"], lost),
    ):
        parts["total"] = Score(value=(low + high) / 2, low=low, high=high, n=9)
    one = retrained.runs[0]
    retrained.runs[:] = [
        one.model_copy(update={"lost": {"log_prob": {"total": value}}}) for value in runs
    ]
    return matrix.agreement("convnext", "total", "log_prob")


def test_what_was_measured_is_not_measured_again(
    tiny_folder, suite, clip_alone, again, tmp_path, monkeypatch
):
    options = {"retrained": {"convnext": clip_alone}, "again": [again]}
    run(tiny_folder, suite, tmp_path, retrained={"convnext": clip_alone[:1]})
    asked: list[str] = []
    ask = Asking.ask

    def noting(self, folder):
        before = {path: path.stat().st_size for path in (tmp_path / "kept").iterdir()}
        found = ask(self, folder)
        after = {path: path.stat().st_size for path in (tmp_path / "kept").iterdir()}
        asked.extend([Path(folder).name] if before != after else [])
        return found

    monkeypatch.setattr(Asking, "ask", noting)
    first = run(tiny_folder, suite, tmp_path, **options)
    assert asked == [again.name, clip_alone[1].name]
    assert run(tiny_folder, suite, tmp_path, **options) == first
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("without", "further", "message"),
    [
        ({"convnex": [0]}, [], 'no expert "convnex". Did you mean "convnext"'),
        ({"clip": [0]}, [], "has the experts clip, but the model without clip has convnext"),
        ({"convnext": [0, 1]}, [], "2 models without convnext, but 1 with it"),
        ({"convnext": [0]}, ["again"], "no expert has 2 models without it"),
        ({"convnext": [0, 0]}, ["again"], "the same weights as"),
        ({"convnext": [0, 1]}, ["model"], "the same weights as"),
        ({"convnext": [0, 1]}, [0], "has the experts clip, but the model has clip, convnext"),
        ({"convnext": ["nowhere"]}, [], "nowhere: no config.json in it"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    tiny_folder, suite, clip_alone, again, tmp_path, without, further, message
):
    places = {0: clip_alone[0], 1: clip_alone[1], "again": again, "model": tiny_folder}
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        run(
            tiny_folder,
            suite,
            tmp_path / "out",
            retrained={name: [places.get(k, k) for k in keys] for name, keys in without.items()},
            again=[places[key] for key in further],
        )
    assert not (tmp_path / "out").exists()


def test_the_command_takes_several_seeds(tiny_folder, suite, clip_alone, again, tmp_path, capsys):
    told = ["--model", str(tiny_folder), "--data", str(suite), "--out", str(tmp_path)]
    few = ["--reference", "2", "--images", "0", "--limit", "3", "--device", "cpu"]
    pairs = [part for folder in clip_alone for part in ("--retrained", f"convnext={folder}")]
    main([*told, *few, *pairs, "--again", str(again)])
    data = json.loads((tmp_path / "experts.json").read_text())
    runs = data["retrained"]["convnext"]["runs"]
    assert [one["beside"] for one in runs] == [str(tiny_folder), str(again)]
    for mistaken in ("convnext", "convnext="):
        with pytest.raises(SystemExit) as stopped:
            main([*told, "--retrained", mistaken])
        assert stopped.value.code == 2
        assert "give EXPERT=DIR" in capsys.readouterr().err
