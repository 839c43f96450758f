"""Pre-aligned experts, named after all that determined them: made once, used by every mixture.

    STORE/experts/<name>-<key>/model.safetensors   the expert alone
                               provenance.json     what happened to its weights
                               recipe.yaml         of the run that aligned it
                               expert.json         its architecture and view
                               stage.json          steps and seconds of that run

A folder is a checkpoint with one part. A recipe takes it in `init.experts` (`{sam: FOLDER}`), or in
`init_from` (`{checkpoint: FOLDER, parts: [experts.sam]}`).
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file

from eagle_moe.checkpoint import (
    EXPERT_SPEC,
    RECIPE,
    WEIGHTS,
    read_complete,
    read_parts,
    read_provenance,
    replace_text,
    write_checkpoint,
    write_json,
    write_provenance,
)
from eagle_moe.experts import resolve_expert
from eagle_moe.parts import expert_part
from train.stages import StageRun

STAGE = "stage.json"


@dataclass(frozen=True)
class StageFacts:
    """What a run of a stage took: optimizer steps, and seconds of its last sitting.

    `trained`: False if it was found in the store, made by someone else.
    """

    steps: int
    seconds: float
    trained: bool = True

    def write(self, folder: Path) -> None:
        replace_text(folder / STAGE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> StageFacts | None:
        """None if the run has not ended."""
        path = folder / STAGE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@contextmanager
def alone_with(place: Path) -> Iterator[None]:
    """Wait until no other process makes the expert in `place`, and keep others waiting."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{place}: another search makes it now; waiting for that", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_expert(run: StageRun, place: Path, facts: StageFacts) -> None:
    """Put the expert that `run` has aligned into the store, whole or not at all."""
    assert run.expert is not None
    complete = read_complete(run.folder)
    assert complete is not None, f"{run.folder} is not finished"
    part = expert_part(run.expert)
    spec = resolve_expert(run.model_spec.experts[0])
    with write_checkpoint(place, complete) as draft:
        save_file(read_parts(run.folder, [part]), draft / WEIGHTS, metadata={"format": "pt"})
        write_provenance(draft, {part: read_provenance(run.folder)[part]})
        shutil.copy2(run.folder / RECIPE, draft / RECIPE)
        write_json(draft / EXPERT_SPEC, spec.dump())
        facts.write(draft)
