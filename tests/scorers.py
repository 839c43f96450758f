"""The scorers of lmms-eval, asked as its tasks ask them; for `test_scorers`, in its own process.

Every function takes a golden record's prediction, references and extra, and returns its score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from eval.tasks.catalogue import importable_without_a_key

Score = Any
Scorer = Callable[[Any, list[str], dict[str, Any]], Score]


def utils(task: str) -> Any:
    with importable_without_a_key():
        return import_module(f"lmms_eval.tasks.{task}")


def anls(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    from lmms_eval.api.metrics import anls

    return anls(references, [prediction.strip()], extra["threshold"])["anls"]


def exact_match(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    from lmms_eval.api.metrics import exact_match_fn

    told = exact_match_fn(predictions=[prediction.strip()], references=references, **extra)
    return float(told["exact_match"])


def mathvista(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    evaluator = utils("mathvista.mathvista_evals").MathVistaEvaluator
    with importable_without_a_key():
        judge = evaluator()
    kinds = extra["choices"], extra["question_type"], extra["answer_type"], extra["precision"]
    return judge.safe_equal(judge.normalize_extracted_answer(prediction, *kinds), references[0])


def mme(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    doc = {"question_id": "0", "category": "existence", "answer": references[0]}
    return utils("mme.utils").mme_process_results(doc, [prediction])["mme_perception_score"][
        "score"
    ]


def mme_total(predictions: list[str], references: list[str], extra: dict[str, Any]) -> Score:
    module = utils("mme.utils")
    rows = zip(extra["rows"], predictions, references, strict=True)
    items = [
        module.mme_process_results(row | {"answer": right}, [said])["mme_perception_score"]
        for row, said, right in rows
    ]
    return module.mme_aggregate_results(items)


def mmmu_open(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    module = utils("mmmu.utils")
    answer = references[0] if len(references) == 1 else references
    doc = {"id": "validation_Art_1", "question_type": "open", "answer": answer}
    said = module.mmmu_process_results(doc, [prediction.strip()])["mmmu_acc"]
    return module.mmmu_aggregate_results([said])


def mmmu_choice(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    options = extra["options"]
    parse = utils("mmmu.utils").parse_multi_choice_response
    return parse(prediction.strip(), list(options), dict(options)) == extra["gold"]


def ocrbench(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    doc = extra | {"answer": references}
    found = utils("ocrbench.utils").ocrbench_process_results(doc, [prediction])
    return found["ocrbench_accuracy"]["score"]


def pope(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    doc = {"question_id": "0", "answer": references[0]}
    return utils("pope.utils").pope_process_results(doc, [prediction])["pope_accuracy"]["score"]


def pope_total(predictions: list[str], references: list[str], extra: dict[str, Any]) -> Score:
    module = utils("pope.utils")
    items = [
        module.pope_process_results({"question_id": "0", "answer": right}, [said])["pope_accuracy"]
        for said, right in zip(predictions, references, strict=True)
    ]
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    return {f"pope_{name}": getattr(module, f"pope_aggregate_{name}")(items) for name in names}


def chartqa(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    doc = {"type": "human_test", "answer": references[0]}
    told = utils("chartqa.utils").chartqa_process_results(doc, [prediction.strip()])
    return told["relaxed_overall"]


def vqa(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    if extra["flavour"] == "vqav2":
        answers = [{"answer": one, "answer_id": i} for i, one in enumerate(references)]
        doc = {"question_id": 0, "answers": answers}
        return utils("vqav2.utils").vqav2_process_results_val(doc, [prediction])["exact_match"]
    doc = {"question_id": 0, "answers": list(references)}
    return utils("textvqa.utils").textvqa_process_results(doc, [prediction])["exact_match"]


def mmbench_rows(predictions: list[str], answers: list[str], options: list[dict]) -> list[dict]:
    return [
        {
            "index": 7 + turn * 10**6,
            "question": "q",
            "category": "c",
            "answer": answer,
            "prediction": said,
            **choices,
        }
        for turn, (said, answer, choices) in enumerate(
            zip(predictions, answers, options, strict=True)
        )
    ]


def mmbench_static(prediction: Any, references: list[str], extra: dict[str, Any]) -> Score:
    evaluator = utils("mmbench.en_utils").mmbench_evaluator
    several = isinstance(prediction, list)
    said = prediction if several else [prediction]
    default = {"A": "red", "B": "green", "C": "blue", "D": "a large yellow bus"}
    rows = mmbench_rows(said, references, [extra.get("options", default)] * len(said))
    return evaluator.eval_result(rows, "static")[0]


def mmbench_prefetch(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    evaluator = utils("mmbench.en_utils").mmbench_evaluator
    return evaluator.can_infer(prediction.strip(), dict(extra["options"])) == extra["gold"]


def seed(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    module = utils("seedbench.utils")
    doc = {"question_id": "0", "data_type": "image", "answer": references[0]}
    said = module.seed_process_result(doc, [prediction.strip()])["seed_image"]
    return module.seed_aggregation_result([said])


def scienceqa(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    options = list(extra["options"])
    doc = {"choices": options, "answer": options.index(extra["gold"])}
    return utils("scienceqa.utils").sqa_process_results(doc, [prediction])["exact_match"]


def ai2d(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    chosen = utils("ai2d.utils").MultiChoiceRegexFilter(
        regex_pattern="([A-Z])\\.", group_select=0, ignore_case=True, ignore_punctuation=True
    )
    (said,) = chosen.apply([[prediction.strip()]], [{}])
    return exact_match(said, references, {"ignore_case": True, "ignore_punctuation": True})


def realworldqa(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    module = utils("realworldqa.utils")
    doc = {"answer": references[0]}
    return module.realworldqa_process_results(doc, [prediction.strip()])["exact_match"]


def mmvp_row(prediction: str, reference: str, index: int) -> dict[str, Any]:
    doc = {"Index": index + 1, "Correct Answer": reference, "Options": "(a) red (b) green"}
    return utils("mmvp.utils").mmvp_process_results(doc, [prediction])["mmvp_accuracy"]


def mmvp(prediction: str, references: list[str], extra: dict[str, Any]) -> Score:
    return mmvp_row(prediction, references[0], 0)["is_correct"]


def mmvp_pairs(predictions: list[str], references: list[str], extra: dict[str, Any]) -> Score:
    items = [mmvp_row(*pair, i) for i, pair in enumerate(zip(predictions, references, strict=True))]
    return utils("mmvp.utils").mmvp_aggregate_pair_results(items)


SCORERS: dict[str, Scorer] = {
    "anls": anls,
    "gqa_exact_match": exact_match,
    "mathvista_normalise": mathvista,
    "mme_correct": mme,
    "mme_perception_total": mme_total,
    "mmmu_open": mmmu_open,
    "mmmu_multi_choice": mmmu_choice,
    "ocrbench_contains": ocrbench,
    "pope_correct": pope,
    "pope_aggregate": pope_total,
    "relaxed_accuracy": chartqa,
    "vqa_accuracy": vqa,
    "mmbench_en_dev_static": mmbench_static,
    "mmbench_circular": mmbench_static,
    "mmbench_prefetch": mmbench_prefetch,
    "seed_image": seed,
    "scienceqa_img": scienceqa,
    "ai2d": ai2d,
    "realworldqa": realworldqa,
    "mmvp_letter": mmvp,
    "mmvp_pair_accuracy": mmvp_pairs,
}

MISTAKES: dict[str, tuple[str, Any]] = {
    "anls": ("lmms_eval.api.metrics.levenshtein_distance", lambda a, b: abs(len(a) - len(b))),
    "gqa_exact_match": ("lmms_eval.api.metrics.string.punctuation", ""),
    "mme_correct": (
        "lmms_eval.tasks.mme.utils.parse_pred_ans",
        lambda text: "yes" if "yes" in text else "no",
    ),
    "pope_correct": (
        "lmms_eval.tasks.pope.utils.pope_process_results",
        lambda doc, said: {"pope_accuracy": {"score": float(doc["answer"] in said[0].lower())}},
    ),
    "relaxed_accuracy": (
        "lmms_eval.tasks.chartqa.utils.relaxed_correctness",
        lambda said, right: said.lower() == right.lower(),
    ),
    "ocrbench_contains": ("lmms_eval.tasks.ocrbench.utils._fold_fullwidth_ascii", str.strip),
    "mmmu_open": ("lmms_eval.tasks.mmmu.utils.extract_numbers", lambda text: []),
}
"""Metric -> a function inside its scorer, and a plausible other version of it."""


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Golden records of lmms-eval with a fixed answer; the vendored copy of 2024 is another one."""
    for path in sorted(folder.glob("*.json")):
        for record in json.loads(path.read_text(encoding="utf-8")):
            if record["source"].startswith("lmms-eval ") and record["score"] is not None:
                yield record


def _close(score: Score, golden: Any) -> bool:
    if isinstance(golden, dict):
        return all(_close(score[name], value) for name, value in golden.items())
    return abs(float(score) - float(golden)) < 1e-6


def _wrong(record: dict[str, Any]) -> bool:
    said = record["prediction"]
    score = SCORERS[record["metric"]](said, list(record["references"]), dict(record["extra"]))
    return not _close(score, record["score"])


def check(goldens: str) -> dict[str, Any]:
    """Records by metric, those that today's scorers answer otherwise, and so under a mistake."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for record in records(Path(goldens)):
        asked.setdefault(record["metric"], []).append(record)
    found = {
        metric: [f"{one['case']}: {one['prediction']}" for one in ones if _wrong(one)]
        for metric, ones in asked.items()
    }
    mistaken = {}
    for metric, (target, other) in MISTAKES.items():
        utils(target.split(".")[2] + ".utils") if ".tasks." in target else None
        with patch(target, other):
            mistaken[metric] = sum(map(_wrong, asked[metric]))
    return {
        "asked": {metric: len(ones) for metric, ones in asked.items()},
        "differ": {metric: ones for metric, ones in found.items() if ones},
        "mistaken": mistaken,
    }
