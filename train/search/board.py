"""What a search has asked for so far and what came back: no trial is asked for twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from train.search.rounds import Candidate, Verdict
from train.search.scores import Evidence, Measured, score_of, verdict_of
from train.search.trial import ABSENT, Members, Result, RunTrials, Trial


class Board:
    """Results of full trials and of cheap ones, by mixture.

    Raises `ValueError` where results cannot be compared: other tasks, or other numbers of items.
    """

    def __init__(self, run_trials: RunTrials, seeds: Sequence[int], resamples: int) -> None:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds: {list(seeds)}. Give at least one, and none twice.")
        self.seeds = tuple(seeds)
        self.resamples = resamples
        self._run = run_trials
        self._results: dict[Trial, Result] = {}
        self._shape: tuple[Members, dict[str, int]] | None = None
        self._evidence: Evidence | None = None

    def ask(self, trials: Iterable[Trial]) -> None:
        """Run those that have not been asked for yet, all in one batch."""
        new = [trial for trial in dict.fromkeys(trials) if trial not in self._results]
        if not new:
            return
        results, self._evidence = list(self._run(new)), None
        assert len(results) == len(new), "run_trials gives one result per trial, in their order"
        for trial, result in zip(new, results, strict=True):
            self._results[trial] = self._examined(trial, result)

    def full_trials(self, members: Members, seeds: Sequence[int]) -> list[Trial]:
        return [Trial(members, seed) for seed in seeds]

    def next_seed(self, members: Members) -> Trial | None:
        """A trial of it with the first seed that it has not had; None if it had them all."""
        trials = self.full_trials(members, self.seeds)
        return next((trial for trial in trials if trial not in self._results), None)

    def proxy(self, members: Members, budget: float) -> Result | None:
        """Its cheap trial if that succeeded."""
        result = self._results.get(Trial(members, self.seeds[0], budget))
        return None if result is None or result.error else result

    def scored(self, mixtures: Iterable[Members]) -> list[Members]:
        """Those with at least one full trial that succeeded."""
        measured = self.evidence().measured
        return [members for members in mixtures if members in measured]

    def error(self, members: Members) -> str:
        """Why a trial of it failed; `ABSENT` if all that is wrong is that a table lacks it."""
        errors = [r.error for t, r in self._results.items() if t.members == members and r.error]
        return next((error for error in errors if error != ABSENT), errors[0] if errors else "")

    def evidence(self) -> Evidence:
        """Of all mixtures that have a score."""
        if self._evidence is None:
            done: dict[Members, list[Result]] = {}
            for trial, result in self._results.items():
                if trial.budget == 1 and not result.error:
                    done.setdefault(trial.members, []).append(result)
            measured = {members: Measured(members, tuple(done[members])) for members in done}
            self._evidence = Evidence(measured, self.resamples)
        return self._evidence

    def candidate(self, members: Members, incumbent: Members) -> Candidate:
        """What is known of a mixture beside the incumbent; `()`: there is none."""
        evidence, error = self.evidence(), self.error(members)
        proxy = self._last_proxy(members)
        other = set(members) ^ set(incumbent)
        changed = next(iter(other)) if len(other) == 1 else None
        one = evidence.measured.get(members)
        if one is None:
            verdict: Verdict = "dropped" if not error else "failed"
            if error == ABSENT:
                verdict, error = ABSENT, ""
            return Candidate(members, changed, None, None, verdict, error=error, proxy=proxy)
        gain = evidence.gain(members, incumbent) if incumbent and incumbent != members else None
        return Candidate(
            members,
            changed,
            evidence.interval(members),
            gain,
            verdict_of(gain) if gain else None,
            one.seeds,
            {task: float(values.mean()) for task, values in one.items.items()} or None,
            one.cost,
            "" if error == ABSENT else error,
            proxy,
        )

    def _last_proxy(self, members: Members) -> float | None:
        budgets = [t.budget for t in self._results if t.members == members and t.budget < 1]
        found = [self.proxy(members, budget) for budget in sorted(budgets)]
        return next((score_of(result) for result in reversed(found) if result), None)

    def _examined(self, trial: Trial, result: Result) -> Result:
        """The result, or a failed one that says what is wrong with it."""
        error = result.error or _fault(result)
        if error:
            return Result(trial, error=error)
        self._compare(trial, result)
        return result

    def _compare(self, trial: Trial, result: Result) -> None:
        shape = {task: len(values) for task, values in result.items.items()}
        if self._shape is None:
            self._shape = (trial.members, shape)
        first, known = self._shape
        if shape == known:
            return
        task = next(task for task in {**known, **shape} if known.get(task) != shape.get(task))
        raise ValueError(
            f'"{"+".join(trial.members)}" (seed {trial.seed}) has {shape.get(task, "no")} items of '
            f'task "{task}", "{"+".join(first)}" has {known.get(task, "none")}: they cannot be '
            "compared. Score every mixture on the same items, or give scores without items for all."
        )


def _fault(result: Result) -> str:
    for task, values in result.items.items():
        if not len(values):
            return f'task "{task}" has no items'
        wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if wrong is not None:
            return f'item {wrong} of task "{task}" is {values[wrong]}, not a number'
    if result.items:
        return ""
    if result.score is None:
        return "it gave neither a score nor an error"
    return "" if math.isfinite(result.score) else f"its score is {result.score}, not a number"
