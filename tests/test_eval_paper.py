"""eval/paper: the 18 benchmarks, the average of 11, what was published, and the pages of them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from eagle_moe.scores.card import Card, Score
from eval.paper import BENCHMARKS, TASKS, check_average, eagle_average, read_published
from eval.paper.__main__ import main
from eval.paper.benchmarks import AVERAGED, BY_NAME
from eval.paper.published import PUBLISHED
from eval.paper.table import measure, render_page
from tests.own_process import call
from tests.test_card import make_answers, make_card, make_identity, save

ROOT = Path(__file__).parents[1]
ROWS = {(row.source.split(",")[0], row.model): row for row in read_published()}
README, SEARCH = "README of NVlabs/EAGLE", "Fig. 4 and Table 12"
needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra eval")

HALF = {
    "GQA": 50.0,
    "VizWiz": 50.0,
    "MME": 1000.0,
    "SEED-image": 50.0,
    "OCRBench": 500.0,
    "DocVQA": 50.0,
    "ChartQA": 50.0,
    "AI2D": 50.0,
    "POPE": 50.0,
    "RealWorldQA": 50.0,
    "ScienceQA-image": 50.0,
}
"""Half of everything, by hand: the 11 of the average, as the paper names them."""


def test_half_of_everything_is_500():
    assert len(HALF) == 11
    assert eagle_average(HALF) == pytest.approx(500)
    assert eagle_average(HALF | {"MMMU": 99.0, "MMVP": 1.0}) == pytest.approx(500)


@pytest.mark.parametrize(("name", "points"), [("MME", 20), ("GQA", 1), ("OCRBench", 10)])
def test_what_a_point_of_each_is_worth(name, points):
    """Twenty points of MME are 0.9, as are one percent of GQA and ten points of OCRBench."""
    got = eagle_average(HALF | {name: HALF[name] + points}) - 500
    assert got == pytest.approx(10 / 11)


@pytest.mark.parametrize("name", HALF)
def test_a_missing_part_is_named(name):
    scores = {key: value for key, value in HALF.items() if key != name}
    with pytest.raises(ValueError, match=f"needs 11 benchmarks; missing: {name}\\."):
        eagle_average(scores)


@pytest.mark.parametrize(
    ("name", "value"), [("MME", 2001), ("GQA", -1), ("OCRBench", float("nan")), ("POPE", 101)]
)
def test_a_part_off_its_scale_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} = .*the paper's unit is 0 to"):
        eagle_average(HALF | {name: value})


def test_a_share_taken_for_percent_does_not_pass_as_an_average():
    check_average(500.0, HALF, "mine")
    with pytest.raises(ValueError, match=r"mine: the average 500 does not follow .* give 455\.0"):
        check_average(500.0, HALF | {"GQA": 0.5}, "mine")


@pytest.mark.parametrize("model", ["X4-7B", "X5-7B"])
def test_the_papers_average_follows_from_its_row(model):
    """Table 12's rows are the README's (to 0.3) but for VizWiz, AI2D and RealWorldQA. VizWiz is
    what the averages with and without it leave; of the other two the paper's sum is left, and
    must be one that two such benchmarks can have."""
    searched = next(row for key, row in ROWS.items() if key[0] == SEARCH and model[:2] in key[1])
    scores = dict(ROWS[README, model].scores) | {"VizWiz": searched.vizwiz}
    check_average(searched.average, scores, model)
    known = eagle_average(scores | {"AI2D": 0.0, "RealWorldQA": 0.0})
    both = (searched.average - known) * 11 / 10
    assert 130 < both < 137
    full = scores | {"AI2D": both / 2, "RealWorldQA": both / 2}
    assert eagle_average(full) == pytest.approx(searched.average)
    with pytest.raises(ValueError, match="does not follow"):
        check_average(searched.average, full | {"MME": scores["MME"] / 2}, model)


def test_vizwiz_of_the_readme_gives_other_averages():
    """689.4 and 693.0 where 694.6 and 697.1 were printed: another split in one column."""
    for model, implied, instead in (("X4", 56.5, 689.4), ("X5", 59.1, 693.0)):
        row = next(row for key, row in ROWS.items() if key[0] == SEARCH and f"({model})" in key[1])
        vizwiz = ROWS[README, f"{model}-7B"].scores["VizWiz"]
        assert row.vizwiz == pytest.approx(implied, abs=0.3)
        assert (10 * row.without_vizwiz + 10 * vizwiz) / 11 == pytest.approx(instead, abs=0.1)


def test_rows_whose_averages_do_not_follow_are_known():
    table = [row for row in read_published() if row.source.startswith("Tables 2 and 9")]
    assert len(table) == 8 and not any(row.follows for row in table)
    assert all(row.follows for row in read_published() if row not in table)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = PUBLISHED.read_text()
    assert old in text
    path = tmp_path / "published.yaml"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "average: 510.5, scores: {OCRBench: 35",
            "average: 95.5, scores: {OCRBench: 35",
            r"SAM-L: the average 95\.5 does not follow from its parts, which give between",
        ),
        ("average: 681.5, without", "average: 481.5, without", r"leave -\d+\.\d for VizWiz"),
        ("MME: 1561", "MME: 2561", r"X4-7B: .*MME = 2561: it goes from 0 to 2000"),
        ("{GQA: 64.8", "{GQAA: 64.8", r'no benchmark is called "GQAA". Did you mean "GQA"'),
        ("OCRBench: 540", "OCRBench: many", r"README of NVlabs/EAGLE, X4-7B: `scores\.OCRBench`"),
        ("recomputed: 629", "recomputd: 629", 'unknown key `recomputd`. Did you mean "recomputed"'),
    ],
)
def test_published_rows_that_do_not_hold_are_refused(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message):
        read_published(edited(tmp_path, old, new))


def oracle_cards(out: Path, names=tuple(BY_NAME), **changes: object) -> None:
    """Cards of a model that has half of everything, in the harness's units."""
    for one in (BY_NAME[name] for name in names):
        answers = [replace(answer, scores={}) for answer in make_answers(text=5)]
        value = one.best / 2 / one.factor
        score = Score(value=value, low=value * 0.9, high=value * 1.1, n=10)
        task = make_identity().task.dump() | {"name": one.task}
        card = make_card(
            answers,
            metrics={one.metric: {"total": score}},
            means=[],
            primary=one.metric,
            identity=make_identity(task=task, **changes),
        )
        save(out / one.task, answers, card)


