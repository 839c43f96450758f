from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle_moe.processor import TEMPLATES, EagleMixProcessor, read_template
from tests.conftest import make_tokenizer

TOKENS = 16
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def user(text: str, images: int = 0) -> dict:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


TURNS = [user("q1", images=2), assistant("a1"), user("q2"), assistant("a2")]


@pytest.mark.parametrize(
    ("template", "expected", "spans"),
    [
        (
            "vicuna",
            f"{SYSTEM} USER: <image>\n<image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
            [" a1</s>", " a2</s>"],
        ),
        (
            "short",
            "USER: <image>\n<image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
            [" a1</s>", " a2</s>"],
        ),
        (
            "llama3",
            f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nq1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>",
            ["a1<|eot_id|>", "a2<|eot_id|>"],
        ),
        (
            "yi",
            "<|im_start|>system\nAnswer the questions.<|im_end|>"
            "<|im_start|>user\n<image>\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
            "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>",
            ["a1<|im_end|>", "a2<|im_end|>"],
        ),
        ("plain", "<image>\n<image>a1\na2\n", ["a1\na2\n"]),
    ],
)
def test_templates_write_and_mark_what_they_promise(tiny_processor, template, expected, spans):
    """Supervised: the answer, its leading space and its end token; nothing else, ever."""
    text = read_template(template)
    assert tiny_processor.apply_chat_template(TURNS, chat_template=text) == expected
    output = tiny_processor.tokenizer.apply_chat_template(
        TURNS, chat_template=text, return_dict=True, return_assistant_tokens_mask=True
    )
    found, run = [], []
    for token, kept in zip(output["input_ids"], [*output["assistant_masks"], 0], strict=False):
        if kept:
            run.append(token)
        elif run:
            found.append(tiny_processor.decode(run))
            run = []
    found += [tiny_processor.decode(run)] if run else []
    assert found == spans


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("vicuna", "q1 ASSISTANT:"),
        ("short", "q1 ASSISTANT:"),
        ("llama3", "q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("llama3-release", "q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("yi", "q1<|im_end|><|im_start|>assistant\n"),
        ("llama2", "q1 [/INST]"),
        ("plain", "<image>"),
    ],
)
def test_generation_prompt_ends_where_the_answer_begins(tiny_processor, template, end):
    text = read_template(template)
    prompt = tiny_processor.apply_chat_template(
        [user("q1", 1)], chat_template=text, add_generation_prompt=True
    )
    assert prompt.endswith(end)
    whole = tiny_processor.apply_chat_template([user("q1", 1), assistant("a")], chat_template=text)
    assert whole.startswith(prompt)


def test_llama2_writes_the_system_text_into_the_first_question(tiny_processor):
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    text = read_template("llama2")
    assert tiny_processor.apply_chat_template(turns, chat_template=text) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\n<image>\nq1 [/INST] a1 </s>"
        "<s>[INST] q2 [/INST] a2 </s>"
    )
    for without_question in (turns[:1], [turns[0], turns[2]]):
        with pytest.raises(Exception, match="the first turn must be the user's"):
            tiny_processor.apply_chat_template(without_question, chat_template=text)


def test_llama3_release_has_both_bos_tokens_and_no_third(tiny_processor):
    text = read_template("llama3-release")
    prompt = tiny_processor.apply_chat_template(TURNS, chat_template=text)
    ours = tiny_processor.apply_chat_template(TURNS, chat_template=read_template("llama3"))
    assert prompt == "<s><s>" + ours
    ids = tiny_processor.tokenizer.apply_chat_template(TURNS, chat_template=text)["input_ids"]
    assert ids.count(tiny_processor.tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("template", ["vicuna", "short", "llama3", "yi", "llama2"])
def test_a_system_message_replaces_the_default(tiny_processor, template):
    turns = [{"role": "system", "content": "Be brief."}, user("q")]
    prompt = tiny_processor.apply_chat_template(turns, chat_template=read_template(template))
    assert "Be brief." in prompt
    assert "curious user" not in prompt


@pytest.mark.parametrize("template", ["vicuna", "short", "llama3", "yi", "llama2"])
def test_unknown_roles_and_content_are_refused(tiny_processor, template):
    text = read_template(template)
    with pytest.raises(Exception, match="got tool"):
        tiny_processor.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=text)
    video = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(Exception, match="got video"):
        tiny_processor.apply_chat_template(video, chat_template=text)


def test_plain_text_content_is_taken_as_it_is(tiny_processor):
    turns = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}]
    assert tiny_processor.apply_chat_template(turns) == "USER: <image>\nq ASSISTANT: a</s>"
    plain = tiny_processor.apply_chat_template(turns, chat_template=read_template("plain"))
    assert plain == "<image>a\n"


def test_template_names_and_files(tmp_path):
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "my.jinja")) == "{{ messages }}"
    with pytest.raises(ValueError, match=r'no "vicunna".*Did you mean "vicuna"'):
        read_template("vicunna")


def test_templates_are_composed_into_one_string(tiny_processor, tmp_path):
    for file in TEMPLATES.glob("*.jinja"):
        if file.stem.startswith("_"):
            with pytest.raises(ValueError, match=f'no "{file.stem}"'):
                read_template(file.stem)
        else:
            assert "{%- include" not in read_template(file.stem)
    mine = tmp_path / "mine.jinja"
    mine.write_text('{%- set default_system = "Hi." -%}\n{%- include "_vicuna.jinja" -%}\n')
    prompt = tiny_processor.apply_chat_template([user("q")], chat_template=read_template(str(mine)))
    assert prompt == "Hi. USER: q "
    mine.write_text('{%- include "_vicunna.jinja" -%}')
    with pytest.raises(ValueError, match=r'mine\.jinja: includes _vicunna.*mean "_vicuna\.jinja"'):
        read_template(str(mine))


