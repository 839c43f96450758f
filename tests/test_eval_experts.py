"""eval/experts: a checkpoint and a suite in; matrix, items, page and picture out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_moe import explain
from eagle_moe.answer import Answerer
from eval.experts import read_measured
from eval.experts.__main__ import main
from eval.items import read_items
from tests.conftest import make_config
from tests.explained import EXPERTS, resampled, run, save
from tests.suites import make_record, write_records, write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"), per_skill=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, suite) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(tiny_folder, suite, out)
    return out


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


def test_a_model_with_one_expert_is_refused(tiny_processor, suite, tmp_path):
    clip_alone = save(tmp_path / "clip", make_config(("clip-tiny",)), tiny_processor)
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
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_folder, suite, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tiny_folder, suite, tmp_path, **options)


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