def test_an_oracle_that_knows_half_has_500(tmp_path, capsys):
    oracle_cards(tmp_path)
    main([str(tmp_path), "--markdown", "--beside", "all"])
    told = capsys.readouterr().out
    line = {row.split(" | ")[0].strip("| *"): row.split(" | ") for row in told.splitlines()}
    assert line["MME"][1:4] == ["1000", "900 to 1100", "1561"]
    assert line["OCRBench"][1:4] == ["500", "450 to 550", "540"]
    assert line["MMBench"][1:4] == ["50.0", "45.0 to 55.0", "67.8"]
    assert line["GQA"][1:4] == ["50.0", "45.0 to 55.0", "64.8"]
    assert line["Eagle average"][1] == "500.0"
    main([str(tmp_path)])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert ["│", "Eagle", "average", "│", "500.0"] in [row[:5] for row in rows]
    assert "1528" in next(row for row in rows if "MME" in row)


def test_without_all_parts_there_is_no_average_and_it_says_which(tmp_path, capsys):
    oracle_cards(tmp_path, [name for name in BY_NAME if name not in ("POPE", "AI2D")])
    path = tmp_path / BY_NAME["MathVista"].task
    card = Card.load(path)
    card.model_copy(update={"metrics": {}, "not_run": {card.primary: "no key"}}).save(path)
    main([str(tmp_path), "--markdown"])
    told = capsys.readouterr().out
    assert "| Eagle average |  |" in told
    assert "missing: POPE, AI2D." in told
    assert "| MathVista | not run |" in told and "MathVista was not run: no key" in told


def test_cards_of_two_models_are_refused(tmp_path, capsys):
    oracle_cards(tmp_path, ["GQA"])
    oracle_cards(tmp_path, ["POPE"], weights_sha256="other")
    assert "the cards are of 2 models: GQA, POPE" in refused(tmp_path, capsys)


