"""The words of the page, and figures as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eagle_moe.heatmap import HINTS, PLACES, true_minus
from eagle_moe.heatmap import replaced as replaced_by
from eagle_moe.scores.card import ACCURACY, Score
from eagle_moe.scores.score import TOTAL
from eval.experts.hints import Hint
from eval.experts.matrix import Matrix
from eval.experts.measure import ALL, LOG_PROB

TITLE = "What each expert adds"
UNITS = {LOG_PROB: "log-probability of the right answer", ACCURACY: "right answers, in points"}


def show(metric: str, score: Score) -> tuple[str, str]:
    """A difference and its interval: `+12`, `8 to 16` points, or `+0.41`, `0.30 to 0.52` nats."""
    assert score.low is not None and score.high is not None
    low, high = _figure(metric, score.low, ""), _figure(metric, score.high, "")
    return _figure(metric, score.value, "+"), f"{low} to {high}"


def show_again(metric: str, score: Score, of_runs: Sequence[float]) -> str:
    """`+12 (8 to 16)`, and what single runs gave where there are several: `; runs +7, +17`."""
    text = "{} ({})".format(*show(metric, score))
    if len(of_runs) > 1:
        text += f"; runs {', '.join(_figure(metric, value, '+') for value in of_runs)}"
    return text


def _figure(metric: str, value: float, sign: str) -> str:
    digits, factor = (0, 100) if metric == ACCURACY else (2, 1)
    return true_minus(f"{factor * value + 0.0:{sign}.{digits}f}")


def replaced(matrix: Matrix) -> str:
    """What a silenced expert gives instead, for every caption."""
    return replaced_by(matrix.reference)


def headline(matrix: Matrix) -> str:
    """The strongest expert of every skill, in one sentence."""
    by_expert: dict[str, list[str]] = {}
    for skill in matrix.skills:
        by_expert.setdefault(matrix.strongest(skill), []).append(skill)
    parts = [f"{', '.join(skills)}: {name}" for name, skills in by_expert.items()]
    n = matrix.scores[ALL][LOG_PROB][TOTAL].n
    return (
        f"Over {n:,} questions, the expert whose absence costs the right answer most of its "
        f"probability is, for {'; for '.join(parts)}. An expert is absent with "
        f"{replaced(matrix)}; the others stay."
    )


def how_to_read(matrix: Matrix) -> list[tuple[str, str]]:
    """(term, explanation) of everything that the page shows."""
    return [
        (
            "Silenced",
            f"The expert still runs, but the rest of the model gets the mean of its maps over "
            f"{matrix.reference:,} reference images, cell by cell and channel by channel, in place "
            "of its map of this image. Nothing else changes, and nothing is trained again.",
        ),
        (
            "Leave one out",
            "With all experts, less with this one silenced: what the model would lose. Two experts "
            "that see the same thing cover for each other, and both look small here.",
        ),
        (
            "Only one",
            "With all others silenced, less with all silenced: what the expert brings by itself. A "
            "model that was trained with all of them is not used to that, so this may "
            "understate what an expert could do alone.",
        ),
        (
            "Log-probability",
            "Natural logarithm of the probability that the model gives to the right answer, its "
            "end included; the mean over questions. A loss of 0.69 halves that probability. It "
            "shows a doubt before an answer turns wrong.",
        ),
        (
            "Right answers",
            "Greedy exact match: whether each token of the right answer is the most likely one "
            "after those before it, read from the same forward pass. In percentage points.",
        ),
        (
            "Intervals",
            "95 %, paired bootstrap: questions are resampled 10,000 times, each with both of its "
            "outcomes. They say how much the choice of questions matters, not how much another "
            "training run would differ.",
        ),
    ]


def hints_caption(matrix: Matrix, hints: Sequence[Hint]) -> str:
    pairs = [(hint.loss(name), hint.maps[name].sum()) for hint in hints for name in matrix.experts]
    alike = sum(bool(loss * total > 0) for loss, total in pairs)
    return (
        "The figures under the maps are the claim: how much log-probability the right answer to "
        f"this one question loses with that expert silenced ({replaced(matrix)}). {HINTS} "
        f"Here the sum of a map has the sign of the figure below it in {alike} of {len(pairs)} "
        f"cases. {PLACES} Questions were "
        "chosen by place in the file, skill by skill: they are no random sample."
    )


def lost(hint: Hint, expert: str) -> str:
    """What the right answer to one question loses without an expert."""
    return true_minus(f"{hint.loss(expert):+.2f}")


def agreement(matrix: Matrix, parts: Sequence[str]) -> str:
    """In how many of `parts` the strongest expert's loss has the same sign when trained again."""
    asked = [part for part in parts if matrix.strongest(part) in matrix.retrained]
    counts = {
        metric: Counter(matrix.agreement(matrix.strongest(part), part, metric) for part in asked)
        for metric in UNITS
    }
    told = " and ".join(
        f"on {count['yes']} of {len(asked)} skills in {name}"
        + (f" ({count['unclear']} unclear)" if count["unclear"] else "")
        for name, count in zip(("log-probability", "right answers"), counts.values(), strict=True)
    )
    return (
        "The loss of a skill's strongest expert has the same sign when the model is trained again "
        f"without it {told}. It is unclear where an interval holds zero, or runs differ in sign."
    )


def retrained_rows(matrix: Matrix) -> list[list[str]]:
    """A row for every skill and the total: its strongest expert, and per metric what is lost with
    it silenced, what in training again without it, and whether both have the same sign."""
    rows = []
    for part in matrix.parts:
        expert = matrix.strongest(part)
        if expert not in matrix.retrained:
            continue
        cells, again = [], matrix.retrained[expert]
        for metric in UNITS:
            silenced = show(metric, matrix.leave_one_out[metric][expert][part])
            cells += [
                "{} ({})".format(*silenced),
                show_again(metric, again.lost[metric][part], again.of_runs(metric, part)),
                matrix.agreement(expert, part, metric),
            ]
        rows.append([part, expert, *cells])
    return rows


def runs(matrix: Matrix) -> str:
    """How many training runs the comparison rests on, and what its intervals do not hold."""
    counts = sorted({len(again.runs) for again in matrix.retrained.values()})
    if counts[-1] == 1:
        return "One training run each: its own scatter is not in the intervals."
    least = "" if counts[0] == counts[-1] else f"{counts[0]} to "
    return (
        f"{least}{counts[-1]} training runs each, and the mean over pairs of a model with the "
        "expert and one without it; what each pair gave stands behind it. Intervals are over "
        "questions."
    )
