"""Pretext tasks: what each kind of tiny expert learns to see, as the real ones did.

    clip        contrast: which caption belongs to which picture (open_clip's loss)
    pix2struct  recognition: the printed character in each cell
    eva02       detection: a heat map of coloured figures (focal loss)
    sam         segmentation: what is drawn, pixel by pixel (focal loss)
    convnext    classification: the handwritten digit in each cell

A task is a head on the expert's 8x8 map, a loss, and a score between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.skills import SKILLS, Scene
from eval.skills.scene import CELL, GLYPHS, GRID, SYMBOLS
from train.pretrain.tokenizer import build_tokenizer

TEXT_WIDTH = 96
TEXT_LENGTH = 32
GROUP = 60
"""Captions that a picture's own is told from when contrast is scored."""


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
    weight: Tensor
    table: Tensor

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
    """Pictures and captions in one space; scored as the right caption among `GROUP`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.transformer import TextTransformer

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
        groups = zip(images.split(GROUP), texts.split(GROUP), strict=True)
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
