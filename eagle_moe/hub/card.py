"""The model card of a release: `README.md` and its picture, written from the records beside it.

What is told by a record is taken from there, what only a person knows from `card.yaml`; what
neither tells is said to be not recorded. Every score is recounted from its answers before it is
shown, and shown only if it was measured on these weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from eagle_moe.checkpoint import RECIPE, replace_text
from eagle_moe.config import EagleMixConfig
from eagle_moe.hub.details import Details, check_details, hub_licence, read_details
from eagle_moe.hub.evidence import (
    EXPERTS_PICTURE,
    SCORES,
    check_weights,
    copy_experts_page,
    copy_scores,
    show_card,
)
from eagle_moe.hub.experts import is_expert_folder
from eagle_moe.hub.gate import GATE, Verdict
from eagle_moe.hub.licences import PartLicence, hub_ids, read_licences, read_specs
from eagle_moe.hub.picture import Anatomy, ExpertShape, draw_architecture
from eagle_moe.hub.records import (
    NOT_RECORDED,
    data_names,
    data_rows,
    last_stage,
    part_rows,
    read_recipe,
    stage_rows,
)
from eagle_moe.hub.scan import scan_text
from eagle_moe.scores.card import Card, find_cards
from eagle_moe.scores.identity import hash_weights
from eagle_moe.scores.score import TOTAL

README, PICTURE = "README.md", "architecture.png"
NO_DESCRIPTION = {
    False: "A vision-language model: it answers questions about images.",
    True: "An aligned vision expert.",
}
"""By whether it is one expert alone."""
TAGS = ["eagle-moe", "mixture-of-vision-experts", "vision-language-model"]


def write_card(
    folder: str | Path,
    repo: str | None,
    scores: Sequence[Path] = (),
    experts_page: Path | None = None,
) -> None:
    """Write the card of the model or expert in `folder`, which is a checkpoint with its records.

    - `repo`: where it will be; default: the folder's name.
    - `scores`: folders of score cards (of one task, or of a run with several); they are copied to
      `scores/`, beside those that are there already.
    - `experts_page`: what `python -m eval.experts` left: what each expert adds.

    Raises `ValueError` (`FileNotFoundError` for a file that is not there): fields that are missing,
    a number that does not follow from its answers, a score of other weights, a local path.
    """
    folder = Path(folder)
    recipe, details = read_recipe(folder), read_details(folder)
    licences = read_licences(folder)
    check_details(details, [one.part for one in licences], data_names(recipe))
    name = repo or folder.name
    facts = _facts(folder, name, recipe, details, licences)
    if is_expert_folder(folder):
        _write(folder, "expert.jinja", _metadata(name, details, licences, {}, expert=True), facts)
        return
    copy_scores(folder, scores, name)
    cards = find_cards(folder / SCORES)
    check_weights(folder, cards)
    caption = copy_experts_page(folder, experts_page, name)
    config = EagleMixConfig.from_pretrained(folder)
    anatomy = Anatomy.of(config)
    (folder / PICTURE).write_bytes(draw_architecture(anatomy))
    facts |= {
        "anatomy": anatomy,
        "picture": PICTURE,
        "dtype": str(config.dtype or NOT_RECORDED).removeprefix("torch."),
        "limits": _limits(details, anatomy),
        "tasks": [show_card(card) for card in cards.values()],
        "experts_caption": caption,
        "experts_picture": EXPERTS_PICTURE,
    }
    _write(folder, "card.jinja", _metadata(name, details, licences, cards), facts)


def _write(folder: Path, template: str, metadata: ModelCardData, facts: dict[str, Any]) -> None:
    body = _environment().get_template(template).render(**facts)
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    if found := scan_text(text, README):
        raise ValueError("\n".join(map(str, found)))
    replace_text(folder / README, text)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eagle_moe.hub", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.globals["large"] = _large
    return environment


def _facts(
    folder: Path,
    name: str,
    recipe: dict[str, Any],
    details: Details,
    licences: list[PartLicence],
) -> dict[str, Any]:
    """What both kinds of card show."""
    parts = part_rows(folder, licences)
    stages = stage_rows(recipe, last_stage(folder))
    first = read_specs(folder)[0]
    return {
        "repo": name,
        "title": details.title or name.rpartition("/")[2],
        "description": details.description or NO_DESCRIPTION[is_expert_folder(folder)],
        "question": json.dumps(details.question),
        "licence": details.licence,
        "authors": details.authors,
        "install": details.install,
        "spec": first,
        "shape": ExpertShape.of(first),
        "parameters": sum(part.parameters for part in parts),
        "parts": parts,
        "restrictions": _restrictions(licences),
        "stages": stages,
        "seed": recipe.get("seed"),
        "data": data_rows(recipe, details, stages),
        "details_limits": details.limits,
        "provenance": _provenance(folder),
    }


def _restrictions(licences: list[PartLicence]) -> list[str]:
    """A sentence for every licence that is not free."""
    links = {one: f" ({one.link})" if one.link.startswith("https://") else "" for one in licences}
    lines = (
        f"The licence {one.licence}{links[one]} {one.restriction}."
        for one in licences
        if one.restriction
    )
    return list(dict.fromkeys(lines))


def _limits(details: Details, anatomy: Anatomy) -> list[str]:
    spoken = (
        f"Made for {', '.join(details.language)}; other languages were not looked at."
        if details.language
        else "Which languages it is made for is not recorded."
    )
    return [
        *details.limits,
        spoken,
        f"Every image is scaled to fit {anatomy.canvas} x {anatomy.canvas} pixels: what cannot be "
        "seen there cannot be answered.",
        "It may state what is not in the image. No evaluation of safety or bias is recorded.",
    ]


def _provenance(folder: Path) -> list[str]:
    lines = [
        f"Weights (as `sha256sum *.safetensors` has it): `{hash_weights(folder)}`.",
        "`provenance.json` has the hash of every part, and every stage that changed it.",
    ]
    if (folder / RECIPE).is_file():
        lines.append("`recipe.yaml` is the resolved recipe.")
    if (folder / GATE).is_file():
        data = json.loads((folder / GATE).read_text(encoding="utf-8"))
        lines.append(_gate(Verdict.parse(data, str(folder / GATE))))
    return lines


def _gate(verdict: Verdict) -> str:
    """What the gate found, in a sentence."""
    count, failed = len(verdict.checks), verdict.failed
    versions = ", ".join(f"{name} {version}" for name, version in verdict.versions.items())
    found = f"all {count} checks passed"
    if failed:
        names = ", ".join(check.name for check in failed)
        found = f"{len(failed)} of {count} checks failed ({names})"
    return (
        "The folder was loaded in fresh processes, with and without `trust_remote_code`, and "
        f"compared with the model that it was made of: {found} ({versions}). Each of them is in "
        f"`{GATE}`; `release.json` holds what to compare a copy with."
    )


def _metadata(
    name: str,
    details: Details,
    licences: list[PartLicence],
    cards: dict[str, Card],
    expert: bool = False,
) -> ModelCardData:
    known = hub_licence(details.licence)
    results = [result for card in cards.values() for result in _results(card)]
    bases = list(dict.fromkeys([*hub_ids(licences), *details.base_models]))
    return ModelCardData(
        language=None if expert else details.language or None,
        license=known or "other",
        license_name=None if known else details.licence,
        library_name="eagle-moe" if expert else "transformers",
        pipeline_tag="image-feature-extraction" if expert else "image-text-to-text",
        tags=["eagle-moe", "vision-expert"] if expert else TAGS,
        base_model=bases or None,
        datasets=details.datasets or None,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _results(card: Card) -> list[EvalResult]:
    """Of every metric its total; a task's own data set is named where it has one."""
    task = card.identity.task
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=task.dataset or task.name,
            dataset_name=task.name,
            dataset_split=task.split,
            metric_type=metric.partition(",")[0],
            metric_name=f"{metric} (n = {parts[TOTAL].n})",
            metric_value=parts[TOTAL].value,
        )
        for metric, parts in card.metrics.items()
    ]


def _large(count: int) -> str:
    for letter, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _cell(text: object) -> str:
    """What would end a cell of a table, or become a tag, is escaped."""
    plain = " ".join(str(text).split())
    return plain.replace("|", "\\|").replace("<", "&lt;")
