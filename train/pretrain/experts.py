"""Tiny experts learn their eyes, each on a pretext task of its own, as the real ones did.

    clip        contrast: which caption belongs to which picture (open_clip's loss)
    pix2struct  recognition: the printed character in each cell
    eva02       detection: a heat map of coloured figures (focal loss)
    sam         segmentation: what is drawn, pixel by pixel (focal loss)
    convnext    classification: the handwritten digit in each cell

Scenes are made in memory from the training split; the score is measured on the held-out split,
where chance is far below it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_moe.experts import VisionExpert, resolve_expert
from eval.skills import SKILLS, Scene, make_scene
from eval.skills.content import Split
from eval.skills.scene import CELL, GLYPHS, GRID, SYMBOLS
from train.muon import MATRIX, MuonWithAdamW, is_matrix

Progress = Callable[[float, float, str], None]
TEXT_WIDTH = 96
TEXT_LENGTH = 32
WARMUP_STEPS = 20
TEST_SCENES = 60
FIRST_INDEX = 1_000_000
"""Scene numbers from here on, so that pretext scenes are not those of the suite."""


@dataclass
class Batch:
    """`canvas` (B,3,64,64) uint8, `cells` (B,64) symbol indices, `mask` (B,64,64) bool."""

    canvas: Tensor
    cells: Tensor
    mask: Tensor
    captions: list[str]

    def __getitem__(self, index: Tensor) -> Batch:
        captions = [self.captions[i] for i in index.tolist()]
        return Batch(self.canvas[index], self.cells[index], self.mask[index], captions)

    def __len__(self) -> int:
        return len(self.captions)


def stack(scenes: list[Scene]) -> Batch:
    """Scenes as tensors."""
    symbol = {name: index for index, name in enumerate(SYMBOLS)}
    images = np.stack([scene.image for scene in scenes])
    return Batch(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([[symbol[cell] for cell in scene.cells] for scene in scenes]),
        torch.from_numpy(np.stack([scene.mask for scene in scenes])),
        [scene.caption for scene in scenes],
    )


class Pretext(nn.Module):
    """A task: a head on the expert's 8x8 map, a loss, and a score between 0 and 1."""

    skills: tuple[str, ...] = tuple(SKILLS)

    def loss(self, maps: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def score(self, maps: Tensor, batch: Batch) -> float:
        raise NotImplementedError


class CellClassification(Pretext):
    """Which of `symbols` stands in each cell, or none; scored over the cells that hold one."""

    symbols: str = ""
    background_weight = 0.1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, len(self.symbols) + 1)
        weight = torch.ones(len(self.symbols) + 1)
        weight[0] = self.background_weight  # most cells are empty
        self.register_buffer("weight", weight)
        table = torch.zeros(len(SYMBOLS), dtype=torch.long)
        for index, name in enumerate(self.symbols, start=1):
            table[SYMBOLS.index(name)] = index
        self.register_buffer("table", table)

    def logits(self, maps: Tensor) -> Tensor:
        return self.head(maps.flatten(2).transpose(1, 2))

    def loss(self, maps: Tensor, batch: Batch) -> Tensor:
        target = self.table[batch.cells]
        return F.cross_entropy(self.logits(maps).transpose(1, 2), target, weight=self.weight)

    def score(self, maps: Tensor, batch: Batch) -> float:
        target = self.table[batch.cells]
        right = self.logits(maps).argmax(-1) == target
        return float(right[target > 0].float().mean())


class Recognition(CellClassification):
    """Printed characters of words and forms."""

    skills = ("text", "form")
    symbols = GLYPHS


class Digits(CellClassification):
    """Handwritten digits."""

    skills = ("handwriting",)
    symbols = "0123456789"


