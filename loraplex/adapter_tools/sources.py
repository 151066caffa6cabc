"""From what a user types to an adapter's directory on this machine."""

from __future__ import annotations

import logging
import os

from ..router.sources import trusted_source
from .errors import UNUSABLE, ToolFailed, reported
from .progress import download_bar

# Xet transfers bypass plain HTTP, and with it the proxies and mirrors that HF_ENDPOINT may name.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from huggingface_hub.utils import logging as hub_logging

from ..shard.adapters.files import FileLimits
from ..shard.adapters.manifest import AdapterRequest, Snapshot, Source
from ..shard.adapters.sources.fetch import Fetcher
from ..shard.adapters.sources.retry import RetryPolicy


def bring(text: str) -> Snapshot:
    """The adapter that `text` names, fetched if it is not on disk: a directory, a hub id or an S3 address.

    Raises ToolFailed where it names none or cannot be had.
    """
    try:
        source = trusted_source(text)
    except ValueError as error:
        raise ToolFailed(UNUSABLE, str(error)) from error
    hub_logging.set_verbosity(logging.ERROR)  # its warnings show signed addresses
    request = AdapterRequest(
        Source(source.kind.value), source.id, revision=source.revision, subfolder=source.subfolder
    )
    with reported(text), download_bar(text) as report:
        return Fetcher(FileLimits(), RetryPolicy()).fetch(request, report)
