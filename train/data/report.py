"""What an examination means: counts, percentiles, duplicates, leaks, and whether to refuse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.examine import Examination
from train.data.manifest import FileReport, Overlap

QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
EXAMPLES = 5


def report_on(found: Examination, tokenised: bool) -> FileReport:
    """The file's part of the manifest. `tokenised`: the examination had an encoder."""
    read = found.id_hashes != 0
    counts: dict[str, Any] = {
        "kinds": dict(found.kinds),
        "skills": dict(found.skills),
        "images": len(found.image_hashes),
        "distinct_images": len(np.unique(found.image_hashes)),
        "duplicate_ids": _extra(found.id_hashes),
        "duplicate_samples": _extra(found.sample_hashes),
        "answers": spread(found.answers[read]),
        "characters": spread(found.chars[read]),
        "image_side": spread(found.image_sides),
    }
    if tokenised:
        known = found.tokens > 0
        counts["tokens"] = spread(found.tokens[known])
        counts["supervised_tokens"] = spread(found.supervised[known])
        counts["cut"] = int(found.cut.sum())
        counts["unsupervised"] = len(found.faults("unsupervised"))
    return FileReport(
        path=found.spec.path,
        fingerprint=found.records.content,
        image_root=str(found.spec.root),
        records=len(found.records),
        bad=found.bad,
        counts=counts,
    )


def spread(values: NDArray[np.int64]) -> dict[str, float]:
    """Total, mean and quantiles of a column; empty if the column is."""
    if len(values) == 0:
        return {}
    picked = np.quantile(values, list(QUANTILES.values()), method="lower")
    quantiles = {name: int(value) for name, value in zip(QUANTILES, picked, strict=True)}
    return {"total": int(values.sum()), "mean": round(float(values.mean()), 1), **quantiles}


def duplicate_ids(found: Examination) -> list[str]:
    """Ids that occur more than once, up to `EXAMPLES`."""
    values, first, counts = np.unique(found.id_hashes, return_index=True, return_counts=True)
    repeated = np.sort(first[(counts > 1) & (values != 0)])
    return [found.records[int(index)].id for index in repeated[:EXAMPLES]]


def overlaps(founds: Sequence[Examination]) -> list[Overlap]:
    """For each pair of files: pictures and whole samples that both contain."""
    return [_overlap(first, second) for first, second in combinations(founds, 2)]


def _overlap(first: Examination, second: Examination) -> Overlap:
    images, at_first, at_second = np.intersect1d(
        first.image_hashes, second.image_hashes, return_indices=True
    )
    owners = zip(first.image_owners[at_first], second.image_owners[at_second], strict=True)
    pairs = sorted((int(a), int(b)) for a, b in owners)
    samples, in_first, in_second = np.intersect1d(
        first.sample_hashes, second.sample_hashes, return_indices=True
    )
    same = samples != 0
    pairs = sorted(zip(in_first[same].tolist(), in_second[same].tolist(), strict=True)) or pairs
    return Overlap(
        first=first.spec.path,
        second=second.spec.path,
        images=len(images),
        samples=int(same.sum()),
        examples=[
            (first.records[int(a)].id, second.records[int(b)].id) for a, b in pairs[:EXAMPLES]
        ],
    )


def refusals(found: Examination, tokenised: bool, max_unsupervised: float) -> list[str]:
    """Why training would refuse this file; empty if it would not."""
    reasons = []
    if broken := found.faults("record"):
        reasons.append(f"malformed records: {len(broken)}")
    images = {sample.index for sample in found.faults("image")}
    if images and found.spec.on_bad_image == "fail":
        reasons.append(f"samples with bad images: {len(images)}")
    if large := found.faults("tokens"):
        reasons.append(f"samples that cannot be encoded: {len(large)}")
    if tokenised and (encoded := int((found.tokens > 0).sum())):
        share = len(found.faults("unsupervised")) / encoded
        if share > max_unsupervised:
            reasons.append(f"samples without a token to learn: {share:.1%}")
    return reasons


def _extra(hashes: NDArray[np.int64]) -> int:
    """How many entries repeat an earlier one (0 stands for unknown)."""
    known = hashes[hashes != 0]
    return len(known) - len(np.unique(known))
