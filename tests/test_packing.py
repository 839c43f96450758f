"""Packed rows: nothing is lost, nothing mixed; the model sees what it sees unpacked."""

import json
import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    Qwen3NextConfig,
)

from tests.conftest import make_config, make_model
from tests.interrupted import without_times
from tests.tiny_run import make_world
from train.data import (
    NOT_FOR_THE_MODEL,
    Collator,
    DataSpec,
    PackedDataset,
    build_dataset,
    check_keeps_apart,
)
from train.data.labels import IGNORE_INDEX
from train.progress import ProgressReport
from train.recipe import parse_recipe
from train.run import run_recipe

# The dataset


@pytest.fixture
def dataset(tmp_path, tiny_processor, make_image):
    """Twelve samples of different lengths, every third with a picture."""
    make_image().save(tmp_path / "x.png")
    rows = []
    for number in range(12):
        image = {"image": "x.png"} if number % 3 == 0 else {}
        question = "<image>\nwhat" if image else "what" * (number % 4 + 1)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a" * number}]
        rows.append({"id": f"r{number}", **image, "conversations": turns})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return build_dataset([DataSpec(path=str(path))], tiny_processor, 128, seed=0)


def test_rows_hold_the_samples_of_the_mixture(dataset):
    packed = PackedDataset(dataset, 128)
    assert len(packed) < len(dataset)
    seen = [sample["id"] for n in range(len(packed)) for sample in packed[n]]
    assert sorted(seen) == sorted(f"r{number}" for number in range(12))
    lengths = [sum(len(sample["input_ids"]) for sample in packed[n]) for n in range(len(packed))]
    assert lengths == packed.work.tokens.tolist()
    packed.count(sample["seen"] for sample in packed[1])
    assert packed.counts()["seen"] == len(packed[1])
    assert packed.useful == np.mean(lengths) / 128


def test_lengths_and_plan_are_found_again(dataset, tiny_processor, monkeypatch):
    packed = PackedDataset(dataset, 128)
    again = build_dataset([part.spec for part in dataset.parts], tiny_processor, 128, seed=0)

    def refuse(*_args, **_kwargs):
        raise AssertionError("it was known")

    monkeypatch.setattr("train.data.packing.plan_rows", refuse)
    monkeypatch.setattr("train.data.labels.Encoder.__call__", refuse)
    known = PackedDataset(again, 128)
    assert np.array_equal(known.plan.order, packed.plan.order)
    other = build_dataset([part.spec for part in dataset.parts], tiny_processor, 128, seed=1)
    with pytest.raises(AssertionError, match="it was known"):
        PackedDataset(other, 128)


# The model


@pytest.fixture(scope="module")
def models():
    """One model per attention backend, with the same weights."""
    made = {}
    for backend in ("sdpa", "eager"):
        model = make_model(make_config())
        model.set_attn_implementation(backend)
        made[backend] = model
    return made


def rows_of(dataset, *sizes):
    samples = iter([dataset[n] for n in range(len(dataset))])
    return [[next(samples) for _ in range(size)] for size in sizes]


def inputs(batch):
    return {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}


def compare_with_singles(model, batch, rows, collator):
    """Largest difference of logits between packed samples and the same ones alone."""
    worst = 0.0
    with torch.no_grad():
        packed = model(**inputs(batch)).logits
        for row, samples in zip(packed, rows, strict=True):
            at = 0
            for sample in samples:
                alone = model(**inputs(collator([sample]))).logits[0]
                worst = max(worst, float((row[at : at + len(alone)] - alone).abs().max()))
                at += len(alone)
    return worst


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [(5,), (4, 2, 1), (1, 1)])
def test_packed_logits_are_those_of_single_samples(dataset, tiny_processor, models, backend, sizes):
    rows = rows_of(dataset, *sizes)
    collator = Collator(tiny_processor)
    assert compare_with_singles(models[backend], collator(rows), rows, collator) < 1e-5


def test_deliberate_mistake_running_positions_mix_samples(dataset, tiny_processor, models):
    rows = rows_of(dataset, 4)
    collator = Collator(tiny_processor)
    batch = collator(rows)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    assert compare_with_singles(models["sdpa"], batch, rows, collator) > 1e-2


def test_deliberate_mistake_a_cache_mixes_samples(dataset, tiny_processor, models):
    rows = rows_of(dataset, 4)
    collator = Collator(tiny_processor)
    batch = {**collator(rows), "use_cache": True}
    assert compare_with_singles(models["sdpa"], batch, rows, collator) > 1e-2


