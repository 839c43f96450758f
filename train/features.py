"""Feature maps of frozen experts, computed once per image and read from disk by every run.

A store is a folder with one folder per expert, named after all that determines its maps: weights,
view, canvas. Runs with some experts in common share their maps, even when they run side by side.

    STORE/<expert>-<digest>/shape.json    dtype and shape (C,h,w) of a map
                            maps.bin      map after map, as they came out of the expert
                            images.jsonl  which image each map is of, in the same order
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from eagle_moe.experts import VisionExpert
from eagle_moe.parts import tensor_hashes
from train.data import Collator, ConversationDataset
from train.data.records import Picture, Record
from train.data.shards import Member
from train.jobs import progress

if TYPE_CHECKING:
    from eagle_moe.image_processor import EagleMixImageProcessor
    from eagle_moe.processor import EagleMixProcessor

Image = tuple[str, int, int]
"""What an image file is known by: path, time of the last change in ns, size in bytes."""

_BATCH = 32


def image_of(path: Path) -> Image:
    """Identify a file without reading it."""
    status = path.stat()
    return str(path.resolve()), status.st_mtime_ns, status.st_size


class MapFile:
    """The maps of one expert. Maps are only ever added, behind a lock, data before index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[Image, int] = {}
        self.maps: Tensor | None = None
        self._index_bytes = 0

    def read(self) -> None:
        """See what is there; a map without its line in the index does not count."""
        index = self.folder / "images.jsonl"
        whole, _, _ = (index.read_bytes() if index.is_file() else b"").rpartition(b"\n")
        self._index_bytes = len(whole) + 1 if whole else 0
        images = [tuple(json.loads(line)) for line in whole.splitlines()]
        self.rows = {image: row for row, image in enumerate(images)}
        if images:
            told = json.loads((self.folder / "shape.json").read_text(encoding="utf-8"))
            shape = (len(images), *told["shape"])
            path, dtype = str(self.folder / "maps.bin"), getattr(torch, told["dtype"])
            flat = torch.from_file(path, shared=False, size=prod(shape), dtype=dtype)
            self.maps = flat.view(shape)

    def add(self, images: Sequence[Image], maps: Tensor) -> None:
        """Append maps (n,C,h,w). Raises `OSError` if the disk is full; what was there stays."""
        maps = maps.detach().contiguous().cpu()
        row_bytes = maps[0].numel() * maps.element_size()
        if not self.rows:  # never over one that is in use: a kill would leave it empty
            shape = {"dtype": str(maps.dtype).removeprefix("torch."), "shape": list(maps.shape[1:])}
            (self.folder / "shape.json").write_text(json.dumps(shape), encoding="utf-8")
        lines = "".join(json.dumps(image) + "\n" for image in images).encode()
        # truncated to what is whole: a killed process may have left a part of a map or a line
        with (self.folder / "maps.bin").open("ab") as file:
            file.truncate(len(self.rows) * row_bytes)
            file.write(maps.view(-1).view(torch.uint8).numpy().data)
        with (self.folder / "images.jsonl").open("ab") as file:
            file.truncate(self._index_bytes)
            file.write(lines)
        self._index_bytes += len(lines)
        self.rows |= {image: len(self.rows) + i for i, image in enumerate(images)}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process adds maps, then see what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.read()
            yield


