"""Prompts, token ids and labels against the official release's own, token for token.

The release's texts were made with its own code and slow tokenizers; see `eagle_release` for where
they lie. Ours go through the imported tokenizer, the chat templates, the encoder of training and
the processor of inference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.interop.tokenizer import release_template
from eagle_moe.processor import EagleMixProcessor, read_template
from tests.eagle_release import GOLDENS, needs_goldens
from tests.release_tokenizers import golden_tokenizer, write_golden_tokenizer
from train.data.labels import IGNORE_INDEX, Encoder
from train.data.records import Record, parse_record

pytestmark = needs_goldens
IMAGE = -200  # the release's stand-in for an image, until its features take the place
TOKENS = 3
TEMPLATES = {
    "plain": "plain",
    "v1": "vicuna",
    "llama3": "llama3-release",
    "yi_34b_chatml_direct": "yi",
    "llama_2": "llama2",
}
ROLES = {"human": "user", "gpt": "assistant"}
TEXT: dict[str, Any] = (
    json.loads((GOLDENS / "text.json").read_text())
    if (GOLDENS / "text.json").is_file()
    else {"templates": [], "tokenizer_image_token": []}
)


def name_of(entry: dict) -> str:
    return ", ".join(filter(None, map(entry.get, ("template", "tokenizer", "case", "text"))))


ENTRIES = [pytest.param(entry, id=name_of(entry)) for entry in TEXT["templates"]]
CHUNKS = [pytest.param(entry, id=name_of(entry)) for entry in TEXT["tokenizer_image_token"]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Callable[[str], PreTrainedTokenizerFast]:
    made: dict[str, PreTrainedTokenizerFast] = {}

    def tokenizer(described: str) -> PreTrainedTokenizerFast:
        if described not in made:
            made[described] = golden_tokenizer(described, tmp_path_factory.mktemp("tokenizer"))
        return made[described]

    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> EagleMixProcessor:
    return EagleMixProcessor(
        EagleMixImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=TOKENS,
        chat_template=read_template(TEMPLATES[template]),
    )


@pytest.fixture
def processor(entry, tokenizers) -> EagleMixProcessor:
    return make_processor(tokenizers(entry["tokenizer"]), entry["template"])


@pytest.fixture(params=[False, True], ids=["made", "saved and loaded"])
def served(request, processor, tmp_path) -> EagleMixProcessor:
    if not request.param:
        return processor
    processor.save_pretrained(tmp_path)
    return AutoProcessor.from_pretrained(tmp_path, local_files_only=True)


def messages(entry: dict) -> list[dict[str, str]]:
    """The conversation as our templates read it, placeholders in the text."""
    return [
        {"role": ROLES[turn["from"]], "content": turn["value"]}
        for turn in entry["conversation_after_image_rule"]
    ]


def record(entry: dict) -> Record:
    """The conversation as training reads it."""
    count = str(entry["conversation_after_image_rule"]).count("<image>")
    raw = {
        "id": entry["case"],
        "conversations": entry["conversation_after_image_rule"],
        "image": [f"{number}.png" for number in range(count)],
    }
    return parse_record(raw, 0, "text.json")


def collapsed(ids: list[int], labels: list[int], image: int) -> tuple[list[int], list[int]]:
    """With one `IMAGE` for the run of an image's placeholders, as the release writes it."""
    short_ids: list[int] = []
    short_labels: list[int] = []
    for is_image, group in groupby(zip(ids, labels, strict=True), lambda pair: pair[0] == image):
        pairs = list(group)
        if is_image:
            assert len(pairs) % TOKENS == 0
            assert all(label == IGNORE_INDEX for _, label in pairs)
            pairs = [(IMAGE, IGNORE_INDEX)] * (len(pairs) // TOKENS)
        short_ids += [token for token, _ in pairs]
        short_labels += [label for _, label in pairs]
    return short_ids, short_labels


def encoded(
    processor: EagleMixProcessor, entry: dict, rule: str, encoder: type[Encoder] = Encoder
) -> tuple[list[int], list[int]]:
    output = encoder(processor, None, labels=rule)(record(entry))
    ids, labels = output.input_ids.tolist(), output.labels.tolist()
    return collapsed(ids, labels, processor.image_token_id)


def spans_of(labels: list[int], processor: EagleMixProcessor) -> list[str]:
    """What runs of labels say, less the spaces that slow and fast tokenizers decode differently."""
    runs = groupby(labels, lambda label: label != IGNORE_INDEX)
    texts = [processor.tokenizer.decode(list(run)) for learned, run in runs if learned]
    return [text.replace(" ", "") for text in texts]


def test_every_official_template_of_the_goldens_has_ours():
    assert {entry["template"] for entry in TEXT["templates"]} == set(TEMPLATES)


@pytest.mark.parametrize("entry", CHUNKS)
def test_ids_of_a_text_with_placeholders(entry, tokenizers):
    tokenizer = tokenizers(entry["tokenizer"])
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(entry["text"]).input_ids
    assert [IMAGE if token == image else token for token in ids] == entry["ids"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_prompts(entry, processor):
    prompt = processor.apply_chat_template(messages(entry))
    asked = processor.apply_chat_template(messages(entry)[:1], add_generation_prompt=True)
    if entry["template"] == "plain":
        # The release trains on the caption alone and has no prompt to ask for one: what it writes
        # for inference repeats the question, which training leaves out. Ours asks as it trains.
        assert entry["prompt"] is None
        assert entry["inference_prompt_first_turn"] == messages(entry)[0]["content"] + "\n"
        assert (prompt, asked) == ("<image>" + messages(entry)[1]["content"] + "\n", "<image>")
        return
    # llama3-release writes the BOS that the release's tokenizer adds to its text
    bos = processor.tokenizer.bos_token if entry["template"] == "llama3" else ""
    assert prompt == bos + entry["prompt"]
    assert asked == bos + entry["inference_prompt_first_turn"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_ids_and_labels_of_training_by_the_releases_rule(entry, served):
    """Equal everywhere, samples that the release masks whole among them."""
    ids, labels = encoded(served, entry, "release")
    assert ids == entry["input_ids"]
    assert labels == entry["labels"]
    expected = [text.replace(" ", "") for text in entry["supervised_text"]]
    assert spans_of(labels, served) == expected


@pytest.mark.parametrize("entry", ENTRIES)
def test_labels_by_our_own_rule(entry, processor):
    """Equal wherever the release's counts are right. Where they are not, it masks the sample and
    we deliberately differ: the answers are learned."""
    ids, labels = encoded(processor, entry, "spans")
    assert ids == entry["input_ids"]
    if not entry["mismatch_warning"]:
        assert labels == entry["labels"]
        return
    assert all(label == IGNORE_INDEX for label in entry["labels"])
    end = "<|im_end|>"
    answers = [turn["content"] for turn in messages(entry) if turn["role"] == "assistant"]
    assert spans_of(labels, processor) == [(text + end).replace(" ", "") for text in answers]


@pytest.mark.parametrize("entry", ENTRIES)
def test_ids_of_the_processor(entry, served, make_image):
    """`apply_chat_template` to ids, a batch of two, pictures and all."""
    turns = [
        {"role": turn["role"], "content": list(items(turn["content"], make_image))}
        for turn in messages(entry)
    ]
    pair = [turns, turns]
    batch = served.apply_chat_template(pair, tokenize=True, return_dict=True, return_tensors="pt")
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[mask.bool()].tolist()
        nothing = [IGNORE_INDEX] * len(ids)
        assert collapsed(ids, nothing, served.image_token_id)[0] == entry["input_ids"]
    count = entry["input_ids"].count(IMAGE)
    assert ("pixel_values" in batch) == (count > 0)
    if count:
        assert batch["pixel_values"].shape == torch.Size([2 * count, 3, 16, 16])


def items(content: str, make_image: Callable[..., Any]) -> Any:
    """A turn's text as content items: the template writes the line break after a picture."""
    before, image, rest = content.partition("<image>\n")
    assert not before or not image
    if image:
        yield {"type": "image", "image": make_image()}
    yield {"type": "text", "text": rest if image else content}


def test_the_imported_family_gets_its_template(tokenizers):
    expected = {"tiny_sp legacy": "vicuna", "tiny_sp+chatml": "yi", "tiny_llama3": "llama3-release"}
    for entry in TEXT["templates"]:
        tokenizer = tokenizers(entry["tokenizer"])
        prefix = next(key for key in expected if entry["tokenizer"].startswith(key))
        assert release_template(tokenizer) == expected[prefix]


# Deliberate mistakes


def entries(template: str, tokenizer: str = "") -> list[dict]:
    found = [
        entry
        for entry in TEXT["templates"]
        if entry["template"] == template and tokenizer in entry["tokenizer"]
    ]
    assert found
    return found


@pytest.mark.parametrize("entry", ENTRIES)
def test_deliberate_mistake_no_prefix_after_an_image(entry, tmp_path):
    """transformers' own reading of the folder: wrong in every prompt with an image, for
    tokenizers from sentencepiece with `legacy: false`."""
    folder = write_golden_tokenizer(entry["tokenizer"], tmp_path)
    plain = AutoTokenizer.from_pretrained(
        folder, extra_special_tokens={"image_token": "<image>"}, local_files_only=True
    )
    ids, _ = encoded(make_processor(plain, entry["template"]), entry, "spans")
    wrong = entry["has_image"] and "legacy=False" in entry["tokenizer"]
    assert (ids != entry["input_ids"]) == wrong


def test_deliberate_mistake_one_bos(tokenizers):
    for entry in entries("llama3"):
        processor = make_processor(tokenizers(entry["tokenizer"]), "llama3")
        processor.chat_template = read_template("llama3")
        ids, labels = encoded(processor, entry, "spans")
        assert ids == entry["input_ids"][1:]
        assert labels == entry["labels"][1:]


class ShortSpans(Encoder):
    def render(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
        text, spans = super().render(record)
        ends = [re.search(r"(<[^<>]*>|\n)$", text[start:end])[0] for start, end in spans]
        return text, [(a, b - len(end)) for (a, b), end in zip(spans, ends, strict=True)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_deliberate_mistake_a_span_one_token_short(entry, processor):
    """The last token of every answer, its end, is left out."""
    ids, labels = encoded(processor, entry, "spans", ShortSpans)
    assert ids == entry["input_ids"]
    assert labels != entry["labels"]
    if not entry["mismatch_warning"]:
        wrong = sum(ours != theirs for ours, theirs in zip(labels, entry["labels"], strict=True))
        assert wrong == len(entry["supervised_text"])
