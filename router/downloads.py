"""What the shards are asked to fetch so that a version is on disk: one thing, or a merge after its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..proto import shard_pb2
from .merges import Merge, MergePart
from .sources import Source, SourceKind
from .versions import Adapter

_Request = shard_pb2.DownloadAdapterRequest

_KINDS = {SourceKind.HUB: _Request.HUB, SourceKind.LOCAL: _Request.LOCAL, SourceKind.S3: _Request.S3}


@dataclass(frozen=True, slots=True)
class Download:
    """`part`: the name of the part that it fetches for a merge; empty: the adapter itself."""

    request: shard_pb2.DownloadAdapterRequest
    part: str = ""


def downloads_of(adapter: Adapter, on_disk: Callable[[], set[str]]) -> list[Download]:
    """In order, the last one for the adapter itself. A version whose bytes are known must get them again.

    `on_disk`: digests that need no fetch.
    """
    manifest = adapter.manifest
    digest, revision = (manifest.digest, manifest.revision) if manifest else ("", "")
    if isinstance(adapter.source, Merge):
        request = _merge(adapter.name, adapter.source, digest)
        return [*_parts(adapter.source, on_disk()), Download(request)]
    return [Download(_fetch(adapter.source, digest, revision, adapter.token))]


def _parts(merge: Merge, done: set[str]) -> list[Download]:
    """What is missing of a merge's parts, each once. `done` gets what they will have put on disk."""
    downloads: list[Download] = []
    for part in merge.parts:
        if part.digest in done:
            continue
        done.add(part.digest)
        if isinstance(part.source, Merge):
            downloads += _parts(part.source, done)
        downloads.append(Download(_part(part), part.name))
    return downloads


def _part(part: MergePart) -> shard_pb2.DownloadAdapterRequest:
    if isinstance(part.source, Merge):
        return _merge(part.name, part.source, part.digest)
    return _fetch(part.source, part.digest, part.revision, part.token)


def _fetch(source: Source, digest: str, revision: str, token: str) -> shard_pb2.DownloadAdapterRequest:
    return _Request(
        source=_KINDS[source.kind],
        id=source.id,
        revision=revision or source.revision,
        token=token,
        expect_digest=digest,
        subfolder=source.subfolder,
        root=source.root,
    )


def _merge(name: str, merge: Merge, digest: str) -> shard_pb2.DownloadAdapterRequest:
    recipe = merge.recipe
    return _Request(
        source=_Request.MERGED,
        id=name,
        expect_digest=digest,
        merge=shard_pb2.MergeRecipe(
            parts=[shard_pb2.MergeRecipe.Part(digest=p.digest, weight=p.weight) for p in merge.parts],
            method=recipe.method,
            density=recipe.density,
            majority_sign_method=recipe.majority_sign_method,
            seed=recipe.seed,
            rank=recipe.rank,
        ),
    )
