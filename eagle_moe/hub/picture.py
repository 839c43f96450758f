"""The architecture of a model, drawn from its config: experts, maps, grid, connector, LLM.

Drawn with Pillow, which every installation has, so that no card is without its picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from eagle_moe.config import EagleMixConfig
from eagle_moe.experts import ExpertSpec, build_expert
from eagle_moe.fusion import FUSIONS

INK, FAINT, RULE, PAPER = "#22262b", "#6b7178", "#d9dce1", "#ffffff"
FILLS = {
    "image": "#eef0f3",
    "view": "#e3ecf8",
    "map": "#f3f6fb",
    "fusion": "#fbe8d8",
    "connector": "#fbe8d8",
    "llm": "#e4f1e6",
}
SCALE = 2
"""Drawn so many times as large and made smaller, for smooth edges."""
ROW, TALL, GAP, MARGIN = 92, 150, 16, 28
"""Pixels: height of an expert's box and of the others, between boxes, around all."""
WIDTHS = {"image": 190, "view": 210, "map": 230, "fusion": 260, "connector": 240, "llm": 250}
ARROW = 46


@dataclass(frozen=True)
class ExpertShape:
    """An expert in numbers: a view of `view` pixels a side gives (channels, cells, cells)."""

    name: str
    kind: str
    view: int
    channels: int
    cells: int

    @classmethod
    def of(cls, spec: ExpertSpec) -> ExpertShape:
        """No memory is taken for weights. Raises `ValueError` for one that cannot be built."""
        with torch.device("meta"):
            expert = build_expert(spec)
        size = spec.view.size
        return cls(spec.name, spec.kind, size, expert.channels, size // expert.stride)


@dataclass(frozen=True)
class Anatomy:
    """The shapes that an image passes through.

    `fused`: (tokens, channels) after fusion; `tokens`: (tokens, width) that the LLM reads.
    """

    canvas: int
    experts: tuple[ExpertShape, ...]
    fusion: str
    grid: int | None
    fused: tuple[int, int]
    connector: str
    tokens: tuple[int, int]
    llm: str
    layers: int | None

    @classmethod
    def of(cls, config: EagleMixConfig) -> Anatomy:
        """No memory is taken for weights. Raises `ValueError` for experts that cannot be built."""
        vision, text = config.vision_config, config.text_config
        shapes = tuple(map(ExpertShape.of, vision.expert_specs))
        options = vision.fusion_options
        with torch.device("meta"):
            fusion = FUSIONS[vision.fusion["kind"]](
                {shape.name: shape.channels for shape in shapes}, options
            )
        return cls(
            canvas=vision.canvas_size,
            experts=shapes,
            fusion=vision.fusion["kind"].replace("_", " "),
            grid=getattr(options, "grid", None),
            fused=(fusion.num_tokens, fusion.out_channels),
            connector=config.connector["kind"] if config.connector else "",
            tokens=(config.num_image_tokens, text.hidden_size),
            llm=text.model_type,
            layers=getattr(text, "num_hidden_layers", None),
        )

    def describe(self) -> str:
        """The picture in words, for those who cannot see it."""
        experts = "; ".join(
            f"{one.name} sees {one.view} x {one.view} pixels and gives "
            f"{one.channels} x {one.cells} x {one.cells}"
            for one in self.experts
        )
        grid = f" on a grid of {self.grid} x {self.grid}" if self.grid else ""
        return (
            f"An image becomes a canvas of {self.canvas} x {self.canvas} pixels. {experts}. "
            f"{self.fusion.capitalize()}{grid} makes {self.fused[0]} tokens of {self.fused[1]} "
            f"channels; the connector ({self.connector}) makes {self.tokens[0]} tokens of width "
            f"{self.tokens[1]}, which the language model ({self.llm}) reads among the words."
        )


def draw_architecture(anatomy: Anatomy) -> bytes:
    """The picture as a PNG: an expert a row, the image on the left, the language model right."""
    count = len(anatomy.experts)
    tall = max(count * (ROW + GAP) - GAP, TALL)
    pen = _Pen(sum(WIDTHS.values()) + 5 * ARROW + 2 * MARGIN, tall + 2 * MARGIN)
    middle = pen.size[1] / 2
    rows = [middle + (i - (count - 1) / 2) * (ROW + GAP) for i in range(count)]
    side = anatomy.canvas
    pen.box("image", middle, TALL, ["image", f"canvas {side} x {side}"])
    for row, one in zip(rows, anatomy.experts, strict=True):
        pen.arrow("image", middle, "view", row)
        pen.box("view", row, ROW, [one.name, f"view {one.view} x {one.view}"])
        pen.arrow("view", row, "map", row)
        pen.box("map", row, ROW, ["map", f"{one.channels:,} x {one.cells} x {one.cells}"])
        pen.arrow("map", row, "fusion", row)
    grid = [f"grid {anatomy.grid} x {anatomy.grid}"] if anatomy.grid else []
    fused = f"{anatomy.fused[0]:,} x {anatomy.fused[1]:,}"
    pen.box("fusion", middle, tall, [anatomy.fusion, *grid, fused])
    pen.arrow("fusion", middle, "connector", middle)
    read = f"{anatomy.tokens[0]:,} x {anatomy.tokens[1]:,}"
    pen.box("connector", middle, TALL, ["connector", anatomy.connector, read])
    pen.arrow("connector", middle, "llm", middle)
    layers = [f"{anatomy.layers} layers"] if anatomy.layers else []
    pen.box("llm", middle, TALL, ["language model", anatomy.llm, *layers])
    return pen.png()


class _Pen:
    """Boxes in columns, each a title and lines, and arrows between them. In finished pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size * SCALE) for size in (21, 24)}
        self.lefts, x = {}, MARGIN
        for column, wide in WIDTHS.items():
            self.lefts[column] = x
            x += wide + ARROW

    def box(self, column: str, middle: float, height: int, lines: list[str]) -> None:
        left, width = self.lefts[column], WIDTHS[column]
        corners = (left, middle - height / 2, left + width, middle + height / 2)
        self.draw.rounded_rectangle(
            [SCALE * edge for edge in corners],
            radius=12 * SCALE,
            fill=FILLS[column],
            outline=RULE,
            width=2 * SCALE,
        )
        for index, line in enumerate(lines):
            y = middle + (index - (len(lines) - 1) / 2) * 32
            at = (SCALE * (left + width / 2), SCALE * y)
            font = self._fitting(line, 24 if index == 0 else 21, width - 16)
            self.draw.text(at, line, INK if index == 0 else FAINT, font, anchor="mm")

    def arrow(self, column: str, y: float, to: str, to_y: float) -> None:
        """Along the rows, with a bend half-way where the two ends are on different ones."""
        right, left = self.lefts[column] + WIDTHS[column], self.lefts[to]
        start, end, bend = right + 4, left - 6, (right + left) / 2 - 4
        points = [(start, y), (bend, y), (bend, to_y), (end, to_y)]
        self.draw.line([(SCALE * a, SCALE * b) for a, b in points], FAINT, 2 * SCALE)
        tip = [(end - 12, to_y - 6), (end, to_y), (end - 12, to_y + 6)]
        self.draw.polygon([(SCALE * a, SCALE * b) for a, b in tip], FAINT)

    def png(self) -> bytes:
        target = io.BytesIO()
        self.image.resize(self.size, Image.Resampling.LANCZOS).save(target, "PNG", optimize=True)
        return target.getvalue()

    def _fitting(self, line: str, size: int, width: float) -> ImageFont.ImageFont:
        """The font at this size, or smaller if the line would leave its box."""
        font = self.fonts[size]
        length = self.draw.textlength(line, font)
        if length > SCALE * width:
            font = ImageFont.load_default(size * SCALE * SCALE * width / length)
        return font  # type: ignore[return-value]
