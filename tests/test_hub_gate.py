"""eagle_moe/hub/{consolidate,gate}.py: what is released does what it was made of, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_moe.checkpoint import COMPLETE, read_complete, read_provenance, weight_files
from eagle_moe.hub import gate, probe
from eagle_moe.hub.consolidate import consolidate, read_size
from eagle_moe.hub.experts import check_hashes
from eagle_moe.hub.gate import RELEASE, Observation, Verdict, check_folder, read_release
from eagle_moe.scores.identity import hash_weights

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def released(tiny_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("released") / "release"
    consolidate(tiny_folder, out)
    return out


@pytest.fixture
def copy(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "copy"))


def look(folder: Path, way: str, device: str) -> Observation:
    """As the gate's own process does, in this one: what is compared matters here."""
    seen: dict = {}
    try:
        probe._watch(str(folder), "package", device, seen)
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    return Observation.parse(json.loads(json.dumps(seen)), "seen")


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(gate, "WAYS", {"package": gate.WAYS["package"]})
    monkeypatch.setattr(gate, "_watch_folder", look)


def failures(verdict: Verdict) -> dict[str, str]:
    return {check.name.rpartition(": ")[2]: check.finding for check in verdict.failed}


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_image_processor(folder: Path, **fields) -> None:
    path = folder / "processor_config.json"
    data = json.loads(path.read_text())
    data["image_processor"] |= fields
    path.write_text(json.dumps(data))


def test_loaded_in_fresh_processes_both_ways(released):
    verdict = check_folder(released)
    assert not verdict.failed
    ways = {check.name.partition(":")[0] for check in verdict.checks}
    assert ways >= set(gate.WAYS.values())


def test_a_release_is_the_source_byte_for_byte(released, tiny_folder):
    assert hash_weights(released) == hash_weights(tiny_folder)
    assert check_hashes(released)
    assert read_complete(released) is not None
    assert read_release(released).source == "saved model"
    assert all(record.history == [] for record in read_provenance(released).values())


def test_a_broken_weight_is_refused(copy, here):
    tensors = load_file(copy / WEIGHTS)
    name = "lm_head.weight"
    tensors[name][5, 5] += 0.01
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    found = failures(check_folder(copy))
    assert f"1 of {len(tensors)} changed, first {name}" in found["weights"]
    assert "allowed 1e-05" in found["logits"]


def test_weights_that_are_missing_or_cut_off_are_refused(copy, here):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    found = failures(check_folder(copy))
    assert "cannot be read" in found["weights"]
    assert "loads and runs" in found


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"fill": [0, 0, 0]}, "fill[0]: 0 instead of 122"),
        ({"fit": "crop"}, "fit: 'crop' instead of 'pad'"),
        ({"size": {"height": 32, "width": 32}}, "size.height: 32 instead of 64"),
    ],
)
def test_a_wrong_setting_of_the_canvas_is_refused(copy, here, fields, told):
    edit_image_processor(copy, **fields)
    found = failures(check_folder(copy))
    assert found["settings"] == told
    assert "canvases" in found


def test_a_wrong_number_of_tokens_per_image_is_refused(copy, here):
    edit(copy / "processor_config.json", image_seq_length=15)
    found = failures(check_folder(copy))
    assert found["settings"] == "image_seq_length: 15 instead of 16"
    assert "token ids" in found
    assert "15" in found["loads and runs"] or "60" in found["loads and runs"]


def test_another_template_is_refused(copy, here):
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER", "HUMAN"))
    found = failures(check_folder(copy))
    assert "HUMAN" in found["prompts"] and "USER" in found["prompts"]


@pytest.mark.parametrize("file", ["modeling_eagle_moe.py", "processing_eagle_moe.py"])
def test_a_missing_or_foreign_stub_is_refused(copy, here, file):
    (copy / file).write_text("print('not ours')")
    assert f"{file} is not" in failures(check_folder(copy))["files for trust_remote_code"]
    (copy / file).unlink()
    assert failures(check_folder(copy))["files for trust_remote_code"] == f"{file} is missing"


