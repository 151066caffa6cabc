"""Merged adapters on this host: made once, then found by what they are made of."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from ..directory_cache import DirectoryCache
from ..files import FileLimits
from ..progress import ProgressMeter
from .merge import MergeInput, merge_adapters
from .recipe import MergeRequest, PartPlace


class MergedAdapters:
    """Makes merges, one at a time, which bounds their memory, into a cache of directories."""

    def __init__(self, limits: FileLimits, cache: DirectoryCache) -> None:
        self._limits = limits
        self._cache = cache
        self._merging = threading.Lock()

    def fetch(self, merge: MergeRequest, places: Sequence[PartPlace], meter: ProgressMeter) -> Path:
        """The directory of a merge; `places` says where its parts lie, in order.

        Raises AdapterRejected where they cannot be merged or have changed, AdapterFetchFailed where the
        result cannot be written.
        """
        inputs = [
            MergeInput(Path(place.directory), part.weight, place.name, part.digest)
            for part, place in zip(merge.parts, places, strict=True)
        ]

        def report(size: int, total: int) -> None:
            meter.total = total
            meter.advance(size)

        def fill(directory: Path) -> None:
            merge_adapters(inputs, merge.recipe, directory, self._limits, report)
            meter.finish_file(meter.total)

        key = merge.key()
        with self._merging:
            return self._cache.find(key) or self._cache.put(key, fill)
