"""What `loraplex doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    fatal: bool = False
    """Serving is impossible until it is mended."""
    bars_cuda: bool = False
    """Serving on a GPU is."""
