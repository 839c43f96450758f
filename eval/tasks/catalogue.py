"""Names -> tasks of lmms-eval, without its own index of all tasks, which takes ten seconds.

A YAML file beside this one may include one that lmms-eval brings, wherever that is installed:

    include: lmms_eval/tasks/pope/pope.yaml
    task: eagle_pope
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from PIL import ImageFile

from eagle_moe.answer import Images
from eagle_moe.schema import nearest
from eagle_moe.scores.card import SKILLS
from eagle_moe.scores.identity import Task
from eval.paper import TASKS

OWN = Path(__file__).parent
ALIASES: dict[str, tuple[str, ...]] = {"skills": (SKILLS,), "paper": TASKS}
BUILDERS = {"arrow", "csv", "json", "parquet", "text"}
"""Values of `dataset_path` that read files named elsewhere."""
_NAME = re.compile(r"^task\s*:\s*[\"']?([\w.-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)
_GROUP = re.compile(r"^group\s*:\s*[\"']?([\w.-]+)[\"']?\s*(?:#.*)?$", re.MULTILINE)


class _Plain(yaml.SafeLoader):
    """Reads names, and leaves functions alone: importing lmms-eval changes the process."""


_Plain.add_multi_constructor("!", lambda *_: None)


def installed() -> Path:
    """Folder of the package lmms_eval. Raises `ValueError` naming the extra if there is none."""
    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('lmms_eval is not installed. Install the extra: pip install -e ".[eval]".')
    return Path(spec.submodule_search_locations[0])


@cache
def find_tasks() -> dict[str, Path]:
    """Name of every task and group -> its YAML file; ours come before those of lmms-eval."""
    found: dict[str, Path] = {}
    for root in (OWN, installed() / "tasks"):
        for path in sorted(root.rglob("*.yaml")):
            text = path.read_text(encoding="utf-8", errors="replace")
            name = _NAME.search(text) or _GROUP.search(text)
            if name is not None:
                found.setdefault(name[1], path)
    return found


def expand(names: Iterable[str]) -> list[str]:
    """Names of single tasks: aliases and groups are replaced by what they stand for.

    Raises `ValueError` with the nearest names for one that there is not.
    """
    tasks: dict[str, None] = {}
    known = find_tasks()
    for name in names:
        if name in ALIASES:
            tasks |= dict.fromkeys(ALIASES[name])
            continue
        if name not in known:
            raise ValueError(f'tasks: no "{name}".{nearest(name, [*known, *ALIASES])}')
        text = known[name].read_text(encoding="utf-8", errors="replace")
        if _NAME.search(text):
            tasks[name] = None
            continue
        members = yaml.load(text, Loader=_Plain)["task"]  # noqa: S506 - a SafeLoader
        if all(isinstance(member, str) for member in members):
            tasks |= dict.fromkeys(expand(members))
        else:
            raise ValueError(f"tasks: {name} is a group that changes its tasks. Name them instead.")
    return list(tasks)


def read_yaml(path: Path, run: bool = True) -> dict[str, Any]:
    """A task's YAML with all that it includes; with `run`, `!function` names become functions."""
    from lmms_eval import utils

    constructor = utils.import_function if run else utils.ignore_constructor
    yaml.add_constructor("!function", constructor)
    text = re.sub(
        r"^(include\s*:\s*)(lmms_eval/\S+)",
        lambda match: f"{match[1]}{installed().parent / match[2]}",
        path.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    stream = io.StringIO(text)
    stream.name = str(path)  # where `!function` looks for a file first
    config = yaml.full_load(stream)
    mode = "full" if run else "simple"
    return utils.load_yaml_config(yaml_path=str(path), yaml_config=config, mode=mode)


def load_task(name: str, data: Path | None, limit: int | None = None) -> Any:
    """The task `name`, with its data set.

    - `data`: folder of local copies: of the suite for the built-in task, else one folder per data
      set, named as on the Hub, such as `data/lmms-lab-encoder/POPE`.

    Raises `FileNotFoundError` naming the data set that is nowhere here while offline, and
    `ValueError` for one that cannot be read.
    """
    import lmms_eval.api.metrics  # noqa: F401 - registers what YAML files name
    from lmms_eval.api.task import ConfigurableMessagesTask

    with importable_without_a_key():
        config = read_yaml(find_tasks()[name])
    kind = config.pop("class", ConfigurableMessagesTask)
    # lmms-eval has Pillow take half an image for a whole one, which some benchmarks need
    ImageFile.LOAD_TRUNCATED_IMAGES = name != SKILLS
    if name == SKILLS:
        if data is None:
            raise ValueError("data: say where the suite is (python -m eval.skills makes it).")
        config |= {"dataset_path": str(data), "dataset_kwargs": {"limit": limit}}
        return kind(config=config)
    _check_data(name, str(config.get("dataset_path")), data)
    try:
        with _beside(data):
            return kind(config=config)
    except Exception as error:
        cause = _last(error)
        raise ValueError(
            f"task {name}: its data set {config.get('dataset_path')} cannot be read: "
            f"{type(cause).__name__}: {cause}"
        ) from error


def _check_data(name: str, dataset: str, data: Path | None) -> None:
    """Fail at once where loading would try for a minute."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    if dataset in BUILDERS or Path(dataset).exists():
        return
    places = [data / dataset] if data is not None else []
    places.append(Path(HF_HUB_CACHE, f"datasets--{dataset.replace('/', '--')}"))
    places.append(Path(config.HF_DATASETS_CACHE, dataset.replace("/", "___")))
    if config.HF_HUB_OFFLINE and not any(place.exists() for place in places):
        target = places[0] if data is not None else f"FOLDER/{dataset}"
        raise FileNotFoundError(
            f"task {name}: its data set {dataset} is not here, and this run is offline. Get it "
            f"with: hf download {dataset} --repo-type dataset --local-dir {target}"
            + ("" if data is not None else ", and give DATA=FOLDER.")
        )


@contextmanager
def _beside(data: Path | None) -> Iterator[None]:
    """Work in a folder that shows `data`'s folders: `datasets` takes those before the Hub's.

    Some tasks (GQA) load a second data set by its name themselves: no setting reaches them.
    """
    if data is None:
        yield
        return
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        for owner in data.iterdir():
            if owner.is_dir():
                Path(folder, owner.name).symlink_to(owner.resolve())
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@contextmanager
def importable_without_a_key() -> Iterator[None]:
    """Some scorers ask for a judge's key when they are imported, whether they need it or not."""
    if "OPENAI_API_KEY" in os.environ:
        yield
        return
    os.environ["OPENAI_API_KEY"] = "none"
    try:
        yield
    finally:
        del os.environ["OPENAI_API_KEY"]


def _last(error: BaseException) -> BaseException:
    """What went wrong the last time, of something that was tried several times."""
    attempt = getattr(error, "last_attempt", None)
    return error if attempt is None else attempt.exception() or error


def describe(task: Any, images: Images, limit: int | None) -> Task:
    """What is asked, for the identity of a score. `limit`: only so many questions are."""
    config = task.config
    own = task.made() if config.task == SKILLS else {}
    version = own.get("version", _version(config.metadata))
    return Task(
        name=config.task,
        version=None if version is None else str(version),
        config_sha256=_hash_config(vars(config)),
        dataset=None if config.task == SKILLS else str(config.dataset_path),
        split=config.test_split or config.validation_split,
        seed=own.get("seed"),
        data_sha256=task.data_sha256() if config.task == SKILLS else hash_rows(task, limit),
        images=images,
    )


def hash_rows(task: Any, limit: int | None) -> str:
    """sha256 over every column of every row that is asked; of images, the bytes of their files."""
    rows = task.eval_docs if limit is None else task.eval_docs.select(range(limit))
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=256):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _hash_config(config: dict[str, Any]) -> str:
    """Of all that a task says, and of the files of its functions; not of where its data is."""
    told = {k: v for k, v in config.items() if k not in ("dataset_path", "dataset_kwargs")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=_source).encode()).hexdigest()


def _source(function: Any) -> str:
    path = inspect.getsourcefile(function)
    code = Path(path).read_bytes() if path else b""
    return f"{function.__qualname__} {hashlib.sha256(code).hexdigest()}"


def _version(metadata: Any) -> Any:
    """lmms-eval writes it in a mapping, or in a list of them."""
    parts = metadata if isinstance(metadata, list) else [metadata]
    return next(
        (one["version"] for one in parts if isinstance(one, dict) and "version" in one), None
    )
