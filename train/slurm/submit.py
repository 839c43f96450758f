"""Queue the stages of a recipe on SLURM, each after those that it starts from.

    python -m train.slurm.submit RECIPE.yaml [key=value ...] [--nodes 4] [--stage NAME]
                                 [--dry-run] [-- options of sbatch]

A stage with a run per expert becomes a job array, and what starts from it waits for all of them. A
stage that is finished ends as soon as it starts. Recipe and overrides are checked before anything
is queued; data and weights are checked by the jobs.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train.recipe import Recipe, load_recipe
from train.stages import stage_runs

SCRIPT = Path(__file__).with_name("stage.sbatch")


def commands(
    recipe: Recipe,
    arguments: Sequence[str],
    nodes: int = 1,
    options: Sequence[str] = (),
    only: str | None = None,
) -> dict[str, tuple[list[str], list[str]]]:
    """Stage -> its sbatch command, and the stages queued here that it has to wait for.

    `arguments`: path of the recipe, then overrides. `options`: further ones of sbatch. `only`: this
    stage alone. Raises `ValueError` with the nearest stage.
    """
    queued: dict[str, tuple[list[str], list[str]]] = {}
    for name in [only] if only else recipe.stages:
        runs = stage_runs(recipe, name)
        experts = [run.expert for run in runs if run.expert]
        array = [f"--array=0-{len(experts) - 1}"] if experts else []
        command = [
            "sbatch",
            "--parsable",
            f"--job-name={recipe.name}-{name}",
            f"--nodes={nodes}",
            f"--output={logs(recipe)}/%x-%j.log",
            f"--export=ALL,LOGS={logs(recipe)}",
            *array,
            *options,
            str(SCRIPT),
            arguments[0],
            name,
            ",".join(experts) or "-",
            *arguments[1:],
        ]
        sources = [source.checkpoint for source in recipe.stages[name].sources]
        queued[name] = command, [source for source in sources if source in queued]
    return queued


def logs(recipe: Recipe) -> Path:
    """Folder of what jobs print, one file per job and one per node."""
    return Path(recipe.output_dir, "slurm")


def submit(queue: dict[str, tuple[list[str], list[str]]]) -> dict[str, str]:
    """Run the commands of `commands`; stage -> number of its job."""
    jobs: dict[str, str] = {}
    for name, (command, after) in queue.items():
        waits = []
        if after:  # a job whose predecessor has failed would wait for ever otherwise
            numbers = ":".join(jobs[each] for each in after)
            waits = [f"--dependency=afterok:{numbers}", "--kill-on-invalid-dep=yes"]
        told = subprocess.run(
            [*command[:2], *waits, *command[2:]], check=True, stdout=subprocess.PIPE, text=True
        )
        jobs[name] = told.stdout.strip().partition(";")[0]  # "job;cluster" where there are several
    return jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m train.slurm.submit`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python -m train.slurm.submit", description="Queue the stages of a recipe on SLURM."
    )
    parser.add_argument("recipe", help="path of the recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1, help="nodes for each job")
    parser.add_argument("--stage", help="only this stage")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, queue nothing")
    told = parser.parse_intermixed_args(given[:at])
    try:
        recipe = load_recipe(told.recipe, told.overrides)
        names = [told.recipe, *told.overrides]
        queue = commands(recipe, names, told.nodes, given[at + 1 :], told.stage)
        if told.dry_run:
            for command, after in queue.values():
                print(shlex.join(command), *(["# after", *after] if after else []))
            return 0
        logs(recipe).mkdir(parents=True, exist_ok=True)  # SLURM does not make it
        for name, job in submit(queue).items():
            print(f"{name}: job {job}")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
