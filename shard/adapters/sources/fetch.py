"""From a source to a local directory that holds an adapter's config and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from ...errors import AdapterRejected
from ..directory_cache import DirectoryCache
from ..files import FileLimits
from ..manifest import AdapterRequest, Snapshot, Source
from ..merging.merged import MergedAdapters
from ..merging.recipe import PartPlace
from ..progress import OnProgress, ProgressMeter
from .hub import HubFetcher
from .local import local_directory
from .retry import RetryPolicy
from .s3 import S3Fetcher


class Fetcher:
    """Resolves every kind of source."""

    def __init__(self, limits: FileLimits, retry: RetryPolicy) -> None:
        home = Path(constants.HF_HOME) / "loraplex"
        self._hub = HubFetcher(limits, retry)
        self._s3 = S3Fetcher(limits, retry, DirectoryCache(home / "s3"))
        self._merged = MergedAdapters(limits, DirectoryCache(home / "merged"))

    def fetch(
        self, request: AdapterRequest, on_progress: OnProgress, parts: Sequence[PartPlace] = ()
    ) -> Snapshot:
        """Bring the adapter to disk, blocking. `parts`: where those lie that a merged one is made of.

        `on_progress` is called at most ten times a second, and once for each file.

        Raises AdapterNotFound, AdapterRejected or AdapterFetchFailed.
        """
        if request.subfolder and request.source is not Source.HUB:
            raise AdapterRejected("only hub repositories have sub-folders; name the folder itself")
        meter = ProgressMeter(on_progress)
        match request.source:
            case Source.LOCAL:
                return Snapshot(local_directory(request.id, request.root))
            case Source.HUB:
                return self._hub.fetch(request, meter)
            case Source.S3:
                return self._s3.fetch(request, meter)
            case Source.MERGED:
                if request.merge is None:
                    raise AdapterRejected("it is to be merged, but nothing says of what")
                return Snapshot(self._merged.fetch(request.merge, parts, meter))
