"""eval/answer.py: batches, resuming, and a checkpoint that answers alike alone and in company."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.answer import (
    ITEMS,
    Answer,
    CheckpointAnswerer,
    answer_items,
    read_answers,
    write_answers,
)
from eval.items import Item, read_items
from eval.score import accuracy_by_skill
from tests.suites import write_suite


class Fake:
    """Answers by rule, and remembers the batches it was asked."""

    def __init__(self, rule: Callable[[Item], str], fail_after: int | None = None) -> None:
        self.rule, self.fail_after = rule, fail_after
        self.batches: list[list[str]] = []

    def length(self, item: Item) -> int:
        return len(item.question)

    def __call__(self, items: Sequence[Item]) -> list[str]:
        if len(self.batches) == self.fail_after:
            raise KeyboardInterrupt
        self.batches.append([item.id for item in items])
        return [self.rule(item) for item in items]


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[Item]:
    return read_items(write_suite(tmp_path_factory.mktemp("suite"), per_skill=4))


def test_an_oracle_is_always_right_and_a_constant_as_often_as_counted(items, tmp_path):
    answers = answer_items(items, Fake(lambda item: f" {item.answer.upper()}\n"), tmp_path / "a", 5)
    assert all(answer.scores == {"accuracy": 1.0} for answer in answers)
    assert [answer.id for answer in answers] == [item.id for item in items]
    answers = answer_items(items, Fake(lambda item: "lamp"), tmp_path / "b", 5)
    # by hand: lamp, tree, door, lamp are the answers of the skill `text`, and of no other
    score = accuracy_by_skill([a.part for a in answers], [a.scores["accuracy"] for a in answers])
    assert {key: estimate.mean for key, estimate in score.items()} == {
        "total": pytest.approx(2 / 12),
        "text": 0.5,
        "chart": 0.0,
        "shapes": 0.0,
    }


def test_batches_hold_prompts_of_like_length_the_longest_first(items, tmp_path):
    fake = Fake(lambda item: "x")
    seen: list[tuple[int, int]] = []
    answer_items(
        items, fake, tmp_path / "a", 5, lambda done, total, note: seen.append((done, total))
    )
    lengths = {item.id: len(item.question) for item in items}
    flat = [lengths[name] for batch in fake.batches for name in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in fake.batches] == [5, 5, 2]
    assert seen == [(5, 12), (10, 12), (12, 12)]


def lines_of(path: Path) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in path.read_text().splitlines()]


def test_the_file_holds_what_is_returned(items, tmp_path):
    answers = answer_items(items, Fake(lambda item: "lamp"), tmp_path / "a", 5)
    assert sorted(lines_of(tmp_path / "a"), key=str) == sorted(answers, key=str)


def test_equal_answers_are_equal_files(items, tmp_path):
    answers = answer_items(items, Fake(lambda item: "straße\u2028"), tmp_path / "a", 5)
    write_answers(tmp_path, answers)
    first = (tmp_path / ITEMS).read_bytes()
    write_answers(tmp_path, answers)
    assert (tmp_path / ITEMS).read_bytes() == first
    assert read_answers(tmp_path) == answers


def test_an_interrupted_run_continues(items, tmp_path):
    path = tmp_path / "a"
    whole = answer_items(items, Fake(lambda item: item.answer), tmp_path / "whole", 5)
    with pytest.raises(KeyboardInterrupt):
        answer_items(items, Fake(lambda item: item.answer, fail_after=1), path, 5)
    assert len(lines_of(path)) == 5
    second = Fake(lambda item: item.answer)
    assert answer_items(items, second, path, 5) == whole
    assert [len(batch) for batch in second.batches] == [5, 2]
    third = Fake(lambda item: "never asked")
    assert answer_items(items, third, path, 5) == whole
    assert third.batches == []


def test_a_line_torn_by_a_kill_is_answered_again_in_the_same_batch(items, tmp_path):
    path = tmp_path / "a"
    first = Fake(lambda item: item.answer)
    whole = answer_items(items, first, path, 5)
    path.write_bytes(path.read_bytes()[:-40])
    again = Fake(lambda item: item.answer)
    assert answer_items(items, again, path, 5) == whole
    assert again.batches == first.batches[-1:]
    assert len(lines_of(path)) == 12


def test_answers_to_other_questions_are_not_mixed_in(items, tmp_path):
    answer_items(items, Fake(lambda item: "x"), tmp_path / "a", 5)
    with pytest.raises(ValueError, match="which is not asked. Remove the file"):
        answer_items(items[1:], Fake(lambda item: "x"), tmp_path / "a", 5)


def test_bad_calls_and_bad_files_are_named(items, tmp_path):
    with pytest.raises(ValueError, match="batch_size = 0"):
        answer_items(items, Fake(lambda item: "x"), tmp_path / "a", 0)
    (tmp_path / "b").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"b:1: not an answer"):
        answer_items(items, Fake(lambda item: "x"), tmp_path / "b", 5)


@pytest.fixture(scope="module")
def answerer(tiny_folder: Path) -> CheckpointAnswerer:
    return CheckpointAnswerer.load(tiny_folder, max_new_tokens=12, device="cpu")


def test_alone_and_in_a_batch_the_answers_are_the_same(items, answerer):
    # questions of one, two and three lengths in one batch, so that there is padding to be wrong
    alone = [answerer([item])[0] for item in items]
    assert answerer(items[:8]) == alone[:8]
    assert len(set(alone)) > 3  # the images decide: the check is not empty


def test_a_wrong_padding_side_would_be_seen(items, answerer, monkeypatch):
    alone = [answerer([item])[0] for item in items]
    template = answerer.processor.apply_chat_template

    def pad_right(*args, processor_kwargs, **kwargs):
        return template(
            *args, **kwargs, processor_kwargs=processor_kwargs | {"padding_side": "right"}
        )

    monkeypatch.setattr(answerer.processor, "apply_chat_template", pad_right)
    assert answerer(items) != alone


def test_the_blind_model_sees_neither_image_nor_placeholder(items, answerer):
    blind = CheckpointAnswerer(answerer.model, answerer.processor, images="drop")
    token = answerer.processor.image_token
    assert token in answerer.prompt(items[0])
    assert token not in blind.prompt(items[0])
    assert items[0].question in blind.prompt(items[0])
    same = [item for item in items if item.question == items[0].question]
    assert len({item.image for item in same}) > 1
    assert len(set(blind(same))) == 1  # without its image, one question has one answer


@pytest.mark.parametrize("images", ["keep", "drop"])
def test_the_prompt_is_the_one_that_training_shows(items, tiny_processor, images):
    """Token for token: what is asked is what training taught up to the answer."""
    from train.data import ConversationDataset, DataSpec

    answerer = CheckpointAnswerer(None, tiny_processor, images)
    path = items[0].image.parent.parent / "test.jsonl"
    dataset = ConversationDataset(DataSpec(path=str(path), images=images), tiny_processor, None)
    for index, item in enumerate(items):
        sample = dataset[index]
        asked = answerer.encode([item])["input_ids"][0]
        taught = sample["input_ids"][: len(asked)]
        assert torch.equal(asked, taught)
        learned = sample["input_ids"][sample["labels"] != -100]
        assert sample["labels"][: len(asked)].eq(-100).all()
        text = tiny_processor.tokenizer.decode(learned, skip_special_tokens=True)
        assert text.strip() == item.answer


def test_a_right_answer_must_fit_into_the_cap(items, answerer):
    answerer.check(items)
    short = CheckpointAnswerer(answerer.model, answerer.processor, max_new_tokens=5)
    with pytest.raises(ValueError, match=r'"test-shapes-0": its answer has 8 tokens.* is 5'):
        short.check(items)


def copy_with(tiny_folder: Path, out: Path, change: Callable[[dict], None]) -> Path:
    out.mkdir()
    for file in tiny_folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_incomplete_checkpoints_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        CheckpointAnswerer.load(tmp_path)
    name = "lm_head.weight"
    missing = copy_with(tiny_folder, tmp_path / "missing", lambda w: w.pop(name))
    with pytest.raises(ValueError, match=f"missing keys.*{name}"):
        CheckpointAnswerer.load(missing)
    extra = copy_with(tiny_folder, tmp_path / "extra", lambda w: w.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match="unexpected keys.*stranger"):
        CheckpointAnswerer.load(extra)
    nan = copy_with(tiny_folder, tmp_path / "nan", lambda w: w[name].view(-1)[3].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"`{name}` has a value that is not a finite number"):
        CheckpointAnswerer.load(nan)
