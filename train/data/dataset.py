"""Records on disk -> training samples: token ids, labels, canvases.

Nothing is substituted: a picture that cannot be read stops the run and is named, or its sample was
left out before step 1 because the doctor's manifest names it and `on_bad_image: skip` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from eagle_moe.canvas import load_image, to_canvas
from eagle_moe.processor import read_template
from eagle_moe.schema import Schema
from train.data.index import identity
from train.data.labels import Encoded, Encoder, LabelRule
from train.data.manifest import Manifest
from train.data.measure import Lengths, count_images, lengths_name, measure
from train.data.records import MissingPlaceholder, Picture, Record
from train.data.shards import Member
from train.data.source import RecordSource, data_files

if TYPE_CHECKING:
    from eagle_moe.processor import EagleMixProcessor

_SEEN, _CUT, _UNSUPERVISED = 1, 2, 4
_FLAGS = {"seen": _SEEN, "cut": _CUT, "unsupervised": _UNSUPERVISED}
_COMBINATIONS = np.arange(8)


class DataSpec(Schema):
    """One source of a stage's data.

    - `path`: a .json or .jsonl file in LLaVA or `messages` style; or a folder, pattern or name of
      WebDataset shards (`train.data.shards`), which hold their pictures.
    - `image_root`: folder that image paths are relative to; by default that of the file.
    - `limit`: use only that many records, chosen at random once and for all.
    - `weight`: how often a record is seen per epoch; 0.5 is a fixed random half of them.
    - `images`: `drop` removes pictures and placeholders (the blind baseline).
    - `missing_placeholder`: `prepend` puts the pictures of a record without any `<image>` first.
    - `on_bad_image`: `skip` leaves out, and counts, the samples whose pictures `manifest` names
      as bad; `fail` refuses to start if it names any.
    - `manifest`: what `python -m train.data.doctor ... --out FILE` wrote.
    - `template`: chat template to use instead of the model's own (a name or a .jinja file).
    - `labels`: `spans` learns what the template says the assistant speaks; `release` repeats the
      counts of official Eagle training, with the samples that these mask whole.
    """

    path: str
    image_root: str | None = None
    limit: int | None = Field(default=None, ge=1)
    weight: float = Field(default=1.0, gt=0)
    images: Literal["keep", "drop"] = "keep"
    missing_placeholder: MissingPlaceholder = "error"
    on_bad_image: Literal["fail", "skip"] = "fail"
    manifest: str | None = None
    template: str | None = None
    labels: LabelRule = "spans"

    @property
    def root(self) -> Path:
        """Folder that image paths are relative to."""
        return Path(self.image_root) if self.image_root is not None else Path(self.path).parent

    def check_files(self) -> None:
        """Raises `FileNotFoundError` or `ValueError` if what this names is not there."""
        data_files(self.path)
        for path in filter(None, (self.image_root, self.manifest)):
            if not Path(path).exists():
                raise FileNotFoundError(f"no such file: {path}.")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a sample takes along to be counted by, once a step has used it: its number in its data
    set, and what happened to it."""

    index: int
    flags: int