def test_every_image_becomes_its_placeholders(tiny_processor, make_image):
    images = [make_image(seed=i) for i in range(3)]
    texts = ["<image>\na <image>\nb", "none", "<image>\nc"]
    output = tiny_processor(
        text=texts, images=[images[:2], [], images[2:]], padding=True, return_tensors="pt"
    )
    assert (output["input_ids"] == 3).sum(1).tolist() == [2 * TOKENS, 0, TOKENS]
    assert output["pixel_values"].shape == (3, 3, 64, 64)
    assert output["pixel_values"].dtype == torch.uint8


def test_adjacent_images_keep_a_token_between(tiny_processor, make_image):
    """Serving engines tell images apart by runs of placeholders."""
    turns = [user("q", images=3)]
    output = tiny_processor(
        text=tiny_processor.apply_chat_template(turns), images=[make_image() for _ in range(3)]
    )
    placeholders = torch.tensor(output["input_ids"][0]) == 3
    starts = placeholders & ~torch.nn.functional.pad(placeholders[:-1], (1, 0))
    assert starts.sum() == 3


def test_padding_is_on_the_left(tiny_processor):
    output = tiny_processor(text=["a", "abc"], padding=True, return_tensors="pt")
    assert output["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_one_bos_however_the_prompt_is_made(tiny_processor, make_image):
    turns = [user("q", 1)]
    turns[0]["content"][0] = {"type": "image", "image": make_image()}
    for template in ("vicuna", "llama3", "short", "plain"):
        text = read_template(template)
        once = tiny_processor.apply_chat_template(
            turns, chat_template=text, tokenize=True, return_dict=True
        )["input_ids"][0]
        written = tiny_processor.apply_chat_template(turns, chat_template=text)
        twice = tiny_processor(text=written, images=make_image())["input_ids"][0]
        assert list(once) == list(twice)
        assert list(once).count(1) == 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_images_names_both_numbers(tiny_processor, make_image, count):
    images = [make_image() for _ in range(count)] or None
    with pytest.raises(ValueError, match=rf"the text has 2 <image> but {count} images"):
        tiny_processor(text="<image> and <image>", images=images)


def test_images_in_any_container(tiny_processor, make_image):
    pair = torch.stack([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2)
    output = tiny_processor(text="<image> <image>", images=pair)
    assert output["pixel_values"].shape == (2, 3, 64, 64)
    for none in (None, [], [[]]):
        assert set(tiny_processor(text="hello", images=none)) == {"input_ids", "attention_mask"}


def test_images_of_one_prompt_are_not_lent_to_another(tiny_processor, make_image):
    with pytest.raises(ValueError, match="prompt 0 has 1 <image> but 2 images"):
        tiny_processor(text=["<image> a", "<image> b"], images=[[make_image(), make_image()], []])


def test_truncation_never_cuts_an_image(tiny_processor, make_image):
    with pytest.raises(ValueError, match="image"):
        tiny_processor(text="<image> a", images=make_image(), truncation=True, max_length=10)


def test_what_engines_ask_for(tiny_processor, make_image):
    counts = tiny_processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [30, 40]])
    assert counts.num_image_tokens == [TOKENS, TOKENS]
    assert counts.num_image_patches == [1, 1]
    output = tiny_processor(
        text="a<image>b",
        images=make_image(),
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )
    assert sum(output["mm_token_type_ids"][0]) == TOKENS
    offsets = output["text_replacement_offsets"][0]
    assert [(o["type"], o["span"]) for o in offsets] == [("image", (1, 8))]
    assert tiny_processor.image_token_ids == [3]


def test_image_token_must_be_one_special_token(tiny_processor):
    vocab = {"<unk>": 0, "a": 1}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    without = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ValueError, match="<image> must be one special token"):
        EagleMixProcessor(tiny_processor.image_processor, without)
    ordinary = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ordinary.add_tokens(["<image>"])
    with pytest.raises(ValueError, match="<image> must be one special token"):
        EagleMixProcessor(tiny_processor.image_processor, ordinary)


def test_settings_survive_saving(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    again = EagleMixProcessor.from_pretrained(tmp_path)
    assert again.image_seq_length == TOKENS
    assert again.image_token_id == 3
    assert again.chat_template == tiny_processor.chat_template
    assert again.tokenizer.padding_side == "left"
    assert again.image_processor.to_json_string() == tiny_processor.image_processor.to_json_string()


def test_a_tokenizer_is_made_to_pad_left(tiny_processor):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    EagleMixProcessor(tiny_processor.image_processor, tokenizer)
    assert tokenizer.padding_side == "left"


QUESTIONS = (("what?", 1), ("which of the two is larger?", 2), ("hello", 0), ("a longer one", 1))


@torch.no_grad()
def test_a_batch_of_four_equals_the_four_alone(tiny_model, tiny_processor, make_image):
    """One image, two images, none, one: token for token, padded on the left."""
    seeds = iter(range(9))
    chats = []
    for text, images in QUESTIONS:
        pictures = [{"type": "image", "image": make_image(seed=next(seeds))} for _ in range(images)]
        chats.append([{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}])

    def answer(chats: list) -> list[list[int]]:
        inputs = tiny_processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = tiny_model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = answer(chats)
    for chat, tokens in zip(chats, together, strict=True):
        (alone,) = answer([chat])
        assert alone == tokens[: len(alone)]
        assert set(tokens[len(alone) :]) <= {0}  # padding behind an early end
    assert len({tuple(tokens) for tokens in together}) == len(chats)  # and they do differ
