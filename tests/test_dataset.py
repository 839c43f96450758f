"""Dataset: what the model gets is what the record says, and what was seen of it is counted."""

import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eagle_moe.canvas import load_image, to_canvas
from tests.small_data import SIZE, make_data, spec
from train.data import Collator, ConversationDataset


@pytest.fixture
def data(tmp_path, make_image):
    return make_data(tmp_path, make_image)


def test_a_sample_is_what_the_processor_makes_of_the_record(data, tiny_processor):
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    assert len(dataset) == 4
    for index, sample in enumerate(dataset[n] for n in range(4)):
        record = dataset.record(index)
        text = tiny_processor.apply_chat_template(record.messages)
        paths = [str(data.parent / path) for path in record.images]
        own = tiny_processor(text=text, images=paths or None, return_tensors="pt")
        assert torch.equal(sample["input_ids"], own["input_ids"][0])
        assert len(sample["pixel_values"]) == len(paths)
        if paths:
            assert torch.equal(torch.stack(sample["pixel_values"]), own["pixel_values"])
    assert dataset[0]["skill"] == "ocr"
    assert dataset[0]["id"] == "a"
    assert "skill" not in dataset[1]


def test_pictures_come_in_prompt_order(data, tiny_processor):
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    expected = [to_canvas(load_image(data.parent / f"images/{n}.png"), SIZE) for n in (2, 1)]
    assert torch.equal(torch.stack(dataset[1]["pixel_values"]), torch.stack(expected))
    assert not torch.equal(expected[0], expected[1])


def test_deliberate_mistake_another_picture_is_noticed(data, tiny_processor, make_image):
    """The comparison of canvases above can fail: one changed picture changes the sample."""
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    before = dataset[0]["pixel_values"][0]
    make_image(40, 30, seed=99).save(data.parent / "images/0.png")
    assert not np.array_equal(before, dataset[0]["pixel_values"][0])


