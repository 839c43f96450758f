"""eagle_moe/hub/card.py: what a card says follows from the records, and nothing is made up."""

from __future__ import annotations

import inspect
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from eagle_moe.build import load_model
from eagle_moe.checkpoint import PartRecord, write_provenance
from eagle_moe.hub.card import write_card
from eagle_moe.hub.picture import Anatomy, draw_architecture
from eagle_moe.hub.scan import Machine, scan_folder
from eagle_moe.parts import model_tensors, part_hashes, tensor_hashes
from eagle_moe.scores.card import ACCURACY, CARD, Card
from eagle_moe.scores.identity import hash_weights
from tests.conftest import make_config
from tests.test_card import edit, make_answers, make_card, make_identity, save

DETAILS = """
licence: apache-2.0
authors: [Ada, "Grace | Hopper"]
language: en
data:
  questions: {licence: CC-BY-4.0, source: https://example.org/data}
limits: [It is small.]
"""
RECIPE = {
    "name": "mini",
    "seed": 3,
    "data": {
        "captions": {"path": "/home/ada/captions.jsonl", "limit": None},
        "questions": {"path": "suite/train.jsonl", "limit": 2500},
        "unused": {"path": "test.jsonl"},
    },
    "stages": {
        "align": {
            "data": ["captions"],
            "trainable": ["connector"],
            "args": {"max_steps": 1200, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
        },
        "sft": {
            "data": ["captions", "questions"],
            "trainable": ["connector", "language_model"],
            "lora": {"language_model": {"r": 8}},
            "batch_size": 128,
            "lr": {"connector": 2e-5},
            "args": {"num_train_epochs": 1},
        },
    },
}


@pytest.fixture
def folder(tiny_folder, tiny_model, tmp_path) -> Path:
    """A release of the tiny model, as the consolidation leaves it."""
    made = tmp_path / "release"
    shutil.copytree(tiny_folder, made)
    hashes = part_hashes(tensor_hashes(model_tensors(tiny_model)))
    origins = {
        "experts.clip": "openai/clip-vit-large-patch14-336: model.safetensors (CLIP)",
        "experts.convnext": "/home/ada/weights/convnext.safetensors: whole",
        "connector": "random, seed 3",
        "language_model": "lmsys/vicuna-7b-v1.5",
    }
    write_provenance(
        made,
        {
            part: PartRecord(sha256=hash_, parameters=1000, history=[origins[part], "sft"])
            for part, hash_ in hashes.items()
        },
    )
    (made / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (made / "card.yaml").write_text(DETAILS)
    return made


def make_score(place: Path, folder: Path, **changes) -> Path:
    """A run folder with one score card of the model in `folder`."""
    answers = make_answers(text=3, chart=8)
    identity = make_identity(**{"weights_sha256": hash_weights(folder), **changes})
    save(place / "eagle_skills", answers, make_card(answers, identity=identity))
    return place


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    below = text[text.index(f"{heading}\n") :]
    lines = [line for line in below[below.index("\n|") :].split("\n\n")[0].splitlines() if line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_metadata_is_what_the_hub_reads(folder, tmp_path):
    write_card(folder, "org/eagle-tiny", [make_score(tmp_path / "scores", folder)])
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    assert data.language == ["en"]
    assert data.base_model == ["openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == (ACCURACY, 0.55)
    assert data.model_name == "eagle-tiny"


def test_parts_stages_and_data_are_those_of_the_records(folder):
    write_card(folder, "org/eagle-tiny")
    text = text_of(folder)
    parts = {row[0]: row for row in table(text, "## Parts")[2:]}
    assert list(parts) == ["experts.clip", "experts.convnext", "connector", "language_model"]
    assert parts["experts.convnext"][2:4] == [
        "weights made earlier (convnext.safetensors): whole → sft",
        "Apache-2.0",
    ]
    assert parts["language_model"][2:4] == ["lmsys/vicuna-7b-v1.5 → sft", "llama2"]
    assert parts["connector"][1] == "1 k"
    records = json.loads((folder / "provenance.json").read_text())
    assert all(row[4] == f"`{records[part]['sha256'][:12]}`" for part, row in parts.items())
    assert table(text, "## Training")[2:] == [
        ["align", "connector", "captions", "1,200 steps", "8 per device", "0.001; cosine"],
        [
            "sft", "connector, language_model (LoRA, r 8)", "captions, questions", "1 epoch", "128",
            "connector 2e-05",
        ],
    ]  # fmt: skip
    assert table(text, "### Data")[2:] == [
        ["captions", "captions.jsonl", "align, sft", "not recorded", "not recorded"],
        [
            "questions", "train.jsonl, first 2,500 records", "sft", "https://example.org/data",
            "CC-BY-4.0",
        ],
    ]  # fmt: skip
    assert "The licence llama2 (https://ai.meta.com/llama/license/) asks for" in text
    assert "Grace \\| Hopper" in text and "- It is small." in text


def test_scores_are_shown_as_recounted_and_travel_with_the_release(folder, tmp_path):
    write_card(folder, "org/eagle-tiny", [make_score(tmp_path / "scores", folder)])
    rows = table(text_of(folder), "### eagle_skills")[2:]
    card = Card.load(folder / "scores" / "eagle_skills")
    assert [row[:3] for row in rows] == [
        [ACCURACY, "total", "0.550"],
        [ACCURACY, "text", "0.300"],
        [ACCURACY, "chart", "0.800"],
    ]
    assert [row[4] for row in rows] == ["20", "10", "10"]
    total = card.score
    assert rows[0][3] == f"{total.low:.3f} to {total.high:.3f}"
    assert card.model == "org/eagle-tiny"
    assert hash_weights(folder)[:12] in text_of(folder)
    write_card(folder, "org/eagle-tiny")  # again, from what the release itself holds
    assert table(text_of(folder), "### eagle_skills")[2:] == rows


def test_the_lines_of_the_card_run(folder, make_image, tmp_path, monkeypatch, capsys):
    write_card(folder, "org/eagle-tiny")
    first, second = re.findall(r"```python\n(.*?)```", text_of(folder), re.DOTALL)
    make_image().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(first.replace("org/eagle-tiny", str(folder)), {})  # noqa: S102 - our own lines
    assert capsys.readouterr().out
    assert second.count("load_model(") == 1
    assert "quantize" in inspect.signature(load_model).parameters and "quantize=" in second


def test_without_scores_the_card_says_so(folder):
    write_card(folder, None)
    assert "No score of this model is recorded." in text_of(folder)
    assert "model-index" not in text_of(folder) and text_of(folder).count("\n# release\n") == 1


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("metrics", ACCURACY, "total", "value"), 0.6),
        (("metrics", ACCURACY, "chart", "n"), 11),
        (("metrics", ACCURACY, "text", "low"), 0.299),
    ],
)
def test_a_number_that_does_not_follow_is_refused(folder, tmp_path, keys, value):
    scores = make_score(tmp_path / "scores", folder)
    edit(scores / "eagle_skills", *keys, value=value)
    with pytest.raises(ValueError, match=CARD):
        write_card(folder, "org/eagle-tiny", [scores])
    assert not (folder / "README.md").exists()


def test_a_score_of_other_weights_is_refused(folder, tmp_path):
    scores = make_score(tmp_path / "scores", folder, weights_sha256="f" * 64)
    with pytest.raises(ValueError, match=r"a score of other weights \(ffffffffffff\)"):
        write_card(folder, "org/eagle-tiny", [scores])
    with pytest.raises(FileNotFoundError, match="no card.json in it"):
        write_card(folder, "org/eagle-tiny", [tmp_path])


def test_fields_that_are_missing_are_all_named_with_what_to_do(folder):
    (folder / "card.yaml").write_text(
        "data: {question: {licence: mit}}\nlicences: {experts.sam: mit}\n"
    )
    with pytest.raises(ValueError) as error:
        write_card(folder, "org/eagle-tiny")
    told = str(error.value)
    for part in ("`licence` is missing", "`authors` is missing", "data.question", "experts.sam"):
        assert part in told
    assert "--card" in told and "\n" not in told
    (folder / "card.yaml").write_text("license: mit\n")
    with pytest.raises(ValueError, match='Did you mean "licence"'):
        write_card(folder, "org/eagle-tiny")
    (folder / "card.yaml").unlink()
    with pytest.raises(ValueError, match="`licence` is missing; `authors` is missing"):
        write_card(folder, "org/eagle-tiny")


def test_a_licence_that_the_hub_does_not_know_has_its_name_beside(folder):
    (folder / "card.yaml").write_text("licence: Our own terms 1.0\nauthors: Ada\n")
    write_card(folder, "org/eagle-tiny")
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name) == ("other", "Our own terms 1.0")


