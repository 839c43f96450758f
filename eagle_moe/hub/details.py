"""What a model card needs and no record holds: `card.yaml` in the folder of a release."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator

from eagle_moe.schema import Schema, load_yaml

DETAILS = "card.yaml"
"""Travels in the release, so that its card can be written again."""

UNKNOWN, OTHER = "unknown", "other"
HUB_LICENCES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research
    isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib""".split()
)
"""Identifiers that the Hub takes as `license`; https://huggingface.co/docs/hub/repositories-licenses.
Any other name goes there as `other` with `license_name`."""


class DataDetails(Schema):
    """Where an entry of the recipe's `data` is from, and under what licence."""

    licence: str
    source: str = ""


class Details(Schema):
    """`card.yaml`.

    - `licence`: of the whole release: an identifier of the Hub, or the licence's own name.
    - `authors`: who made it.
    - `title`, `description`: one line, and what the model is for in a few sentences.
    - `question`: of the example in the card.
    - `language`: codes such as `en`; none are assumed.
    - `data`: entry of the recipe's `data` -> source and licence.
    - `licences`: part (`experts.sam`, `language_model`) -> licence of the weights that it started
      from, where the records do not tell.
    - `base_models`, `datasets`: Hub ids beyond those in the records.
    - `limits`: sentences on what the model is not good at or not for.
    - `install`: how the package is got, if not from a registry.
    """

    licence: str = ""
    authors: list[str] = []
    title: str = ""
    description: str = ""
    question: str = "What is in the picture?"
    language: list[str] = []
    data: dict[str, DataDetails] = {}
    licences: dict[str, str] = {}
    base_models: list[str] = []
    datasets: list[str] = []
    limits: list[str] = Field(default_factory=list)
    install: str = "pip install eagle-moe"

    @field_validator("authors", "language", "limits", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def missing(self) -> list[str]:
        """Required fields without a value."""
        return [name for name in ("licence", "authors") if not getattr(self, name)]


def read_details(folder: str | Path) -> Details:
    """The details in `folder`; empty ones if it has no `card.yaml`. Raises `ValueError`."""
    path = Path(folder) / DETAILS
    return Details.parse(load_yaml(path), str(path)) if path.is_file() else Details()


def check_details(details: Details, parts: Iterable[str], data: Iterable[str]) -> None:
    """Raise `ValueError` with every field that is missing or names what the release has not."""
    wrong = [f"`{name}` is missing" for name in details.missing]
    for field, given, known in (
        ("licences", details.licences, set(parts)),
        ("data", details.data, set(data)),
    ):
        wrong += [
            f"`{field}.{name}` is of nothing here (known: {', '.join(sorted(known)) or 'none'})"
            for name in given
            if name not in known
        ]
    if wrong:
        raise ValueError(
            f"{DETAILS}: {'; '.join(wrong)}. Write a YAML file such as `licence: apache-2.0` and "
            "`authors: [Your Name]` (docs/model-card.md has every field) and give it as --card."
        )


def hub_licence(name: str) -> str | None:
    """The Hub's identifier of the licence `name`, however it is cased; None if it has none."""
    return name.lower() if name.lower() in HUB_LICENCES else None
