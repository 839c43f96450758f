"""What lmms-eval returns of a task -> answers item by item, and metrics with intervals."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle_moe.scores.answer import Answer
from eagle_moe.scores.card import Score, count
from eagle_moe.scores.score import CONFIDENCE, SEED, TOTAL, bootstrap

IDS = ("id", "question_id", "questionId", "questionID", "pid", "index", "Index")
"""Columns that may name a question; the first one that is there and unique does."""
PARTS = ("skill", "category")
"""Columns by whose values a mean is also given."""
MOST_PARTS = 40
SHORT = 200
"""Characters of a text that is kept in an answer's `fields`."""
RESAMPLED = {
    "pope_accuracy": "",
    "pope_precision": "",
    "pope_recall": "",
    "pope_f1_score": "",
    "pope_yes_ratio": "",
    "mme_perception_score": "question_id",
    "mme_cognition_score": "question_id",
    "mmmu_acc": "",
    "mmvp_accuracy": "",
    "mmvp_pair_accuracy": "pair_index",
    "seed_all": "",
    "seed_image": "",
    "seed_video": "",
}
"""Metrics that are no means, whose function of all items has no other effect and may therefore be
asked again and again; with the field that questions share which count together."""
RESAMPLES = 1_000


@dataclass(frozen=True)
class Outcome:
    """Answers in the order of the data set, and the fields of a card that follow from them."""

    answers: list[Answer]
    metrics: dict[str, dict[str, Score]]
    means: list[str]
    not_run: dict[str, str]
    primary: str


def read_outcome(task: Any, results: Mapping[str, Any]) -> Outcome:
    """Of what `simple_evaluate` returned for the one task.

    Raises `RuntimeError` if it holds no items.
    """
    (name,) = results["samples"]
    samples: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    filters = _filters(results["results"][name])
    per_filter: dict[str, list[dict[str, Any]]] = _by_filter(results["samples"][name], filters)
    for key, ones in per_filter.items():
        for one in ones:
            samples[one["doc_id"]][key] = one
    if not samples:
        raise RuntimeError(f"task {name}: lmms-eval returned no items.")
    values, not_run = _values(results["results"][name], filters)
    means = [metric for metric in values if _is_mean(task, metric.split(",")[0])]
    items = {metric: _items(metric, filters, per_filter) for metric in values}
    answers = _answers(samples, {metric: items[metric] for metric in means})
    metrics = count(answers, means)
    for metric in values.keys() - metrics.keys():
        found = list(items[metric].values())
        metrics[metric] = {TOTAL: _aggregated(task, metric, values[metric], found)}
    for metric in means:
        _check(name, metric, metrics[metric][TOTAL].value, values[metric])
    ordered = {metric: metrics[metric] for metric in values}
    return Outcome(answers, ordered, means, not_run, next(iter([*values, *not_run]), ""))


def _filters(result: Mapping[str, Any]) -> list[str]:
    """Names of the filters that answers went through before they were scored, in order."""
    found = dict.fromkeys(key.split(",", 1)[1] for key in result if "," in key)
    return list(found) or ["none"]


