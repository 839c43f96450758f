"""What the loopback Hub answers to each request, from the repositories that it keeps."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.loopback_repo import Blob, Repo
from tests.loopback_request import MOST, Refused, Request

LARGE = 10_000
"""Bytes from which a file goes to the large file storage (10 MB on the real one)."""
LICENCES = {"apache-2.0", "mit", "llama2", "cc-by-nc-4.0", "other", "unknown"}


class Handler(Request):
    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

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

    # What is answered

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
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", f"/api/models/{_REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", f"/api/models/{_REPO}/tag/(?P<revision>.+)", Handler.tag),
    ("GET", f"/api/models/{_REPO}/refs", Handler.refs),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", Handler.tree),
    ("GET", f"/api/models/{_REPO}", Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("POST", "/verify", Handler.verify),
    ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
"""(methods, path, what answers); the first that fits does."""
