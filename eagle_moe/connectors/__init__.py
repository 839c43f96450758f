"""Connectors. One import line per file registers it."""

from eagle_moe.connectors import mlp  # noqa: F401 - registers
from eagle_moe.connectors.base import CONNECTORS, Connector

__all__ = ["CONNECTORS", "Connector"]
