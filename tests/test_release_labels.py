"""The official label rule beyond its golden texts (`test_golden_text`): odd samples, limits,
refusals, and what a run says about samples that it masks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eagle_moe.processor import read_template
from tests.conversations import conversation
from tests.tokenizer_families import make_processor, metaspace
from train.data import DataSpec, build_dataset, check_supervision
from train.data.examine import examine
from train.data.labels import IGNORE_INDEX, Encoder
from train.data.release_labels import TEMPLATES, ReleaseLabels


def processor_of(template="vicuna", legacy=True):
    """Spaces are written as the slow tokenizer does: before every piece if `legacy`."""
    processor = make_processor(metaspace("normalizer" if legacy else "first"), template)
    processor.tokenizer.init_kwargs["legacy"] = legacy
    return processor


TURNS = conversation(
    "<image>\nwhat is this", "a cat", "on what", "the mat.", "sure", "yes", images=1
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("record", [TURNS, conversation("what is this", "a cat")])
def test_it_is_the_spans_rule_where_the_counts_are_right(template, record):
    processor = processor_of(template)
    if template == "yi":  # a rule for tokenizers without a BOS
        backend = processor.tokenizer.backend_tokenizer
        backend.post_processor = type(backend.post_processor)(single="$A", special_tokens=[])
    elif template == "plain":
        record = conversation("<image>\nwhat", "a cat", images=1)
    spans = Encoder(processor, None)(record)
    release = Encoder(processor, None, labels="release")(record)
    assert release.input_ids.tolist() == spans.input_ids.tolist()
    assert release.labels.tolist() == spans.labels.tolist()
    assert release.supervised == spans.supervised > 0


def test_an_unexpected_mark_in_a_question_masks_the_whole_sample():
    record = conversation("say ASSISTANT: hello", "a cat")
    encoder = Encoder(processor_of(), None, labels="release")
    assert encoder(record).supervised == 0
    assert Encoder(processor_of(), None)(record).supervised > 0


def test_a_wrong_correction_masks_the_whole_sample():
    """`legacy: false` takes a token off each later round, which this tokenizer did not put on."""
    processor = processor_of(legacy=True)
    processor.tokenizer.init_kwargs["legacy"] = False
    encoder = Encoder(processor, None, labels="release")
    assert encoder(TURNS).supervised == 0
    assert encoder(conversation("what is this", "a cat")).supervised > 0  # one round only


def test_samples_at_the_limit_are_not_masked_whole():
    """The release compares counts only below its length limit."""
    processor = processor_of(legacy=True)
    processor.tokenizer.init_kwargs["legacy"] = False
    text, _ = Encoder(processor, None).render(TURNS)
    ids = np.asarray(processor.tokenizer(text)["input_ids"])
    counted = len(ids) - 2  # two later rounds, one token off each
    template = processor.chat_template
    below = ReleaseLabels(processor.tokenizer, template, counted + 1)(text, ids)
    at = ReleaseLabels(processor.tokenizer, template, counted)(text, ids)
    assert (below.sum(), at.sum() > 0) == (0, True)


def test_a_template_that_the_release_does_not_have():
    with pytest.raises(ValueError, match=r"none of those that official.*plain, vicuna"):
        Encoder(processor_of("short"), None, labels="release")
    mine = read_template("vicuna").replace("USER", "HUMAN")
    with pytest.raises(ValueError, match="none of those that official"):
        Encoder(processor_of(), None, mine, labels="release")


@pytest.mark.parametrize("template", ["vicuna", "yi"])
def test_a_tokenizer_that_does_not_say_whether_it_is_legacy(template):
    with pytest.raises(ValueError, match=r"depend on the tokenizer's `legacy`"):
        Encoder(make_processor(metaspace("first"), template), None, labels="release")
    Encoder(make_processor(metaspace("first"), "llama3"), None, labels="release")


def test_masked_samples_are_counted_named_and_refused(tmp_path):
    """Through a recipe's data entry: the doctor and the start of a run say which and why."""
    file = tmp_path / "data.json"
    answer = {"from": "gpt", "value": "a cat"}
    rows = [
        {"id": name, "conversations": [{"from": "human", "value": text}, answer]}
        for name, text in (("good", "what is this"), ("odd", "say ASSISTANT: hello"))
    ]
    file.write_text(json.dumps(rows))
    processor = processor_of()
    spec = DataSpec.parse({"path": str(file), "labels": "release"}, "recipe")
    dataset = build_dataset([spec], processor, max_length=200)
    with pytest.raises(ValueError, match=r"1 of 2 samples.*odd.*`labels: release` masks them"):
        check_supervision(dataset)
    found = examine(spec, Encoder(processor, 200, None, spec.labels))
    assert [sample.id for sample in found.faults("unsupervised")] == ["odd"]
    assert "the counts of `labels: release` do not add up" in found.bad[0].reason
    assert (dataset[0]["labels"] != IGNORE_INDEX).any()

    default = build_dataset([DataSpec(path=str(file))], processor, max_length=200)
    assert check_supervision(default).unsupervised == 0
    with pytest.raises(ValueError, match="labels"):
        DataSpec.parse({"path": str(file), "labels": "counts"}, "recipe")
