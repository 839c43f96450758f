"""The imported tokenizer against sentencepiece itself, cut as the slow Llama tokenizer cuts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eagle_moe.interop.tokenizer import load_release_tokenizer, release_template
from tests.release_tokenizers import pieces, write_llama3, write_sentencepiece

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: what is shown in this picture? ASSISTANT: a red boat on a lake.",
    "The assistant gives helpful, detailed, and polite answers to the questions.",
    "system user and assistant see the boat   on  the lake",
] * 8
TEXTS = [
    "what is shown?",
    " starts with a space",
    "  with two, and ends so  ",
    "▁spelled out",
    "<image>",
    "<image>\nwhat is shown",
    "see <image> and <image>\nthe boat",
    "<image><image> a",
    " <image> ",
    "a</s>user: what",
    "a </s> user</s></s> what\n</s>\n </s>a",
    "</s>what <s>is",
    " </s>what",
    "<image></s>what<image> </s>",
    "\n\n a\n</s>",
    "rare: ü 数 🦅 \t x<unk>y",
    "",
    " ",
]


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., Path]:
    """A small sentencepiece model with Llama's rules, or others."""

    def train(**changes: object) -> Path:
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=model,
            **{
                "vocab_size": 380,
                "model_type": "bpe",
                "byte_fallback": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "allow_whitespace_only_pieces": True,
                "minloglevel": 2,
                **changes,
            },
        )
        file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
        file.write_bytes(model.getvalue())
        return file

    return train


@pytest.fixture(scope="module")
def model(train) -> Path:
    return train()


def slow_ids(
    model: Path,
    text: str,
    legacy: bool,
    image: int,
    bos: bool = True,
    added: dict[str, int] | None = None,
    ordinary: dict[str, int] | None = None,
) -> list[int]:
    """Chunk by chunk, with the rules of transformers 4.44's slow `LlamaTokenizer`.

    `added` are special tokens beside the three of the model, `ordinary` are not special.
    """
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, **(added or {})}
    cuts = special | (ordinary or {})
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    if not legacy:
        proto.normalizer_spec.add_dummy_prefix = False
    encode = SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    space = encode("▁") if not legacy else None
    ids = [1] if bos else []
    for number, chunk in enumerate(text.split("<image>")):
        ids += [image] if number else []
        if not chunk:
            continue
        found: list[int] = []
        first = "" if legacy else "▁"
        between = "|".join(map(re.escape, cuts))
        for part in filter(None, re.split(f"({between})", first + chunk)):
            found += [cuts[part]] if part in cuts else encode(part)
        if not legacy and found[:1] == space and len(found) > 1 and found[1] in special.values():
            found = found[1:]
        ids += found
    return ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("added", [{}, {"<|im_start|>": 0, "<|im_end|>": 1}])
