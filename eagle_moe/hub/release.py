"""From a trained model to a repository of the Hub, in steps of which any may refuse.

1. consolidate: one folder (`eagle_moe.hub.consolidate`)
2. gate: it does what its source does (`eagle_moe.hub.gate`)
3. licences: publication is allowed
4. card: written from the records
5. scan: nothing in it that must stay private
6. push, only if asked for
7. what the Hub has by then, downloaded into an empty cache, through the gate again

A refusal does not end the steps before the push, so that one run names everything that is wrong.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_moe.hub.card import write_card
from eagle_moe.hub.consolidate import check_out, consolidate
from eagle_moe.hub.details import DETAILS
from eagle_moe.hub.experts import is_expert_folder, prepare_expert
from eagle_moe.hub.gate import Release, Verdict, check_folder, write_verdict
from eagle_moe.hub.licences import check_licences, read_licences
from eagle_moe.hub.pull import check_release
from eagle_moe.hub.push import Pushed, changed_files, download_release, local_files, push_release
from eagle_moe.hub.scan import scan_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ReleaseSettings:
    """What a person decides; the options of `eagle-moe release`."""

    model: Path
    to: str
    out: Path | None = None
    push: bool = False
    public: bool = False
    revision: str | None = None
    tag: str | None = None
    scores: Sequence[Path] = ()
    experts_page: Path | None = None
    accepted: Sequence[str] = ()
    card: Path | None = None
    shard_size: str = "5GB"
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Where the release is made: beside the model unless `out` says otherwise."""
        return self.out or self.model.parent / f"release-{self.to.rpartition('/')[2]}"


@dataclass
class Step:
    """One step while it runs: what it found in one line, and what it refuses."""

    title: str
    finding: str = ""
    refusals: list[str] = field(default_factory=list)


Steps = Callable[[str], AbstractContextManager[Step]]
"""Begins a step of that title, and shows it."""


@dataclass(frozen=True)
class Outcome:
    """- `refusals`: why it must not be published; `pushed`: None if it was not.
    - `upload`: files that a push would send (`None`: the Hub could not be asked)."""

    folder: Path
    refusals: list[str]
    upload: list[str] | None = None
    pushed: Pushed | None = None


def run_release(settings: ReleaseSettings, steps: Steps, api: HfApi | None = None) -> Outcome:
    """All steps. The folder stays, whatever they say.

    Raises `ValueError` or `OSError` if no folder can be made, or the Hub refuses the push.
    """
    _check_name(settings.to)
    folder = settings.folder
    refusals: list[str] = []
    release = _make(settings, steps, refusals)
    for title, work in (("licences", _licences), ("card", _card), ("scan", _scan)):
        with steps(title) as step:
            try:
                work(settings, step)
            except (ValueError, FileNotFoundError) as error:
                step.refusals += str(error).splitlines()
        refusals += step.refusals
    if not settings.push:
        with steps("what a push would send") as step:
            upload = _preview(settings, step, api)
        return Outcome(folder, refusals, upload)
    if refusals:
        return Outcome(folder, refusals)
    with steps("push") as step:
        pushed = push_release(
            folder,
            settings.to,
            private=not settings.public,
            revision=settings.revision,
            tag=settings.tag,
            api=api,
        )
        sent = f"{len(pushed.uploaded)} files sent, {len(pushed.skipped)} were there"
        step.finding = f"{sent}; {pushed.revision[:12]}"
    _check_again(settings, pushed, release, steps, refusals, api)
    return Outcome(folder, refusals, pushed.uploaded, pushed)


def _check_name(to: str) -> None:
    if not _NAME.fullmatch(to):
        raise ValueError(f"--to {to}: write it as OWNER/NAME, of letters, digits, `-`, `_`, `.`.")


def _make(settings: ReleaseSettings, steps: Steps, refusals: list[str]) -> Release | None:
    """The folder, gated. What it must do, None for an expert alone, which is held to its hash."""
    folder = settings.folder
    if is_expert_folder(settings.model):
        with steps("consolidate") as step:
            _make_expert(settings)
            step.finding = f"one aligned expert -> {folder}"
        with steps("gate") as step:
            step.finding = f"{check_release(folder)}: its weights are the recorded ones and fit"
        return None
    with steps("consolidate") as step:
        release = consolidate(
            settings.model, folder, settings.shard_size, settings.card, settings.device
        )
        step.finding = f"{release.source}, {len(release.tensors)} tensors -> {folder}"
    with steps("gate") as step:
        verdict = check_folder(folder, release, settings.device)
        write_verdict(folder, verdict)
        _report(step, verdict)
    refusals += step.refusals
    return release


def _make_expert(settings: ReleaseSettings) -> None:
    """An expert that was released to that folder before makes way."""
    folder = settings.folder
    if is_expert_folder(folder):
        shutil.rmtree(folder)
    check_out(settings.model, folder)
    prepare_expert(settings.model, folder)
    if settings.card is not None:
        shutil.copyfile(settings.card, folder / DETAILS)


def _report(step: Step, verdict: Verdict) -> None:
    failed = verdict.failed
    step.finding = f"{len(verdict.checks) - len(failed)} of {len(verdict.checks)} checks passed"
    step.refusals += [f"{check.name}: {check.finding}" for check in failed]


def _licences(settings: ReleaseSettings, step: Step) -> None:
    found = read_licences(settings.folder)
    step.finding = ", ".join(dict.fromkeys(one.licence for one in found))
    check_licences(found, settings.accepted)


def _card(settings: ReleaseSettings, step: Step) -> None:
    write_card(settings.folder, settings.to, settings.scores, settings.experts_page)
    step.finding = f"{settings.folder / 'README.md'}"


def _scan(settings: ReleaseSettings, step: Step) -> None:
    step.refusals += map(str, scan_folder(settings.folder))
    files = len(local_files(settings.folder))
    step.finding = f"{files} files, {len(step.refusals)} findings"


def _preview(settings: ReleaseSettings, step: Step, api: HfApi | None) -> list[str] | None:
    files = local_files(settings.folder)
    try:
        upload = changed_files(settings.folder, settings.to, settings.revision, api)
    except ValueError as error:
        size = sum(file.path.stat().st_size for file in files.values())
        step.finding = f"at most {len(files)} files, {size / 1e6:,.1f} MB (not compared: {error})"
        return None
    size = sum(files[name].path.stat().st_size for name in upload)
    step.finding = f"{len(upload)} of {len(files)} files, {size / 1e6:,.1f} MB, to {settings.to}"
    return upload


def _check_again(
    settings: ReleaseSettings,
    pushed: Pushed,
    release: Release | None,
    steps: Steps,
    refusals: list[str],
    api: HfApi | None,
) -> None:
    """Download exactly what was uploaded, into an empty cache, and hold it to the same."""
    place = settings.folder.absolute().parent  # where there was room for the first copy
    with (
        tempfile.TemporaryDirectory(prefix=".downloaded-", dir=place) as cache,
        steps("check what the Hub has") as step,
    ):
        copy = download_release(pushed.repo, pushed.revision, Path(cache), api)
        check_release(copy)
        if release is None:
            step.finding = "the weights are the recorded ones"
            return
        _report(step, check_folder(copy, release, settings.device))
    refusals += step.refusals
