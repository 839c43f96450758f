"""Answers while a run lasts: bare texts that outlive its process, and how far it has come."""

from __future__ import annotations

import json
import os
from collections import UserDict
from collections.abc import Callable
from pathlib import Path

OnProgress = Callable[[int, int, str], None]
"""Called with (items done, items in all, note)."""


class KeptTexts(UserDict[str, str]):
    """Question -> text, written to a file as they come: what is finished outlives the process.

    What an earlier run left in the file is there; the torn last line of a killed run is cut.
    Raises `ValueError` naming the line of a file that is none of these.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        with self.path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                try:
                    key, text = json.loads(line)
                except (json.JSONDecodeError, TypeError, ValueError):
                    raise ValueError(f"{self.path}:{number}: not an answer. Remove it.") from None
                self.data[key] = text

    def __setitem__(self, key: str, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, text], ensure_ascii=True) + "\n")
        self.data[key] = text
