"""Conversations as records of data hold them."""

from __future__ import annotations

from train.data.records import parse_record


def conversation(*turns, images=0, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    messages += [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    raw = {"id": "x", "messages": messages, "images": [f"{n}.png" for n in range(images)]}
    return parse_record(raw, 0, "data.json")


CONVERSATIONS = {
    "one turn": conversation("<image>\nwhat is the text", "hello", images=1),
    "several turns": conversation(
        "<image>\nwhat is this", "a cat", "on what", "the mat.", "sure", "yes", images=1
    ),
    "several images": conversation("<image><image>\nwhat <image>", "a b", "<image>", "c", images=4),
    "text only": conversation("what is the text", "hello world", "and", "so on"),
    "system": conversation("<image>\nwhat", "a cat", images=1, system="speak of cats"),
    "odd text": conversation("<image>\n(ok)  ", ") 12345 yes\n\nno: ", "x", "a  b", images=1),
    "answer repeats question": conversation("a cat", "a cat", "a cat", "a cat"),
}
