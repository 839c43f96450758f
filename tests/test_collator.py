"""Collator: right-padded, nothing of the padding is learned or attended to, images in order."""

import pytest
import torch

from eagle_moe.processor import EagleMixProcessor
from tests.conftest import CANVAS, make_tokenizer
from train.data import NOT_FOR_THE_MODEL, Collator
from train.data.dataset import Seen
from train.data.labels import IGNORE_INDEX


def sample(processor, name, text, images=0):
    ids = [processor.tokenizer.bos_token_id]
    ids += [processor.image_token_id] * (images * processor.image_seq_length)
    ids += processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [IGNORE_INDEX] * (len(ids) - 1) + ids[-1:]
    canvas = torch.arange(3 * CANVAS * CANVAS).remainder(251).to(torch.uint8)
    canvas = canvas.view(3, CANVAS, CANVAS)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "pixel_values": [canvas + ord(name) + number for number in range(images)],
        "id": name,
        "seen": Seen(ord(name), flags=1),
    }


def inputs(batch):
    """What the trainer hands on to the model."""
    return {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}


def test_batch(tiny_processor):
    samples = [
        sample(tiny_processor, "a", "xyz", images=1),
        sample(tiny_processor, "b", "longer text"),
        sample(tiny_processor, "c", "<unk>", images=2),  # ends with the pad token itself
    ]
    batch = Collator(tiny_processor)(samples)
    longest = max(len(item["input_ids"]) for item in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    for row, item in enumerate(samples):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert torch.equal(batch["labels"][row, :length], item["labels"])
        assert (batch["input_ids"][row, length:] == tiny_processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][row].sum() == length
        assert batch["attention_mask"][row, :length].all()
    expected = [*samples[0]["pixel_values"], *samples[2]["pixel_values"]]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["seen"] == [item["seen"] for item in samples]


def test_a_batch_without_images_has_no_pixel_values(tiny_processor):
    batch = Collator(tiny_processor)([sample(tiny_processor, "a", "x")])
    assert set(batch) == {"input_ids", "labels", "attention_mask", *NOT_FOR_THE_MODEL}


def test_the_model_takes_a_batch_and_padding_does_not_matter(tiny_processor, tiny_model):
    samples = [sample(tiny_processor, "a", "xyz", images=1), sample(tiny_processor, "b", "longer")]
    collator = Collator(tiny_processor)
    with torch.no_grad():
        together = tiny_model(**inputs(collator(samples))).logits
        for row, item in enumerate(samples):
            alone = tiny_model(**inputs(collator([item]))).logits
            torch.testing.assert_close(
                together[row, : alone.shape[1]], alone[0], atol=2e-4, rtol=1e-3
            )


def test_image_tokens_without_their_image_are_named(tiny_processor):
    broken = sample(tiny_processor, "a", "x", images=2)
    broken["pixel_values"].pop()
    with pytest.raises(ValueError, match=r'sample "a": 32 image tokens for 1 images of 16'):
        Collator(tiny_processor)([broken])


def test_a_tokenizer_without_pad_token_is_refused(tiny_processor):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    processor = EagleMixProcessor(tiny_processor.image_processor, tokenizer)
    with pytest.raises(ValueError, match="no pad token"):
        Collator(processor)


def test_packed_rows_say_where_their_samples_begin(tiny_processor):
    a = sample(tiny_processor, "a", "xyz")  # 4 tokens
    b = sample(tiny_processor, "b", "longer", images=1)
    c = sample(tiny_processor, "c", "<unk>")
    batch = Collator(tiny_processor)([[a, b], [c]])
    first, second = (len(item["input_ids"]) for item in (a, b))
    width = first + second
    assert batch["input_ids"].shape == (2, width)
    assert torch.equal(batch["input_ids"][0], torch.cat([a["input_ids"], b["input_ids"]]))
    expected = [*range(first), *range(second)]
    assert batch["position_ids"][0].tolist() == expected
    assert batch["position_ids"][1].tolist() == [0, 1, *range(width - 2)]  # padding is apart, too
    assert batch["cu_seq_lens_q"].tolist() == [0, first, width, width + 2, 2 * width]
    assert batch["max_length_q"] == max(second, width - 2)
    assert (batch["labels"][1, 2:] == IGNORE_INDEX).all()
    assert batch["sample_ids"] == ["a", "b", "c"]
    assert batch["seen"] == [item["seen"] for item in (a, b, c)]
    assert "attention_mask" not in batch


def test_the_first_token_of_a_packed_sample_is_no_target(tiny_processor):
    """Unpacked, nothing predicts it; in a row, the sample before it would have to."""
    items = [sample(tiny_processor, name, "xyz") for name in "ab"]
    for item in items:
        item["labels"] = item["input_ids"].clone()
    labels = Collator(tiny_processor)([items])["labels"][0]
    assert (labels == IGNORE_INDEX).nonzero().flatten().tolist() == [0, 4]
