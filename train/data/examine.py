"""Look at every sample of a source once, in parallel: its JSON, its pictures, its tokens.

Findings are kept as columns, a few machine words per sample, so that millions of samples fit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from train.data.dataset import DataSpec, load_picture
from train.data.labels import Encoder
from train.data.manifest import BadSample, Fault
from train.data.records import Picture, Record
from train.data.source import RecordSource

BATCH = 32
"""Samples per message from a worker: a trade between their number and a smooth progress bar."""


@dataclass(slots=True)
class Finding:
    """What one sample is like. Hashes are 64 bits of content, 0 for unknown."""

    index: int
    id: str
    faults: list[tuple[Fault, str]] = field(default_factory=list)
    id_hash: int = 0
    sample_hash: int = 0
    image_hashes: list[int] = field(default_factory=list)
    image_sides: list[int] = field(default_factory=list)
    kind: str = ""
    skill: str | None = None
    answers: int = 0
    chars: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: bool = False


class Examiner(Dataset[Finding]):
    """Examines record `index` when asked for item `index`; the loader's workers run it."""

    def __init__(self, spec: DataSpec, encoder: Encoder | None) -> None:
        self.spec = spec
        self.encoder = encoder
        self.records = RecordSource(spec.path, spec.missing_placeholder)
        _look_at.cache_clear()  # pictures may have changed since the last examination

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Finding:
        try:
            record = self.records[index]
        except ValueError as error:
            return Finding(index, self._id(index), [("record", str(error))])
        if self.spec.images == "drop":
            record = record.without_images()
        finding = Finding(index, record.id, id_hash=_hash(record.id.encode()))
        self._describe(record, finding)
        self._open_images(record, finding)
        self._encode(record, finding)
        return finding

    def _id(self, index: int) -> str:
        """The id of a record that is malformed, if it can be told."""
        try:
            raw = self.records.raw(index)
        except ValueError:
            return str(index)
        return str(raw.get("id", index)) if isinstance(raw, dict) else str(index)

    def _describe(self, record: Record, finding: Finding) -> None:
        images = len(record.images)
        finding.kind = ("text only", "one image")[images] if images < 2 else "several images"
        skill = record.extra.get("skill")
        finding.skill = None if skill is None else str(skill)
        finding.answers = len(record.text("assistant"))
        finding.chars = sum(
            len(item.get("text", "")) for turn in record.messages for item in turn["content"]
        )

    def _open_images(self, record: Record, finding: Finding) -> None:
        for picture in record.images:
            look = _look_at(picture, self.spec.root)
            if isinstance(look, str):
                finding.faults.append(("image", f"{record.where}: {look}"))
            else:
                finding.image_hashes.append(look[0])
                finding.image_sides.append(look[1])
        if len(finding.image_hashes) == len(record.images):
            content = repr((record.messages, finding.image_hashes))
            finding.sample_hash = _hash(content.encode())

    def _encode(self, record: Record, finding: Finding) -> None:
        if self.encoder is None:
            return
        try:
            encoded = self.encoder(record)
        except ValueError as error:
            finding.faults.append(("tokens", str(error)))
            return
        finding.tokens = encoded.length
        finding.supervised = encoded.supervised
        finding.cut = encoded.cut
        if encoded.supervised == 0:
            if encoded.cut:
                why = "the limit cuts it all off"
            elif finding.answers:
                why = "the counts of `labels: release` do not add up, so all of it is masked"
            else:
                why = "it has no answer"
            finding.faults.append(("unsupervised", f"{record.where}: nothing to learn: {why}."))


@lru_cache(maxsize=4096)  # neighbouring records often ask about the same picture
def _look_at(picture: Picture, root: Path) -> tuple[int, int] | str:
    """(hash of the pixels, longer side) of a picture, or why it cannot be used."""
    try:
        image = load_picture(picture, root)
    except (OSError, ValueError) as error:
        return str(error)
    return _hash(repr(image.size).encode() + image.tobytes()), max(image.size)


def _hash(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


class Examination:
    """All findings on one source, as columns with one entry per record."""

    def __init__(self, spec: DataSpec, records: RecordSource) -> None:
        count = len(records)
        self.spec = spec
        self.records = records
        self.bad: list[BadSample] = []
        self.kinds: Counter[str] = Counter()
        self.skills: Counter[str] = Counter()
        self.id_hashes = np.zeros(count, np.int64)
        self.sample_hashes = np.zeros(count, np.int64)
        self.answers = np.zeros(count, np.int64)
        self.chars = np.zeros(count, np.int64)
        self.tokens = np.zeros(count, np.int64)
        self.supervised = np.zeros(count, np.int64)
        self.cut = np.zeros(count, bool)
        self._image_owners: list[int] = []
        self._image_hashes: list[int] = []
        self._image_sides: list[int] = []

    def add(self, finding: Finding) -> None:
        """Enter what was found about one record."""
        at = finding.index
        self.bad += [
            BadSample(index=at, id=finding.id, fault=fault, reason=reason)
            for fault, reason in finding.faults
        ]
        if finding.kind:
            self.kinds[finding.kind] += 1
        if finding.skill is not None:
            self.skills[finding.skill] += 1
        self.id_hashes[at] = finding.id_hash
        self.sample_hashes[at] = finding.sample_hash
        self.answers[at] = finding.answers
        self.chars[at] = finding.chars
        self.tokens[at] = finding.tokens
        self.supervised[at] = finding.supervised
        self.cut[at] = finding.cut
        self._image_owners += [at] * len(finding.image_hashes)
        self._image_hashes += finding.image_hashes
        self._image_sides += finding.image_sides

    @property
    def image_hashes(self) -> NDArray[np.int64]:
        """One per picture that could be read, in file order."""
        return np.asarray(self._image_hashes, np.int64)

    @property
    def image_owners(self) -> NDArray[np.int64]:
        """Record number of each of `image_hashes`."""
        return np.asarray(self._image_owners, np.int64)

    @property
    def image_sides(self) -> NDArray[np.int64]:
        """Longer side in pixels of each of `image_hashes`."""
        return np.asarray(self._image_sides, np.int64)

    def faults(self, fault: Fault) -> list[BadSample]:
        """The bad samples of one kind."""
        return [sample for sample in self.bad if sample.fault == fault]


def examine(
    spec: DataSpec,
    encoder: Encoder | None = None,
    workers: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Examine every record of `spec`; without an encoder, tokens are left out.

    `workers` processes do it (0: this one); `advance(done, total)` is called as records get done.
    """
    examiner = Examiner(spec, encoder)
    result = Examination(spec, examiner.records)
    loader = DataLoader(examiner, batch_size=BATCH, num_workers=workers, collate_fn=list)
    done = 0
    for findings in loader:
        for finding in findings:
            result.add(finding)
        done += len(findings)
        advance(done, len(examiner))
    return result