def test_image_root(data, tiny_processor, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "train.jsonl"
    elsewhere.parent.mkdir()
    data.rename(elsewhere)
    dataset = ConversationDataset(spec(elsewhere, image_root=str(tmp_path)), tiny_processor, 512)
    assert len(dataset[0]["pixel_values"]) == 1


def test_blind_data_has_the_same_words_and_no_image(data, tiny_processor):
    seeing = ConversationDataset(spec(data), tiny_processor, 512)
    blind = ConversationDataset(spec(data, images="drop"), tiny_processor, 512)
    for index in range(4):
        sample = blind[index]
        assert sample["pixel_values"] == []
        assert tiny_processor.image_token_id not in sample["input_ids"]
        assert blind.encode(index).supervised == seeing.encode(index).supervised
        assert blind.record(index).text("user") == seeing.record(index).text("user")


def test_blind_data_needs_no_image_file(data, tiny_processor):
    (data.parent / "images/0.png").unlink()
    assert ConversationDataset(spec(data, images="drop"), tiny_processor, 512)[0]["id"] == "a"


def test_limit_takes_a_fixed_random_part(data, tiny_processor):
    rows = data.read_text().splitlines()
    data.write_text("\n".join(rows * 25))  # 100 records that cycle through four kinds
    datasets = [ConversationDataset(spec(data, limit=20), tiny_processor, 512) for _ in range(2)]
    first, second = ([part.record(n).where for n in range(len(part))] for part in datasets)
    assert first == second
    assert len(set(first)) == 20
    assert {part.record(n).id for part in datasets for n in range(20)} == set("abcd")


def test_template_override(data, tiny_processor):
    plain = ConversationDataset(spec(data, template="plain"), tiny_processor, 512)
    text = tiny_processor.tokenizer.decode(plain[0]["input_ids"])
    assert text == "<s>" + "<image>" * tiny_processor.image_seq_length + "cat\n"
    with pytest.raises(ValueError, match='no "plane". Did you mean "plain"'):
        ConversationDataset(spec(data, template="plane"), tiny_processor, 512)


def test_missing_placeholder_is_an_error_unless_it_may_be_prepended(data, tiny_processor):
    data.write_text(data.read_text().replace("<image>\\nwho", "who"))
    with pytest.raises(ValueError, match=r"id \"d\"\): 0 <image> in the text but 1 images"):
        ConversationDataset(spec(data), tiny_processor, 512)[3]
    dataset = ConversationDataset(spec(data, missing_placeholder="prepend"), tiny_processor, 512)
    assert len(dataset[3]["pixel_values"]) == 1


def test_counts_name_what_was_cut_and_what_teaches_nothing(data, tiny_processor):
    # one token per letter and 16 per image: "a" takes 44, "c" 30; "b" loses its answer
    dataset = ConversationDataset(spec(data), tiny_processor, 43)
    assert dataset.counts() == {
        "records": 4,
        "skipped": 0,
        "seen": 0,
        "cut": 0,
        "unsupervised": 0,
    }
    encoded = [dataset.encode(n) for n in range(4)]
    assert [item.cut for item in encoded] == [True, True, False, False]
    assert [item.supervised for item in encoded] == [4, 0, 9, 4]
    samples = [dataset[n] for n in range(4)]
    assert dataset.counts()["seen"] == 0  # what was read is not yet used
    for _ in range(2):  # a second epoch counts nothing twice
        dataset.count(sample["seen"] for sample in samples)
    assert dataset.counts()["seen"] == 4
    assert dataset.counts()["cut"] == 2
    assert dataset.counts()["unsupervised"] == 1
    assert dataset.named("unsupervised") == ["b"]
    assert dataset.named("cut") == ["a", "b"]


def test_batches_of_loader_workers_are_counted_when_they_are_used(data, tiny_processor):
    dataset = ConversationDataset(spec(data), tiny_processor, 43)
    loader = DataLoader(
        dataset,
        batch_size=1,
        num_workers=2,
        collate_fn=Collator(tiny_processor),
    )
    for used, batch in enumerate(loader, 1):  # four are prefetched
        dataset.count(batch["seen"])
        counts = dataset.counts()
        assert (counts["seen"], counts["unsupervised"]) == (used, int(used > 1))


def test_a_spawned_worker_gets_the_dataset(data, tiny_processor):
    dataset = ConversationDataset(spec(data), tiny_processor, 43)
    dataset[0]  # the file is open now, and must not travel
    copy = pickle.loads(ForkingPickler.dumps(dataset))
    assert torch.equal(copy[1]["input_ids"], dataset[1]["input_ids"])
    assert copy[1]["seen"] == dataset[1]["seen"]


# Counts over processes and over restarts


def _rank(rank, path, processor, address, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2
    )
    dataset = ConversationDataset(spec(path), processor, 43)
    for index in ([0, 1], [1, 2])[rank]:  # both see one of them
        dataset.count([dataset[index]["seen"]])
    dataset.share_counts(torch.device("cpu"))
    results.put(dataset.counts())
    torch.distributed.destroy_process_group()


def test_counts_of_several_processes_are_those_of_all_together(data, tiny_processor, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(n, data, tiny_processor, tmp_path / "meet", results))
        for n in range(2)
    ]
    for rank in ranks:
        rank.start()
    expected = {"records": 4, "skipped": 0, "seen": 3, "cut": 2, "unsupervised": 1}
    assert [results.get(timeout=60) for _ in ranks] == [expected] * 2
    for rank in ranks:
        rank.join()


def test_a_continued_run_goes_on_counting(data, tiny_processor):
    first = ConversationDataset(spec(data), tiny_processor, 43)
    first.count([first[1]["seen"]])
    kept = first.state_dict()
    first.count([first[2]["seen"]])
    second = ConversationDataset(spec(data), tiny_processor, 43)
    second.load_state_dict(kept)
    second.count([second[1]["seen"]])
    assert second.counts()["seen"] == 1
    assert second.counts()["unsupervised"] == 1
    first.load_state_dict(kept)  # back to where it was
    assert first.counts() == second.counts()
