"""Labels: exactly the assistant's words and end tokens, in the processor's own tokens.

Checked for every template with every family of tokenizer: byte-level BPE as Llama-3's, sentence-
piece-derived BPE as Vicuna's in its three spellings of the leading space, a unigram model, and
the mini suite's words and letters.
"""

from itertools import pairwise

import numpy as np
import pytest

from eagle_moe.processor import read_template
from tests.conversations import CONVERSATIONS, conversation
from tests.tokenizer_families import (
    FAMILIES,
    TOKENS_PER_IMAGE,
    byte_level,
    make_processor,
    metaspace,
)
from train.data.labels import IGNORE_INDEX, Encoder
from train.data.records import parse_record

TEMPLATES = ("vicuna", "llama3", "plain", "short", "llama3-release", "yi", "llama2")
WRITES_BOS = ("llama3-release",)  # `apply_chat_template` adds none to a prompt that begins with one
END = {
    "vicuna": "</s>",
    "short": "</s>",
    "llama3": "<|eot_id|>",
    "llama3-release": "<|eot_id|>",
    "yi": "<|im_end|>",
    "llama2": " </s>",
    "plain": "\n",
}


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return make_processor(FAMILIES[request.param]())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_supervised_tokens_are_the_answers_and_their_ends(processor, template, name):
    record = CONVERSATIONS[name]
    encoded = Encoder(processor, None, read_template(template))(record)
    learned = encoded.labels != IGNORE_INDEX
    np.testing.assert_array_equal(encoded.labels[learned], encoded.input_ids[learned])
    assert encoded.supervised == learned.sum() > 0

    # one run of supervised tokens per answer; each reads as that answer and its end token
    starts = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int)])) == 1)
    ends = np.flatnonzero(np.diff(np.concatenate([learned.astype(int), [0]])) == -1) + 1
    # families differ in whether a space is spelled before the first word: not a matter of labels
    said = [
        processor.tokenizer.decode(encoded.input_ids[start:end]).removeprefix(" ")
        for start, end in zip(starts, ends, strict=True)
    ]
    expected = [answer + END[template] for answer in record.text("assistant")]
    if template == "plain":  # user text is left out, so captions may stand side by side
        said, expected = ["".join(said)], ["".join(expected)]
    assert said == expected
    if template != "plain":
        end_id = processor.tokenizer.convert_tokens_to_ids(END[template].strip())
        assert [encoded.labels[end - 1] for end in ends] == [end_id] * len(expected)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_the_processors_own(processor, template, name, make_image):
    record = CONVERSATIONS[name]
    jinja = read_template(template)
    encoder = Encoder(processor, None, jinja)
    text, _ = encoder.render(record)
    images = [make_image(seed=n) for n in range(len(record.images))]
    own = processor(text=text, images=images or None, add_special_tokens=template not in WRITES_BOS)
    ids = encoder(record).input_ids
    assert ids.tolist() == own["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == TOKENS_PER_IMAGE * len(images)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_follows_the_very_prompt_that_generate_sees(processor, template):
    """No token before the first supervised one differs from what inference feeds the model."""
    record = CONVERSATIONS["one turn"]
    jinja = read_template(template)
    encoder = Encoder(processor, None, jinja)
    encoded = encoder(record)
    asked = encoder(conversation("<image>\nwhat is the text", images=1))
    prompt = processor.apply_chat_template(
        record.messages[:1], chat_template=jinja, add_generation_prompt=True
    )
    ids = processor.tokenizer(prompt, add_special_tokens=template not in WRITES_BOS)["input_ids"]
    at = ids.index(processor.image_token_id)
    ids[at : at + 1] = [processor.image_token_id] * TOKENS_PER_IMAGE
    first = int(np.argmax(encoded.labels != IGNORE_INDEX))
    assert encoded.input_ids[:first].tolist() == ids
    assert asked.supervised == 0


def test_rare_characters_are_learned_byte_by_byte():
    """Several tokens share one character: all of its bytes are supervised, not only the first."""
    processor = make_processor(metaspace("first"))
    encoded = Encoder(processor, None)(conversation("what", "ok \N{SNOWMAN}\N{SNOWMAN}"))
    learned = encoded.labels[encoded.labels != IGNORE_INDEX]
    tokens = processor.tokenizer.convert_ids_to_tokens(learned)
    assert tokens[-7:] == ["<0xE2>", "<0x98>", "<0x83>"] * 2 + ["</s>"]


def test_an_image_within_an_answer_is_not_learned():
    processor = make_processor(byte_level(), "short")
    encoded = Encoder(processor, None)(conversation("show", "here <image>\nit is", images=1))
    is_image = encoded.input_ids == processor.image_token_id
    assert is_image.sum() == TOKENS_PER_IMAGE
    assert (encoded.labels[is_image] == IGNORE_INDEX).all()
    learned = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert processor.tokenizer.decode(learned) == " here \nit is</s>"


def test_a_bos_in_the_template_is_not_doubled():
    processor = make_processor(byte_level())
    jinja = "{{ bos_token }}" + read_template("short")
    encoded = Encoder(processor, None, jinja)(conversation("what", "cat"))
    bos = processor.tokenizer.bos_token_id
    assert encoded.input_ids.tolist().count(bos) == 1
    assert encoded.input_ids[0] == bos


# Cutting


@pytest.mark.parametrize("max_length", range(11, 60, 6))
def test_text_is_cut_and_image_tokens_never(max_length):
    processor = make_processor(byte_level(), "short")
    record = conversation("<image>\nwhat is the text", "hello world", "and <image>", "b", images=2)
    whole = Encoder(processor, None)(record)
    cut = Encoder(processor, max_length)(record)
    image = processor.image_token_id
    assert whole.length == cut.length == len(whole.input_ids)
    assert len(cut.input_ids) == len(cut.labels) == min(max_length, whole.length)
    assert cut.cut == (max_length < whole.length)
    assert (cut.input_ids == image).sum() == 2 * TOKENS_PER_IMAGE
    # what is left of the text is its beginning, with the labels it had
    words = cut.input_ids[cut.input_ids != image]
    np.testing.assert_array_equal(
        words, whole.input_ids[whole.input_ids != image][: max_length - 2 * TOKENS_PER_IMAGE]
    )
    np.testing.assert_array_equal(
        cut.labels[cut.input_ids != image],
        whole.labels[whole.input_ids != image][: max_length - 2 * TOKENS_PER_IMAGE],
    )
    assert cut.supervised == (cut.labels != IGNORE_INDEX).sum()


def test_cut_after_the_last_image_is_a_plain_prefix():
    processor = make_processor(byte_level(), "short")
    record = CONVERSATIONS["several turns"]
    whole, cut = Encoder(processor, None)(record), Encoder(processor, 40)(record)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:40])
    np.testing.assert_array_equal(cut.labels, whole.labels[:40])