class Detection(Pretext):
    """A heat map per kind of coloured figure; scored as the figure of each cell that has one."""

    skills = ("shapes", "chart")
    first = 1 + len(GLYPHS)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, len(SYMBOLS) - self.first)
        nn.init.constant_(self.head.bias, -4.0)  # figures are rare (RetinaNet, arXiv 1708.02002)

    def loss(self, maps: Tensor, batch: Batch) -> Tensor:
        from torchvision.ops import sigmoid_focal_loss

        logits = self.head(maps.flatten(2).transpose(1, 2))
        target = F.one_hot(batch.cells, len(SYMBOLS))[..., self.first :].to(logits)
        total = sigmoid_focal_loss(logits, target, reduction="sum")
        return total / target.sum().clamp(min=1)

    def score(self, maps: Tensor, batch: Batch) -> float:
        found = self.head(maps.flatten(2).transpose(1, 2)).argmax(-1) + self.first
        present = batch.cells >= self.first
        return float((found == batch.cells)[present].float().mean())


class Segmentation(Pretext):
    """The 8x8 pixels of each cell: drawn or background; scored by intersection over union."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, CELL * CELL)

    def logits(self, maps: Tensor) -> Tensor:
        pixels = self.head(maps.permute(0, 2, 3, 1)).unflatten(-1, (CELL, CELL))
        return pixels.permute(0, 1, 3, 2, 4).reshape(len(maps), GRID * CELL, GRID * CELL)

    def loss(self, maps: Tensor, batch: Batch) -> Tensor:
        from torchvision.ops import sigmoid_focal_loss

        logits = self.logits(maps)
        return 10 * sigmoid_focal_loss(logits, batch.mask.to(logits), reduction="mean")

    def score(self, maps: Tensor, batch: Batch) -> float:
        found = self.logits(maps) > 0
        union = (found | batch.mask).sum()
        return float((found & batch.mask).sum() / union.clamp(min=1))


class Contrast(Pretext):
    """Pictures and captions in one space; scored as the right caption among a batch of 60."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.transformer import TextTransformer

        from train.pretrain.tokenizer import build_tokenizer

        self.tokenizer = build_tokenizer()
        self.text = TextTransformer(
            context_length=TEXT_LENGTH,
            vocab_size=len(self.tokenizer),
            width=TEXT_WIDTH,
            heads=3,
            layers=2,
            output_dim=TEXT_WIDTH,
            pool_type="last",
            no_causal_mask=True,
        )
        self.head = nn.Linear(channels, TEXT_WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.criterion = ClipLoss()

    def features(self, maps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            [caption + self.tokenizer.eos_token for caption in batch.captions],
            padding="max_length",
            truncation=True,
            max_length=TEXT_LENGTH,
            return_tensors="pt",
        )
        images = F.normalize(self.head(maps.mean(dim=(2, 3))), dim=-1)
        return images, F.normalize(self.text(tokens.input_ids), dim=-1)

    def loss(self, maps: Tensor, batch: Batch) -> Tensor:
        return self.criterion(*self.features(maps, batch), self.log_scale.exp().clamp(max=100))

    def score(self, maps: Tensor, batch: Batch) -> float:
        images, texts = self.features(maps, batch)
        groups = zip(images.split(TEST_SCENES), texts.split(TEST_SCENES), strict=True)
        right = [(i @ t.T).argmax(-1) == torch.arange(len(i)) for i, t in groups]
        return float(torch.cat(right).float().mean())


PRETEXTS: dict[str, type[Pretext]] = {
    "clip": Contrast,
    "pix2struct": Recognition,
    "eva02": Detection,
    "sam": Segmentation,
    "convnext": Digits,
}
"""Kind of expert -> what it learns to see."""


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
    train = _scenes(pretext, "train", scenes, seed)
    test = _scenes(pretext, "test", 5 * TEST_SCENES, seed)
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
    # skills take turns, so that every run of 60 holds all of them
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
    maps = torch.cat([expert(expert.view(part)) for part in test.canvas.split(TEST_SCENES)])
    result = pretext.score(maps, test)
    expert.train()
    return round(result, 4)


def _write(expert: VisionExpert, scores: dict[str, object], out: Path) -> Path:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in expert.state_dict().items()}
    save_file(weights, str(out / "expert.safetensors"), metadata={"format": "pt"})
    for name, content in (("expert", expert.spec.dump()), ("pretext", scores)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out
