"""eagle_moe/hub/licences.py: whose weights these are, under what licence, and what that forbids."""

from __future__ import annotations

import json

import pytest

from eagle_moe.checkpoint import PartRecord, write_provenance
from eagle_moe.experts import resolve_expert
from eagle_moe.hub.details import HUB_LICENCES
from eagle_moe.hub.licences import (
    FREE,
    ORIGINS,
    OWN,
    RESTRICTED,
    PartLicence,
    check_licences,
    hub_ids,
    read_licences,
)

CLIP, SAM = "openai/clip-vit-large-patch14-336", "facebook/sam-vit-large"


def make_release(folder, experts=("clip", "sam"), card: str = "", **origins: str):
    """Config and records of a model whose parts have these origins; weights are not needed."""
    specs = [resolve_expert(name).dump() for name in experts]
    (folder / "config.json").write_text(json.dumps({"vision_config": {"experts": specs}}))
    given = {f"experts.{spec['name']}": "random, seed 0" for spec in specs}
    given |= {"connector": "random, seed 0", "language_model": "random, seed 0"}
    given |= {key.replace("__", "."): value for key, value in origins.items()}
    write_provenance(
        folder,
        {k: PartRecord(sha256="0", parameters=1, history=[v, "sft"]) for k, v in given.items()},
    )
    if card:
        (folder / "card.yaml").write_text(card)
    return folder


def licences(folder) -> dict[str, str]:
    return {one.part: one.licence for one in read_licences(folder)}


def test_weights_that_started_random_are_the_releases_own(tmp_path):
    found = read_licences(make_release(tmp_path))
    assert {one.licence for one in found} == {OWN}
    assert [one.part for one in found] == [
        "experts.clip", "experts.sam", "connector", "language_model",
    ]  # fmt: skip
    check_licences(found, [])


@pytest.mark.parametrize(
    ("origin", "licence"),
    [
        ("lmsys/vicuna-7b-v1.5", "llama2"),
        ("lmsys/vicuna-13b-v1.5-16k", "llama2"),
        ("lmsys/vicuna-7b-v1.3", "llama-research"),
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("NousResearch/Nous-Hermes-2-Yi-34B", "apache-2.0"),
        ("Qwen/Qwen2.5-3B-Instruct", "qwen-research"),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
        ("official Eagle release Eagle-X5-7B, config.json 012345", "cc-by-nc-4.0"),
        ("someone/new-llm", "unknown"),
        ("vicuna-7b-v1.5", "unknown"),
        ("", "unknown"),
    ],
)
def test_language_models_by_their_origin(origin, licence, tmp_path):
    folder = make_release(tmp_path, language_model=origin)
    assert licences(folder)["language_model"] == licence


def test_an_experts_card_counts_for_the_checkpoint_that_it_names(tmp_path):
    folder = make_release(
        tmp_path,
        experts__clip=f"{CLIP}: model.safetensors (CLIP of transformers)",
        experts__sam=f"{SAM}@main: model.safetensors (SAM)",
    )
    assert licences(folder)["experts.clip"] == "MIT"
    assert licences(folder)["experts.sam"] == "Apache-2.0"
    assert hub_ids(read_licences(folder)) == [CLIP, SAM]
    check_licences(read_licences(folder), [])


def test_another_checkpoint_has_another_licence(tmp_path):
    folder = make_release(
        tmp_path,
        experts__clip=f"{CLIP}-mine: model.safetensors (CLIP)",
        experts__sam=f"{CLIP}: model.safetensors (another preset's)",
    )
    assert licences(folder)["experts.clip"] == "unknown"
    assert licences(folder)["experts.sam"] == "MIT"


def test_tiny_experts_trained_here_have_the_licence_of_their_preset(tmp_path):
    folder = make_release(tmp_path, ("clip-tiny",), experts__clip="runs/experts/clip")
    (first, *_) = read_licences(folder)
    assert (first.licence, first.source) == ("Apache-2.0", "this repository")
    assert hub_ids([first]) == []
    make_release(tmp_path, ("clip-tiny",), experts__clip="someone/clip: model.safetensors")
    assert read_licences(tmp_path)[0].licence == "unknown"


def test_a_person_may_know_better_than_the_records(tmp_path):
    card = "licences: {language_model: mit, experts.clip: cc-by-nc-sa-4.0}"
    folder = make_release(tmp_path, card=card, language_model="models/mine")
    found = {one.part: one for one in read_licences(folder)}
    assert found["language_model"].restriction is None
    restriction = found["experts.clip"].restriction
    assert "commercial" in restriction and "binds" in restriction


def test_a_folder_without_records_says_unknown_and_one_without_a_model_is_refused(tmp_path):
    folder = make_release(tmp_path)
    (folder / "provenance.json").unlink()
    assert set(licences(folder).values()) == {"unknown"} and len(licences(folder)) == 4
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither a model \(config.json\) nor an expert"):
        read_licences(folder)


def test_one_expert_is_read_as_well(tmp_path):
    (tmp_path / "expert.json").write_text(json.dumps(resolve_expert("sam").dump()))
    record = PartRecord(sha256="0", parameters=1, history=[SAM, "pre_align/sam"])
    write_provenance(tmp_path, {"experts.sam": record})
    (only,) = read_licences(tmp_path)
    assert (only.part, only.licence) == ("experts.sam", "Apache-2.0")


def test_what_restricts_is_refused_until_it_is_accepted_by_name(tmp_path):
    found = read_licences(
        make_release(tmp_path, language_model="lmsys/vicuna-7b-v1.5", experts__sam="mine/sam")
    )
    with pytest.raises(ValueError) as refusal:
        check_licences(found, [])
    first, second = str(refusal.value).splitlines()
    assert first.startswith("experts.sam: ") and "--accept-licence unknown" in first
    assert "licences: {experts.sam: apache-2.0}" in first
    assert second.startswith("language_model: ") and "lmsys/vicuna-7b-v1.5" in second
    assert "--accept-licence llama2" in second and "https://ai.meta.com/llama/license/" in second
    with pytest.raises(ValueError, match=r"^language_model"):
        check_licences(found, ["unknown"])
    check_licences(found, ["LLAMA2", "unknown"])


def test_parts_under_one_licence_are_refused_in_one_line(tmp_path):
    origin = "official Eagle release Eagle-X5-7B, config.json 0"
    parts = ("experts__clip", "experts__sam", "connector", "language_model")
    found = read_licences(make_release(tmp_path, **dict.fromkeys(parts, origin)))
    with pytest.raises(ValueError) as refusal:
        check_licences(found, [])
    assert str(refusal.value).count("cc-by-nc-4.0") == 2
    assert str(refusal.value).count("Eagle-X5-7B") == 1


def test_accepting_what_no_part_is_under_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"--accept-licence llama3: no part is under it"):
        check_licences(read_licences(make_release(tmp_path)), ["llama3"])


@pytest.mark.parametrize("licence", ["cc-by-nd-4.0", "openrail", "my-own-terms", "cc-by-nc-2.0"])
def test_what_is_not_known_to_be_free_is_not(licence):
    assert PartLicence("language_model", licence, "a/b", "").restriction


def test_the_tables_agree():
    assert not FREE & RESTRICTED.keys()
    assert FREE <= HUB_LICENCES
    assert {licence for _, licence, _ in ORIGINS} <= FREE | RESTRICTED.keys()
