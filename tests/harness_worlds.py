"""What `test_harness` has done in a process of its own: runs of lmms-eval, and what they gave."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Sequence, Value
from lmms_eval.api.model import lmms
from PIL import Image as Pillow

from eagle_moe.scores.card import Card
from eval.engine import score
from eval.harness import RunFailed, Settings, go_offline, run_tasks
from eval.tasks.catalogue import load_task

TEXT = Value("string")


class Oracle(lmms):
    """Says what it is told to say to each row."""

    is_simple = False

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.said = answers
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        for one in requests:
            text, to_messages, _, doc_id, task, split = one.args
            (message,) = to_messages(self.task_dict[task][split][doc_id])
            assert [part["type"] for part in message["content"]] == ["image", "text"]
            assert message["content"][1]["text"] == text
            self.prompts.append(text)
        return [self.said[one.doc_id] for one in requests]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError


def write_parquet(
    folder: Path, config: str | None, split: str, columns: dict[str, Any], rows: list[dict]
) -> None:
    """As the Hub has it: `data/<split>-*.parquet`, or configs that the card names."""
    inside = folder / (config or "data")
    inside.mkdir(parents=True)
    pictures = {"image", "decoded_image"}
    colours = ["red", "green", "blue", "white", "black", "navy", "pink", "grey"]
    for index, row in enumerate(rows):
        picture = Pillow.new("RGB", (24 + index, 20), colours[index % len(colours)])
        row |= dict.fromkeys(pictures & columns.keys(), picture)
    table = Dataset.from_list(rows, features=Features(columns))
    table.to_parquet(inside / f"{split}-00000-of-00001.parquet")
    if config is not None:
        files = f"  data_files:\n  - split: {split}\n    path: {config}/{split}-*\n"
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")


def pope(data: Path) -> list[str]:
    columns = dict.fromkeys(
        ["id", "question_id", "question", "answer", "image_source", "category"], TEXT
    )
    right = ["yes", "yes", "yes", "no", "no", "no", "yes", "no"]
    rows = [
        {
            "id": str(index),
            "question_id": str(index),
            "question": "Is there a snowboard in the image?",
            "answer": answer,
            "image_source": "COCO_val2014_000000310196",
            "category": "adversarial" if index < 4 else "popular",
        }
        for index, answer in enumerate(right)
    ]
    folder = data / "lmms-lab-encoder" / "POPE"
    write_parquet(folder, None, "test", columns | {"image": Image()}, rows)
    return ["Yes", "no", " yes\n", "No", "yes", "No.", "Yes.", "no"]


def chartqa(data: Path) -> list[str]:
    columns = dict.fromkeys(("type", "question", "answer"), TEXT) | {"image": Image()}
    right = ["12", "10", "10", "0.5", "Yes", "3"]
    rows = [
        {
            "type": "human_test" if index < 3 else "augmented_test",
            "question": f"What is the value of bar {index}?",
            "answer": answer,
        }
        for index, answer in enumerate(right)
    ]
    write_parquet(data / "lmms-lab-encoder" / "ChartQA", None, "test", columns, rows)
    return ["12", "10.4", "10.6", "50%", "yes", "4"]


def docvqa(data: Path) -> list[str]:
    columns = {
        "questionId": TEXT,
        "question": TEXT,
        "question_types": Sequence(TEXT),
        "image": Image(),
        "docId": Value("int64"),
        "ucsf_document_id": TEXT,
        "ucsf_document_page_no": TEXT,
        "answers": Sequence(TEXT),
        "data_split": TEXT,
    }
    right = [["University"], ["abcdefxxxx"], ["abcdef"], ["abcd"], ["a b", "1998"]]
    rows = [
        {
            "questionId": str(337 + index),
            "question": "What is the name?",
            "question_types": ["handwritten", "form"],
            "docId": 279 + index,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": "val",
        }
        for index, answers in enumerate(right)
    ]
    write_parquet(data / "lmms-lab-encoder" / "DocVQA", "DocVQA", "validation", columns, rows)
    return ["university", "abcdefghij", "abcxyz", "zzzz", "1998"]


def mathvista(data: Path) -> list[str]:
    facts = ("split", "language", "source", "category", "task", "context", "grade")
    names = ("pid", "question", "unit", "answer", "question_type", "answer_type", "query")
    columns = dict.fromkeys(names, TEXT) | {
        "decoded_image": Image(),
        "choices": Sequence(TEXT),
        "precision": Value("float64"),
        "metadata": dict.fromkeys(facts, TEXT) | {"skills": Sequence(TEXT)},
    }
    rows = [
        {
            "pid": str(index),
            "question": "How many?",
            "unit": None,
            "answer": answer,
            "question_type": "free_form",
            "answer_type": "integer",
            "query": "How many?",
            "choices": None,
            "precision": None,
            "metadata": dict.fromkeys(facts, "testmini") | {"skills": ["arithmetic"]},
        }
        for index, answer in enumerate(["3", "7", "5"])
    ]
    write_parquet(data / "AI4Math" / "MathVista", None, "testmini", columns, rows)
    return ["3", "8", "5"]


BENCHMARKS: dict[str, Callable[[Path], list[str]]] = {
    "pope": pope,
    "chartqa": chartqa,
    "docvqa_val": docvqa,
    "mathvista_testmini_format": mathvista,
}


def _scored(name: str, data: Path, out: Path, said: list[str], limit: int | None = None) -> dict:
    oracle = Oracle(said)
    outcome = score(oracle, load_task(name, data), out, limit)
    return {
        "metrics": {
            metric: {part: one.dump() for part, one in parts.items()}
            for metric, parts in outcome.metrics.items()
        },
        "means": outcome.means,
        "not_run": outcome.not_run,
        "primary": outcome.primary,
        "items": [vars(answer) for answer in outcome.answers],
        "prompts": oracle.prompts,
    }


def benchmarks(data: str, out: str) -> dict[str, Any]:
    """Scores of oracles on data sets in the columns of the real ones."""
    go_offline()
    folder, answers = Path(data), {}
    for name, make in BENCHMARKS.items():
        answers[name] = make(folder)
    found = {name: _scored(name, folder, Path(out), answers[name]) for name in BENCHMARKS}
    found["pope, first three"] = _scored("pope", folder, Path(out), answers["pope"], 3)
    math = "mathvista_testmini_format"
    found["judged"] = _scored(math, folder, Path(out), ["3", "it is seven", "5"])
    try:
        load_task("ai2d", folder)
    except FileNotFoundError as error:
        found["missing"] = str(error)
    return found


def _card(settings: Settings, **changes: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    (card,) = run_tasks(settings.model_copy(update=changes)).values()
    return card.dump()


def skills(model: str, data: str, out: str) -> dict[str, Any]:
    """The built-in suite by a tiny model, in many ways."""
    settings = Settings(
        model=model, tasks=["eagle_skills"], data=data, out=f"{out}/eight", batch_size=8
    )
    ask = functools.partial(_card, settings)
    found: dict[str, Any] = {"eight": ask()}
    found["one"] = ask(batch_size=1, out=f"{out}/one")
    seen: list[tuple[int, int, str]] = []
    again = run_tasks(settings, lambda *told: seen.append(told))
    found["again"] = [card.dump() for card in again.values()], seen
    found["blind"] = ask(images="drop", out=f"{out}/blind")
    found["three"] = ask(limit=3, out=f"{out}/three")
    found["interrupted"] = _interrupted(settings.model_copy(update={"out": f"{out}/stopped"}))
    try:
        ask(max_new_tokens=5, out=f"{out}/short")
    except ValueError as error:
        found["short"] = str(error)
    found["failed"] = _failed(settings.model_copy(update={"out": f"{out}/failed"}), model)
    return found


def _interrupted(settings: Settings) -> dict[str, Any]:
    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run_tasks(settings, stop)
    folder = Path(settings.out, "eagle_skills")
    (part,) = folder.iterdir()
    kept = len(part.read_text().splitlines())
    seen: list[int] = []
    (card,) = run_tasks(settings, lambda done, *_: seen.append(done)).values()
    names = sorted(path.name for path in folder.iterdir())
    rest = card.seconds * card.questions_per_second
    return {"kept": kept, "seen": seen, "card": card.dump(), "files": names, "rest": rest}


def _failed(settings: Settings, model: str) -> dict[str, Any]:
    """A task that cannot be run beside one that can."""
    try:
        run_tasks(settings.model_copy(update={"tasks": ["pope", "eagle_skills"]}))
    except RunFailed as error:
        card = Card.load(Path(settings.out, "eagle_skills"))
        return {"message": str(error), "card": card.dump()}
    return {}


def everything(
    benchmark_data: str, benchmark_out: str, model: str, data: str, out: str
) -> dict[str, Any]:
    """All of the above in one process, as importing lmms-eval takes longer than any of it."""
    return {
        "oracles": benchmarks(benchmark_data, benchmark_out),
        "skills": skills(model, data, out),
    }