def _by_filter(
    samples: Sequence[dict[str, Any]], filters: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Samples come filter by filter (and process by process), every question once for each."""
    seen: dict[int, int] = defaultdict(int)
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in filters}
    for one in samples:
        found[filters[seen[one["doc_id"]]]].append(one)
        seen[one["doc_id"]] += 1
    return found


def _values(
    result: Mapping[str, Any], filters: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Metric -> its number; metric -> why it has none."""
    values: dict[str, float] = {}
    not_run: dict[str, str] = {}
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric == "bypass" or "_stderr" in metric:
            continue
        name = metric if len(filters) == 1 else f"{metric},{chosen}"
        if isinstance(value, bool | int | float) and math.isfinite(value):
            values[name] = float(value)
        elif metric == "submission":
            not_run[name] = "scored by the benchmark's own server: upload the file in submissions/"
        else:
            not_run[name] = f"lmms-eval gives no number: {value}"
    return values, not_run


def _is_mean(task: Any, metric: str) -> bool:
    from lmms_eval.api.metrics import mean

    return task.aggregation().get(metric) is mean


def _items(
    metric: str, filters: Sequence[str], per_filter: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[int, Any]:
    """Question -> what it adds to the metric, for the questions that add something."""
    name, _, chosen = metric.partition(",")
    ones = per_filter[chosen or filters[0]]
    return {one["doc_id"]: one[name] for one in ones if name in one}


def _answers(
    samples: Mapping[int, Mapping[str, dict[str, Any]]], means: Mapping[str, Mapping[int, Any]]
) -> list[Answer]:
    rows = {doc: next(iter(by_filter.values())) for doc, by_filter in sorted(samples.items())}
    docs = {doc: row["doc"] for doc, row in rows.items()}
    naming, part = _id_column(docs), _part_column(docs)
    left_out = {naming, part, "question", "answer", "image"}
    return [
        Answer(
            id=str(docs[doc][naming]) if naming else str(doc),
            part=str(docs[doc][part]) if part else "",
            question=str(row["arguments"][0]),
            target=json.loads(json.dumps(row["target"], default=str)),
            prediction=_text(row["resps"]).strip(),
            scores={name: float(of[doc]) for name, of in means.items() if doc in of},
            fields={
                key: value
                for key, value in docs[doc].items()
                if key not in left_out and _is_short(value)
            },
        )
        for doc, row in rows.items()
    ]


def _id_column(docs: Mapping[int, Mapping[str, Any]]) -> str | None:
    for column in IDS:
        values = [doc.get(column) for doc in docs.values()]
        if None not in values and len({str(value) for value in values}) == len(values):
            return column
    return None


def _part_column(docs: Mapping[int, Mapping[str, Any]]) -> str | None:
    for column in PARTS:
        values = [doc.get(column) for doc in docs.values()]
        texts = all(isinstance(value, str) and value for value in values)
        if texts and TOTAL not in values and 1 <= len(set(values)) <= MOST_PARTS:
            return column
    return None


def _is_short(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= SHORT)


def _text(responses: Any) -> str:
    """The first text in nested lists of responses."""
    while isinstance(responses, list | tuple):
        responses = responses[0] if responses else ""
    return str(responses)


def _check(name: str, metric: str, ours: float, theirs: float) -> None:
    if not math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9):
        raise RuntimeError(
            f"task {name}: lmms-eval says that {metric} is {theirs}, but the mean of its items is "
            f"{ours}. Some answers were lost, or counted twice."
        )


def _aggregated(task: Any, metric: str, value: float, items: Sequence[Any]) -> Score:
    """A number that the task computes from all items at once, with an interval if that may be."""
    name = metric.split(",")[0]
    if name in RESAMPLED:
        low, high = _resample(task.aggregation()[name], items, RESAMPLED[name])
        return Score(value=value, low=min(low, value), high=max(high, value), n=len(items))
    scores = [one.get("score") if isinstance(one, Mapping) else None for one in items]
    if all(isinstance(score, bool | int | float) and 0 <= score <= 1 for score in scores):
        estimate = bootstrap([float(score) for score in scores if score is not None])
        if math.isclose(estimate.mean, value, abs_tol=1e-9):
            return Score.of(estimate)
    return Score(value=value, n=len(items))


def _resample(
    function: Callable[[list[Any]], float], items: Sequence[Any], together: str
) -> tuple[float, float]:
    """The 95 % interval of `function` under resampling of questions, or of groups of them.

    A group that is drawn twice is two groups: each draw gets a name of its own.
    """
    groups: dict[Any, list[Any]] = defaultdict(list)
    for index, one in enumerate(items):
        groups[(one.get("category"), one[together]) if together else index].append(one)
    units = list(groups.values())
    rng = np.random.default_rng(SEED)
    values = []
    for _ in range(RESAMPLES):
        drawn: list[Any] = []
        for turn, unit in enumerate(rng.integers(len(units), size=len(units))):
            ones = units[unit]
            drawn += [{**one, together: turn} for one in ones] if together else ones
        with contextlib.redirect_stdout(io.StringIO()):
            values.append(float(function(drawn)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