def test_no_local_path_of_the_records_gets_into_what_is_published(folder, tmp_path):
    scores = make_score(tmp_path / "scores", folder, recipe=RECIPE)
    write_card(folder, "org/eagle-tiny", [scores])
    for name in ("recipe.yaml", "provenance.json"):  # the consolidation's to clean
        (folder / name).unlink()
    assert scan_folder(folder, Machine()) == []
    assert Card.load(folder / "scores" / "eagle_skills").identity.recipe["seed"] == 3


def test_a_path_that_the_person_wrote_is_refused(folder):
    (folder / "card.yaml").write_text(DETAILS + "description: made in /home/ada/runs/x\n")
    with pytest.raises(ValueError, match=r"README.md:\d+: a local path \(/home/ada/runs/x"):
        write_card(folder, "org/eagle-tiny")
    assert not (folder / "README.md").exists()


def make_experts_page(place: Path, folder: Path, **changes) -> Path:
    place.mkdir()
    score = {"total": {"value": -0.5, "n": 40}}
    data = {
        "model": "/home/ada/model",
        "experts": ["clip", "convnext"],
        "reference": 256,
        "scores": {"all": {"log_prob": score}},
        "identity": {"weights_sha256": hash_weights(folder), **changes},
    }
    (place / "experts.json").write_text(json.dumps(data))
    Image.new("RGB", (4, 4)).save(place / "experts.png")
    return place


