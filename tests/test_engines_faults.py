"""Two processes, gloo: steps that go wrong, under every engine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_moe.loss import IGNORE_INDEX
from tests.engine_runs import make_mixed_world, mixed_recipe, run_on_two
from train.health import HEALTH

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ZERO = [pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_mixed_world(folder)
    return folder


# -- steps that are not finite, or have nothing to learn from


def trouble(folder: Path) -> Callable[[int], None]:
    """For `before`: six steps of two micro batches, of which 1 and 5 go well.

    2: a loss of rank 1 is infinite, its gradients are not. 3: gradients of rank 0 are not numbers,
    its loss is one. 4: no sample has a label. 5: none of rank 1 has. 6: a loss of rank 0 is nan.
    """

    def before(rank: int) -> None:
        from transformers import Trainer

        from train.data import Collator

        compute, collate = Trainer.compute_loss, Collator.__call__
        batches = 0

        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step + 1
            loss = compute(self, *args, **kwargs)
            if (step, rank) == (2, 1):
                return loss + math.inf
            if (step, rank) == (3, 0):
                loss.register_hook(lambda gradient: gradient * math.nan)
            return loss * math.nan if (step, rank) == (6, 0) else loss

        def without_labels(self: Any, samples: Any) -> Any:
            nonlocal batches
            batch, step = collate(self, samples), batches // 2 + 1
            batches += 1
            if step == 4 or (step, rank) == (5, 1):
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            return batch

        Trainer.compute_loss = compute_loss  # type: ignore[method-assign]
        Collator.__call__ = without_labels  # type: ignore[method-assign]
        _witness(folder / f"witness-{rank}.json", folder / "left.safetensors", rank)

    return before


def _witness(path: Path, weights: Path, rank: int) -> None:
    """Write down what a run holds before each step and when it is stopped, and what it logs."""
    from train.moved import TrainingFault
    from train.trainer import StageTrainer

    step, train = StageTrainer.training_step, StageTrainer.train
    held: dict[int, str] = {}

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step not in held:
            held[self.state.global_step] = digest(self)
        return step(self, *args, **kwargs)

    def train_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        except TrainingFault:
            told = {"held": [*held.values(), digest(self)], "log": self.state.log_history}
            path.write_text(json.dumps(told))
            whole = self.engine.gather(self.model)
            if rank == 0:
                save_file({name: value.contiguous() for name, value in whole.items()}, weights)
            raise

    StageTrainer.training_step = training_step  # type: ignore[method-assign]
    StageTrainer.train = train_and_tell  # type: ignore[method-assign]


def digest(trainer: Any) -> str:
    """Of all that this process holds of weights and optimizer state."""
    found = hashlib.sha256()
    for tensor in _held(trainer):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found.update(local.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _held(trainer: Any) -> Iterator[torch.Tensor]:
    yield from trainer.engine.held(trainer.model).values()
    optimizer = trainer.optimizer.optimizer
    for masters in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        yield from getattr(optimizer, masters, [])
    state = getattr(optimizer, "optimizer", optimizer).state
    assert state or trainer.state.global_step == 0
    for values in state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def run_into_trouble(world: Path, folder: Path, engine: str, **args: Any) -> list[dict[str, Any]]:
    """What each process witnessed."""
    recipe = mixed_recipe(
        world,
        folder / "run",
        engine,
        on_nonfinite="skip",
        max_nonfinite=2,
        args={"max_steps": 6, "save_steps": 100, **args},
    )
    for code, message in run_on_two(recipe, folder, trouble(folder)):
        assert code == 1
        assert "step 6: the loss is nan, and 2 steps were skipped already" in message
        assert "The weights were not touched" in message
    return [json.loads((folder / f"witness-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def under_ddp(world: Path) -> Path:
    run_into_trouble(world, world / "ddp", "ddp")
    return world / "ddp"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *ZERO])
def test_what_is_not_finite_reaches_neither_weights_nor_optimizer(
    world: Path, under_ddp: Path, tmp_path: Path, engine: str
) -> None:
    folder = under_ddp
    if engine != "ddp":
        folder = tmp_path
        run_into_trouble(world, folder, engine)
    witnesses = [json.loads((folder / f"witness-{rank}.json").read_text()) for rank in range(2)]
    for told in witnesses:
        _check_held(told["held"])
        losses, unlabelled = ([e[k] for e in told["log"]] for k in ("loss", "steps_unlabelled"))
        assert [math.isnan(loss) for loss in losses] == [False, True, True, False, False]
        assert (losses[3], unlabelled) == (0, [0, 0, 0, 1, 1])
        rates = [entry["learning_rate"] for entry in told["log"]]
        assert rates[0] > rates[1] == rates[2] == rates[3] > rates[4]
    events = [(row["step"], row["event"], row["action"]) for row in _events(folder)]
    assert events[0] == (2, "the loss is inf", "skipped")
    assert events[1][0] == 3 and events[1][1].startswith("the gradient norm is")
    assert events[2:] == [
        (4, "no sample of it has a token to learn from", "taken"),
        (6, "the loss is nan", "stopped"),
    ]
    _check_same(folder / "left.safetensors", under_ddp / "left.safetensors")


@pytest.mark.parametrize("engine", ZERO)
def test_nor_does_it_in_bfloat16(world: Path, tmp_path: Path, engine: str) -> None:
    for told in run_into_trouble(world, tmp_path, engine, bf16=True):
        _check_held(told["held"])


def _check_held(held: list[str]) -> None:
    """Steps 2, 3 and 6 leave everything as it was, the others nothing."""
    assert len(held) == 7
    same = [one == other for one, other in pairwise(held)]
    assert same == [False, True, True, False, False, True]


def _check_same(one: Path, other: Path) -> None:
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, atol=1e-5, rtol=0, msg=name)


def _events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run/unfinished/sft" / HEALTH).read_text().splitlines()
    return [json.loads(line) for line in lines]


@needs_deepspeed
def test_a_step_that_the_engine_took_all_the_same_is_not_called_harmless(
    world: Path, tmp_path: Path
) -> None:
    """Without what makes gradients of an infinite loss infinite, DeepSpeed takes its step."""

    def before(rank: int) -> None:
        trouble(tmp_path)(rank)
        math.nan = 1.0

    recipe = mixed_recipe(world, tmp_path / "run", "zero2", on_nonfinite="skip")
    ends = run_on_two(recipe, tmp_path, before)
    for code, message in ends:
        assert code == 1
        assert "step 2: the loss is inf. engine: zero2 took the step all the same" in message
    (row,) = _events(tmp_path)
    assert row["action"] == "taken"
    held = json.loads((tmp_path / "witness-0.json").read_text())["held"]
    assert held[1] != held[2]


# -- processes that would wait for each other


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *ZERO])
def test_an_expert_that_runs_twice_in_one_process_is_named(
    world: Path, tmp_path: Path, engine: str
) -> None:
    def twice(rank: int) -> None:
        from eagle_moe.model import EagleMixVisionModel

        encode = EagleMixVisionModel.encode

        def encode_again(self: Any, pixels: Any) -> Any:
            if self.training:  # not in the rehearsal
                expert = self.towers["clip"]
                expert(expert.view(pixels))
            return encode(self, pixels)

        if rank == 1:
            EagleMixVisionModel.encode = encode_again  # type: ignore[method-assign]

    recipe = mixed_recipe(world, tmp_path / "run", engine)
    ends = run_on_two(recipe, tmp_path / "seen", twice, limit=30)
    if engine in ("ddp", "zero2"):  # found before anything would have to be waited for
        for code, message in ends:
            assert code == 1
            assert "experts.clip: processes ran it a different number of times: rank" in message
    else:
        assert ends[1][0] == 1
        assert "rank 1: experts.clip was run a second time for one batch" in ends[1][1]
        assert ends[0][0] != 0


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_an_expert_that_leaves_its_rehearsal_is_named(
    world: Path, tmp_path: Path, engine: str
) -> None:
    def skip_a_block(rank: int) -> None:
        from eagle_moe.experts import VisionExpert

        run_block = VisionExpert.run_block

        def skip(self: Any, block: Any, *args: Any) -> Any:
            busy = rank == 1 and self.spec.name == "clip" and args[0].ndim and self.training
            return args[0] if busy and block is self.blocks[1] else run_block(self, block, *args)

        VisionExpert.run_block = skip  # type: ignore[method-assign]

    recipe = mixed_recipe(world, tmp_path / "run", engine)
    ends = run_on_two(recipe, tmp_path / "seen", skip_a_block, limit=30)
    assert ends[1][0] == 1
    assert "rank 1: experts.clip went through its blocks in another order" in ends[1][1]
    assert ends[0][0] != 0
