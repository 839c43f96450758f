"""A release goes to the Hub: what has changed, in one commit that is read back and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from eagle_moe.checkpoint import PROVENANCE
from eagle_moe.hub.errors import in_words, status_of

MAIN = "main"
THEIRS = {".gitattributes"}
"""Files that the Hub itself puts into a repository."""
EMPTY = THEIRS | {"README.md"}
"""What a repository that was made by hand may hold before a release comes."""


@dataclass(frozen=True)
class Pushed:
    """`revision` is the commit, whose files are those of the folder, byte for byte."""

    repo: str
    revision: str
    url: str
    uploaded: list[str]
    skipped: list[str]
    deleted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LocalFile:
    """A file of the folder, with the two hashes by which the Hub knows contents."""

    path: Path

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git(self) -> str:
        """What `git hash-object` prints."""
        digest = hashlib.sha1(b"blob %d\0" % self.path.stat().st_size, usedforsecurity=False)
        with self.path.open("rb") as file:
            for piece in iter(lambda: file.read(2**20), b""):
                digest.update(piece)
        return digest.hexdigest()

    def equals(self, remote: RepoFile) -> bool:
        if remote.size != self.path.stat().st_size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.sha256
        return remote.blob_id == self.git


def push_release(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tag: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    api: HfApi | None = None,
) -> Pushed:
    """Make the branch `revision` (default: main) of `repo` hold what `folder` holds, and no more.

    The repository is made if there is none. Large files go first and are known by their hash: after
    an interruption the same call sends what is missing. `tag` then names the commit. `api`: of
    another Hub, or with another token, than the environment's.

    Raises `ValueError` in one line: no token or one that may not, a name that is taken by something
    else, a tag that exists, a public repository where `private` was meant, no room, no connection.
    """
    api = api or HfApi()
    files = local_files(folder)
    with in_words(repo, "uploading"):
        api.whoami()  # a token that is missing or expired is named before anything else
        made = _make_repository(api, repo, private)
        say(f"{repo}: {'made, ' + ('private' if private else 'public') if made else 'is there'}")
        branch = _make_branch(api, repo, revision)
        head, there = _read_branch(api, repo, branch)
        if not made:
            _check_ours(repo, there)
        changed = [name for name, file in files.items() if not _has(there, name, file)]
        stale = sorted(there.keys() - files.keys() - THEIRS)
        _check_tag(api, repo, tag, None if changed or stale else head)
        commit = head
        if changed or stale:
            size = sum(files[name].path.stat().st_size for name in changed)
            say(f"{repo}: {len(changed)} of {len(files)} files to upload, {size / 1e6:,.1f} MB")
            commit = _commit(api, repo, branch, head, {n: files[n] for n in changed}, stale)
        _verify(api, repo, commit, files)
        if tag and tag not in _tags(api, repo):
            api.create_tag(repo, tag=tag, revision=commit)
    skipped = [name for name in files if name not in set(changed)]
    url = f"{api.endpoint}/{repo}/tree/{commit}"
    return Pushed(repo, commit, url, changed, skipped, stale)


def changed_files(
    folder: str | Path, repo: str, revision: str | None = None, api: HfApi | None = None
) -> list[str]:
    """What `push_release` would upload now; everything if there is no such repository or branch.

    Changes nothing. Raises `ValueError` as it does.
    """
    files = local_files(folder)
    try:
        with in_words(repo, "comparing"):
            _, there = _read_branch(api or HfApi(), repo, revision or MAIN)
    except ValueError as error:
        if isinstance(error.__cause__, HfHubHTTPError) and status_of(error.__cause__) == 404:
            return list(files)
        raise
    return [name for name, file in files.items() if not _has(there, name, file)]


def download_release(repo: str, revision: str, cache: str | Path, api: HfApi | None = None) -> Path:
    """The folder of `repo` at exactly `revision`, downloaded into `cache`. No code is run.

    Raises `ValueError` in one line.
    """
    api = api or HfApi()
    with in_words(repo, "downloading"):
        found = snapshot_download(
            repo, revision=revision, cache_dir=cache, endpoint=api.endpoint, token=api.token
        )
    return Path(found)


def local_files(folder: str | Path) -> dict[str, LocalFile]:
    """Path in the repository -> file, of all that is in `folder`. `ValueError` if it is empty."""
    folder = Path(folder)
    found = {
        path.relative_to(folder).as_posix(): LocalFile(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if not found:
        raise ValueError(f"{folder}: nothing in it to upload.")
    return found


def _make_repository(api: HfApi, repo: str, private: bool) -> bool:
    """Whether it was made just now. One that exists keeps who may see it."""
    try:
        is_private = bool(api.repo_info(repo).private)
    except RepositoryNotFoundError:
        try:
            api.create_repo(repo, private=private)
        except HfHubHTTPError as error:
            if status_of(error) == 409:
                raise ValueError(
                    f"{repo}: the name is taken, by something that this token may not see. Give "
                    "another name, or a token that may."
                ) from None
            raise
        return True
    if private and not is_private:
        raise ValueError(
            f"{repo}: exists and is public. Add --public to push there, or give another name."
        )
    if is_private and not private:
        raise ValueError(
            f"{repo}: exists and is private. Make it public on its settings page, or leave out "
            "--public."
        )
    return False


def _make_branch(api: HfApi, repo: str, revision: str | None) -> str:
    if revision is None or revision == MAIN:
        return MAIN
    if revision not in {branch.name for branch in api.list_repo_refs(repo).branches}:
        api.create_branch(repo, branch=revision)
    return revision


def _read_branch(api: HfApi, repo: str, revision: str) -> tuple[str, dict[str, RepoFile]]:
    """The commit at the head of a branch, and its files."""
    commit = api.repo_info(repo, revision=revision).sha
    assert commit is not None
    return commit, _read_files(api, repo, commit)


def _read_files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_ours(repo: str, there: Mapping[str, RepoFile]) -> None:
    """A repository that exists must hold a release, or nothing yet."""
    if there.keys() - EMPTY and PROVENANCE not in there:
        raise ValueError(
            f"{repo}: the name is taken: it holds {len(there)} files and is no release "
            f"(no {PROVENANCE}). Give another name."
        )


def _has(there: Mapping[str, RepoFile], name: str, file: LocalFile) -> bool:
    return name in there and file.equals(there[name])


def _tags(api: HfApi, repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}


def _check_tag(api: HfApi, repo: str, tag: str | None, commit: str | None) -> None:
    """A tag is of one commit for good. `commit`: what it would name; None if not made yet."""
    if tag and (named := _tags(api, repo).get(tag)) not in (None, commit):
        raise ValueError(
            f"{repo}: the tag {tag} exists and names another commit ({named}). Give a new one."
        )


def _commit(
    api: HfApi,
    repo: str,
    branch: str,
    head: str,
    changed: Mapping[str, LocalFile],
    stale: list[str],
) -> str:
    """One commit on top of `head`, and on nothing else that came meanwhile."""
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(file.path)) for name, file in changed.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    info = api.create_commit(
        repo,
        operations,
        commit_message="Release of eagle-moe",
        revision=branch,
        parent_commit=head,
    )
    return info.oid


def _verify(api: HfApi, repo: str, commit: str, files: Mapping[str, LocalFile]) -> None:
    there = _read_files(api, repo, commit)
    wrong = [name for name, file in files.items() if not _has(there, name, file)]
    wrong += sorted(there.keys() - files.keys() - THEIRS)
    if wrong:
        raise ValueError(
            f"{repo}: after the upload {commit[:12]} does not hold what the folder does: "
            f"{', '.join(wrong)}. Was the folder changed meanwhile? Run the same command again."
        )
