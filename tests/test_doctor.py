"""Doctor: finds everything wrong at once, names it, and its manifest is what training accepts."""

import json

import pytest
import yaml

from train.data import ConversationDataset, DataSpec
from train.data.doctor import main
from train.data.manifest import Manifest


def turns(question, *answers):
    said = [{"from": "human", "value": question}]
    return said + [{"from": "gpt", "value": answer} for answer in answers]


@pytest.fixture
def folder(tmp_path, make_image):
    """`train.jsonl` with twelve sound records of three kinds, and `test.jsonl` with other ones."""
    for split, first in (("train", 0), ("test", 100)):
        rows = []
        for number in range(first, first + 12):
            images = [f"{number}-{n}.png" for n in range(number % 3)]
            for n, name in enumerate(images):
                make_image(30, 40, seed=10 * number + n).save(tmp_path / name)
            rows.append(
                {
                    "id": f"{split}{number}",
                    "image": images,
                    "skill": ("read", "count")[number % 2],
                    "conversations": turns("<image>\n" * len(images) + f"what is {number}", "it"),
                }
            )
        write(tmp_path / f"{split}.jsonl", rows)
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def change(path, number, **fields):
    rows = read(path)
    rows[number].update(fields)
    write(path, rows)


def doctor(folder, *arguments, files=("train.jsonl",)):
    """Exit code and manifest."""
    out = folder / "manifest.json"
    paths = [str(folder / name) for name in files]
    code = main([*paths, "--workers", "0", "--out", str(out), *arguments])
    return code, Manifest.load(out)


def faults(manifest):
    return [(sample.index, sample.id, sample.fault) for sample in manifest.files[0].bad]


def test_sound_data_is_counted(folder, tiny_folder, capsys):
    code, manifest = doctor(folder, "--model", str(tiny_folder))
    (report,) = manifest.files
    assert code == 0
    assert report.records == 12
    assert report.bad == []
    counts = report.counts
    assert counts["kinds"] == {"text only": 4, "one image": 4, "several images": 4}
    assert counts["skills"] == {"read": 6, "count": 6}
    assert counts["images"] == counts["distinct_images"] == 12
    assert counts["duplicate_ids"] == counts["duplicate_samples"] == 0
    assert counts["answers"]["total"] == 12
    assert counts["image_side"]["max"] == 40
    # letters are tokens here: "what is 1" and so on; "it" and its end, after a space
    assert counts["characters"]["min"] == len("what is 0" + "it")
    assert counts["supervised_tokens"] == {
        "total": 12 * 4,
        "mean": 4.0,
        **dict.fromkeys(("min", "median", "p95", "p99", "max"), 4),
    }
    dataset = ConversationDataset(
        DataSpec(path=str(folder / "train.jsonl")), load_processor(tiny_folder), None
    )
    lengths = sorted(dataset.encode(n).length for n in range(12))
    assert counts["tokens"]["min"] == lengths[0]
    assert counts["tokens"]["max"] == lengths[-1]
    assert counts["tokens"]["total"] == sum(lengths)
    assert "can be trained on" in capsys.readouterr().out


def load_processor(folder):
    from eagle_moe.processor import EagleMixProcessor

    return EagleMixProcessor.from_pretrained(folder)


def test_everything_wrong_is_found_at_once(folder, tiny_folder, make_image, capsys):
    path = folder / "train.jsonl"
    (folder / "1-0.png").unlink()
    (folder / "2-1.png").write_bytes(b"")
    (folder / "4-0.png").write_bytes((folder / "4-0.png").read_bytes()[:-30])
    change(path, 5, conversations=turns("<image>what", "it"))
    change(path, 7, conversations=[{"from": "nobody", "value": "x"}])
    change(path, 9, conversations=turns("why"))
    path.write_text(path.read_text() + "\n{broken")
    code, manifest = doctor(folder, "--model", str(tiny_folder))
    assert code == 1
    assert faults(manifest) == [
        (1, "train1", "image"),
        (2, "train2", "image"),
        (4, "train4", "image"),
        (5, "train5", "record"),
        (7, "train7", "record"),
        (9, "train9", "unsupervised"),
        (12, "12", "record"),
    ]
    reasons = [sample.reason for sample in manifest.files[0].bad]
    expected = (
        "no such image",
        "empty",
        "damaged",
        "1 <image> in the text but 2",
        "nobody",
        "no answer",
        "JSON",
    )
    for reason, words in zip(reasons, expected, strict=True):
        assert words in reason
        assert "record" in reason  # each names its record
    shown = capsys.readouterr().out
    assert (
        "malformed records: 3; samples with bad images: 3; samples without a token to learn: 10.0%"
        in shown
    )
    for reason in reasons:
        assert reason in shown


def test_the_manifest_is_what_training_accepts(folder, tiny_processor):
    (folder / "1-0.png").unlink()
    path = str(folder / "train.jsonl")
    assert doctor(folder)[0] == 1
    code, _ = doctor(folder, "--on-bad-image", "skip")
    assert code == 0
    manifest = str(folder / "manifest.json")
    spec = DataSpec(path=path, manifest=manifest, on_bad_image="skip")
    dataset = ConversationDataset(spec, tiny_processor, 256)
    assert len(dataset) == 11
    assert dataset.counts()["skipped"] == 1
    assert all(len(dataset[n]["pixel_values"]) < 3 for n in range(11))  # every one can be read
    with pytest.raises(ValueError, match="1-0.png"):
        ConversationDataset(DataSpec(path=path, manifest=manifest), tiny_processor, 256)


