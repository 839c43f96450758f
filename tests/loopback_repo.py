"""Repositories as the loopback Hub keeps them: commits of files, with the ids that git gives."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        """The blob's id in git; of a large file, that of its pointer."""
        data = self.content
        if self.large:
            data = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(data)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "rfilename": path, "oid": self.git}
        found |= {"size": len(self.content), "blobId": self.git}
        if self.large:
            found["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "pointerSize": 130}
            found["lfs"]["size"] = len(self.content)
        return found


@dataclass
class Repo:
    private: bool
    hidden: bool = False
    """From everybody but its owner, who has no token here."""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        text = json.dumps([len(self.commits), sorted((k, v.git) for k, v in files.items())])
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        return oid

    def find(self, revision: str) -> str | None:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return name if name in self.commits else None
