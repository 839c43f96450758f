"""Licences of the weights that a release is made of, and which of them restrict its publication.

What a part started from is in `provenance.json`; its licence is on the expert's card, in the table
of known origins below, or in `card.yaml`. Where none of them tells, it is "unknown", and a release
with it is not pushed unless the person says that it may be. None of this is legal advice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle_moe.checkpoint import EXPERT_SPEC, PROVENANCE, read_provenance
from eagle_moe.experts import ExpertSpec
from eagle_moe.experts.registry import presets
from eagle_moe.hub.details import DETAILS, UNKNOWN, read_details
from eagle_moe.parts import CONNECTOR, LANGUAGE_MODEL, expert_part

OWN = "the release's own"
"""Of weights that started random: nobody else's licence applies."""

FREE = frozenset(
    """apache-2.0 mit bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc zlib unlicense cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 bsl-1.0 ncsa wtfpl pddl postgresql cdla-permissive-1.0
    cdla-permissive-2.0""".split()
)
"""Allow copies and commercial use of weights, changed or not, with no more than a notice."""

_LLAMA = "asks for the licence and a notice to go with copies, and binds their use to a policy"
_NO_COMMERCE = "forbids commercial use"
RESTRICTED = {
    "llama2": (_LLAMA, "https://ai.meta.com/llama/license/"),
    "llama3": (_LLAMA, "https://www.llama.com/llama3/license/"),
    "llama3.1": (_LLAMA, "https://www.llama.com/llama3_1/license/"),
    "llama3.2": (_LLAMA, "https://www.llama.com/llama3_2/license/"),
    "llama3.3": (_LLAMA, "https://www.llama.com/llama3_3/license/"),
    "llama4": (_LLAMA, "https://www.llama.com/llama4/license/"),
    "llama-research": (
        "is for research only and forbids copies outside of it",
        "https://github.com/facebookresearch/llama/blob/llama_v1/MODEL_CARD.md",
    ),
    "gemma": (
        "binds the use of copies to a policy that must go with them",
        "https://ai.google.dev/gemma/terms",
    ),
    "qwen": (
        "asks for a notice, and for leave above 100 million users",
        "https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE",
    ),
    "qwen-research": (_NO_COMMERCE, "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE"),
    "cc-by-nc-4.0": (_NO_COMMERCE, "https://creativecommons.org/licenses/by-nc/4.0/"),
    UNKNOWN: ("is not recorded anywhere", ""),
}
"""Licence -> how it restricts copies or their use, and its text."""

_TERMS = {"nc": _NO_COMMERCE, "nd": "forbids copies of changed weights", "sa": "binds copies to it"}
"""What the letters in a Creative Commons licence mean; https://creativecommons.org/licenses/."""

ORIGINS = (
    (r"official Eagle release ", "cc-by-nc-4.0", "https://github.com/NVlabs/EAGLE#license"),
    (r"NVEagle/", "cc-by-nc-4.0", "https://github.com/NVlabs/EAGLE#license"),
    (r"lmsys/vicuna-\d+b-v1\.5", "llama2", "https://huggingface.co/lmsys/vicuna-7b-v1.5"),
    (r"lmsys/vicuna-", "llama-research", "https://huggingface.co/lmsys/vicuna-7b-v1.3"),
    (r"meta-llama/Llama-2-", "llama2", "https://huggingface.co/meta-llama/Llama-2-7b-hf"),
    (r"meta-llama/(Meta-)?Llama-3-", "llama3", ""),
    (r"meta-llama/(Meta-)?Llama-3\.1-", "llama3.1", ""),
    (r"meta-llama/(Meta-)?Llama-3\.2-", "llama3.2", ""),
    (r"meta-llama/(Meta-)?Llama-3\.3-", "llama3.3", ""),
    (r"google/gemma-(1\.1|2|3|7)", "gemma", ""),
    (r"NousResearch/Nous-Hermes-2-Yi-34B", "apache-2.0", ""),
    (r"01-ai/Yi-", "apache-2.0", "https://huggingface.co/01-ai/Yi-34B"),
    (r"Qwen/Qwen2\.5-3B", "qwen-research", ""),
    (r"Qwen/Qwen2\.5-72B", "qwen", ""),
    (r"Qwen/Qwen(2\.5-(0\.5|1\.5|7|14|32)B|3-)", "apache-2.0", ""),
    (r"HuggingFaceTB/SmolLM", "apache-2.0", ""),
    (r"TinyLlama/", "apache-2.0", ""),
    (r"mistralai/Mistral-7B-", "apache-2.0", ""),
    (r"microsoft/phi-2", "mit", ""),
)
"""(how an origin begins, licence, where that is said; "": on the page of the weights)."""


_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?=$|@|:)")


@dataclass(frozen=True)
class PartLicence:
    """The licence of the weights that a part started from.

    `origin`: those weights, as recorded ("" = not recorded); `source`: where the licence is said.
    """

    part: str
    licence: str
    origin: str
    source: str

    @property
    def restriction(self) -> str | None:
        """How it restricts copies or their use; None for none."""
        name = self.licence.lower()
        if self.licence == OWN or name in FREE:
            return None
        if name in RESTRICTED:
            return RESTRICTED[name][0]
        terms = [_TERMS[key] for key in re.findall(r"nc|nd|sa", name)] if name[:3] == "cc-" else []
        return " and ".join(terms) or "is not known to be free of restrictions"

    @property
    def link(self) -> str:
        """The text of a licence that restricts, or where it is said."""
        return RESTRICTED.get(self.licence.lower(), ("", ""))[1] or self.source


