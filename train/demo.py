"""`make demo`: the whole job, small, on a CPU and without a download.

    data, tokenizer, text            suite  tokenizer  corpus
    eyes, and a reader               experts/*  reader
    three stages, and three          mixture (pre_align, align, sft)
      models to compare with         clip_only  clip_best  blind
    scores and the page              scores/*  report.html  report.png  summary.json

Everything is a job in a graph (`train.jobs`), so it uses every core, shows where it is, and goes
on where it was interrupted. The sizes are in `configs/demo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eagle_moe.schema import load_yaml
from train.jobs import Job, JobsFailed, progress, run_jobs
from train.material import Material, MaterialSettings, make_stage

CONFIGS = Path("configs/demo")
CLIP = "[{name: clip, preset: clip-tiny}]"


class DemoSettings(MaterialSettings):
    """Sizes of the demo."""

    recipe: str
    overrides: list[str] = []
    """Of the recipe, in every run of it."""
    clip_best_overrides: list[str] = []
    """What CLIP does best with, on top of opening it after `clip_only`."""


def make_score(out: Path, model: str, data: str, images: str) -> None:
    from eval.run import evaluate

    evaluate(model, data, out, images=images, batch_size=100, progress=progress)  # type: ignore[arg-type]


# -- the graph


class Demo:
    """Names, folders and recipe overrides of one demo under `root`."""

    def __init__(self, settings: DemoSettings, root: Path) -> None:
        self.settings = settings
        self.root = root
        self.material = Material(settings, root)

    def jobs(self) -> list[Job]:
        """All jobs, those that others wait for longest first."""
        return [*self.material.jobs(), *self._models(), *self._scores()]

    def _place(self, name: str) -> Path:
        return self.root / "jobs" / name.replace("/", "-")

    def _stage(
        self,
        model: str,
        stage: str,
        changes: Sequence[str],
        needs: Sequence[str],
        expert: str | None = None,
    ) -> Job:
        """One run of the recipe on this demo's material, with `changes` on top."""
        overrides = [
            f"output_dir={self.root}/{model}",
            f"features_dir={self.root}/features",
            *self.material.overrides(),
            *self.settings.overrides,
            *changes,
        ]
        kwargs: dict[str, Any] = {"stage": stage, "overrides": overrides, "expert": expert}
        name = "/".join(filter(None, (model, stage, expert)))
        kwargs["recipe"] = self.settings.recipe
        return Job(name, make_stage, kwargs, self._place(name), ("suite", *needs))

    def _models(self) -> list[Job]:
        """The mixture, and the three models that it is compared with."""
        told = self.settings
        names = list(told.pretexts)
        mixture = [self.material.init_experts(names)]
        clip = [f"model.experts={CLIP}", self.material.init_experts(["clip"])]
        aligned = [
            f"stages.align.init_from=[{self.material.reader}, {self.root}/mixture/pre_align]"
        ]
        # Its own best recipe: longer, with the expert open.
        best = [
            f"stages.sft.init_from=[{self.root}/clip_only/sft]",
            "stages.sft.trainable=[experts, connector, language_model]",
            "stages.sft.lr={experts: 1.0e-3}",
            *told.clip_best_overrides,
        ]
        blind = [
            "stages.sft.trainable=[language_model]",
            f"stages.sft.init_from=[{self.material.reader}]",
            "data.questions.images=drop",
            "data.held_out.images=drop",
        ]
        pre_align = [
            self._stage("mixture", "pre_align", mixture, ("reader", f"eyes/{name}"), name)
            for name in names
        ]
        return [
            *pre_align,
            self._stage("mixture", "align", mixture, [job.name for job in pre_align]),
            self._stage("mixture", "sft", mixture, ["mixture/align"]),
            self._stage("clip_only", "align", clip + aligned, ["mixture/pre_align/clip"]),
            self._stage("clip_only", "sft", clip, ["clip_only/align"]),
            self._stage("clip_best", "sft", clip + best, ["clip_only/sft"]),
            self._stage("blind", "sft", clip + blind, ["reader", "eyes/clip"]),
        ]

    def _scores(self) -> list[Job]:
        return [
            Job(
                f"{model}/score",
                make_score,
                {
                    "model": f"{self.root}/{model}/sft",
                    "data": str(self.material.suite),
                    "images": "drop" if model == "blind" else "keep",
                },
                self.root / "scores" / model,
                (f"{model}/sft",),
            )
            for model in MODELS
        ]


MODELS = ("mixture", "clip_only", "clip_best", "blind")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The whole job, small, on a CPU.")
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("size", nargs="?", default="mini", choices=known)
    parser.add_argument("--out", type=Path, help="default: runs/demo, or runs/demo-SIZE")
    told = parser.parse_args(arguments)
    settings = DemoSettings.parse(load_yaml(CONFIGS / f"{told.size}.yaml"), str(CONFIGS))
    root = told.out or Path("runs/demo" if told.size == "mini" else f"runs/demo-{told.size}")
    started = time.perf_counter()
    try:
        results = run_jobs(Demo(settings, root).jobs(), title="demo")
    except JobsFailed as error:
        print(error, file=sys.stderr)
        return 1
    seconds = {name: result.seconds for name, result in results.items()}
    reused = [result.reused for result in results.values()]
    wall = _wall_before(root) if all(reused) else None
    report(root, seconds, wall if any(reused) else time.perf_counter() - started)
    return 0


def _wall_before(root: Path) -> float | None:
    """What the run took that all results come from, if it was a single one."""
    summary = root / "summary.json"
    if not summary.exists():
        return None
    return json.loads(summary.read_text(encoding="utf-8")).get("wall_seconds")


def report(root: Path, seconds: dict[str, float], wall_seconds: float | None) -> None:
    """The page, its picture, the summary, the table, and where the model is."""
    from eval.report import gather, print_summary, write_report

    shutil.copytree(root / "mixture" / "sft", root / "model", dirs_exist_ok=True)
    ask = f"make chat MODEL={root}/model IMAGE=picture.png"
    results = gather(
        {model: root / "scores" / model for model in MODELS},
        root / "suite",
        {model: root / model / "sft" / "curve.jsonl" for model in MODELS},
        seconds,
        wall_seconds=wall_seconds,
        ask=ask,
        notes=[_pretext_note(root)],
    )
    write_report(results, root)
    print_summary(results)
    print(f"The page: {root}/report.html (as a picture: report.png). Ask the model: {ask}")


def _pretext_note(root: Path) -> str:
    """How well each expert has learned its pretext task, in a sentence."""
    scores = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "experts").glob("*/pretext.json"))
    }
    parts = [
        f"{name} {one['pretext']} {one['score']:.2f} (untrained {one['untrained']:.2f})"
        for name, one in scores.items()
    ]
    return "Held-out scores of the experts' pretext tasks: " + ", ".join(parts) + "."


if __name__ == "__main__":
    raise SystemExit(main())
