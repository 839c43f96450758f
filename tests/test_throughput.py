from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from eagle_moe.loss import IGNORE_INDEX
from tests.ranks import on_ranks
from tests.tiny_trainer import Samples, collate, make_trainer
from train.continuing import Continuing
from train.engines import make_engine
from train.flops import model_flops
from train.stopwatch import Stopwatch
from train.throughput import ACTIVITIES, BatchCounts, TimedSteps, card_peak, positions_seen
from train.trainer import StageTrainer

PARTS = ("experts.clip", "connector", "language_model")
TOKENS, LABELS = 9, 5  # of a sample of `Samples`: four of its image, five of its text


def make(out: Path, parts: tuple[str, ...] = PARTS, images: int = 1, **more: Any) -> StageTrainer:
    options = {"engine": make_engine("auto"), **more.pop("options", {})}
    given = {"max_steps": 4, "logging_steps": 2, "save_steps": 100, **more}
    return make_trainer(out, parts, images=images, options=options, **given)


def lines(trainer: StageTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Slow(Samples):
    """A twentieth of a second per sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.05)
        return super().__getitem__(index)


class SlowSteps(TrainerCallback):
    """Time that belongs to nothing in particular, and an evaluation's, which does not count."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        time.sleep(0.03)

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        time.sleep(0.3)


def test_the_parts_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.add_callback(SlowSteps())
    started = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - started
    for line in lines(trainer):
        parts = [line[f"time_{activity}"] for activity in ACTIVITIES]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(line["time_step"], rel=1e-9)
        assert line["time_other"] > 0.03
    assert sum(2 * line["time_step"] for line in lines(trainer)) < whole


def test_time_is_put_down_to_what_took_it(tmp_path: Path) -> None:
    def slow(seconds: float) -> Any:
        return lambda *_: time.sleep(seconds)

    trainer = make(tmp_path, gradient_accumulation_steps=2)
    trainer.train_dataset = Slow()
    trainer.model.model.vision_tower.towers["clip"].register_forward_hook(slow(0.02))
    trainer.model.model.vision_tower.towers["clip"].register_forward_hook(
        lambda module, args, out: out.register_hook(slow(0.03)) and None
    )
    trainer.model.model.language_model.layers[0].register_forward_hook(slow(0.05))
    trainer.model.model.language_model.layers[0].register_full_backward_hook(slow(0.06))
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(slow(0.04))
    trainer.train()
    line = lines(trainer)[-1]
    expected = {"data": 0.2, "experts": 0.1, "language_model": 0.22, "optimizer": 0.04}
    for activity, seconds in expected.items():
        assert line[f"time_{activity}"] >= seconds, activity  # no upper bound: machines are busy


def test_frozen_experts_take_no_time_in_the_backward_pass(tmp_path: Path) -> None:
    trainer = make(tmp_path, ("language_model",))
    trainer.model.model.language_model.layers[0].register_full_backward_hook(
        lambda *_: time.sleep(0.2)
    )
    trainer.train()
    line = lines(trainer)[-1]
    assert line["time_language_model"] > 0.2 > line["time_experts"]


def test_evaluating_and_saving_do_not_count(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        evaluation=Slow(),
    )
    trainer.add_callback(SlowSteps())
    trainer.train()
    assert all(line["time_step"] < 0.6 for line in lines(trainer))  # an evaluation takes 0.9
    assert trainer.stopwatch.activity is not None


def test_throughput_is_what_was_done_by_the_time_it_took(tmp_path: Path) -> None:
    trainer = make(tmp_path, gradient_accumulation_steps=3, options={"peak_tflops": 1e-3})
    trainer.train()
    flops = model_flops(trainer.model.config)
    per_sample = flops.of_batch(trainer.factors, 1, TOKENS, TOKENS * (TOKENS + 1) / 2, LABELS)
    for line in lines(trainer):
        samples = 6 / line["time_step"]
        assert line["samples_per_second"] == pytest.approx(samples)
        assert line["images_per_second"] == pytest.approx(samples)
        assert line["tokens_per_second"] == pytest.approx(TOKENS * samples)
        assert line["labels_per_second"] == pytest.approx(LABELS * samples)
        assert line["padding"] == 0
        assert line["tflops_per_device"] == pytest.approx(per_sample * samples / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / 1e-3)


def test_mfu_is_counted_per_image(tmp_path: Path) -> None:
    """Two images in a sample are twice the experts' work, none is none of it."""
    work = {}
    for images in (0, 1, 2):
        trainer = make(tmp_path / str(images), images=images, max_steps=2)
        trainer.train()
        (line,) = lines(trainer)
        work[images] = line["tflops_per_device"] * 1e12 * line["time_step"] / 2
        assert "mfu" not in line  # a CPU has no peak
    flops = model_flops(trainer.model.config)
    one = flops.of_batch(trainer.factors, 1, 0, 0, 0)
    text = {n: flops.of_batch(trainer.factors, 0, n, n * (n + 1) / 2, LABELS) for n in (5, 9, 13)}
    # without an image the first text token has no label: nothing comes before it
    bare = flops.of_batch(trainer.factors, 0, 5, 15, LABELS - 1)
    assert work[0] == pytest.approx(bare)
    assert work[1] == pytest.approx(one + text[9])
    assert work[2] == pytest.approx(2 * one + text[13])


def test_padding_is_neither_work_nor_throughput() -> None:
    counts = BatchCounts(pad_token_id=0)
    batch = {
        "input_ids": torch.ones(2, 6, dtype=torch.long),
        "labels": torch.tensor([[7, 7, 7, 7, 7, 7], [IGNORE_INDEX, 7, 7] + [IGNORE_INDEX] * 3]),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
        "sample_ids": ["a", "b"],
        "pixel_values": torch.zeros(3, 3, 4, 4),
    }
    counts.add(batch)
    counts.add(batch)
    counts.add_step()
    expected = {
        "steps": 1,
        "samples": 4,
        "images": 6,
        "cached": 0,
        "places": 24,
        "tokens": 18,
        "positions": 2 * (21 + 6),
        "labels": 2 * (5 + 2),  # the first position is not predicted
    }
    assert counts.state_dict() == expected
    assert counts.take() == expected
    assert not any(counts.take().values())


def test_packed_rows_are_counted_by_sample() -> None:
    ids = torch.tensor([[5, 6, 0, 7, 8, 0, 0, 0], [5, 6, 7, 8, 9, 5, 6, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2]])
    seen = positions_seen({"input_ids": ids, "position_ids": positions}, pad_token_id=0)
    # the pad token within a sample is text; the second row has no padding
    assert seen.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0], [1, 2, 3, 4, 5, 1, 2, 3]]
    apart = positions_seen({"input_ids": ids}, pad_token_id=0)
    assert apart.sum() == 2 * 36 > seen.sum()  # as if one sample were to see the others