class ConversationDataset(Dataset[dict[str, Any]]):
    """Map-style dataset over one source.

    A sample is `{"input_ids": (T,) int64, "labels": (T,) int64, "pixel_values": list of
    (3,S,S) uint8 canvases in prompt order, "id": str, "seen": Seen}`, plus `"skill"` if the record
    has one.

    Reading a sample counts nothing: loaders read ahead. What steps have used is told to `count`, in
    the process that takes them; see `counts`, `named`.
    Raises `ValueError` or `FileNotFoundError` if the source would be refused.
    """

    def __init__(
        self, spec: DataSpec, processor: EagleMixProcessor, max_length: int | None
    ) -> None:
        self.spec = spec
        self.image_processor = processor.image_processor
        self.root = spec.root
        template = read_template(spec.template) if spec.template is not None else None
        self.encoder = Encoder(processor, max_length, template, spec.labels)
        self.records = RecordSource(spec.path, spec.missing_placeholder)
        self.skipped = _skipped(spec, self.records)
        self._kept = _kept(len(self.records), self.skipped, spec)
        count = len(self.records) if self._kept is None else len(self._kept)
        self._flags = torch.zeros(count, dtype=torch.uint8)  # one byte per sample

    def __len__(self) -> int:
        return len(self._flags)

    def record_number(self, index: int) -> int:
        """Where sample `index` stands in the source."""
        return index if self._kept is None else int(self._kept[index])

    def record(self, index: int) -> Record:
        """The conversation behind sample `index`, without its pictures under `images: drop`."""
        record = self.records[self.record_number(index)]
        return record.without_images() if self.spec.images == "drop" else record

    def name_of(self, index: int) -> str:
        """By which a person finds sample `index`: its id."""
        return self.record(index).id

    def encode(self, index: int) -> Encoded:
        """Ids and labels of sample `index`; opens no picture."""
        return self.encoder(self.record(index))

    def check_records(self) -> int:
        """Raises `ValueError` if a record is malformed or its image tokens exceed the limit, so
        that none stops the run later. Returns how many had to be parsed for it: what was found out
        about a record is kept in the index of its file.
        """
        numbers = self._numbers()
        images, parsed = count_images(self.records, numbers)
        limit = self.encoder.max_length
        if limit is not None and self.spec.images == "keep":
            for index in np.flatnonzero(images[numbers] * self.encoder.num_image_tokens > limit):
                self.encoder.check_fits(self.record(int(index)))
        return parsed

    def lengths(self) -> Lengths:
        """How long the samples are, in the order of their indices. Encodes, in parallel and with a
        progress bar, those whose length is not in the index of their file yet.

        Raises `ValueError` for a record that cannot be encoded.
        """
        blind = self.spec.images == "drop"
        return measure(self.records, self.encoder, blind, self._numbers())[0]

    @property
    def identity(self) -> str:
        """A short name for the lengths of all samples: of the data and what is made of it."""
        blind = self.spec.images == "drop"
        kept = None if self._kept is None else self._kept.tolist()
        column = lengths_name(self.records, self.encoder, blind)
        return identity(self.records.content, column, kept)

    def _numbers(self) -> NDArray[np.int64]:
        return np.arange(len(self)) if self._kept is None else self._kept

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.record(index)
        encoded = self.encoder(record)
        flags = (_CUT if encoded.cut else 0) | (_UNSUPERVISED if encoded.supervised == 0 else 0)
        sample: dict[str, Any] = {
            "input_ids": torch.from_numpy(encoded.input_ids),
            "labels": torch.from_numpy(encoded.labels),
            "pixel_values": [self.image_input(picture, record) for picture in record.images],
            "id": record.id,
            "seen": Seen(index, _SEEN | flags),
        }
        if "skill" in record.extra:
            sample["skill"] = record.extra["skill"]
        return sample

    def image_input(self, picture: Picture, record: Record) -> Tensor:
        """What stands for a picture of `record` in a sample: its canvas, (3,S,S) uint8."""
        settings = self.image_processor
        try:
            image = load_picture(picture, self.root)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{record.where}: {error} To leave such samples out, and count them, write a "
                "manifest with `python -m train.data.doctor` and set `on_bad_image: skip`."
            ) from error
        return to_canvas(image, settings.size.height, settings.fit, tuple(settings.fill))

    def count(self, samples: Iterable[Seen]) -> None:
        """Take note of samples that a step has used."""
        for sample in samples:
            self._flags[sample.index] = sample.flags

    def counts(self) -> dict[str, int]:
        """Distinct samples: `records` in use, `skipped`, and of those counted so far, whatever the
        number of epochs, `seen`, `cut`, `unsupervised`."""
        found = np.bincount(self._flags.numpy(), minlength=len(_COMBINATIONS))
        counts = {name: int(found[_COMBINATIONS & bit > 0].sum()) for name, bit in _FLAGS.items()}
        return {"records": len(self), "skipped": len(self.skipped), **counts}

    def share_counts(self, device: torch.device) -> None:
        """Have the counts of all processes be those of all of them together.

        Every process must call it; `device` is where its collectives take place.
        """
        flags = self._flags.to(device)
        # a sample has the same flags wherever it is seen, so the greatest is what anyone has seen
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._flags |= flags.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resume point keeps: what was counted so far."""
        return {"flags": self._flags.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on counting where `state_dict` was taken."""
        self._flags.copy_(state["flags"])

    def named(self, what: Literal["cut", "unsupervised"], limit: int = 10) -> list[str]:
        """Ids of the first `limit` samples counted so far that were `cut` or `unsupervised`."""
        indices = np.flatnonzero(self._flags.numpy() & _FLAGS[what])[:limit]
        return [self.name_of(int(index)) for index in indices]


def choose(count: int, number: int, seed: int | Sequence[int] = 0) -> NDArray[np.int64]:
    """`number` different indices below `count`, sorted; random, but fixed by `seed`.

    Not every n-th: data sets that cycle through their subjects would lose some of them.
    """
    return np.sort(np.random.default_rng(seed).permutation(count)[:number])


def load_picture(picture: Picture, root: Path) -> Image.Image:
    """The upright RGB image of a record's picture; `root`: what its path is relative to.

    Raises `ValueError` that names it if it cannot be used.
    """
    if not isinstance(picture, Member):
        return load_image(root / picture)
    try:
        return load_image(picture.read())
    except ValueError as error:
        raise ValueError(f"{picture}: {str(error).removeprefix('image: ')}") from None


def _kept(count: int, skipped: Sequence[int], spec: DataSpec) -> NDArray[np.int64] | None:
    """Records in use, or None: all of them, which costs no memory."""
    if not skipped and (spec.limit is None or spec.limit >= count):
        return None
    kept = np.delete(np.arange(count), np.asarray(skipped, dtype=np.int64))
    if spec.limit is not None and spec.limit < len(kept):
        kept = kept[choose(len(kept), spec.limit)]
    if len(kept) == 0:
        raise ValueError(f"{spec.path}: no sample is left; the manifest names all as bad.")
    return kept


def _skipped(spec: DataSpec, records: RecordSource) -> list[int]:
    """Record numbers that the manifest says have a bad picture, if the policy is to skip them."""
    if spec.images == "drop":
        return []
    if spec.manifest is None:
        if spec.on_bad_image == "skip":
            raise ValueError(
                f"{spec.path}: `on_bad_image: skip` needs a `manifest` that names the bad "
                f"pictures. Write it with `python -m train.data.doctor {spec.path} --out FILE`."
            )
        return []
    report = Manifest.load(spec.manifest).report_on(records.content, spec.path, spec.manifest)
    bad = [sample for sample in report.bad if sample.fault == "image"]
    if bad and spec.on_bad_image == "fail":
        raise ValueError(
            f"{spec.path}: {len(bad)} bad images, such as {bad[0].reason} Mend them, or set "
            "`on_bad_image: skip` to leave their samples out and count them."
        )
    return sorted({sample.index for sample in bad})
