"""Conversations: LLaVA style or `messages` style -> `Record`.

LLaVA style:    {"id", "image": str | [str], "conversations": [{"from": "human"|"gpt", "value"}]}
messages style: {"id", "images": [str], "messages": [{"role", "content": str | [item]}]}

Both become the content items that chat templates read, with one image item per picture, in order.
Every error names the file, the record (index from 0, and id), the field and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from eagle_moe.schema import nearest
from train.data.shards import Member

PLACEHOLDER = "<image>"
"""Where a picture goes in the text of a record, whatever the tokenizer's own image token is."""

MissingPlaceholder = Literal["error", "prepend"]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Picture = str | Member
"""Where a picture is: a path as written in the record, or a place in a shard."""


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation.

    - `messages`: `[{"role": "system"|"user"|"assistant", "content": [item]}]`, an item being
      `{"type": "text", "text": str}` or `{"type": "image"}`.
    - `images`: one per image item, in order: a path as written in the record, or, of a sample in a
      shard, the picture's place there.
    - `extra`: every other field of the record (`skill`, `source`, ...), untouched.
    - `where`: file, index and id, for messages to the person.
    """

    id: str
    messages: list[dict[str, Any]]
    images: tuple[Picture, ...]
    extra: Mapping[str, Any]
    where: str

    def without_images(self) -> Record:
        """The same conversation with its pictures and their placeholders taken out."""
        messages = [
            {**turn, "content": [item for item in turn["content"] if item["type"] != "image"]}
            for turn in self.messages
        ]
        return replace(self, messages=messages, images=())

    def text(self, role: str) -> list[str]:
        """What `role` says, one string per turn, pictures left out."""
        return [
            "".join(item["text"] for item in turn["content"] if item["type"] == "text")
            for turn in self.messages
            if turn["role"] == role
        ]


def parse_record(
    raw: Any,
    index: int,
    source: str,
    missing_placeholder: MissingPlaceholder = "error",
    members: Mapping[str, Member] | None = None,
) -> Record:
    """Validate one JSON value in either style; `source` and `index` are named in the errors.

    `missing_placeholder="prepend"` puts the pictures of a record without any `<image>` at the
    start of its first user turn; by default that is an error, like every other count mismatch.
    `members`: the pictures that lie beside the record in its shard, by name.
    """
    where = f"{source}: record {index}"
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected an object, got {type(raw).__name__}.")
    record_id = str(raw.get("id", index))
    where += f' (id "{record_id}")'
    messages, inline = _read_turns(raw, where)
    listed = _listed_images(raw, where)
    if listed and inline:
        raise ValueError(
            f"{where}: images are given both in a list and inside `content`. Use one of the two."
        )
    named = listed or inline
    images = named if members is None else _members(named, members, where)
    _match_placeholders(messages, images, where, missing_placeholder)
    taken = {"id", "image", "images", "conversations", "messages"}
    extra = {key: value for key, value in raw.items() if key not in taken}
    return Record(record_id, messages, tuple(images), extra, where)


def _read_turns(raw: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The turns as messages, and the images named inside their content."""
    styles = {"conversations": ("from", "value"), "messages": ("role", "content")}
    present = [key for key in styles if key in raw]
    if len(present) != 1:
        found = " and ".join(present) or f"only {', '.join(raw) or 'no field'}"
        raise ValueError(
            f"{where}: give `conversations` or `messages`, one of them; found {found}."
        )
    field = present[0]
    role_key, content_key = styles[field]
    if not isinstance(raw[field], list) or not raw[field]:
        raise ValueError(f"{where}: `{field}` must be a list with at least one turn.")
    messages: list[dict[str, Any]] = []
    inline: list[str] = []
    for number, turn in enumerate(raw[field]):
        at = f"{where}: `{field}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise ValueError(f"{at}` must be an object with `{role_key}` and `{content_key}`.")
        role = turn[role_key]
        if role not in _ROLES:
            raise ValueError(f"{at}.{role_key}` = {role!r}.{nearest(str(role), _ROLES)}")
        content = _read_content(turn[content_key], f"{at}.{content_key}`", inline)
        messages.append({"role": _ROLES[role], "content": content})
    return messages, inline


def _read_content(value: Any, at: str, inline: list[str]) -> list[dict[str, Any]]:
    """Content items of one turn; paths found on image items are appended to `inline`."""
    if isinstance(value, str):
        return _split_text(value)
    if not isinstance(value, list):
        raise ValueError(f"{at} must be text or a list of items, got {type(value).__name__}.")
    items: list[dict[str, Any]] = []
    for item in value:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            items += _split_text(item["text"])
        elif kind == "image":
            items.append({"type": "image"})
            inline += _inline_path(item, at)
        else:
            raise ValueError(
                f'{at}: {item!r} is no content item. Write {{"type": "text", "text": ...}} or '
                '{"type": "image"}.'
            )
    return items


def _inline_path(item: Mapping[str, Any], at: str) -> list[str]:
    if "url" in item:
        raise ValueError(f"{at}: images are not downloaded. Save the picture and give its `path`.")
    path = item.get("path", item.get("image"))
    if path is None:
        return []
    if not isinstance(path, str) or not path:
        raise ValueError(f"{at}: the `path` of an image item must be a file name, got {path!r}.")
    return [path]


def _split_text(text: str) -> list[dict[str, Any]]:
    """Text around its placeholders. The line break after one belongs to the chat template."""
    items: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            items.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            items.append({"type": "text", "text": piece})
    return items


def _listed_images(raw: Mapping[str, Any], where: str) -> list[str]:
    if "image" in raw and "images" in raw:
        raise ValueError(f"{where}: give `image` or `images`, not both.")
    field = "images" if "images" in raw else "image"
    value = raw.get(field)
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"{where}: `{field}` = {value!r} must be a file name or a list of them; "
            "leave it out for a text-only record."
        )
    return paths


def _members(names: Sequence[str], members: Mapping[str, Member], where: str) -> Sequence[Picture]:
    """The pictures of a sample in a shard: those that its record names, or all of them."""
    if not names:
        return list(members.values())
    for name in names:
        if name not in members:
            raise ValueError(f"{where}: its shard has no picture {name!r}.{nearest(name, members)}")
    return [members[name] for name in names]


def _match_placeholders(
    messages: list[dict[str, Any]],
    images: Sequence[Picture],
    where: str,
    missing: MissingPlaceholder,
) -> None:
    """Exactly one placeholder per image, or a `ValueError` with both numbers."""
    count = sum(item["type"] == "image" for turn in messages for item in turn["content"])
    if count == len(images):
        return
    users = [turn for turn in messages if turn["role"] == "user"]
    if count == 0 and missing == "prepend" and users:
        users[0]["content"][:0] = [{"type": "image"} for _ in images]
        return
    remedy = f"Put one {PLACEHOLDER} in the text per image"
    if count == 0:
        remedy += ", or set `missing_placeholder: prepend` to have them put first"
    raise ValueError(
        f"{where}: {count} {PLACEHOLDER} in the text but {len(images)} images. {remedy}."
    )