def test_what_each_expert_adds_comes_with_what_was_done_to_see_it(folder, tmp_path):
    page = make_experts_page(tmp_path / "page", folder)
    write_card(folder, "org/eagle-tiny", experts_page=page)
    text = text_of(folder)
    assert "![Heat maps" in text and "(experts.png)" in text
    assert "on 40 questions" in text and "256 reference images" in text
    assert "Nothing is trained again" in text
    assert json.loads((folder / "experts.json").read_text())["model"] == "org/eagle-tiny"
    other = make_experts_page(tmp_path / "other", folder, weights_sha256="e" * 64)
    with pytest.raises(ValueError, match=r"measured on other weights \(eeeeeeeeeeee\)"):
        write_card(folder, "org/eagle-tiny", experts_page=other)
    (page / "experts.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"experts.png: no such file. Run `python -m eval"):
        write_card(folder, "org/eagle-tiny", experts_page=page)


@pytest.mark.parametrize(
    ("passed", "told"), [(True, "all 2 checks passed"), (False, "1 of 2 checks failed (logits)")]
)
def test_the_gates_verdict_is_told_as_it_is(folder, passed, told):
    checks = [
        {"name": "logits", "passed": passed, "finding": "1e-6"},
        {"name": "stubs", "passed": True, "finding": ""},
    ]
    (folder / "gate.json").write_text(json.dumps({"checks": checks, "versions": {"torch": "2"}}))
    write_card(folder, "org/eagle-tiny")
    assert told in text_of(folder)


def test_shapes_in_the_picture_are_those_of_the_model(tiny_model, tiny_config):
    anatomy = Anatomy.of(tiny_config)
    vision = tiny_model.model.vision_tower
    assert [one.channels for one in anatomy.experts] == [e.channels for e in vision.towers.values()]
    assert anatomy.fused == (vision.fusion.num_tokens, vision.fusion.out_channels)
    assert anatomy.tokens == (tiny_config.num_image_tokens, 32)
    assert "clip sees 32 x 32 pixels and gives 96 x 8 x 8" in anatomy.describe()


@pytest.mark.parametrize("experts", [("clip-tiny",), ("clip-tiny", "sam-tiny", "eva02-tiny")])
def test_the_picture_grows_with_the_experts_and_nothing_leaves_it(experts):
    anatomy = Anatomy.of(make_config(experts))
    with Image.open(io.BytesIO(draw_architecture(anatomy))) as image:
        assert image.format == "PNG" and image.width > 1500
        assert image.height == {1: 206, 3: 364}[len(experts)]
        edges = [image.crop(box).getcolors() for box in ((0, 0, image.width, 20), (0, 0, 20, 99))]
    assert edges == [[(image.width * 20, (255, 255, 255))], [(20 * 99, (255, 255, 255))]]
