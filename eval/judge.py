"""Scorers that ask another model: without a key they are stopped, so that nothing is guessed.

Left alone, such a scorer tries for minutes, and then draws an answer at random.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY", "AZURE_OPENAI_API_KEY")


class JudgeMissing(BaseException):
    """A scorer asked a judge. No `Exception`: scorers catch those, and go on with a guess."""


@contextmanager
def refuse_judges() -> Iterator[None]:
    """Raise `JudgeMissing` where a request would leave for a judge, unless there is a key."""
    if any(os.environ.get(key) for key in KEYS):
        yield
        return
    from openai._base_client import AsyncAPIClient, SyncAPIClient
    from requests import Session

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise JudgeMissing(f"it is scored by a judge, and there is no key: set {KEYS[0]}.")

    with ExitStack() as stack:
        for owner in (SyncAPIClient, AsyncAPIClient, Session):
            stack.enter_context(patch.object(owner, "request", refuse))
        yield
