"""What the Hub, the network and the disk refuse, in one line with the remedy."""

from __future__ import annotations

import errno
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

TOKENS = "https://huggingface.co/settings/tokens"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def in_words(repo: str, doing: str) -> Iterator[None]:
    """Turn what the Hub's library raises into a `ValueError` of one line, which starts with `repo`.

    `doing`: what was tried, such as "uploading"; after what passes by itself (a connection that was
    lost, a server out of order) the line says that the same command goes on from there. An error
    that is none of these is let through.
    """
    try:
        yield
    except Exception as error:
        if (told := _told(_cause(error), repo, doing)) is None:
            raise
        raise ValueError(f"{repo}: {told}") from error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with; None if it did not answer."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return response.status_code if response is not None else None


def _cause(error: BaseException) -> BaseException:
    """The library wraps what went wrong with one of several uploads."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _told(error: BaseException, repo: str, doing: str) -> str | None:
    again = "Run the same command again: what has arrived is not sent again."
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token for the Hub. Make one with write access ({TOKENS}), then `hf auth login`."
    if isinstance(error, HFValidationError):
        return f"no name of a repository: write OWNER/NAME ({_short(error)})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to reach the Hub."
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        return (
            _told(cause, repo, doing) if cause else None
        ) or f"{doing}: {_short(error)}. {again}"
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo, doing, again)
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "hf_xet"):
        return f"{doing}: the connection was lost ({_short(error)}). {again}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"{doing}: the disk is full ({_short(error)}). Free space or give a folder elsewhere."
        )
    return None


def _refused(error: HfHubHTTPError, repo: str, doing: str, again: str) -> str:
    """By HTTP status; a 401 for a name alone means that the name is not to be seen."""
    status, said = status_of(error), _short(error.server_message or error)
    if isinstance(error, RevisionNotFoundError):
        return f"no such branch, tag or commit in it ({said})."
    if isinstance(error, EntryNotFoundError):
        return f"no such file in it ({said})."
    if status == 401 and "Repository" not in said:
        return (
            f"the Hub does not take the token ({said}): it has expired, was withdrawn or is "
            f"mistyped. Make a new one ({TOKENS}), then `hf auth login`."
        )
    if status in (401, 404):
        return "the Hub has no such repository, or it is private and this token may not see it."
    if status == 403:
        owner = repo.split("/")[0]
        return f"the token may not do that ({said}). It needs write access to {owner} ({TOKENS})."
    if status in (409, 412):
        return f"somebody changed the repository meanwhile ({said}). {again}"
    if status in (413, 507):
        return (
            f"{doing}: the Hub has no room left for it ({said}). Free space there or ask for more."
        )
    if status == 429 or (status or 0) >= 500:
        return f"{doing}: the Hub is out of order or asks to wait ({status}: {said}). {again}"
    return f"{doing}: the Hub refused ({status}: {said})."


def _short(error: object) -> str:
    return textwrap.shorten(str(error).rstrip(". "), 160, placeholder=" ...")
