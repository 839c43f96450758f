"""eagle_moe/answer.py: alone and in company the same answers, and no image encoded twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_moe.answer import Answerer, ImageMemory
from eval.items import Item, read_items
from tests.suites import write_suite


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[Item]:
    return read_items(write_suite(tmp_path_factory.mktemp("suite"), per_skill=4))


@pytest.fixture
def answerer(tiny_model, tiny_processor) -> Answerer:
    return Answerer(tiny_model, tiny_processor, max_new_tokens=12)


def ask(text: str, *images: object) -> list[dict]:
    parts = [{"type": "image", "image": str(image)} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def conversations(items: list[Item]) -> list[list[dict]]:
    return [ask(item.question, item.image) for item in items]


def test_alone_and_in_a_batch_the_answers_are_the_same(items, answerer):
    """Prompts of several lengths, with no, one and two images, so that there is much to confuse."""
    asked = [
        *conversations(items[:6]),
        ask("what is it"),
        ask("which of the two", items[0].image, items[5].image),
    ]
    alone = [answerer([one])[0] for one in asked]
    assert answerer(asked) == alone
    assert len(set(alone)) > 4  # the images decide: the check is not empty
    assert answerer(asked[::-1]) == alone[::-1]


def test_a_wrong_padding_side_would_be_seen(items, answerer, monkeypatch):
    asked = conversations(items)
    alone = [answerer([one])[0] for one in asked]
    template = answerer.processor.apply_chat_template

    def pad_right(*args, processor_kwargs, **kwargs):
        return template(
            *args, **kwargs, processor_kwargs=processor_kwargs | {"padding_side": "right"}
        )

    monkeypatch.setattr(answerer.processor, "apply_chat_template", pad_right)
    assert answerer(asked) != alone


def test_image_tokens_of_another_image_would_be_seen(items, answerer, monkeypatch):
    """The deliberate mistake of an image memory: tokens in another order than the images."""
    asked = conversations(items[:4])
    right = answerer(asked)
    remember = ImageMemory.__call__
    monkeypatch.setattr(ImageMemory, "__call__", lambda *args: remember(*args)[::-1])
    assert answerer(asked) != right


def test_an_image_seen_again_is_not_encoded_again(items, answerer, monkeypatch):
    asked = conversations(items[:4])
    encoded: list[int] = []
    encode = Answerer._image_tokens

    def counting(self, canvases):
        encoded.append(len(canvases))
        return encode(self, canvases)

    monkeypatch.setattr(Answerer, "_image_tokens", counting)
    first = answerer(asked)
    twice = [ask("how many", items[0].image, items[0].image), ask("how many", items[9].image)]
    again = answerer([*asked, *twice])
    assert encoded == [4, 1]
    assert again[:4] == first
    assert (answerer.memory.seen, answerer.memory.encoded) == (4 + 4 + 3, 5)


def test_the_memory_of_images_is_bounded_and_forgets_the_oldest():
    tokens = torch.arange(6.0).view(6, 1, 1).expand(6, 4, 8).contiguous()  # 128 bytes an image
    canvases = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    asked: list[list[int]] = []

    def encode(missing: torch.Tensor) -> list[torch.Tensor]:
        asked.append(missing.flatten().tolist())
        return [tokens[int(one)] for one in missing.flatten()]

    memory = ImageMemory(capacity=3 * 128)
    for wanted in ([0, 1, 2], [0, 3], [0, 2, 1], [4, 4]):
        found = memory(canvases[wanted], encode)
        assert [int(one[0, 0]) for one in found] == wanted
        assert memory._bytes <= memory.capacity
    # 3 pushed out 1, the image that was asked for longest ago
    assert asked == [[0, 1, 2], [3], [1], [4]]
    small = ImageMemory(capacity=100)
    assert [int(one[0, 0]) for one in small(canvases[[5, 5]], encode)] == [5, 5]
    small(canvases[[5]], encode)
    assert asked[4:] == [[5], [5]]


def test_an_answer_ends_before_what_it_must_not_hold(items, answerer):
    asked = conversations(items)
    whole = answerer(asked)
    stop = whole[0][3:5]
    expected = [text.split(stop)[0] for text in whole]
    assert expected != whole
    assert answerer(asked, until=[stop]) == expected
    assert [answerer([one], until=[stop, ""])[0] for one in asked] == expected
    both = [stop, whole[1][1]]
    assert answerer(asked[:2], until=both) == [
        min((whole[i].split(end)[0] for end in both), key=len) for i in range(2)
    ]


def test_the_cap_is_the_smaller_of_the_two(items, answerer):
    assert answerer.decoding(5)["max_new_tokens"] == 5
    assert answerer.decoding(5000)["max_new_tokens"] == 12
    (whole,) = answerer(conversations(items[:1]))
    (short,) = answerer(conversations(items[:1]), max_new_tokens=4)
    assert whole.startswith(short.rstrip("\ufffd"))  # the last character may be cut in two
    assert len(short) < len(whole)


def test_answers_are_greedy_however_the_checkpoint_samples(items, tiny_model, tiny_processor):
    asked = conversations(items[:3])
    answerer = Answerer(tiny_model, tiny_processor, max_new_tokens=8)
    right = answerer(asked)
    config = tiny_model.generation_config
    before = config.do_sample, config.temperature
    config.do_sample, config.temperature = True, 5.0
    try:
        assert answerer(asked) == right
    finally:
        config.do_sample, config.temperature = before


def test_the_blind_model_sees_neither_image_nor_placeholder(items, answerer):
    blind = Answerer(answerer.model, answerer.processor, images="drop", max_new_tokens=8)
    token = answerer.processor.image_token
    asked = conversations([item for item in items if item.question == items[0].question])
    assert token in answerer.prompt(asked[0])
    assert token not in blind.prompt(asked[0])
    assert items[0].question in blind.prompt(asked[0])
    assert len(asked) > 1
    assert len(set(blind(asked))) == 1  # without its image, one question has one answer
    assert blind.memory.seen == 0


def test_prompts_beyond_what_the_model_was_made_for_are_counted(items, answerer):
    asked = [ask("what is it"), ask("what " * 110)]
    answerer(asked, max_new_tokens=1)
    assert answerer.beyond == 1  # of 512 positions


@pytest.mark.parametrize("images", ["keep", "drop"])
def test_the_prompt_is_the_one_that_training_shows(items, tiny_processor, images):
    """Token for token: what is asked is what training taught up to the answer."""
    from train.data import ConversationDataset, DataSpec

    answerer = Answerer(None, tiny_processor, images)
    path = items[0].image.parent.parent / "test.jsonl"
    dataset = ConversationDataset(DataSpec(path=str(path), images=images), tiny_processor, None)
    for index, item in enumerate(items):
        sample = dataset[index]
        asked = answerer.encode(conversations([item]))["input_ids"][0]
        taught = sample["input_ids"][: len(asked)]
        assert torch.equal(asked, taught)
        learned = sample["input_ids"][sample["labels"] != -100]
        assert sample["labels"][: len(asked)].eq(-100).all()
        text = tiny_processor.tokenizer.decode(learned, skip_special_tokens=True)
        assert text.strip() == item.answer


def copy_with(tiny_folder: Path, out: Path, change: Callable[[dict], None]) -> Path:
    out.mkdir()
    for file in tiny_folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_incomplete_checkpoints_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="not a model folder"):
        Answerer.load(tmp_path)
    name = "lm_head.weight"
    missing = copy_with(tiny_folder, tmp_path / "missing", lambda w: w.pop(name))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        Answerer.load(missing)
    extra = copy_with(tiny_folder, tmp_path / "extra", lambda w: w.update(stranger=torch.zeros(2)))
    with pytest.raises(ValueError, match="not part of this model: stranger"):
        Answerer.load(extra)
    nan = copy_with(tiny_folder, tmp_path / "nan", lambda w: w[name].view(-1)[3].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"`{name}` has a value that is not a finite number"):
        Answerer.load(nan)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("image_seq_length", 9, "tokens per image is 9 in the processor, but 16 in the model"),
        ("image_token_id", 7, "the image placeholder's id is 7 in the processor, but 3"),
        ("chat_template", None, "the processor has no chat template"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    tiny_model, tiny_processor, monkeypatch, field, value, complaint
):
    from eagle_moe.load import check_processor

    check_processor(tiny_model.config, tiny_processor, "here")
    monkeypatch.setattr(tiny_processor, field, value)
    with pytest.raises(ValueError, match=f"here: .*{complaint}"):
        check_processor(tiny_model.config, tiny_processor, "here")


def test_bad_settings_are_named(tiny_model, tiny_processor):
    with pytest.raises(ValueError, match='images = "hide"'):
        Answerer(tiny_model, tiny_processor, images="hide")
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        Answerer(tiny_model, tiny_processor, max_new_tokens=0)
