"""What a search would do, told before it does it: `python -m train.search ... --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from train.search.inputs import SearchInputs
from train.search.pool import Pool
from train.search.settings import SearchSettings
from train.search.strategies import Strategy
from train.search.trial import Members
from train.stages import StageRun
from train.table import show


def show_outlook(inputs: SearchInputs) -> None:
    """Print the stages, the trials of the first round, and how many there can be in all."""
    settings, pool = inputs.settings, inputs.pool
    strategy = settings.make_strategy()
    show(_stages_table(inputs))
    start = strategy.start(pool)
    first = list(strategy.proposals(pool, start, 1))
    print(f"{settings.name}: pool {', '.join(pool.names)}; {settings.strategy['kind']} search,")
    print(f"rule {settings.rule['kind']}, seeds {', '.join(map(str, settings.seeds))}")
    if start:
        print(f"start: {'+'.join(start)}")
    print(f"round 1: {', '.join('+'.join(members) for members in first)}")
    mixtures = most_mixtures(pool, strategy)
    trials = len(mixtures) * len(settings.seeds)
    seats = sum(map(len, mixtures)) * len(settings.seeds)
    print(f"at most {len(mixtures)} mixtures, {trials} trials in full; {_budgets(settings)}")
    if settings.reuse:
        print(f"pre-alignments: {len(pool.names)} at most; without reuse, {seats}")
    else:
        print(f"pre-alignments: {seats} at most, as nothing is reused")


def _budgets(settings: SearchSettings) -> str:
    halving = settings.make_halving()
    if halving is None:
        return "no cheaper trials before"
    shares = ", ".join(f"{100 * share:g} %" for share in halving.budgets)
    return f"before those, trials with {shares} of the steps"


def most_mixtures(pool: Pool, strategy: Strategy) -> Sequence[Members]:
    """Mixtures that are tried if the search goes on to its end: as large as they can be."""
    tried, incumbent, number = [strategy.start(pool)], strategy.start(pool), 1
    while found := list(strategy.proposals(pool, incumbent, number)):
        tried += found
        incumbent, number = max(found, key=len), number + 1
    return [members for members in tried if members]


def _stages_table(inputs: SearchInputs) -> Table:
    table = Table(title=f"{inputs.settings.name}: {inputs.settings.recipe}", title_justify="left")
    for heading in ("stage", "runs", "learns", "steps", "feature cache"):
        table.add_column(heading)
    for name, stage in inputs.recipe.stages.items():
        run = StageRun(inputs.recipe, name)
        runs = "one per expert, shared" if stage.per_expert else "one per trial"
        if not inputs.settings.reuse:
            runs = runs.replace("shared", "in every trial")
        learns = [*stage.trainable, *(f"{part} (LoRA)" for part in stage.lora)]
        table.add_row(name, runs, ", ".join(learns), _length(run), _cache(inputs, run))
    return table


def _length(run: StageRun) -> str:
    steps = run.stage.args.get("max_steps", -1)
    epochs = run.stage.args.get("num_train_epochs", 3)
    return f"{steps}" if steps > 0 else f"{epochs:g} epoch{'s' if epochs != 1 else ''}"


def _cache(inputs: SearchInputs, run: StageRun) -> str:
    if run.stage.cache_features:
        return "yes"
    frozen = not run.stage.per_expert and not any(
        part.startswith("experts") for part in (*run.trainable, *run.lora)
    )
    return inputs.settings.features if frozen else "no: experts learn"