def test_ids_are_sentencepieces_own(model, tmp_path, legacy, bos, added):
    added = {content: pieces(model) + number for content, number in added.items()}
    folder = write_sentencepiece(tmp_path, model, added, legacy=legacy, add_bos_token=bos)
    tokenizer = load_release_tokenizer(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image == pieces(model) + len(added)
    texts = [*TEXTS, *(text.replace("</s>", "<|im_end|>") for text in TEXTS)]
    expected = [slow_ids(model, text, legacy, image, bos, added) for text in texts]
    assert [tokenizer(text).input_ids for text in texts] == expected
    assert tokenizer(texts).input_ids == expected

    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again(texts).input_ids == expected
    assert again.init_kwargs["legacy"] is legacy
    assert (again.pad_token, again.model_max_length, again.image_token) == (
        "<unk>",
        2048,
        "<image>",
    )


def test_deliberate_mistake_no_prefix_after_an_image(model, tmp_path):
    """What transformers makes of the same folder: one token fewer, before the line break."""
    write_sentencepiece(tmp_path, model, legacy=False)
    plain = AutoTokenizer.from_pretrained(
        tmp_path, extra_special_tokens={"image_token": "<image>"}, local_files_only=True
    )
    text = "<image>\nwhat is shown"
    assert len(plain(text).input_ids) == len(load_release_tokenizer(tmp_path)(text).input_ids) - 1


def test_a_model_without_dummy_prefix_gets_none(train, tmp_path):
    """As Yi's. With `legacy: false` the slow tokenizer writes one all the same."""
    model = train(add_dummy_prefix=False)
    for legacy in (True, False):
        folder = write_sentencepiece(tmp_path / str(legacy), model, legacy=legacy)
        tokenizer = load_release_tokenizer(folder)
        image = tokenizer.convert_tokens_to_ids("<image>")
        for text in TEXTS:
            assert tokenizer(text).input_ids == slow_ids(model, text, legacy, image)


def test_what_is_not_said_is_as_the_slow_tokenizer_has_it(model, tmp_path):
    """No tokenizer_config.json: legacy, BOS, no EOS."""
    write_sentencepiece(tmp_path, model)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_release_tokenizer(tmp_path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for text in TEXTS:
        assert tokenizer(text).input_ids == slow_ids(model, text, True, image)
    assert tokenizer.init_kwargs["legacy"] is True


@pytest.mark.parametrize("legacy", [True, False])
def test_an_added_token_that_is_not_special_cuts_too(model, tmp_path, legacy):
    write_sentencepiece(tmp_path, model, {"<ref>": pieces(model)}, legacy=legacy)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"][str(pieces(model))]["special"] = False
    file.write_text(json.dumps(settings))
    tokenizer = load_release_tokenizer(tmp_path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ordinary = {"<ref>": pieces(model)}
    for text in ("see <ref>what", "<ref>what</s>a", " <ref> what<image><ref>the<ref><ref>"):
        assert tokenizer(text).input_ids == slow_ids(model, text, legacy, image, ordinary=ordinary)


def test_text_comes_back(model, tmp_path):
    tokenizer = load_release_tokenizer(write_sentencepiece(tmp_path, model))
    text = "A red boat ü 🦅\non a lake."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    """A byte-level tokenizer file in the manner of Llama-3, without a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    file = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    backend.save(str(file))
    return file


def test_llama3_gets_the_padding_token_of_official_training(llama3, tmp_path):
    tokenizer = load_release_tokenizer(write_llama3(tmp_path, llama3))
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<image>"]) == [259, 260]
    assert tokenizer("a<image>\nb").input_ids == [
        256,
        *tokenizer.convert_tokens_to_ids(["a", "<image>", "Ċ", "b"]),
    ]
    own = load_release_tokenizer(write_llama3(tmp_path, llama3, pad_token="<|eot_id|>"))
    assert own.pad_token == "<|eot_id|>"


def test_the_family_decides_the_template(model, llama3, tmp_path):
    chatml = {"<|im_start|>": pieces(model), "<|im_end|>": pieces(model) + 1}
    for folder, name in (
        (write_sentencepiece(tmp_path / "vicuna", model), "vicuna"),
        (write_sentencepiece(tmp_path / "yi", model, chatml), "yi"),
        (write_llama3(tmp_path / "llama3", llama3), "llama3-release"),
    ):
        assert release_template(load_release_tokenizer(folder)) == name


# Refused


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer \(neither tokenizer.model nor tokenizer."):
        load_release_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "without a single piece"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (None, "Git LFS"),
    ],
)
def test_a_damaged_model(model, tmp_path, content, fault):
    write_sentencepiece(tmp_path, model)
    whole = model.read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:1000] if content is None else content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{fault}"):
        load_release_tokenizer(tmp_path)


def test_a_damaged_tokenizer_file(llama3, tmp_path):
    write_llama3(tmp_path, llama3)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        load_release_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "not a byte-pair model"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"changes the text.*nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "changes the text"),
    ],
)
def test_a_model_that_is_not_like_llamas(train, tmp_path, changes, fault):
    write_sentencepiece(tmp_path, train(**changes))
    with pytest.raises(ValueError, match=rf"tokenizer\.model: .*{fault}"):
        load_release_tokenizer(tmp_path)


def test_settings_that_would_give_other_ids(model, llama3, tmp_path):
    settings = write_sentencepiece(tmp_path / "a", model) / "tokenizer_config.json"
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is not valid JSON"):
        load_release_tokenizer(tmp_path / "a")
    write_sentencepiece(tmp_path / "b", model, tokenizer_class="YiTokenizer")
    with pytest.raises(ValueError, match="tokenizer_class = YiTokenizer"):
        load_release_tokenizer(tmp_path / "b")
    write_sentencepiece(tmp_path / "c", model, {"<|im_start|>": pieces(model) + 5})
    with pytest.raises(ValueError, match=r"<\|im_start\|> should be token 385"):
        load_release_tokenizer(tmp_path / "c")
    settings = write_sentencepiece(tmp_path / "d", model) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"rstrip": false', '"rstrip": true'))
    with pytest.raises(ValueError, match="takes in the spaces around it"):
        load_release_tokenizer(tmp_path / "d")


def test_a_converted_file_alone_does_not_say_where_spaces_belong(model, tmp_path):
    tokenizer = load_release_tokenizer(write_sentencepiece(tmp_path / "slow", model))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(tmp_path / "fast")
    with pytest.raises(ValueError, match=r"converted from a tokenizer\.model"):
        load_release_tokenizer(tmp_path / "fast")
