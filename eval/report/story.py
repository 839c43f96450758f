"""The words of the demo's page: computed from the results, used alike by the page and the PNG."""

from __future__ import annotations

from collections.abc import Mapping

from eagle_moe.scores.score import TOTAL, Estimate
from eval.page import show_seconds
from eval.report.results import MODELS, DemoResults, Parts

TITLE = "What a mixture of vision experts sees"


def percent(score: Estimate) -> str:
    """`71 % (68 to 74)`, which no line break tears apart."""
    return _whole(f"{100 * score.mean:.0f} % ({100 * score.low:.0f} to {100 * score.high:.0f})")


def points(score: Estimate) -> str:
    """`+29 (26 to 32)`, in percentage points."""
    return _whole(f"{100 * score.mean:+.0f} ({100 * score.low:.0f} to {100 * score.high:.0f})")


def headline(results: DemoResults) -> str:
    """The main numbers in one sentence."""
    total = {name: scores[TOTAL] for name, scores in results.accuracy.items()}
    return (
        f"On {total['mixture'].n:,} held-out questions the mixture is right on "
        f"{percent(total['mixture'])}, CLIP alone with the same recipe and budget on "
        f"{percent(total['clip_only'])}, the same recipe without an image on "
        f"{percent(total['blind'])}, and a guesser who knows the possible answers on "
        f"{percent(total['chance'])}; in brackets the 95 % interval."
    )


def accuracy_table(accuracy: Mapping[str, Parts]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows, the total first: right answers in % with their intervals."""
    models = [name for name in MODELS if name in accuracy]
    rows = [
        [part, *(_cell(accuracy[name][part]) for name in models)] for part in accuracy[models[0]]
    ]
    return ["", *(MODELS[name] for name in models)], rows


def _cell(score: Estimate) -> str:
    return f"{100 * score.mean:.0f} ({100 * score.low:.0f}-{100 * score.high:.0f})"


def lead_sentences(leads: Mapping[str, Parts]) -> list[str]:
    """The mixture's lead over each reference, in total and where it is least."""
    sentences = []
    for name, lead in leads.items():
        least = min((part for part in lead if part != TOTAL), key=lambda part: lead[part].mean)
        sentences.append(
            f"Lead over {_lower(MODELS[name])}: {points(lead[TOTAL])} points; the least on "
            f"{least}, {points(lead[least])}."
        )
    return sentences


def how_measured(results: DemoResults) -> list[tuple[str, str]]:
    """(term, explanation) of everything that the page compares."""
    paragraphs = [
        (
            "Right",
            "The answer equals the true one, but for outer space and case. Answers are greedy. "
            "Every question is about an image that was in no training stage, with other words, "
            "tables, numbers or handwriting where a skill has content to hold out.",
        ),
        (
            "Plain and wide",
            "The mixture learns from pictures that are nearly all plain, and is asked about ones "
            "with other fonts, fills, shades and backgrounds. Experts saw such ones in tasks of "
            "their own.",
        ),
        (
            "CLIP only",
            "The same recipe, data, steps and language model, with CLIP as the only expert. Part "
            "of the mixture's lead at one budget is speed: compare the learning curves.",
        ),
        (
            "Blind",
            "The same recipe, trained and asked without images: neither the picture nor its "
            "placeholder is in the prompt. What it gets right can be guessed from the question.",
        ),
        (
            "Chance",
            "A guesser that looks up all distinct answers which questions of the same kind have "
            "in the training data, and draws one of them. Its accuracy on the same questions is "
            "computed exactly: one over their number, or zero for an answer that never occurs.",
        ),
        (
            "Intervals",
            "95 %, by resampling the questions 10,000 times. Leads are resampled pairwise: both "
            "models' answers to a question stay together.",
        ),
    ]
    if "clip_best" in results.accuracy:
        best = (
            MODELS["clip_best"],
            "CLIP as the only expert again, with the best recipe that was found for it: its "
            "fine-tuning goes on for longer, and CLIP itself learns too.",
        )
        paragraphs.insert(2, best)
    return paragraphs


def caveats(results: DemoResults) -> list[str]:
    """What the numbers do not say."""
    return [
        "One seed. The intervals say how much the choice of questions matters, not how much "
        "another training run would differ.",
        "Tiny models and small pictures, trained for minutes: this shows that the parts work "
        "together, not how good a full-size mixture is.",
        "The experts differ in strength because each learned a task of its own first; the tasks "
        "were chosen to resemble what the real experts were trained on.",
        *results.notes,
    ]


def setting(results: DemoResults) -> str:
    """Where and how long it ran, with the libraries that matter."""
    if results.wall_seconds is not None:
        took = f"{show_seconds(results.wall_seconds)} in all"
    else:  # it was interrupted or partly read back
        took = f"{show_seconds(total_seconds(results))} of steps, some of them side by side"
    libraries = ", ".join(
        f"{name} {results.versions[name]}"
        for name in ("python", "torch", "transformers", "eagle-moe")
        if name in results.versions
    )
    return f"{results.machine}. {took}. {libraries}."


def time_sentence(results: DemoResults) -> str:
    """How the steps' times add up."""
    total = show_seconds(total_seconds(results))
    if results.wall_seconds is None:
        return f"The steps took {total} together."
    return (
        f"The steps took {total} together and {show_seconds(results.wall_seconds)} by the clock, "
        "because independent steps ran side by side."
    )


def total_seconds(results: DemoResults) -> float:
    return sum(results.seconds.values())


def _whole(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}")


def _lower(label: str) -> str:
    """A label inside a sentence; acronyms keep their capitals."""
    return label if label[:2].isupper() else label[0].lower() + label[1:]
