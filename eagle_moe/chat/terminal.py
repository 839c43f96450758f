"""The terminal chat: one question with `--prompt`, or a conversation line by line."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from eagle_moe.chat.session import ChatSession
from eagle_moe.schema import nearest

COMMANDS = {
    "/image": "FILE: show an image with the next question",
    "/without": "EXPERT ...: the last question again, these experts shown nothing of the images",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (as does end of input)",
}


def run_chat(
    session: ChatSession, images: Sequence[str], prompt: str | None, max_new_tokens: int
) -> None:
    """Show `images` with the first question, which is `prompt` or the first line of the input.

    Only answers go to the standard output, so that they can be piped. In a conversation a mistake
    (a bad image, a too long text) is reported and the conversation goes on; with `prompt` it is
    raised as `ValueError`.
    """
    for image in images:
        session.add_image(image)
    if prompt is not None:
        _answer(session, prompt, max_new_tokens)
        return
    _say(f"{describe(session)}\nType a question, or /help.")
    for line in _lines():
        try:
            if line == "/quit":
                break
            if line.startswith("/"):
                _command(session, line, max_new_tokens)
            elif line:
                _answer(session, line, max_new_tokens)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def describe(session: ChatSession) -> str:
    """The model in one line: experts, language model, size, where it runs."""
    model = session.model
    experts = " + ".join(model.model.vision_tower.towers)
    text = model.config.text_config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{experts} -> {text.model_type} ({parameters / 1e6:,.1f} M parameters), "
        f"{session.processor.image_seq_length} tokens per image, on {model.device}"
    )


def _answer(session: ChatSession, text: str, max_new_tokens: int) -> None:
    _print(session.ask(text, max_new_tokens))


def _print(pieces: Generator[str]) -> None:
    with suppress(KeyboardInterrupt):  # Ctrl-C ends the answer, not the chat
        for piece in pieces:
            print(piece, end="", flush=True)
    pieces.close()
    print(flush=True)


def _command(session: ChatSession, line: str, max_new_tokens: int) -> None:
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"no command {name}.{nearest(name, COMMANDS)}")
    if name == "/reset":
        session.reset()
        _say("conversation forgotten")
    elif name == "/help":
        _say("\n".join(f"{command} {what}" for command, what in COMMANDS.items()))
    elif name == "/without":
        if not argument.strip():
            experts = ", ".join(session.model.model.vision_tower.towers)
            raise ValueError(f"/without: give one or more of {experts}.")
        _print(session.again(argument.replace(",", " ").split(), max_new_tokens))
    else:
        file = argument.strip().strip("'\"")
        if not file:
            raise ValueError("/image: give a file.")
        session.add_image(Path(file).expanduser())
        _say("shown with the next question")


def _lines() -> Iterator[str]:
    """Lines of the standard input, stripped; with a prompt and a history if a person types."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    with suppress(ImportError):  # no line editing on this system
        import readline  # noqa: F401
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()


def _say(text: str) -> None:
    """Tell a person at the keyboard; say nothing into a pipe."""
    if sys.stdin.isatty():
        print(text, file=sys.stderr)