def test_a_card_without_the_benchmarks_metric_is_refused(tmp_path, capsys):
    oracle_cards(tmp_path, ["GQA"])
    path = tmp_path / "gqa"
    score = Score(value=0.5, n=10)
    changes = {"metrics": {"other": {"total": score}}, "primary": "other"}
    Card.load(path).model_copy(update=changes).save(path)
    assert "card of gqa: it has no metric exact_match, but other." in refused(tmp_path, capsys)


def test_a_folder_without_cards_is_refused(tmp_path, capsys):
    assert "no card of the paper's benchmarks" in refused(tmp_path, capsys)
    answers = make_answers(text=5)
    save(tmp_path / "eagle_skills", answers, make_card(answers))
    assert measure({"eagle_skills": make_card(answers)}).scores == {}
    assert "no card of the paper's benchmarks" in refused(tmp_path, capsys)


def test_a_row_that_was_not_published_is_refused(tmp_path, capsys):
    told = refused(tmp_path, capsys, "--beside", "X5-7b")
    assert 'no row of scores was published of "X5-7b". Did you mean "X5-7B"?' in told


def refused(out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(out), *options])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_page_in_docs_is_what_is_rendered(capsys):
    main([])
    page = (ROOT / "docs" / "benchmarks-paper.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page == render_page()
    for one in BENCHMARKS:
        assert f"`{one.task}`" in page
        assert all(of.paper in page and of.today in page for of in one.deviations)


def test_there_are_18_and_11_of_them_count():
    assert len(BENCHMARKS) == len(set(TASKS)) == len(BY_NAME) == 18
    assert {one.name for one in AVERAGED} == HALF.keys()


def tasks_of_the_paper() -> dict[str, object]:
    """In a process of its own: what the tasks are, as the harness reads them."""
    from datasets import Dataset

    from eval.tasks.catalogue import expand, find_tasks, importable_without_a_key, read_yaml

    found: dict[str, object] = {"names": expand(["paper"]), "both": expand(["paper", "skills"])}
    files = find_tasks()
    configs = {one: read_yaml(files[one], run=False) for one in TASKS}
    own = ("eagle_seed_image", "eagle_mmmu_val")
    with importable_without_a_key():
        configs |= {one: read_yaml(files[one]) for one in own}
    found["metrics"] = {
        name: [metric["metric"] for metric in config["metric_list"]]
        for name, config in configs.items()
    }
    seed, mmmu = (configs[one] for one in own)
    docs = [
        {
            "data_type": kind,
            "question_id": str(index),
            "answer": answer,
            "question": "Which?",
            **dict.fromkeys(("choice_a", "choice_b", "choice_c", "choice_d"), "x"),
        }
        for index, (kind, answer) in enumerate([("image", "A"), ("video", "B"), ("image", "C")])
    ]
    asked = list(seed["process_docs"](Dataset.from_list(docs)))
    found["asked"] = [doc["question_id"] for doc in asked]
    scored = [
        seed["process_results"](doc, [said]) for doc, said in zip(asked, ("a. x", "D"), strict=True)
    ]
    aggregate = {one["metric"]: one["aggregation"] for one in seed["metric_list"]}["seed_image"]
    found["seed"] = aggregate([one["seed_image"] for one in scored])
    doc = {"question": "Which?", "question_type": "multiple-choice", "options": "['x', 'y']"}
    words = mmmu["lmms_eval_specific_kwargs"]["default"]
    found["mmmu"] = mmmu["doc_to_text"](doc, words), mmmu["generation_kwargs"]
    return found


@needs_lmms_eval
def test_the_tasks_are_there_and_undo_what_they_say(tmp_path):
    found = call("tests.test_eval_paper.tasks_of_the_paper", tmp_path)
    assert found["names"] == list(TASKS)
    assert found["both"] == [*TASKS, "eagle_skills"]
    for one in BENCHMARKS:
        assert one.metric in found["metrics"][one.task]
    assert found["asked"] == ["0", "2"]
    assert found["seed"] == 0.5
    text, generation = found["mmmu"]
    assert text.endswith("B. y\n\nAnswer with the option letter from the given choices directly.")
    assert generation == {"max_new_tokens": 16}
