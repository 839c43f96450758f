"""Conversations on disk -> batches. `doctor` examines data before it is trained on."""

from train.data.collator import NOT_FOR_THE_MODEL, Collator
from train.data.dataset import ConversationDataset, DataSpec
from train.data.mixture import MixtureDataset, build_dataset
from train.data.packing import PackedDataset, check_keeps_apart
from train.data.sampler import EpochSampler, order_of
from train.data.supervision import Supervision, check_supervision

__all__ = [
    "NOT_FOR_THE_MODEL",
    "Collator",
    "ConversationDataset",
    "DataSpec",
    "EpochSampler",
    "MixtureDataset",
    "PackedDataset",
    "Supervision",
    "build_dataset",
    "check_keeps_apart",
    "check_supervision",
    "order_of",
]
