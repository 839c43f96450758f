"""Labels: exactly the assistant's words and end tokens, in the processor's own tokens.

Checked for every template with every family of tokenizer: byte-level BPE as Llama-3's, sentence-
piece-derived BPE as Vicuna's in its three spellings of the leading space, a unigram model, and
the mini suite's words and letters.
"""

import json
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from eagle_moe.image_processor import EagleMixImageProcessor
from eagle_moe.processor import EagleMixProcessor, read_template
from train.data.labels import IGNORE_INDEX, Encoder
from train.data.records import parse_record
from train.pretrain.tokenizer import build_tokenizer

TEMPLATES = ("vicuna", "llama3", "plain", "short", "llama3-release", "yi", "llama2")
WRITES_BOS = ("llama3-release",)  # `apply_chat_template` adds none to a prompt that begins with one
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. what is the text",
    "USER: what is this ASSISTANT: a cat sits on the mat. user assistant system hello world",
] * 4
TOKENS_PER_IMAGE = 5
END = {
    "vicuna": "</s>",
    "short": "</s>",
    "llama3": "<|eot_id|>",
    "llama3-release": "<|eot_id|>",
    "yi": "<|im_end|>",
    "llama2": " </s>",
    "plain": "\n",
}


def byte_level():
    """Llama-3's way: split by a pattern, then bytes; no space is added in front."""
    backend = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace(leading_space):
    """Llama-2's and Vicuna's way: spaces are letters, rare characters fall back to bytes."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, *bytes_], show_progress=False
    )
    learner.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(learner.to_str())["model"]
    backend = Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if leading_space == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=leading_space, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


FAMILIES = {
    "byte-level": byte_level,
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-normalizer": lambda: metaspace("normalizer"),
    "unigram": unigram,
    "mini": lambda: build_tokenizer().backend_tokenizer,
}


def make_processor(backend, template="vicuna"):
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    return EagleMixProcessor(
        EagleMixImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=TOKENS_PER_IMAGE,
        chat_template=read_template(template),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return make_processor(FAMILIES[request.param]())


def conversation(*turns, images=0, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    raw = {"id": "x", "messages": messages, "images": [f"{n}.png" for n in range(images)]}
    return parse_record(raw, 0, "data.json")


CONVERSATIONS = {
    "one turn": conversation("<image>\nwhat is the text", "hello", images=1),
    "several turns": conversation(
        "<image>\nwhat is this", "a cat", "on what", "the mat.", "sure", "yes", images=1
    ),
    "several images": conversation("<image><image>\nwhat <image>", "a b", "<image>", "c", images=4),
    "text only": conversation("what is the text", "hello world", "and", "so on"),
    "system": conversation("<image>\nwhat", "a cat", images=1, system="speak of cats"),
    "odd text": conversation("<image>\n(ok)  ", ") 12345 yes\n\nno: ", "x", "a  b", images=1),
    "answer repeats question": conversation("a cat", "a cat", "a cat", "a cat"),
}


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
