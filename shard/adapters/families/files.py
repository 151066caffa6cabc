"""What every family's reader is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..base_weights import BaseWeights
from ..changes import ParsedAdapter
from ..layout import AdapterLayout
from ..tensors import Tensors


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One adapter's files, and the base that it is for."""

    config: Mapping[str, Any]
    """`adapter_config.json`, decoded: a JSON object."""
    tensors: Tensors
    """At least one."""
    layout: AdapterLayout
    base: BaseWeights


Reader = Callable[[AdapterFiles], ParsedAdapter]
"""Reads one family. Raises AdapterRejected unless every tensor has its place; reads no values before a change
is built, unless they decide where something belongs."""
