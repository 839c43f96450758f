"""What the 18 benchmarks are called in the harness, their scales, and the average of 11 of them.

Deviations are those of lmms-eval 0.7.3 from the copy of 2024 that came with the Eagle release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROUNDING = 0.3
"""By how much an average in the paper may miss the mean of its parts: those are printed with one
digit, and the tables that recompute do so to 0.2."""


@dataclass(frozen=True)
class Deviation:
    """How a task differs from the paper's. `undone_by` says how ours undoes it, if it does."""

    paper: str
    today: str
    undone_by: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's.

    - `task`, `metric`: of the harness. `factor` turns its unit into the paper's.
    - `best`: the highest score there is, in the paper's unit.
    - `averaged`: whether it is one of the 11 of the Eagle average.
    """

    name: str
    task: str
    metric: str
    factor: float = 100.0
    best: float = 100.0
    averaged: bool = False
    deviations: tuple[Deviation, ...] = ()


SERVER = "probably the test split, scored by the benchmark's server (the release asks for it)"
VALIDATION = "the validation split, which can be scored here"
NO_HARNESS = "the release has no task for it; how it was scored is not known"
CAP = Deviation("no more than 1024 new tokens", "no cap of its own", "`--max-new-tokens`: 1024")

BENCHMARKS = (
    Benchmark("GQA", "gqa", "exact_match", averaged=True),
    Benchmark("VQAv2", "vqav2_val", "exact_match", deviations=(Deviation(SERVER, VALIDATION),)),
    Benchmark(
        "VizWiz",
        "vizwiz_vqa_val",
        "exact_match",
        averaged=True,
        deviations=(
            Deviation(f"{SERVER}; its tables seem to mix two splits", VALIDATION),
            CAP,
        ),
    ),
    Benchmark(
        "OCRBench",
        "ocrbench",
        "ocrbench_accuracy",
        factor=1000.0,
        best=1000.0,
        averaged=True,
        deviations=(
            Deviation("out of 1000", "out of 1", "the scale of this table"),
            Deviation("formulas compared in lower case", "formulas compared with case"),
            Deviation("full-width letters are other letters", "they are folded to plain ones"),
        ),
    ),
    Benchmark("TextVQA", "textvqa_val", "exact_match", deviations=(CAP,)),
    Benchmark("ChartQA", "chartqa", "relaxed_overall", averaged=True),
    Benchmark(
        "DocVQA",
        "docvqa_val",
        "anls",
        averaged=True,
        deviations=(Deviation(NO_HARNESS, VALIDATION),),
    ),
    Benchmark("InfoVQA", "infovqa_val", "anls", deviations=(Deviation(NO_HARNESS, VALIDATION),)),
    Benchmark(
        "MME",
        "mme",
        "mme_perception_score",
        factor=1.0,
        best=2000.0,
        averaged=True,
        deviations=(Deviation("stricter about the form of yes and no", "y and n count as well"),),
    ),
    Benchmark(
        "MMBench",
        "mmbench_en_dev_static",
        "gpt_eval_score",
        factor=1.0,
        deviations=(
            Deviation(
                "GPT-3.5 reads answers that rules cannot read",
                "GPT-4o does; without a key, letters are drawn at random",
                "`_static`: rules alone, no judge and no chance (another reader than the paper's)",
            ),
        ),
    ),
    Benchmark(
        "SEED-image",
        "eagle_seed_image",
        "seed_image",
        averaged=True,
        deviations=(
            Deviation("questions about images", "videos are asked too", "own task: images only"),
            Deviation("the letter's case counts", "it does not"),
            CAP,
        ),
    ),
    Benchmark(
        "MathVista",
        "mathvista_testmini_format",
        "llm_as_judge_eval",
        factor=1.0,
        deviations=(
            Deviation("one prompt", "a group of three prompts", "`_format` is the paper's"),
            Deviation("GPT-4 (0125-preview) extracts answers", "GPT-4o does; needs a key"),
        ),
    ),
    Benchmark(
        "MMMU",
        "eagle_mmmu_val",
        "mmmu_acc",
        deviations=(
            Deviation('"option letter"', '"option\'s letter"', "own task: the words of 2024"),
            Deviation("16 new tokens", "128 new tokens", "own task: 16"),
            Deviation("no blank line before the instruction", "a blank line"),
            Deviation("images come first", "images stand where the text names them"),
        ),
    ),
    Benchmark(
        "ScienceQA-image",
        "scienceqa_img",
        "exact_match",
        averaged=True,
        deviations=(Deviation("the letter's case counts", "it does not"),),
    ),
    Benchmark("POPE", "pope", "pope_f1_score", averaged=True),
    Benchmark(
        "AI2D",
        "ai2d",
        "exact_match",
        averaged=True,
        deviations=(
            Deviation(NO_HARNESS, "labels masked in the image"),
            Deviation('"B. text" is not B', 'it is (filter "flexible-extract")'),
        ),
    ),
    Benchmark(
        "MMVP",
        "mmvp",
        "mmvp_pair_accuracy",
        deviations=(
            Deviation(NO_HARNESS, "both questions of a pair must be right"),
            Deviation("answers as first published", "four answers corrected"),
        ),
    ),
    Benchmark(
        "RealWorldQA",
        "realworldqa",
        "exact_match",
        averaged=True,
        deviations=(Deviation(NO_HARNESS, "a letter, or the bare text"),),
    ),
)
"""In the order of the tables."""

TASKS = tuple(benchmark.task for benchmark in BENCHMARKS)
AVERAGED = tuple(benchmark for benchmark in BENCHMARKS if benchmark.averaged)
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def eagle_average(scores: Mapping[str, float]) -> float:
    """The paper's average, 0 to 1000: the mean of 11 benchmarks, each as a share of its best.

    - `scores`: name of the benchmark -> score in the paper's unit; others than the 11 are ignored.

    Raises `ValueError` naming the parts that are missing, or that are not within their scale.
    """
    missing = [one.name for one in AVERAGED if one.name not in scores]
    if missing:
        raise ValueError(
            f"the Eagle average needs {len(AVERAGED)} benchmarks; "
            f"missing: {', '.join(missing)}. Run `--tasks paper`."
        )
    return _mean(scores)


def check_average(printed: float, scores: Mapping[str, float], source: str) -> None:
    """Raise `ValueError` unless `printed` follows from its parts.

    Where some of the 11 are not known, it must lie between what they would give at 0 and at best.
    """
    known = {one.name: scores[one.name] for one in AVERAGED if one.name in scores}
    low = _mean({one.name: 0.0 for one in AVERAGED} | known)
    high = _mean({one.name: one.best for one in AVERAGED} | known)
    if not low - ROUNDING <= printed <= high + ROUNDING:
        given = f"{low:.1f}" if low == high else f"between {low:.1f} and {high:.1f}"
        raise ValueError(
            f"{source}: the average {printed:g} does not follow from its parts, which give {given}."
        )


def _mean(scores: Mapping[str, float]) -> float:
    for one in AVERAGED:
        if not 0 <= scores[one.name] <= one.best:  # a comparison with NaN is false: refused too
            raise ValueError(
                f"{one.name} = {scores[one.name]:g}: the paper's unit is 0 to {one.best:g}."
            )
    return 1000 * sum(scores[one.name] / one.best for one in AVERAGED) / len(AVERAGED)
