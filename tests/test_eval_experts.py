"""eval/experts: a checkpoint and a suite in; matrix, items, page and picture out."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_moe import explain
from eagle_moe.answer import Answerer
from eagle_moe.scores.card import Score
from eval.experts import METRICS, Matrix, explain_experts, measure, read_measured
from eval.experts.__main__ import main
from eval.experts.words import show
from eval.items import read_items
from eval.page import INK
from tests.conftest import make_config, make_model
from tests.suites import make_record, write_records, write_suite

EXPERTS = ("clip", "convnext")
"""Of `tiny_folder`."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def clip_alone(tmp_path_factory, tiny_processor) -> Path:
    """What training again without ConvNeXt might have left."""
    return save(tmp_path_factory.mktemp("clip"), make_config(("clip-tiny",)), tiny_processor)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, suite, clip_alone) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(tiny_folder, suite, out, images=4, retrained={"convnext": clip_alone})
    return out


def save(folder: Path, config: Any, processor: Any) -> Path:
    make_model(config, seed=3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(model: Path, data: Path, out: Path, **options: Any) -> Matrix:
    told = {"reference": 5, "images": 0, "batch_size": 4, "device": "cpu"} | options
    return explain_experts(model, data, out, **told)


def test_the_matrix_is_what_an_independent_recount_gives(finished, suite):
    lines = gzip.decompress((finished / "items.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    truth = [json.loads(line) for line in (suite / "test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    matrix = json.loads((finished / "experts.json").read_text())
    for metric in ("log_prob", "accuracy"):
        for expert in EXPERTS:
            for skill in ("text", "chart", "shapes", "total"):
                asked = [row["scores"] for row in rows if skill in (row["skill"], "total")]
                lost = [one["all"][metric] - one[f"without {expert}"][metric] for one in asked]
                own = [one[f"only {expert}"][metric] - one["none"][metric] for one in asked]
                for kind, values in (("leave_one_out", lost), ("only_one", own)):
                    told = matrix[kind][metric][expert][skill]
                    assert told["value"] == pytest.approx(np.mean(values))
                    assert told["low"] <= told["value"] <= told["high"]
                    assert told["n"] == len(asked)
                    if len(set(values)) > 1:
                        assert (told["low"], told["high"]) == pytest.approx(
                            resampled(values), abs=0.02 * np.ptp(values)
                        )
    assert any(row["scores"]["all"] != row["scores"]["none"] for row in rows)


def resampled(values: list[float]) -> tuple[float, float]:
    """The paired bootstrap by hand: questions are drawn, each with its own difference."""
    draws = np.random.default_rng(1).choice(values, (20_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def test_only_one_of_two_is_leaving_out_the_other(finished):
    for one in read_measured(finished):
        assert one.scores["only clip"] == one.scores["without convnext"]
        assert one.scores["only convnext"] == one.scores["without clip"]
        assert one.scores["only clip"] != one.scores["only convnext"]


def test_one_item_alone_from_its_pixels(finished, tiny_folder, suite):
    """The whole path, by hand: mean over the reference set, map replaced by a hook."""
    answerer = Answerer.load(tiny_folder, device="cpu")
    processor = answerer.processor
    paths = [item.image for item in read_items(suite, 5)]
    reference = processor.image_processor([Image.open(p) for p in paths], return_tensors="pt")
    tower = answerer.model.model.vision_tower.towers["clip"]
    item, told = read_items(suite)[7], read_measured(finished)[7]
    content = [
        {"type": "image", "image": Image.open(item.image)},
        {"type": "text", "text": item.question},
    ]
    asked = explain.prepare(processor, [[{"role": "user", "content": content}]], [item.answer])
    with torch.no_grad():
        mean = tower(tower.view(reference["pixel_values"])).mean(0)
        handle = tower.register_forward_hook(lambda module, inputs, x: mean.expand_as(x))
        logits = answerer.model(input_ids=asked.input_ids, pixel_values=asked.canvases).logits[0]
        handle.remove()
    logits[:, answerer.model.config.image_token_id] = -torch.inf
    steps = logits.log_softmax(-1)[:-1].gather(1, asked.input_ids[0, 1:, None])[:, 0]
    expected = float(steps[asked.answer_mask[0, 1:]].sum())
    assert told.scores["without clip"]["log_prob"] == pytest.approx(expected, abs=1e-4)
    assert told.scores["all"]["log_prob"] != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 9])
def test_figures_do_not_depend_on_the_batch_size(
    finished, tiny_folder, suite, tmp_path, batch_size
):
    run(tiny_folder, suite, tmp_path, batch_size=batch_size)
    for one, other in zip(read_measured(tmp_path), read_measured(finished), strict=True):
        for variant, scores in one.scores.items():
            assert scores == pytest.approx(other.scores[variant], abs=1e-4)


def test_an_interrupted_run_goes_on_where_it_was(
    finished, tiny_folder, suite, tmp_path, monkeypatch
):
    scored: list[int] = []
    score = explain.score

    def counting(model, asked, maps):
        scored.append(len(asked.input_ids))
        return score(model, asked, maps)

    def stop(done: int, total: int, note: str) -> None:
        if note == "questions":
            assert (done, total) == (4, 9)
            raise KeyboardInterrupt

    monkeypatch.setattr(explain, "score", counting)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, suite, tmp_path, progress=stop)
    assert not (tmp_path / "experts.json").exists()
    run(tiny_folder, suite, tmp_path)
    # of six variants four are different ones, where there are two experts
    assert sum(scored) == 4 * 9
    assert read_measured(tmp_path) == read_measured(finished)
    run(tiny_folder, suite, tmp_path, reference=4)  # other means: nothing kept is of use
    assert sum(scored) == 2 * 4 * 9


def test_an_image_is_encoded_once_for_all_questions_and_variants(
    tiny_folder, tmp_path, monkeypatch
):
    records = [make_record(f"q{i}", image=f"images/{'ab'[i % 2]}.png") for i in range(6)]
    data = write_records(tmp_path / "data", *records)
    encoded: list[int] = []
    encode = explain.encode

    def counting(model, canvases):
        encoded.append(len(canvases))
        return encode(model, canvases)

    monkeypatch.setattr(explain, "encode", counting)
    matrix = run(tiny_folder, data, tmp_path / "out", batch_size=3)
    assert matrix.reference == 2  # distinct images of the questions
    assert encoded == [2, 1, 1]
    run(tiny_folder, data, tmp_path / "singly", batch_size=2)  # across images
    for one, other in zip(
        read_measured(tmp_path / "out"), read_measured(tmp_path / "singly"), strict=True
    ):
        assert one.scores["all"] == pytest.approx(other.scores["all"], abs=1e-4)


def test_a_model_trained_again_is_compared_question_by_question(
    finished, clip_alone, tiny_folder, suite, tmp_path
):
    matrix = Matrix.load(finished)
    alone = Answerer.load(clip_alone, device="cpu")
    kept = measure.KeptTexts(tmp_path / "kept.jsonl")
    items = read_items(suite)
    again = measure.measure(alone, items, {"all": ()}, {}, kept, batch_size=4)
    first = [one.scores["all"]["log_prob"] for one in read_measured(finished)]
    second = [one.scores["all"]["log_prob"] for one in again]
    lost = matrix.retrained["convnext"].lost["log_prob"]["total"]
    assert lost.value == pytest.approx(np.mean(first) - np.mean(second))
    paired = [one - other for one, other in zip(first, second, strict=True)]
    close = pytest.approx(resampled(paired), abs=0.02 * np.ptp(paired))
    assert (lost.low, lost.high) == close
    crossed = [one - other for one, other in zip(first, reversed(second), strict=True)]
    assert resampled(crossed) != close  # deliberate mistake: other questions' scores
    strongest = matrix.strongest("total")
    least = min(matrix.leave_one_out["log_prob"][name]["total"].value for name in EXPERTS)
    assert matrix.leave_one_out["log_prob"][strongest]["total"].value > least


@pytest.mark.parametrize(
    ("silenced", "again", "told"),
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
def test_two_losses_agree_where_both_intervals_tell_a_sign(finished, silenced, again, told):
    data = Matrix.load(finished).dump()
    losses = data["leave_one_out"], data["retrained"]["convnext"]["lost"]
    for score, (low, high) in (
        (losses[0]["log_prob"]["convnext"]["total"], silenced),
        (losses[1]["log_prob"]["total"], again),
    ):
        score |= {"value": (low + high) / 2, "low": low, "high": high}
    matrix = Matrix.parse(data, "test")
    assert matrix.agreement("convnext", "total", "log_prob") == told


class Page(HTMLParser):
    """What a reader meets: images with their texts, and everything that could be a request."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.figures: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        if found.get("role") == "img":
            self.figures.append(found["aria-label"])

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_holds_all_and_asks_for_nothing(finished, suite):
    text = (finished / "experts.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    shown = read_items(suite, 4)
    assert len(page.images) == 4 * (1 + len(EXPERTS))
    for image in page.images:
        assert image["alt"]
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 192)
    for item in shown:
        assert item.question in page.words
        assert item.answer in page.words
    assert len(page.figures) == 3 * len(METRICS)
    assert all("convnext: total" in figure for figure in page.figures)
    assert page.words.count("mean over 5 reference images") >= 3
    assert "hints" in page.words
    assert "same sign" in page.words
    assert INK in text
    with Image.open(finished / "experts.png") as picture:
        assert picture.width > 1000


def test_a_page_without_images_and_retraining_leaves_those_parts_out(tiny_folder, suite, tmp_path):
    run(tiny_folder, suite, tmp_path, limit=3)
    page = Page((tmp_path / "experts.html").read_text(encoding="utf-8"))
    assert not page.images
    assert "Image by image" not in page.words
    assert "training again" not in page.words.replace("another training run", "")
    assert len(read_measured(tmp_path)) == 3


@pytest.mark.parametrize(
    ("metric", "score", "shown"),
    [
        ("accuracy", (0.124, 0.08, 0.161), ("+12", "8 to 16")),
        ("accuracy", (-0.001, -0.02, 0.004), ("0", "−2 to 0")),
        ("log_prob", (0.414, -0.3, 0.52), ("+0.41", "−0.30 to 0.52")),
    ],
)
def test_figures_are_shown_as_people_read_them(metric, score, shown):
    value, low, high = score
    assert show(metric, Score(value=value, low=low, high=high, n=9)) == shown


def test_a_model_with_one_expert_is_refused(clip_alone, suite, tmp_path):
    with pytest.raises(ValueError, match="its one expert is clip.* two or more"):
        run(clip_alone, suite, tmp_path)


def test_a_model_without_vision_is_refused_before_its_weights_are_read(suite, tmp_path):
    make_config().text_config.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="model_type is llama: it has no vision experts"):
        run(tmp_path / "llm", suite, tmp_path / "out")


def test_an_unknown_suite_is_refused(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file.*suite"):
        run(tiny_folder, tmp_path / "nowhere", tmp_path)


def test_an_item_without_an_image_is_refused(tiny_folder, tmp_path):
    blind = make_record(
        "blind",
        conversations=[
            {"from": "human", "value": "what is blind"},
            {"from": "gpt", "value": "word blind"},
        ],
    )
    del blind["image"]
    data = write_records(tmp_path, make_record("a"), blind)
    with pytest.raises(ValueError, match='item "blind": it has no image'):
        run(tiny_folder, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": 0}, "reference = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"limit": 0}, "limit = 0"),
        ({"retrained": {"convnex": "x"}}, 'no expert "convnex". Did you mean "convnext"'),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_folder, suite, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tiny_folder, suite, tmp_path, **options)


def test_a_model_that_still_has_the_expert_was_not_trained_without_it(
    tiny_folder, clip_alone, suite, tmp_path
):
    with pytest.raises(ValueError, match="has the experts clip, but the model without clip has"):
        run(tiny_folder, suite, tmp_path, retrained={"clip": clip_alone})


def test_the_command_writes_and_tells(tiny_folder, suite, tmp_path, capsys):
    told = ["--model", str(tiny_folder), "--data", str(suite), "--out", str(tmp_path / "out")]
    main([*told, "--reference", "3", "--images", "1", "--limit", "3", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "convnext" in said
    assert str(tmp_path / "out" / "experts.html") in said.replace("\n", "")
    assert (tmp_path / "out" / "experts.html").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file"),
        (["--model", "nowhere"], "nowhere"),
        (["--retrained", "convnext"], "give EXPERT=DIR"),
    ],
)
def test_a_mistake_ends_the_command_in_one_line(
    tiny_folder, suite, tmp_path, capsys, changed, message
):
    told = ["--model", str(tiny_folder), "--data", str(suite), "--out", str(tmp_path), *changed]
    with pytest.raises(SystemExit) as stopped:
        main(told)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
