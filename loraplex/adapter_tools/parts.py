"""What goes into a merge, as typed: `ADAPTER` or `ADAPTER=WEIGHT`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UNUSABLE, ToolFailed


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter's source and its weight."""

    source: str
    weight: float


def parse_part(text: str) -> Part:
    """The part that `text` says; what follows the last `=` is a weight if it is a number.

    Raises ToolFailed for a weight that is not finite.
    """
    source, _, weight = text.rpartition("=")
    try:
        part = Part(source, float(weight)) if source else Part(text, 1.0)
    except ValueError:
        return Part(text, 1.0)
    if not math.isfinite(part.weight):
        raise ToolFailed(UNUSABLE, f"{text}: a weight must be finite")
    return part