def test_nothing_left_to_learn_is_reported_as_zero():
    processor = make_processor(byte_level(), "vicuna")
    encoded = Encoder(processor, 20)(CONVERSATIONS["one turn"])
    assert encoded.cut
    assert encoded.supervised == 0


def test_images_that_cannot_fit_are_an_error_with_both_numbers():
    processor = make_processor(byte_level())
    with pytest.raises(ValueError, match=r'data\.json.*id "x".*4 images take 20 tokens.*is 19'):
        Encoder(processor, 19)(CONVERSATIONS["several images"])


# Refused


def test_a_template_without_assistant_spans_is_refused():
    processor = make_processor(byte_level())
    with pytest.raises(ValueError, match="no {% generation %} block"):
        Encoder(processor, None, "{{ messages[0].content }}")


def test_a_template_that_loses_an_image_is_refused():
    processor = make_processor(byte_level())
    jinja = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match=r'id "x".*0 image tokens for 1 images'):
        Encoder(processor, None, jinja)(CONVERSATIONS["one turn"])


def test_a_template_that_refuses_a_record_names_it():
    processor = make_processor(byte_level())
    raw = {"id": "s", "messages": [{"role": "user", "content": "a"}] * 2}
    raw["messages"].append({"role": "system", "content": "late"})
    with pytest.raises(ValueError, match=r'data\.json: record 0 \(id "s"\).*got system'):
        Encoder(processor, None)(parse_record(raw, 0, "data.json"))


def test_deliberate_mistake_tokenising_pieces_apart_gives_other_ids():
    """What this module avoids: the sum of the pieces is not the whole (LLaVA's mismatch)."""
    processor = make_processor(metaspace("normalizer"))
    record = CONVERSATIONS["several turns"]
    encoder = Encoder(processor, None)
    text, spans = encoder.render(record)
    bounds = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    tokenizer = processor.tokenizer
    apart = [tokenizer.bos_token_id]
    for piece in pieces:
        apart += tokenizer(piece, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    assert apart != whole
    assert len(apart) != len(whole)
