"""Tiny experts learn their eyes, each on the pretext task of its kind (`train.pretrain.pretexts`).

Scenes are made in memory from the split of pretext tasks, which shows more of the world than the
mixture is trained on; the score is measured on the held-out split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from eagle_moe.checkpoint import save_expert, write_json
from eagle_moe.experts import VisionExpert, resolve_expert
from eval.skills import make_scene
from eval.skills.content import Split
from train.muon import MATRIX, MuonWithAdamW, is_matrix
from train.pretrain.pretexts import GROUP, PRETEXTS, Batch, Pretext, stack

Progress = Callable[[float, float, str], None]
WARMUP_STEPS = 20
TEST_SCENES = 5 * GROUP
FIRST_INDEX = 1_000_000
"""Scene numbers from here on, so that pretext scenes are not those of the suite."""


def pretrain_expert(
    entry: str,
    out: str | Path,
    steps: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    scenes: int = 4000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Train an expert from nothing on its pretext task; write it to `out`.

    - `entry`: a preset or entry of `resolve_expert`, of a kind that has a pretext task.
    - `scenes`: training pictures in memory.

    `out` then holds `expert.safetensors`, `expert.json` (its spec) and `pretext.json` (scores).
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    expert = _build(entry)
    pretext = PRETEXTS[expert.spec.kind](expert.channels)
    train = _scenes(pretext, "pretext", scenes, seed)
    test = _scenes(pretext, "test", TEST_SCENES, seed)
    untrained = _score(expert, pretext, test)
    optimizer = _optimizer(expert, pretext, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step, index in enumerate(_batches(len(train), batch_size, steps, seed), start=1):
        batch = train[index]
        loss = pretext.loss(expert(expert.view(batch.canvas)), batch)
        loss.backward()
        nn.utils.clip_grad_norm_([*expert.parameters(), *pretext.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if progress and (step % 10 == 0 or step == steps):
            progress(step, steps, f"loss {loss.item():.3f}")
    scores = {
        "pretext": type(pretext).__name__.lower(),
        "score": _score(expert, pretext, test),
        "untrained": untrained,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return _write(expert, scores, Path(out))


def _build(entry: str) -> VisionExpert:
    """A freshly initialised expert, by the rules that the whole model uses."""
    from eagle_moe.config import EagleMixVisionConfig
    from eagle_moe.model import EagleMixVisionModel

    spec = resolve_expert(entry)
    if spec.kind not in PRETEXTS:
        raise ValueError(
            f"expert {entry}: no pretext task for kind `{spec.kind}`; "
            f"there are tasks for {', '.join(PRETEXTS)}."
        )
    tower = EagleMixVisionModel(EagleMixVisionConfig(experts=[spec.dump()]))
    expert = tower.towers[spec.name]
    assert isinstance(expert, VisionExpert)
    return expert


def _scenes(pretext: Pretext, split: Split, count: int, seed: int) -> Batch:
    share = count // len(pretext.skills)
    indices = range(FIRST_INDEX, FIRST_INDEX + share)
    # skills take turns, so that every group holds all of them
    return stack([make_scene(s, split, i, seed) for i in indices for s in pretext.skills])


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def _optimizer(expert: VisionExpert, pretext: Pretext, lr: float) -> MuonWithAdamW:
    # The head maps to classes, and the text tower is not the expert: AdamW for both
    matrices = [p for name, p in expert.named_parameters() if is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in (*expert.parameters(), *pretext.parameters()) if id(p) not in chosen]
    return MuonWithAdamW([{"params": matrices, MATRIX: True}, {"params": rest}], lr=lr)


def _rate(step: int, steps: int) -> float:
    """Warm up, hold, and fall linearly to nothing over the second half."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 2 * (1 - step / steps))


@torch.no_grad()
def _score(expert: VisionExpert, pretext: Pretext, test: Batch) -> float:
    expert.eval()
    maps = torch.cat([expert(expert.view(part)) for part in test.canvas.split(GROUP)])
    result = pretext.score(maps, test)
    expert.train()
    return round(result, 4)


def _write(expert: VisionExpert, scores: dict[str, object], out: Path) -> Path:
    save_expert(out, expert.spec, expert.state_dict())
    write_json(out / "pretext.json", scores)
    return out