def test_samples_beyond_the_limit(folder, tiny_folder):
    # 16 tokens per image: two images do not fit 30 tokens; one leaves no room for the answer
    code, manifest = doctor(folder, "--model", str(tiny_folder), "--max-length", "30")
    assert code == 1
    assert {fault for _, _, fault in faults(manifest)} == {"tokens", "unsupervised"}
    assert manifest.files[0].counts["unsupervised"] == 4
    assert manifest.files[0].counts["cut"] == 8  # text-only ones too, but they keep an answer
    large = [sample.reason for sample in manifest.files[0].bad if sample.fault == "tokens"]
    assert len(large) == 4
    assert "2 images take 32 tokens, but the limit is 30" in large[0]


def test_unsupervised_samples_are_tolerated_up_to_the_limit(folder, tiny_folder):
    change(folder / "train.jsonl", 0, conversations=turns("why"))
    assert doctor(folder, "--model", str(tiny_folder))[0] == 1
    assert doctor(folder, "--model", str(tiny_folder), "--max-unsupervised", "0.1")[0] == 0


def test_duplicates(folder, capsys):
    path = folder / "train.jsonl"
    rows = read(path)
    (folder / "copy.png").write_bytes((folder / "1-0.png").read_bytes())
    rows += [
        rows[0],  # whole record
        {**rows[1], "id": "other", "image": ["copy.png"]},  # same words, same pixels
        {**rows[3], "conversations": turns("different", "it")},  # same id only
    ]
    write(path, rows)
    _, manifest = doctor(folder)
    counts = manifest.files[0].counts
    assert counts["duplicate_ids"] == 2
    assert counts["duplicate_samples"] == 2
    assert counts["distinct_images"] == counts["images"] - 1
    assert "(such as train0, train3)" in capsys.readouterr().out


def test_leaks_between_files(folder, make_image, capsys):
    files = ("train.jsonl", "test.jsonl")
    code, manifest = doctor(folder, files=files)
    assert (code, manifest.overlaps[0].images, manifest.overlaps[0].samples) == (0, 0, 0)
    assert "share no picture and no sample" in capsys.readouterr().out

    make_image(30, 40, seed=10).save(folder / "leak.bmp")  # the pixels of train1, another format
    change(folder / "test.jsonl", 0, image="leak.bmp", conversations=turns("<image>\nx", "it"))
    rows = read(folder / "test.jsonl")
    write(folder / "test.jsonl", [*rows, {**read(folder / "train.jsonl")[3], "id": "seen"}])
    _, manifest = doctor(folder, files=files)
    (overlap,) = manifest.overlaps
    assert (overlap.images, overlap.samples) == (1, 1)
    assert overlap.examples == [("train3", "seen")]
    assert "share pictures: 1, whole samples: 1" in capsys.readouterr().out


def test_workers_find_the_same(folder, tiny_folder):
    (folder / "2-1.png").write_bytes(b"")
    change(folder / "train.jsonl", 7, conversations="x")
    alone = doctor(folder, "--model", str(tiny_folder))
    assert doctor(folder, "--model", str(tiny_folder), "--workers", "2") == alone


def test_shown_samples_mark_what_is_learned(folder, tiny_folder, capsys):
    doctor(folder, "--model", str(tiny_folder), "--show", "12")
    shown = capsys.readouterr().out
    assert shown.count("ASSISTANT:[[ it</s>]]") == 12
    assert "USER: <image> x 16\n<image> x 16\nwhat is 2" in shown


def test_recipe(folder, tiny_config, tokenizer):
    tokenizer.save_pretrained(folder / "lm")
    text = tiny_config.text_config.to_dict()
    model = {
        "canvas": {"size": 64},
        "experts": ["clip-tiny"],
        "fusion": {"kind": "channel_concat", "grid": 4},
        "language_model": {"checkpoint": str(folder / "lm"), "config": text},
        "template": "short",
    }
    data = {
        "seen": {"path": str(folder / "train.jsonl")},
        "held_out": {"path": str(folder / "test.jsonl"), "images": "drop"},
    }
    stages = {
        "align": {"data": ["seen"], "trainable": ["connector"], "template": "plain"},
        "sft": {
            "data": ["seen"],
            "trainable": ["connector"],
            "init_from": ["align"],
            "max_length": 30,
            "eval": {"data": "held_out", "every": 5},
        },
    }
    recipe = {"name": "r", "output_dir": "out", "model": model, "data": data, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = folder / "manifest.json"
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--workers", "0", "--out", str(out)]

    assert main(arguments) == 1  # the last stage: two images do not fit its 30 tokens
    reports = Manifest.load(out).files
    assert [report.path for report in reports] == [spec["path"] for spec in data.values()]
    assert {sample.fault for sample in reports[0].bad} == {"tokens", "unsupervised"}
    assert reports[1].counts["kinds"] == {"text only": 12}

    assert main([*arguments, "--stage", "align"]) == 0
    (report,) = Manifest.load(out).files
    # the plain template: BOS, images, answer and line break
    assert report.counts["tokens"]["max"] == 1 + 2 * 16 + 1 + len("it\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one data file"),
        (["nothing.jsonl"], "no such file"),
        (["{train}", "--show", "1"], "give --model"),
        (["{train}", "--model", "nothing"], "neither a model folder nor a model file"),
        (["{train}", "--recipe", "r.yaml"], "leave out paths"),
        (["--recipe", "nothing.yaml"], "no such file"),
    ],
)
def test_what_cannot_be_examined_exits_with_two(folder, arguments, message, capsys):
    train = str(folder / "train.jsonl")
    assert main([argument.format(train=train) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_deliberate_mistake_an_intact_file_called_broken_is_noticed(folder):
    """The faults above come from the files: without the damage there are none."""
    assert faults(doctor(folder)[1]) == []
    (folder / "1-0.png").write_bytes(b"")
    assert faults(doctor(folder)[1]) == [(1, "train1", "image")]
