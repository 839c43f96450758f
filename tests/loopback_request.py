"""A request to the loopback Hub: what it holds, who sends it, and how it is answered."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from tests.loopback_repo import Repo

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

MOST = 64 * 2**20
"""Bytes of a request at most."""


class Refused(Exception):
    """An answer other than 200, with what the client's library looks for."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        assert length <= MOST
        self._read = True
        return self.rfile.read(length)

    def _drain(self) -> None:
        if not getattr(self, "_read", False):
            self._body()

    def _json(self) -> Any:
        return json.loads(self._body() or b"{}")

    def _user(self, needed: bool = True) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.hub.users.get(token)
        if user is None and (needed or token):
            raise Refused(401, "Invalid credentials in Authorization header")
        return user or ""

    def _repo(self, repo: str, write: bool = False) -> Repo:
        user = self._user(needed=write)
        found = self.hub.repos.get(repo)
        mine = repo.split("/")[0] in self.hub.writable.get(user, ())
        if found is None or found.hidden or (found.private and not mine):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise Refused(403, f"you may not write to {repo}")
        return found

    def _commit(self, repo: Repo, revision: str) -> str:
        if (found := repo.find(revision)) is None:
            raise Refused(404, "Invalid rev id: " + revision, "RevisionNotFound")
        return found

    def _send(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self._read = False
