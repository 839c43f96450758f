"""A trial as jobs: stages that align experts, stages that train the mixture, the score.

    STORE/experts/<name>-<key>/   an aligned expert, for every mixture and every search
    OUT/experts/<name>-<key>/     where the job that makes it works
    OUT/stages/<key>/             a stage that trains a mixture
    OUT/scores/<key>/             answers to every question

A key is the hash of all that determines a result: settings of the stage, data by content, code, and
the keys of the results that it starts from. So what two trials have in common has one folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_moe.scores.answer import read_answers
from eagle_moe.scores.card import ACCURACY, SKILLS
from eval.items import hash_items, read_items
from train.jobs import Job
from train.recipe import Recipe
from train.search.keys import SHORT, digest
from train.search.mixtures import recipe_of, seeded
from train.search.settings import EvaluationSettings
from train.search.store import StageFacts
from train.search.trial import Cost, Trial
from train.search.work import COST, align_expert, score_mixture, train_mixture
from train.sources import Origin, find_origins, run_settings, weights_digest
from train.stages import StageRun


@dataclass(frozen=True)
class PlannedStage:
    """One run of a stage: `checkpoint` is where its result will be."""

    run: StageRun
    key: str
    checkpoint: Path
    job: Job

    @property
    def title(self) -> str:
        return self.run.title

    @property
    def expert(self) -> str | None:
        return self.run.expert

    def facts(self) -> StageFacts | None:
        """What it took; None if it has not ended."""
        return StageFacts.read(self.job.directory)


@dataclass(frozen=True)
class Plan:
    """A trial, ready to run: the last of `jobs` scores it."""

    trial: Trial
    key: str
    stages: tuple[PlannedStage, ...]
    score: Job

    @property
    def title(self) -> str:
        return title_of(self.trial)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*(stage.job for stage in self.stages), self.score)

    def items(self) -> dict[str, list[float]]:
        """Task -> 1 or 0 for every question, once the score is there."""
        items: dict[str, list[float]] = {}
        for answer in read_answers(self.score.directory / SKILLS):
            items.setdefault(answer.part, []).append(answer.scores[ACCURACY])
        return items

    def cost(self) -> Cost:
        """Of the mixture, once the score is there."""
        return Cost(**json.loads((self.score.directory / COST).read_text(encoding="utf-8")))


class Planner:
    """Makes plans of trials. What it is given determines their results, but for folders."""

    def __init__(
        self,
        recipe: Recipe,
        evaluation: EvaluationSettings,
        out: Path,
        store: Path,
        code: str,
        *,
        reuse: bool = True,
        gpus: int = 0,
        threads: int = 1,
    ) -> None:
        """`evaluation.data` is given. Raises `ValueError` for a recipe that cannot be searched."""
        assert evaluation.data is not None
        _check_order(recipe)
        self.recipe = recipe
        self.evaluation = evaluation
        self.out = out
        self.experts = Path(store, "experts") if reuse else out / "own"
        self.code = code
        self.reuse = reuse
        self.gpus = gpus
        self.threads = threads
        self.asked = hash_items(read_items(evaluation.data, evaluation.limit))

    def plan(self, trial: Trial) -> Plan:
        """Raises `ValueError` or `FileNotFoundError` for weights or data that are not there."""
        recipe = seeded(recipe_of(self.recipe, trial.members), trial.seed, trial.budget)
        made: dict[tuple[str, str | None], PlannedStage] = {}
        for name, stage in recipe.stages.items():
            if stage.per_expert:
                for expert in trial.members:
                    alone = recipe_of(self.recipe, (expert,))
                    if name in alone.stages:
                        run = StageRun(alone, name, expert)
                        made[name, expert] = self._expert(run, made, trial)
            else:
                made[name, None] = self._mixture(StageRun(recipe, name), made, trial)
        last = made[list(recipe.stages)[-1], None]
        return self._scored(trial, tuple(made.values()), last)

    def _expert(self, run: StageRun, made: Made, trial: Trial) -> PlannedStage:
        assert run.expert is not None
        origins, key = self._key(run, made, None if self.reuse else trial)
        folder = f"{run.expert}-{key[:SHORT]}"
        place = self.experts / folder
        told = {"recipe": _single(run, origins, made), "stage": run.name, "expert": run.expert}
        name = run.title if self.reuse else f"{run.title} for {title_of(trial)}"
        job = Job(
            name,
            align_expert,
            told | {"place": str(place), "gpus": self.gpus},
            self.out / "experts" / folder,
            _needs(origins, run, made),
            self.threads,
            gpus=self.gpus,
        )
        return PlannedStage(run, key, place, job)

    def _mixture(self, run: StageRun, made: Made, trial: Trial) -> PlannedStage:
        origins, key = self._key(run, made, None if self.reuse else trial)
        out = self.out / "stages" / key[:SHORT]
        job = Job(
            f"{run.name} {title_of(trial)}",
            train_mixture,
            {"recipe": _single(run, origins, made), "stage": run.name, "gpus": self.gpus},
            out,
            _needs(origins, run, made),
            self.threads,
            gpus=self.gpus,
        )
        return PlannedStage(run, key, out / run.name, job)

    def _scored(self, trial: Trial, stages: tuple[PlannedStage, ...], last: PlannedStage) -> Plan:
        told = self.evaluation.dump() | {"content": self.asked}
        asked = {k: v for k, v in told.items() if k != "data"}
        key = digest([list(trial.members), trial.seed, trial.budget, last.key, asked, self.code])
        job = Job(
            f"score {title_of(trial)}",
            score_mixture,
            told | {"model": str(last.checkpoint)},
            self.out / "scores" / key[:SHORT],
            (last.job.name,),
            self.threads,
            gpus=min(self.gpus, 1),
        )
        return Plan(trial, key, stages, job)

    def _key(self, run: StageRun, made: Made, own: Trial | None) -> tuple[Origins, str]:
        """Where the weights of a run come from, and its key; `own`: it is for this trial alone."""
        origins = find_origins(run, {name for name, _ in made})
        weights = {
            part: _made_by(run, part, origin, made).key
            if origin.kind == "promised"
            else weights_digest(part, origin)
            for part, origin in origins.items()
        }
        alone = None if own is None else [list(own.members), own.seed, own.budget]
        settings = run_settings(run, max(self.gpus, 1))
        return origins, digest([settings, weights, self.code, alone])


Made = Mapping[tuple[str, str | None], PlannedStage]
Origins = Mapping[str, Origin]


def title_of(trial: Trial) -> str:
    """For people: `clip+sam seed 0`, `clip+sam seed 0 at 25 %`."""
    share = "" if trial.budget == 1 else f" at {trial.budget:.0%}"
    return f"{'+'.join(trial.members)} seed {trial.seed}{share}"


def _made_by(run: StageRun, part: str, origin: Origin, made: Made) -> PlannedStage:
    """The run that makes the weights of `part`."""
    fanned = run.recipe.stages[origin.place].per_expert
    return made[origin.place, part.partition(".")[2] if fanned else None]


def _needs(origins: Origins, run: StageRun, made: Made) -> tuple[str, ...]:
    promised = {part: origin for part, origin in origins.items() if origin.kind == "promised"}
    names = (_made_by(run, part, origin, made).job.name for part, origin in promised.items())
    return tuple(dict.fromkeys(names))


def _single(run: StageRun, origins: Origins, made: Made) -> dict[str, Any]:
    """A recipe of this one run, which says of every part in which folder its weights are."""
    folders: dict[str, list[str]] = {}
    for part, origin in origins.items():
        if origin.kind == "promised":
            folders.setdefault(str(_made_by(run, part, origin, made).checkpoint), []).append(part)
        elif origin.kind == "checkpoint":
            folders.setdefault(origin.place, []).append(part)
    sources = [{"checkpoint": place, "parts": parts} for place, parts in folders.items()]
    stage = run.stage.dump() | {"init_from": sources}
    return json.loads(json.dumps(run.recipe.dump() | {"stages": {run.name: stage}}))


def _check_order(recipe: Recipe) -> None:
    """Stages that prepare experts come first, the ones that train the mixture after them."""
    kinds = [stage.per_expert for stage in recipe.stages.values()]
    if kinds != sorted(kinds, reverse=True):
        name = next(n for i, n in enumerate(recipe.stages) if kinds[i] and not all(kinds[:i]))
        raise ValueError(
            f"{recipe.name}: stages.{name} is per_expert but comes after a mixture was trained: "
            "no other mixture could use its experts. Move it to the front."
        )
    if all(kinds):
        raise ValueError(f"{recipe.name}: no stage trains a mixture, so there is none to choose.")