class FeatureStore:
    """The maps of a run's experts: `images` lists the images that the run needs."""

    def __init__(
        self, folder: Path, experts: nn.ModuleDict, images: EagleMixImageProcessor
    ) -> None:
        self.experts: dict[str, VisionExpert] = dict(experts.items())  # type: ignore[arg-type]
        canvas = (images.size.height, images.fit, tuple(images.fill))
        self.files = {
            name: MapFile(folder / f"{name}-{_digest(expert, canvas)}")
            for name, expert in self.experts.items()
        }
        self.images: dict[Image, int] = {}
        self.rows: dict[str, Tensor] = {}

    def fill(self, datasets: Sequence[FeatureDataset], title: str) -> None:
        """Compute the maps that are missing for the images of `datasets`."""
        sources: dict[Image, tuple[FeatureDataset, Picture, Record]] = {}
        for dataset in datasets:
            sources |= dataset.image_sources()
        self.images = {image: index for index, image in enumerate(sources)}
        for dataset in datasets:
            dataset.images = self.images
        with ExitStack() as stack:
            for name in sorted(self.files):
                stack.enter_context(self.files[name].locked())
            missing = [i for i in sources if any(i not in f.rows for f in self.files.values())]
            self._compute(missing, sources, title)
        for name, file in self.files.items():
            file.read()
            self.rows[name] = torch.tensor([file.rows[image] for image in sources])

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """Maps {expert: (n,C,h,w)} of the images with these places in `images`."""
        return {
            name: file.maps[self.rows[name][indices]]
            for name, file in self.files.items()
            if file.maps is not None
        }

    def _compute(self, missing: Sequence[Image], sources: dict[Image, Any], title: str) -> None:
        console = Console(stderr=True)
        starts = range(0, len(missing), _BATCH)
        shown = track(
            starts, f"{title}: features", console=console, disable=not console.is_terminal
        )
        for start in shown:
            batch = missing[start : start + _BATCH]
            canvases = torch.stack([sources[i][0].canvas(*sources[i][1:]) for i in batch])
            for name, file in self.files.items():
                new = [place for place, image in enumerate(batch) if image not in file.rows]
                if new:
                    maps = _run(self.experts[name], canvases[new])
                    if start == 0:
                        _check_room(file.folder, len(missing) * maps[0].nbytes)
                    file.add([batch[place] for place in new], maps)
            progress(start + len(batch), len(missing), "features")


class FeatureDataset(ConversationDataset):
    """Samples in which an image is a number: its place in the `images` of the store.

    Of use once a store was filled for it.
    """

    images: dict[Image, int]

    def canvas(self, picture: Picture, record: Record) -> Tensor:
        """The canvas that the number stands for."""
        return super().image_input(picture, record)

    def image_input(self, picture: Picture, record: Record) -> Tensor:
        return torch.tensor(self.images[image_of(self._file(picture))])

    def image_sources(self) -> dict[Image, tuple[FeatureDataset, Picture, Record]]:
        """Every image of the data set, once, with what `canvas` takes to load it."""
        found: dict[Image, tuple[FeatureDataset, Picture, Record]] = {}
        for index in range(len(self)):
            record = self.record(index)
            for picture in record.images:
                file = self._file(picture)
                if not file.is_file():
                    self.canvas(picture, record)  # raises, and names the sample
                found[image_of(file)] = (self, picture, record)
        return found

    def _file(self, picture: Picture) -> Path:
        if isinstance(picture, Member):
            raise ValueError(
                f"{picture}: cache_features knows images by their files, and takes none from "
                "shards. Leave it out, or use the data set as single files."
            )
        return self.root / picture


class FeatureCollator(Collator):
    """Batches in which `pixel_values` is {expert: maps (num_images,C,h,w)}."""

    def __init__(self, processor: EagleMixProcessor, store: FeatureStore) -> None:
        super().__init__(processor)
        self.store = store

    def __call__(
        self, items: Sequence[dict[str, Any]] | Sequence[list[dict[str, Any]]]
    ) -> dict[str, Any]:
        batch = super().__call__(items)
        if "pixel_values" in batch:
            batch["pixel_values"] = self.store.gather(batch["pixel_values"])
        return batch


@torch.no_grad()
def _run(expert: VisionExpert, canvases: Tensor) -> Tensor:
    expert.eval()
    device = next(expert.parameters()).device
    return expert(expert.view(canvases.to(device)))


def _digest(expert: VisionExpert, canvas: tuple[Any, ...]) -> str:
    """Of all that determines a map, but the image."""
    weights = tensor_hashes(expert.state_dict())
    spec = expert.spec.model_dump(mode="json", exclude={"card", "name"})
    text = json.dumps([weights, spec, canvas], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"cache_features: {folder} needs {needed / 2**30:.1f} GiB for these images, but "
            f"{free / 2**30:.1f} GiB are free. Choose another `features_dir`, or leave it out."
        )
