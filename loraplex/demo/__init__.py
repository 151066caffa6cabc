"""The bundled model and adapters, and the command that shows them working."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .tasks import TASKS

MODEL_DIR = Path(__file__).resolve().parent / "model"
ADAPTERS: Mapping[str, Path] = MappingProxyType(
    {name: Path(__file__).resolve().parent / "adapters" / name for name in TASKS}
)
"""Adapter name -> directory. The names are those of `tasks.TASKS`."""
