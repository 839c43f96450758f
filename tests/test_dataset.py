"""Dataset: what the model gets is what the record says; a bad picture is never papered over."""

import json
import multiprocessing
import pickle
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eagle_moe.canvas import load_image, to_canvas
from train.data import Collator, ConversationDataset, DataSpec
from train.data.manifest import BadSample, FileReport, Manifest, fingerprint_of

SIZE = 64  # of the fixture's canvas


@pytest.fixture
def data(tmp_path, make_image):
    """Four records: one image, two images, text only, one image; and `images/0..3.png`."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        make_image(40 + number, 30, seed=number).save(tmp_path / f"images/{number}.png")
    rows = [
        ("a", ["images/0.png"], "<image>\nwhat", "cat", {"skill": "ocr"}),
        ("b", ["images/2.png", "images/1.png"], "<image>\n<image>\nwhat", "dog", {}),
        ("c", [], "why", "because", {}),
        ("d", ["images/3.png"], "<image>\nwho", "me", {}),
    ]
    lines = [
        json.dumps(
            {
                "id": name,
                "image": images,
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                ],
                **extra,
            }
        )
        for name, images, question, answer, extra in rows
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def spec(path, **fields):
    return DataSpec(path=str(path), **fields)


def write_manifest(path, *bad, out="manifest.json"):
    report = FileReport(
        path=str(path),
        fingerprint=fingerprint_of(path),
        image_root=str(path.parent),
        records=4,
        bad=list(bad),
        counts={},
    )
    Manifest(files=[report]).save(path.parent / out)
    return str(path.parent / out)


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


# Bad pictures


def spoil(path, how, make_image):
    """Turn a good file into one that must be refused."""
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "animated":
        frames = [make_image(seed=n) for n in range(3)]
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    elif how == "not an image":
        path.write_text("<html>404</html>")
    elif how == "huge":
        header = bytearray(path.read_bytes())
        header[16:24] = (200_000).to_bytes(4, "big") * 2  # width and height of a PNG's header
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        path.write_bytes(header)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "no such image file"),
        ("empty", "is empty"),
        ("truncated", "damaged or incomplete"),
        ("animated", "has 3 frames"),
        ("not an image", "not an image"),
        ("huge", "pixels"),
    ],
)
def test_a_bad_image_stops_the_run_and_is_named(data, tiny_processor, make_image, how, reason):
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    spoil(data.parent / "images/3.png", how, make_image)
    with pytest.raises(ValueError, match=reason) as error:
        dataset[3]
    message = str(error.value)
    assert 'record 3 (id "d")' in message
    assert "3.png" in message
    assert "on_bad_image: skip" in message


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_other_colour_modes_are_converted(data, tiny_processor, make_image, mode):
    image = make_image(seed=1)
    path = data.parent / "images/3.png"
    if mode == "CMYK":
        image.convert(mode).save(path, format="TIFF")
    else:
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(path, format="PNG")
    (canvas,) = ConversationDataset(spec(data), tiny_processor, 512)[3]["pixel_values"]
    assert canvas.shape == (3, SIZE, SIZE)
    assert canvas.dtype == torch.uint8


BAD = BadSample(index=1, id="b", fault="image", reason='record 1 (id "b"): 1.png: is empty.')


def test_skip_leaves_out_and_counts_what_the_manifest_names(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    dataset = ConversationDataset(
        spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512
    )
    assert [dataset.record(n).id for n in range(len(dataset))] == ["a", "c", "d"]
    assert dataset.counts()["skipped"] == 1
    assert dataset.counts()["records"] == 3


def test_fail_refuses_before_step_one(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    with pytest.raises(ValueError, match=r'1 bad images.*record 1 \(id "b"\).*is empty'):
        ConversationDataset(spec(data, manifest=manifest), tiny_processor, 512)


def test_only_bad_images_are_skipped(data, tiny_processor):
    other = BAD.model_copy(update={"fault": "unsupervised"})
    manifest = write_manifest(data, other)
    dataset = ConversationDataset(spec(data, manifest=manifest), tiny_processor, 512)
    assert len(dataset) == 4


def test_skip_without_a_manifest_says_how_to_get_one(data, tiny_processor):
    with pytest.raises(ValueError, match=r"needs a `manifest`.*train\.data\.doctor"):
        ConversationDataset(spec(data, on_bad_image="skip"), tiny_processor, 512)


def test_a_manifest_of_other_data_is_refused(data, tiny_processor):
    manifest = write_manifest(data, BAD)
    data.write_text(data.read_text() + "\n" + data.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="does not describe .* as it is now"):
        ConversationDataset(spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512)


def test_a_picture_that_broke_after_the_examination_is_never_substituted(
    data, tiny_processor, make_image
):
    manifest = write_manifest(data, BAD)
    dataset = ConversationDataset(
        spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512
    )
    spoil(data.parent / "images/0.png", "truncated", make_image)
    with pytest.raises(ValueError, match='id "a"'):
        dataset[0]


def test_nothing_left(data, tiny_processor):
    bad = [BAD.model_copy(update={"index": n}) for n in range(4)]
    manifest = write_manifest(data, *bad)
    with pytest.raises(ValueError, match="no sample is left"):
        ConversationDataset(spec(data, on_bad_image="skip", manifest=manifest), tiny_processor, 512)


def test_deliberate_mistake_another_picture_is_noticed(data, tiny_processor, make_image):
    """The comparison of canvases above can fail: one changed picture changes the sample."""
    dataset = ConversationDataset(spec(data), tiny_processor, 512)
    before = dataset[0]["pixel_values"][0]
    make_image(40, 30, seed=99).save(data.parent / "images/0.png")
    assert not np.array_equal(before, dataset[0]["pixel_values"][0])


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
