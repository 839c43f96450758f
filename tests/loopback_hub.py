"""A Hub on the loopback: as much of the protocol as uploads and downloads use, kept in memory.

`with LoopbackHub() as hub:` serves `hub.url` on 127.0.0.1 until the block ends, and at the latest
until the process does. Give it to `HfApi(endpoint=hub.url, token=OWNER)`, or to a process by
`hub.environment()`. The Xet store is not served: `HF_HUB_DISABLE_XET` must be set.

Faults are set by attributes: `drop_after`, `broken`, `full`. What arrived is in `received`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

from tests.loopback_answers import Handler
from tests.loopback_repo import Repo

OWNER, READER = "hf_owner", "hf_reader"
"""Tokens that are known: of the user `me`, who also writes to `org`; and one that only reads."""


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
        handler = type("Handler", (Handler,), {"hub": self})
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


@contextlib.contextmanager
def without_xet() -> Iterator[None]:
    """For code of this process: the Xet store is switched off while the block runs."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
