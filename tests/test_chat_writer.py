"""What is read and seen once: the same answers as if nothing had been kept."""

from __future__ import annotations

import copy
import threading
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import MistralConfig

from eagle_moe import explain
from eagle_moe.chat.prefixes import PrefixMemory, Prompt
from eagle_moe.chat.session import ChatSession
from eagle_moe.model import EagleMixModel
from tests.conftest import make_config, make_model

TOKENS = 10


@pytest.fixture
def session(tiny_model, tiny_processor) -> ChatSession:
    return ChatSession(tiny_model, tiny_processor)


@pytest.fixture
def reads(tiny_model, monkeypatch) -> list[int]:
    """Tokens that the language model reads, one number per forward pass that reads several."""
    found: list[int] = []
    forward = EagleMixModel.forward

    def watched(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[1] > 1:
            found.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(EagleMixModel, "forward", watched)
    return found


@pytest.fixture
def looks(tiny_model, monkeypatch) -> list[int]:
    """Images that are encoded, one number per time."""
    found: list[int] = []
    encode = type(tiny_model.model.vision_tower).encode
    monkeypatch.setattr(
        type(tiny_model.model.vision_tower),
        "encode",
        lambda self, canvases: found.append(len(canvases)) or encode(self, canvases),
    )
    return found


def plain(session: ChatSession, turns: list[dict[str, Any]], tokens: int = TOKENS) -> str:
    """The answer to `turns` by `generate` alone."""
    inputs = session.processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    written = session.model.generate(**inputs, max_new_tokens=tokens)
    text: str = session.processor.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def ask(session: ChatSession, text: str, image: Image.Image | None = None) -> str:
    """Ask, and hold the answer against that of `generate` alone."""
    if image is not None:
        session.add_image(image)
    answer = "".join(session.ask(text, TOKENS))
    assert answer == plain(session, session.turns[:-1])
    return answer


def test_every_turn_is_answered_as_if_nothing_had_been_kept(session, make_image, looks, reads):
    answers = [
        ask(session, "one?", make_image(seed=1)),
        ask(session, "two?"),
        ask(session, "three?", make_image(seed=2)),
        ask(session, "four?"),
    ]
    assert len(set(answers)) == 4
    # each image once in the conversation, and once per question of `plain`
    assert looks == [1, 1, 1, 1, 2, 2]
    mine, whole = reads[::2], reads[1::2]
    assert mine[0] == whole[0]
    assert all(part < all_of_it / 2 for part, all_of_it in zip(mine[1:], whole[1:], strict=True))
    assert all(before < after for before, after in pairwise(whole))


def test_a_new_conversation_shares_what_it_begins_with(session, make_image, looks, reads):
    first = ask(session, "one?", make_image(seed=1))
    other = session.another()
    assert other.turns == []
    assert ask(other, "one?", make_image(seed=1)) == first
    assert looks == [1, 1, 1]
    assert len(reads) == 3  # all but the last token was read before
    other.reset()
    ask(other, "else?", make_image(seed=2))
    assert looks[3:] == [1, 1]
    assert reads[3] == reads[4]  # with another image nothing is the same but the first words
    assert len(session.turns) == 2


def test_an_edited_history_is_read_from_the_edit_on(session, make_image, reads):
    ask(session, "one?", make_image(seed=1))
    ask(session, "two?")
    session.turns[1] = {"role": "assistant", "content": [{"type": "text", "text": "No."}]}
    reads.clear()
    ask(session, "three?")
    assert 2 < reads[0] < reads[1]


def test_the_same_words_about_another_image_are_another_prompt(session, make_image):
    """The deliberate mistake is to look at the tokens alone."""
    ask(session, "one?", make_image(seed=1))
    session.reset()
    ask(session, "one?", make_image(seed=2))


def test_that_mistake_would_be_seen(session, make_image, monkeypatch):
    def blind(self: Prompt, other: Prompt) -> int:
        return int((self.ids[: len(other.ids)] == other.ids[: len(self.ids)]).sum())

    monkeypatch.setattr(Prompt, "common", blind)
    ask(session, "one?", make_image(seed=1))
    session.reset()
    with pytest.raises(AssertionError):
        ask(session, "one?", make_image(seed=2))


def test_a_stopped_answer_is_gone_on_from(session, make_image, reads):
    session.add_image(make_image(seed=1))
    pieces = session.ask("x?", 60)
    next(pieces)
    pieces.close()
    reads.clear()
    ask(session, "two?")
    assert reads[0] < reads[1]


def test_after_an_error_all_is_as_before(session, make_image, monkeypatch):
    ask(session, "one?", make_image(seed=1))
    generate = session.model.generate

    def fail(**options: Any) -> None:
        generate(**options)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model, "generate", fail)
    session.add_image(make_image(seed=2))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.ask("two?", TOKENS))
    monkeypatch.undo()
    assert len(session.turns) == 2
    ask(session, "two?")  # with the image that was to be shown
    assert [part["type"] for part in session.turns[2]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}],
    ids=str,
)
def test_what_keeps_no_plain_cache_is_left_to_generate(tiny_model, tiny_processor, settings):
    model = copy.copy(tiny_model)
    model.generation_config = copy.deepcopy(tiny_model.generation_config)
    model.generation_config.update(**settings)
    session = ChatSession(model, tiny_processor)
    if "num_beams" in settings:  # a streamer cannot take back what another beam had
        with pytest.raises(ValueError, match="beam"):
            list(session.ask("one?", TOKENS))
        return
    ask(session, "one?", Image.new("RGB", (40, 30), "red"))
    ask(session, "two?")
    assert session.writer.prefixes._kept == []


