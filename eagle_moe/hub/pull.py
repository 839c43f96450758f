"""A released model or expert comes from the Hub: downloaded, held to its records, put in place.

No code is run and nothing is unpickled: files that may hold a pickle are not even downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from eagle_moe.checkpoint import PROVENANCE, read_complete
from eagle_moe.hub.errors import in_words
from eagle_moe.hub.experts import check_expert, check_hashes, is_expert_folder
from eagle_moe.hub.scan import PICKLES
from eagle_moe.interop.importer import check_room, check_target


@dataclass(frozen=True)
class Pulled:
    """`expert`: its name, if the folder holds one expert; None if it holds a model."""

    folder: Path
    revision: str
    expert: str | None


def pull(
    repo: str,
    target: str | Path,
    revision: str | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    api: HfApi | None = None,
) -> Pulled:
    """Download the release `repo` (at `revision`: a branch, tag or commit) to the folder `target`.

    It lies beside `target` under a hidden name until every part's weights have the hash that its
    records give. An interrupted download goes on when it is called again. Raises `ValueError` in
    one line: no such repository, nothing of ours in it, weights that are not as recorded, a
    `target` that exists, no room.
    """
    api, target = api or HfApi(), Path(target)
    check_target(target)
    draft = target.with_name(f".{target.name}.pulling")
    with in_words(repo, "downloading"):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        unsafe = [name for name in sizes if Path(name).suffix.lower() in PICKLES]
        if PROVENANCE not in sizes:
            raise ValueError(f"{repo}: no release of this project (no {PROVENANCE} in it).")
        check_room(target, sum(size for name, size in sizes.items() if name not in unsafe))
        if unsafe:
            say(f"{repo}: left out, since they may hold pickles: {', '.join(unsafe)}")
        snapshot_download(
            repo,
            revision=info.sha,
            local_dir=draft,
            ignore_patterns=unsafe,
            endpoint=api.endpoint,
            token=api.token,
        )
    shutil.rmtree(draft / ".cache", ignore_errors=True)  # the library's notes
    say(f"{repo}: {len(sizes) - len(unsafe)} files at {(info.sha or '')[:12]}; checking hashes")
    try:
        expert = check_release(draft)
    except ValueError:
        shutil.rmtree(draft)  # so that another call downloads it afresh
        raise
    draft.rename(target)
    return Pulled(target, info.sha or "", expert)


def pull_command(repo: str, folder: Path | None, revision: str | None) -> int:
    """What `eagle-moe pull` does. Returns the exit code 0."""
    pulled = pull(repo, folder or Path(repo.rpartition("/")[2]), revision, say=print)
    print(f"{pulled.folder}: as recorded, at {pulled.revision}")
    if pulled.expert:
        print(f"a recipe starts from it with init.experts.{pulled.expert}={pulled.folder}")
    else:
        print(f"ask it: eagle-moe chat --model {pulled.folder}")
    return 0


def check_release(folder: Path) -> str | None:
    """Hold a downloaded release to its records; the name of the expert if it holds one alone.

    Raises `ValueError` for files that are missing or of another size, and for weights that do not
    have the hash of their record.
    """
    read_complete(folder)
    if is_expert_folder(folder):
        return check_expert(folder).name
    check_hashes(folder)
    return None