def test_packed_loss_and_gradient_are_those_of_the_padded_batch(dataset, tiny_processor, models):
    rows = rows_of(dataset, 4, 3)
    model, collator = models["sdpa"], Collator(tiny_processor)
    results = []
    for items in (rows, [sample for row in rows for sample in row]):
        batch = collator(items)
        targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        model.zero_grad()
        loss = model(**inputs(batch), num_items_in_batch=targets).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.item(), int(targets), gradients))
    (loss, targets, gradients), (expected, expected_targets, expected_gradients) = results
    assert targets == expected_targets
    assert loss == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-5, rtol=1e-3)


def by_offsets(module, query, key, value, _mask, scaling=None, **kwargs):
    """Attention that knows samples by `cu_seq_lens_q` alone, as flash attention does."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))  # (H, B*T, D)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    starts = kwargs["cu_seq_lens_q"].tolist()
    assert max(b - a for a, b in pairwise(starts)) == kwargs["max_length_q"]
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], is_causal=True, scale=scaling
        )
        for a, b in pairwise(starts)
    ]
    out = torch.cat(pieces, 1)  # (H, B*T, D)
    batch, length = query.shape[0], query.shape[2]
    return out.transpose(0, 1).reshape(batch, length, *out.shape[::2]), None


def test_offsets_reach_every_layer_and_cut_a_batch_of_rows_as_flash_attention_does(
    dataset, tiny_processor, models
):
    """transformers reads positions for flash attention only in a batch of one row."""
    AttentionInterface.register("by_offsets", by_offsets)
    AttentionMaskInterface.register("by_offsets", lambda *_args, **_kwargs: None)
    rows = rows_of(dataset, 4, 2)
    batch = inputs(Collator(tiny_processor)(rows))
    with torch.no_grad():
        expected = models["sdpa"](**batch).logits
        model = make_model(make_config())
        model.model.language_model.config._attn_implementation = "by_offsets"
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)
        wrong = {**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"][[0, 2, -1]]}
        wrong["max_length_q"] = int(wrong["cu_seq_lens_q"].diff().max())
        assert (model(**wrong).logits - expected).abs().max() > 1e-2


# A run


def test_a_killed_run_on_packed_rows_continues_to_the_same_weights(tmp_path, monkeypatch):
    recipe = make_world(tmp_path, ("clip",))
    stage = {**recipe["stages"]["sft"], "init_from": [], "packing": True, "max_length": 128}
    del stage["lr"]
    stage["args"] = {**stage["args"], "max_steps": 4, "dataloader_num_workers": 1}
    recipe["stages"] = {"sft": stage}
    on_step_end = ProgressReport.on_step_end

    def kill_in_step_three(self, args, state, *rest, **kw):
        on_step_end(self, args, state, *rest, **kw)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = {**recipe, "output_dir": str(tmp_path / "killed")}
    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "on_step_end", kill_in_step_three)
        child = multiprocessing.get_context("fork").Process(target=run_recipe, args=(killed,))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    run_recipe(killed)
    run_recipe(recipe)
    one, other = (
        load_file(Path(told["output_dir"], "sft/model.safetensors")) for told in (recipe, killed)
    )
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    state, other = (
        json.loads(Path(told["output_dir"], "sft/trainer_state.json").read_text())
        for told in (recipe, killed)
    )
    # 12 samples of one length: three to a row, two rows to a step, two steps to an epoch
    assert state["epoch"] == 2.0
    lines = [row for row in state["log_history"] if "loss" in row]
    assert [row["samples_seen"] for row in lines] == [6, 12, 12, 12]
    assert [without_times(row) for row in state["log_history"]] == [
        without_times(row) for row in other["log_history"]
    ]


def test_both_ways_to_save_padding_at_once_are_refused(tmp_path):
    recipe = make_world(tmp_path, ("clip",))
    recipe["stages"]["sft"] |= {"packing": True, "length_aware": True}
    with pytest.raises(ValueError, match=r"stages\.sft: packing brings rows of like work"):
        parse_recipe(recipe, "recipe")


def test_models_that_would_mix_samples_are_refused(models):
    language_model = models["sdpa"].model.language_model
    check_keeps_apart(language_model)

    class Recurrent(torch.nn.Module):
        config = language_model.config

        def forward(self, inputs_embeds):
            return inputs_embeds

    with pytest.raises(ValueError, match="packing: Recurrent takes no position_ids"):
        check_keeps_apart(Recurrent())
    hybrid = AutoModel.from_config(
        Qwen3NextConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=0,
            vocab_size=32,
        )
    )
    with pytest.raises(ValueError, match=r"linear_attention.*carry a state"):
        check_keeps_apart(hybrid)