@pytest.mark.parametrize("window", [24, 400])
def test_a_sliding_window_is_crossed(tiny_processor, make_image, window):
    text = MistralConfig(
        **{
            **make_config().text_config.to_dict(),
            "model_type": "mistral",
            "head_dim": None,
            "sliding_window": window,
        }
    )
    model = make_model(make_config(text_config=text))
    session = ChatSession(model, tiny_processor)
    ask(session, "one?", make_image(seed=1))
    ask(session, "two?")
    session.turns[1] = {"role": "assistant", "content": [{"type": "text", "text": "No."}]}
    ask(session, "three?")


def test_kept_prefixes_are_bounded(session, make_image):
    ask(session, "one?", make_image(seed=1))
    (one,) = session.writer.prefixes._kept
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in one.cache.layers)
    session.writer.prefixes = PrefixMemory(capacity=2 * held)
    for seed in range(2, 5):
        session.reset()
        ask(session, "one?", make_image(seed=seed))
    assert len(session.writer.prefixes._kept) == 2
    session.writer.prefixes = PrefixMemory(capacity=held // 2)
    ask(session, "two?")
    assert session.writer.prefixes._kept == []


def test_little_of_a_long_conversation_is_not_taken_from_it(session, make_image, reads):
    ask(session, "a question of some length?", make_image(seed=1))
    ask(session, "two?")
    other = session.another()
    ask(other, "hello?")
    reads.clear()
    ask(session, "three?")
    assert reads[0] < reads[1] / 2


# Silenced experts


def silenced_plain(session: ChatSession, turns: list, means: explain.Maps, silent: set) -> str:
    inputs = session.processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    maps = explain.encode(session.model, inputs.pop("pixel_values"))
    with torch.no_grad():
        image = session.model.get_image_features(
            explain.silence(maps, means, silent), return_dict=True
        )
    written = session.model.generate(
        **inputs, mm_encoder_outputs={"image": image}, max_new_tokens=TOKENS
    )
    text: str = session.processor.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def test_without_an_expert_and_with_it_again(session, make_image):
    with_all = ask(session, "one?", make_image(seed=1))
    ip: Any = session.processor.image_processor
    empty = explain.reference_means(session.model, ip, [Image.new("RGB", (9, 9), tuple(ip.fill))])
    turns = copy.copy(session.turns)
    without = "".join(session.again({"clip"}, TOKENS))
    assert without == silenced_plain(session, turns[:-1], empty, {"clip"})
    assert without != with_all
    assert session.turns == turns
    session.means = explain.reference_means(session.model, ip, [make_image(seed=s) for s in (7, 8)])
    by_means = "".join(session.again({"clip"}, TOKENS))
    assert by_means == silenced_plain(session, turns[:-1], session.means, {"clip"})
    assert by_means not in (with_all, without)
    assert "".join(session.again(set(), TOKENS)) == with_all


def test_silenced_it_stays_silenced_in_the_turns_that_follow(session, make_image):
    session.silenced = {"convnext"}
    session.means = explain.reference_means(
        session.model, session.processor.image_processor, [make_image(seed=7)]
    )
    session.add_image(make_image(seed=1))
    "".join(session.ask("one?", TOKENS))
    answer = "".join(session.ask("two?", TOKENS))
    expected = silenced_plain(session, session.turns[:-1], session.means, {"convnext"})
    assert answer == expected


def test_an_unknown_expert_is_named(session):
    with pytest.raises(ValueError, match="nothing has been asked"):
        list(session.again({"clip"}))
    session.silenced = {"clpi"}
    with pytest.raises(ValueError, match='no expert "clpi" in this model. Did you mean "clip"'):
        list(session.ask("one?", TOKENS))
    assert session.turns == []


# Many at once


def finished(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(60)
    return not any(thread.is_alive() for thread in threads)


def test_sessions_of_one_model_do_not_mix(session, make_image):
    answers: dict[int, list[str]] = {}
    expected: dict[int, list[str]] = {}

    def talk(seed: int, one: ChatSession, into: dict[int, list[str]]) -> None:
        one.add_image(make_image(seed=seed))
        into[seed] = ["".join(one.ask(text, TOKENS)) for text in ("one?", "two?")]

    threads = [
        threading.Thread(target=talk, args=(seed, session.another(), answers)) for seed in range(5)
    ]
    for thread in threads:
        thread.start()
    assert finished(threads)
    for seed in range(5):
        talk(seed, ChatSession(session.model, session.processor), expected)
    assert answers == expected


def test_who_leaves_the_queue_does_not_wait_for_the_others(session):
    first = session.ask("x" * 20, 60)
    next(first)
    waiting = iter(session.another().ask("y", 5))
    thread = threading.Thread(target=next, args=(waiting, None), daemon=True)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive() or not session.writer._turn.locked()
    first.close()
    assert finished([thread])