def test_an_auto_map_that_leads_elsewhere_is_refused(copy, here):
    edit(copy / "config.json", auto_map={"AutoConfig": "other.Thing"})
    assert "config.json: auto_map" in failures(check_folder(copy))["files for trust_remote_code"]


def test_a_value_that_is_no_number_does_not_pass():
    assert not gate._close("x", [[1.0, float("nan")]], [[1.0, 2.0]], {"float32": 1}, None).passed
    assert not gate._close("x", [[1.0, 2.0]], [[1.0, 2.0, 3.0]], {"float32": 1}, None).passed


def test_a_batch_that_differs_from_its_rows_is_refused(released):
    expected = read_release(released).expected
    assert expected.batch_logits is not None and expected.batch_texts is not None
    rows = [[value + 1 for value in row] for row in expected.batch_logits]
    seen = expected.model_copy(
        update={"batch_logits": rows, "batch_texts": ["another"] * len(rows)}
    )
    names = {
        check.name.rpartition(": ")[2]
        for check in gate.compare("package", seen, expected)
        if not check.passed
    }
    assert {"batch, logits", "batch, greedy text"} <= names


def test_the_fixed_inputs_tell_settings_apart(released):
    """Else a wrong one could pass: no two rows, pictures or answers are the same."""
    expected = read_release(released).expected
    assert expected.canvases is not None and expected.logits is not None
    canvases = [canvas for row in expected.canvases for canvas in row]
    assert len(set(canvases)) == len(probe.SIZES)
    assert torch.tensor(expected.logits).std(0).max() > 0.1


def test_large_files_are_split(tiny_folder, tmp_path, here):
    out = tmp_path / "out"
    consolidate(tiny_folder, out, shard_size="200KB")
    assert len(weight_files(out)) > 2
    assert not check_folder(out).failed


def test_sizes_are_read():
    assert read_size("5GB") == 5 * 10**9 and read_size("1.5mb") == 1_500_000
    for bad in ("5", "GB", "-1GB", "0GB", "five GB"):
        with pytest.raises(ValueError, match=f"--shard-size {bad}"):
            read_size(bad)


def test_a_folder_that_is_taken_is_left_alone(tiny_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{RELEASE} in it"):
        consolidate(tiny_folder, tmp_path)
    with pytest.raises(ValueError, match="the model is in there"):
        consolidate(tiny_folder, tiny_folder)
    with pytest.raises(ValueError, match="the model is in there"):
        consolidate(tiny_folder, tiny_folder.parent)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no config.json"),
        ({"config.json": {"model_type": "llava_llama"}}, "eagle-moe import"),
        ({"global_step3": {}}, "a model in pieces"),
        ({COMPLETE: {"stage": "sft", "identity": {}}}, "a resume point"),
        ({"adapter_config.json": {"base_model_name_or_path": "x/y"}}, "adapter_model.safetensors"),
    ],
)
def test_what_is_no_finished_model_is_told(tmp_path, files, told):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        consolidate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_those_of_the_records_are_not_released(copy, tmp_path):
    path = copy / "provenance.json"
    records = json.loads(path.read_text())
    records["connector"]["sha256"] = "0" * 64
    path.write_text(json.dumps(records, indent=1))
    (copy / COMPLETE).unlink()
    with pytest.raises(ValueError, match="the weights of connector"):
        consolidate(copy, tmp_path / "out")


def test_adapters_are_merged_into_their_base(tiny_folder, tmp_path, here):
    peft = pytest.importorskip("peft")
    from eagle_moe.build import load_model

    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(load_model(tiny_folder), settings)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "lora")
    release = consolidate(tmp_path / "lora", tmp_path / "out")
    assert not check_folder(tmp_path / "out").failed
    before, after = load_file(tiny_folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    assert release.source == "adapters, merged"
    assert read_provenance(tmp_path / "out")["language_model"].history == ["adapters lora (peft)"]