class Padded(Samples):
    """Samples end in padding, some in more than others."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "padding": index % 5}


class SlowPadded(Padded, Slow):
    pass


class KeepThird(TrainerCallback):
    """The resume point of step 3, out of reach of retention."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            shutil.copytree(Path(args.output_dir, "checkpoint-3"), Path(args.output_dir, "kept"))


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(samples)
    for row, sample in zip(batch["attention_mask"], samples, strict=True):
        row[len(row) - sample["padding"] :] = 0
    return batch


@pytest.mark.parametrize("mistake", [False, True])
def test_a_line_that_was_cut_by_a_kill_is_about_all_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: bool
) -> None:
    """Three slow steps, a resume point, a quick step: time, throughput, padding are of four."""

    def run(dataset: Samples, **more: Any) -> dict[str, float]:
        trainer = make(tmp_path, logging_steps=4, save_steps=3)
        trainer.data_collator = pad
        trainer.train_dataset = dataset
        trainer.add_callback(KeepThird())
        trainer.train(**more)
        (line,) = lines(trainer)
        return line

    if mistake:
        monkeypatch.setattr(TimedSteps, "carried", Continuing.carried)
    whole = run(SlowPadded())
    resumed = run(Padded(), resume_from_checkpoint=str(tmp_path / "kept"))
    right = (
        resumed["padding"] == whole["padding"]
        and resumed["time_data"] > 3 * 2 * 0.05 / 4
        and resumed["samples_per_second"] * resumed["time_step"] == pytest.approx(2)
    )
    assert right != mistake


def test_counts_of_all_ranks_are_added_up(tmp_path: Path) -> None:
    def run(rank: int) -> dict[str, float]:
        trainer = make(tmp_path / str(rank), max_steps=2)
        if rank == 1:
            collator = trainer.data_collator
            trainer.data_collator = lambda samples: (time.sleep(0.3), collator(samples))[1]
        trainer.train()
        return lines(trainer)[0]

    one, other = on_ranks(run, tmp_path)
    names = [name for name in one if name.startswith("time_") or name.endswith("_per_second")]
    assert [one[name] for name in names] == [other[name] for name in names]
    assert one["samples_per_second"] == pytest.approx(4 / one["time_step"])
    assert 0.15 < one["time_data"] < 0.3  # the mean of next to nothing and 0.3


def test_watching_costs_less_than_a_hundredth(tmp_path: Path) -> None:
    """One switch takes microseconds, and a micro batch makes about ten."""
    stopwatch = Stopwatch(torch.device("cpu"))
    started = time.process_time()
    for _ in range(5000):
        stopwatch.switch("data")
        stopwatch.switch("other")
    assert (time.process_time() - started) / 10_000 < 100e-6
    assert sum(stopwatch.lap().values()) > 0


def test_a_stopwatch_that_is_paused_stands_still() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.switch("data")
    with stopwatch.paused():
        time.sleep(0.05)
    assert stopwatch.activity == "data"
    assert stopwatch.lap()["data"] < 0.05
    time.sleep(0.05)
    stopwatch.switch(None)
    assert stopwatch.lap()["data"] > 0.05


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_cards_are_told_apart(name: str, peak: float | None) -> None:
    assert card_peak(name) == peak
