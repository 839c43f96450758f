"""A Hub on the loopback: as much of the protocol as uploads and downloads use, kept in memory.

`with LoopbackHub() as hub:` serves `hub.url` on 127.0.0.1 until the block ends, and at the latest
until the process does. Give it to `HfApi(endpoint=hub.url, token=OWNER)`, or to a process by
`hub.environment()`. The Xet store is not served: `HF_HUB_DISABLE_XET` must be set.

Faults are set by attributes: `drop_after`, `broken`, `full`. What arrived is in `received`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.loopback_repo import Blob, Repo

OWNER, READER = "hf_owner", "hf_reader"
"""Tokens that are known: of the user `me`, who also writes to `org`; and one that only reads."""
LARGE = 10_000
"""Bytes from which a file goes to the large file storage (10 MB on the real one)."""
MOST = 64 * 2**20
"""Bytes of a request at most."""
LICENCES = {"apache-2.0", "mit", "llama2", "cc-by-nc-4.0", "other", "unknown"}


class Refused(Exception):
    """An answer other than 200, with what the client's library looks for."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    """The server. `repos` and `large` (sha256 -> bytes) are its state.

    - `drop_after`: bytes of a large file after which the connection is cut, once; `broken`: hashes
      of large files during whose upload it always is.
    - `full`: whether storage takes no more.
    - `received`: path of a file's upload -> bytes that came; `requests`: method and path.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.users = {OWNER: "me", READER: "reader"}
        self.writable = {"me": {"me", "org"}}
        self.drop_after: int | None = None
        self.broken: set[str] = set()
        self.full = False
        self.received: Counter[str] = Counter()
        self.requests: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str | None = OWNER) -> dict[str, str]:
        """For a process that is to talk to this Hub alone."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return found | ({"HF_TOKEN": token} if token else {})

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        commit = found.find(revision)
        return {path: blob.content for path, blob in found.commits[commit or ""].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock if "PUT" not in method else contextlib.nullcontext():
                        handle(self, **match.groupdict())
                    return
            raise Refused(404, f"the loopback Hub does not serve {self.command} {path}")
        except Refused as refused:
            self._drain()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send({"error": refused.message}, refused.status, headers)
        except ConnectionError:
            self.close_connection = True

    # What requests hold

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

    # What is answered

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

    def whoami(self) -> None:
        orgs = [{"name": "org", "type": "org"}]
        self._send({"type": "user", "name": self._user(), "orgs": orgs, "auth": {}})

    def validate_yaml(self) -> None:
        text = self._json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if data.get("license") not in {None, *LICENCES}:
            errors.append({"message": f'"license" must be one of {sorted(LICENCES)}'})
        if "model-index" in data and not data["model-index"][0].get("name"):
            errors.append({"message": '"model-index[0].name" is required'})
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        user, asked = self._user(), self._json()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner not in self.hub.writable.get(user, ()):
            raise Refused(403, f"you may not create a repository under {owner}")
        if name in self.hub.repos:
            body = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self._send(body, 409)
            return
        made = Repo(asked.get("private") or asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.hub.repos[name] = made
        self._send({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def preupload(self, repo: str, revision: str) -> None:
        self._commit(self._repo(repo, write=True), revision)
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["size"] > LARGE else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for one in self._json()["files"]
        ]
        self._send({"files": files})

    def batch(self, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for one in self._json()["objects"]:
            found = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.large:
                url = self.hub.url
                found["actions"] = {
                    "upload": {"href": f"{url}/large/{one['oid']}"},
                    "verify": {"href": f"{url}/verify"},
                }
            objects.append(found)
        self._send({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        length, got = int(self.headers["Content-Length"]), b""
        assert length <= MOST
        if self.hub.full:
            raise Refused(507, "Insufficient storage")
        while len(got) < length:
            piece = self.rfile.read(min(length - len(got), 4096))
            self.hub.received[oid] += len(piece)
            got += piece
            once = self.hub.drop_after is not None and len(got) >= self.hub.drop_after
            if once or oid in self.hub.broken:
                self.hub.drop_after = None if once else self.hub.drop_after
                self.connection.close()
                raise ConnectionAbortedError
        self._read = True
        if hashlib.sha256(got).hexdigest() != oid:
            raise Refused(400, "not what was announced")
        self.hub.large[oid] = got
        self._send({})

    def verify(self) -> None:
        asked = self._json()
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "not here")
        self._send({})

    def commit(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        head = self._commit(found, revision)
        files = dict(found.commits[head])
        for line in self._body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                content = base64.b64decode(value["content"])
                self.hub.received[value["path"]] += len(content)
                files[value["path"]] = Blob(content, False)
            elif entry["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        oid = found.commit(revision, files)
        self._send(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        )

    def branch(self, repo: str, name: str) -> None:
        found = self._repo(repo, write=True)
        if name in found.branches:
            raise Refused(409, "Reference already exists")
        start = self._json().get("startingPoint") or "main"
        found.branches[name] = self._commit(found, start)
        self._send({})

    def tag(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        name = self._json()["tag"]
        if name in found.tags:
            raise Refused(409, "Tag already exists")
        found.tags[name] = self._commit(found, revision)
        self._send({})

    def refs(self, repo: str) -> None:
        found = self._repo(repo)
        kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        answer = {
            kind: [
                {"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": commit}
                for name, commit in names.items()
            ]
            for kind, (ref, names) in kinds.items()
        }
        self._send({"converts": [], **answer})

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo)
        commit = self._commit(found, revision or "main")
        siblings = [blob.entry(path) for path, blob in sorted(found.commits[commit].items())]
        answer = {"id": repo, "modelId": repo, "sha": commit, "private": found.private}
        self._send({**answer, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, below: str | None = None) -> None:
        found = self._repo(repo)
        files = found.commits[self._commit(found, revision)]
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{below}/" if below else ""
        chosen = {path: blob for path, blob in files.items() if path.startswith(start)}
        if below and not chosen:
            raise Refused(404, f"{below} does not exist", "EntryNotFound")
        entries, folders = [], set()
        for path, blob in sorted(chosen.items()):
            folder, slash, _ = path.removeprefix(start).rpartition("/")
            if slash:
                folders.add(start + folder)
            if recursive or not slash:
                entries.append(blob.entry(path))
        entries += [{"type": "directory", "path": one, "oid": "0" * 40} for one in sorted(folders)]
        self._send(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        commit = self._commit(found, revision)
        blob = found.commits[commit].get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.git}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.content)),
            }
        content, status = blob.content, 200
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(content, status, headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>.+)", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/tag/(?P<revision>.+)", _Handler.tag),
    ("GET", f"/api/models/{_REPO}/refs", _Handler.refs),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", _Handler.tree),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("POST", "/verify", _Handler.verify),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
"""(methods, path, what answers); the first that fits does."""


@contextlib.contextmanager
def without_xet() -> Iterator[None]:
    """For code of this process: the Xet store is switched off while the block runs."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