def read_licences(folder: str | Path) -> list[PartLicence]:
    """The licence of every part of the model or expert in `folder`, in the order of its records.

    Raises `ValueError` for a folder that holds neither, or a bad `card.yaml`.
    """
    folder = Path(folder)
    told = read_details(folder).licences
    specs = {expert_part(spec.name): spec for spec in read_specs(folder)}
    return [_licence(part, history, specs.get(part), told) for part, history in _histories(folder)]


def check_licences(found: Sequence[PartLicence], accepted: Collection[str]) -> None:
    """Raise `ValueError` for licences that restrict publication, unless they are `accepted`.

    `accepted` are names of licences; one that no part has is refused as well, since the person who
    accepts it takes the release for another.
    """
    taken = {name.lower() for name in accepted}
    restricted: dict[str, list[PartLicence]] = {}
    for one in found:
        if one.restriction and one.licence.lower() not in taken:
            restricted.setdefault(one.licence.lower(), []).append(one)
    if restricted:
        raise ValueError("\n".join(map(_refusal, restricted.values())))
    if odd := taken - {one.licence.lower() for one in found}:
        names = ", ".join(sorted({one.licence for one in found}))
        raise ValueError(f"--accept-licence {min(odd)}: no part is under it. Here: {names}.")


def read_specs(folder: Path) -> list[ExpertSpec]:
    """Of the experts of the model, or of the one expert, in `folder`. Raises `ValueError`."""
    if (folder / EXPERT_SPEC).is_file():
        return [ExpertSpec.parse(_read(folder / EXPERT_SPEC), str(folder / EXPERT_SPEC))]
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither a model (config.json) nor an expert ({EXPERT_SPEC}).")
    vision = _read(folder / "config.json").get("vision_config") or {}
    where = f"{folder / 'config.json'}: vision_config.experts"
    return [ExpertSpec.parse(entry, where) for entry in vision.get("experts", ())]


def hub_ids(found: Sequence[PartLicence]) -> list[str]:
    """Repositories that parts started from, each once: those whose licence a web page says."""
    ids = [_HUB_ID.match(one.origin) for one in found if one.source.startswith("https://")]
    return list(dict.fromkeys(match[0] for match in ids if match))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def _histories(folder: Path) -> Iterator[tuple[str, list[str]]]:
    if (folder / PROVENANCE).is_file():
        for part, record in read_provenance(folder).items():
            yield part, record.history
        return
    for spec in read_specs(folder):
        yield expert_part(spec.name), []
    if not (folder / EXPERT_SPEC).is_file():
        yield CONNECTOR, []
        yield LANGUAGE_MODEL, []


def _licence(
    part: str, history: Sequence[str], spec: ExpertSpec | None, told: dict[str, str]
) -> PartLicence:
    origin = history[0] if history else ""
    if part in told:
        return PartLicence(part, told[part], origin, DETAILS)
    if origin.startswith("random"):
        return PartLicence(part, OWN, origin, "")
    for start, licence, source in ORIGINS:
        if re.match(start, origin):
            page = _HUB_ID.match(origin)
            said = source or (f"https://huggingface.co/{page[0]}" if page else "")
            return PartLicence(part, licence, origin, said)
    cards = [spec.card.dump()] if spec else []
    cards += [preset["card"] for _, preset in presets().values()]
    for card in cards:
        if card["checkpoint"] and _is_of(origin, card["checkpoint"]):
            return PartLicence(part, card["licence"], origin, card["source"])
    if spec and origin and not spec.card.checkpoint and not _HUB_ID.match(origin):
        # made for no published weights, as the tiny experts are: its card speaks of one's own
        return PartLicence(part, spec.card.licence, origin, spec.card.source)
    return PartLicence(part, UNKNOWN, origin, "")


def _is_of(origin: str, checkpoint: str) -> bool:
    """Whether `origin` (a place, perhaps with `@revision`, and a story) is what a card names."""
    plain = re.sub(r"@[\w./-]+", "", origin)
    return plain == checkpoint or plain.startswith(f"{checkpoint}: ")


def _refusal(parts: Sequence[PartLicence]) -> str:
    first = parts[0]
    names = ", ".join(one.part for one in parts)
    origins = ", ".join(dict.fromkeys(one.origin for one in parts if one.origin)) or "not recorded"
    remedy = f"If you may publish them, add --accept-licence {first.licence}"
    if first.licence == UNKNOWN:
        told = f"`licences: {{{first.part}: apache-2.0}}`"
        remedy = f"If you know it, say so in {DETAILS} ({told}). {remedy}"
    link = f" ({first.link})" if first.link else ""
    return (
        f"{names}: the licence of their weights ({origins}), {first.licence}{link}, "
        f"{first.restriction}. {remedy}."
    )
