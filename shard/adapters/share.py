"""What one rank of several holds of a place that adapters change: plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a base weight, and the positions on it that this rank holds."""

    size: int
    """Of the whole."""
    ranges: tuple[tuple[int, int], ...]
    """(first, last + 1), in the order in which this rank has them."""

    @property
    def held(self) -> int:
        """How many positions this rank has."""
        return sum(end - start for start, end in self.ranges)

    def positions(self, length: int) -> NDArray[np.int64]:
        """Those of an axis of `length` positions, which an adapter may have made longer or shorter than the
        base's: whoever holds the base's last position holds those beyond it."""
        ranges = [(start, min(end, length)) for start, end in self.ranges if start < length]
        if length > self.size and self.ranges[-1][1] == self.size:
            ranges.append((self.size, length))
        return np.concatenate([np.arange(*each) for each in ranges] or [np.empty(0, np.int64)])


def side_by_side(axes: tuple[Axis, ...]) -> Axis:
    """Several axes one after the other as one."""
    starts = accumulate((axis.size for axis in axes), initial=0)
    shifted = (
        (first + start, last + start)
        for start, axis in zip(starts, axes, strict=False)
        for first, last in axis.ranges
    )
    return Axis(sum(axis.size for axis in axes), tuple(shifted))


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of one base weight [out, in]."""

    outputs: Axis | None = None
    """None: all of them."""
    inputs: Axis | None = None
    """None: all of them. With a part of them, outputs are partial sums, which the ranks add up."""
    out_offset: int = 0
    """First column of the rank's outputs in what this rank makes of the site."""
    adds_bias: bool = True
    """Whether what is added once to a sum is this rank's to add."""
