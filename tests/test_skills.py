"""The built-in suite: reproducible, held out by content, and every question has one answer."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eval.skills import SKILLS, content, make_scene, write_suite
from eval.skills.__main__ import main
from eval.skills.draw import Painter, shape
from eval.skills.scene import BLANK, COLOURS, GRID, SYMBOLS
from eval.skills.style import FILLS, GROUNDS, PLAIN, choose_style, fill, shade

SPLITS = ("pretext", "train", "test")
EACH = pytest.mark.parametrize("skill", SKILLS)


@EACH
@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_made_the_same_every_time(skill, split):
    one, two, other = (make_scene(skill, split, index) for index in (7, 7, 8))
    assert np.array_equal(one.image, two.image)
    assert (one.cells, one.questions, one.caption) == (two.cells, two.questions, two.caption)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.image, make_scene(skill, split, 7, seed=1).image)


@EACH
def test_a_scene_is_whole(skill):
    for index in range(40):
        scene = make_scene(skill, "train", index)
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.cells) == GRID * GRID
        assert set(scene.cells) <= set(SYMBOLS)
        assert scene.mask.any()
        assert not scene.mask.all()
        asked = [question.question for question in scene.questions]
        assert len(asked) == len(set(asked)) > 0


@EACH
def test_unpainted_scenes_show_the_same(skill):
    for index in range(20):
        painted, bare = (make_scene(skill, "train", index, paint=p) for p in (True, False))
        assert (painted.cells, painted.questions) == (bare.cells, bare.questions)


@EACH
def test_no_question_tells_its_answer(skill):
    for index in range(60):
        for question in make_scene(skill, "test", index, paint=False).questions:
            asked = f" {question.question} "
            assert f" {question.answer} " not in asked


def test_content_is_held_out():
    for split in ("pretext", "train"):
        assert not set(content.words(split)) & set(content.words("test"))
        assert not set(content.numbers(split)) & set(content.numbers("test"))
        assert not set(content.bar_rows(split)) & set(content.bar_rows("test"))
    pretext, train, test = (_digits(split) for split in SPLITS)
    assert train < pretext
    assert len(train) < len(pretext) / 10
    assert not pretext & test
    assert min(len(content.words(s)) for s in SPLITS) > 100
    assert min(len(content.bar_rows(s)) for s in SPLITS) > 100


def _digits(split):
    return {image.tobytes() for image in content.digits(split)[0]}


def test_training_is_drawn_plainly_and_tests_are_not():
    drawn = {
        split: [choose_style(np.random.default_rng(seed), split) for seed in range(2000)]
        for split in SPLITS
    }
    plain = {split: styles.count(PLAIN) / 2000 for split, styles in drawn.items()}
    assert plain["pretext"] == plain["test"] == 0
    assert 0.92 < plain["train"] < 0.98
    assert {style.fill for style in drawn["test"]} == set(FILLS)
    assert {style.ground for style in drawn["test"]} == set(GROUNDS)


@pytest.mark.parametrize("name", FILLS)
def test_a_fill_paints_a_part_of_the_figure_and_the_mask_holds_all_of_it(name):
    figure = shape("square", 20)
    part = fill(name, figure)
    assert ((part == 0) | (part == figure)).all()
    assert (0.2 < part.sum() / figure.sum() < 0.8) == (name != "solid")
    painter = Painter(np.random.default_rng(0), "train")
    painter.style = replace(PLAIN, fill=name)
    painter.figure(figure, (32, 32), COLOURS["red"])
    assert painter.mask.sum() == (figure > 0.5).sum()


def test_wide_colours_stay_nearest_to_their_own():
    rng, palette = np.random.default_rng(0), np.array(list(COLOURS.values()))
    style = replace(PLAIN, shaded=True)
    for index, colour in enumerate(COLOURS.values()):
        shades = np.array([shade(rng, style, colour) for _ in range(200)])
        hues = shades / np.linalg.norm(shades, axis=1, keepdims=True)
        nearest = (hues @ (palette / np.linalg.norm(palette, axis=1, keepdims=True)).T).argmax(1)
        assert (nearest == index).mean() > 0.9


def test_scenes_show_content_of_their_split():
    for index in range(60):
        for question in make_scene("text", "test", index, paint=False).questions:
            assert question.answer in content.words("test")
        for question in make_scene("form", "train", index, paint=False).questions:
            assert question.answer in content.numbers("train")


def _reader(scene):
    """Answers every question from the transcript alone: an independent reading of the scene."""
    rows = [scene.cells[GRID * r : GRID * (r + 1)] for r in range(GRID)]
    if scene.skill == "text":
        lines = ["".join(row).replace(BLANK, "") for row in rows]
        top, bottom = (line for line in lines if line)
        return {"what is the top word": top, "what is the bottom word": bottom}
    if scene.skill == "form":
        lines = ["".join(row).replace(BLANK, "") for row in rows]
        return {f"what is {line[0]}": line[1:] for line in lines if line}
    if scene.skill == "chart":
        tops = [(spot, cell) for spot, cell in enumerate(scene.cells) if cell != BLANK]
        heights = Counter({cell[1:].split(":")[0]: GRID - spot // GRID for spot, cell in tops})
        answers = {f"how high is {colour}": str(n) for colour, n in heights.items()}
        ranked = heights.most_common()
        return answers | {
            "which bar is highest": ranked[0][0],
            "which bar is lowest": ranked[-1][0],
        }
    if scene.skill == "shapes":
        answers = {"how many shapes": str(sum(cell != BLANK for cell in scene.cells))}
        for spot, cell in enumerate(scene.cells):
            if cell != BLANK:
                colour, shape = cell[1:-1].split(":")
                answers[f"where is the {colour} {shape}"] = _quarter(spot)
                answers[f"what color is {_quarter(spot)}"] = colour
                answers[f"what shape is {_quarter(spot)}"] = shape
        return answers
    shown = [(spot, cell) for spot, cell in enumerate(scene.cells) if cell != BLANK]
    return {f"what is {_quarter(spot)}": cell for spot, cell in shown}


def _quarter(spot):
    half = GRID // 2
    row = ("top", "bottom")[spot // GRID // half]
    return f"{row} {('left', 'right')[spot % GRID // half]}"


@EACH
@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_what_is_drawn(skill, split):
    for index in range(80):
        scene = make_scene(skill, split, index, paint=False)
        answers = _reader(scene)
        for question in scene.questions:
            assert answers[question.question] == question.answer, (index, scene.cells)


def test_files(tmp_path):
    write_suite(tmp_path, train=6, test=4)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "captions", "test")
    }
    assert [len(rows[name]) for name in ("train", "captions", "test")] == [30, 30, 20]
    for row in rows["test"]:
        human, gpt = row["conversations"]
        assert human["value"] == f"<image>\n{row['question']}"
        assert gpt["value"] == row["answer"]
        assert Image.open(tmp_path / row["image"]).size == (64, 64)
    assert Counter(row["skill"] for row in rows["test"]) == dict.fromkeys(SKILLS, 4)
    assert len(rows["train"][0]["kinds"]) == len(rows["train"][0]["conversations"]) // 2


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    one = write_suite(tmp_path / "one", train=2, test=1, workers=1)
    two = write_suite(tmp_path / "two", train=2, test=1, workers=2)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_the_command_writes_the_suite_and_refuses_none(tmp_path, capsys):
    main(["--out", str(tmp_path / "suite"), "--train", "2", "--test", "1"])
    write_suite(tmp_path / "same", train=2, test=1)
    for name in ("train.jsonl", "captions.jsonl", "test.jsonl", "suite.json"):
        assert (tmp_path / "suite" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "none"), "--test", "0"])
    assert stopped.value.code == 2
    assert "--test 0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "file" / "suite")])
    assert stopped.value.code == 2
