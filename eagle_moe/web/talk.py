"""One visitor's conversation: questions about images, answered with every expert and without some.

A conversation goes on with what was answered by every expert. An answer without an expert stands
beside it, given after the same words; nothing that follows builds on it.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from eagle_moe.limits import check_count, check_text, open_image
from eagle_moe.web.desk import Desk

EVERY: frozenset[str] = frozenset()
"""Of an answer: no expert silenced."""


@dataclass
class Shown:
    """An image that was shown: what the model sees of it, and what the page shows."""

    name: str
    canvas: Image.Image
    thumbnail: Path


@dataclass
class Turn:
    """A question with its images; `answers`: silenced experts -> what was answered."""

    question: str
    images: Sequence[Shown]
    answers: dict[frozenset[str], str] = field(default_factory=dict)


class Talk:
    """What a visitor asked and was answered, kept on the server."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.turns: list[Turn] = []

    def ask(
        self, text: str, files: Sequence[Path], silenced: Collection[str] = ()
    ) -> Generator[None]:
        """Answer with every expert, then without `silenced` if any; yields after every piece.

        Closing it stops the answer; what was written stays. Raises `ValueError`, and forgets the
        question, if it is beyond the limits or cannot be answered.
        """
        text = text.strip()
        if not text:
            raise ValueError("Type a question first.")
        self._check(text, files)
        turn = Turn(text, [self._show(file) for file in files])
        self.turns.append(turn)
        try:
            yield from self._answer(turn, EVERY)
        except ValueError:
            self.turns.remove(turn)
            raise
        if silenced:
            yield from self._answer(turn, frozenset(silenced))

    def again(self, silenced: Collection[str]) -> Generator[None]:
        """Answer the last question again, without `silenced`."""
        if not self.turns:
            raise ValueError("Nothing was asked yet: ask a question first.")
        yield from self._answer(self.turns[-1], frozenset(silenced))

    def added(self) -> str:
        """HTML: what each expert added to the last answer that every expert gave.

        Raises `ValueError` if there is none, or no image was shown.
        """
        turn = next((turn for turn in reversed(self.turns) if turn.answers.get(EVERY)), None)
        if turn is None:
            raise ValueError("Nothing was answered yet: ask a question first.")
        names = [shown.name for each in self.turns for shown in each.images]
        answer = turn.answers[EVERY].strip()
        return self.desk.weigh(self.messages(upto=turn), turn.question, answer, names)

    def messages(self, upto: Turn | None = None) -> list[dict[str, Any]]:
        """The conversation as chat templates take it; `upto`: up to the question of that turn."""
        said: list[dict[str, Any]] = []
        for turn in self.turns:
            images = [{"type": "image", "image": shown.canvas} for shown in turn.images]
            said.append(
                {"role": "user", "content": [*images, {"type": "text", "text": turn.question}]}
            )
            if turn is upto:
                break
            answer = turn.answers.get(EVERY, "").strip()
            said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return said

    def _check(self, text: str, files: Sequence[Path]) -> None:
        earlier = [part for turn in self.turns for part in (turn.question, *turn.answers.values())]
        check_text("".join([*earlier, text]), self.desk.limits)
        before = sum(len(turn.images) for turn in self.turns)
        check_count(before + len(files), self.desk.limits)

    def _show(self, file: Path) -> Shown:
        image = open_image(file, file.name, self.desk.limits)
        return Shown(file.name, self.desk.canvas(image), self.desk.thumbnail(image, file.name))

    def _answer(self, turn: Turn, silenced: frozenset[str]) -> Generator[None]:
        turn.answers[silenced] = ""
        yield
        pieces = self.desk.write(self.messages(upto=turn), silenced)
        try:
            for piece in pieces:
                turn.answers[silenced] += piece
                yield
        finally:
            pieces.close()
