"""What is asked for, and what comes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from .changes import Traits
from .merging.recipe import MergeRequest


class Source(StrEnum):
    """Where an adapter comes from."""

    HUB = "hub"
    LOCAL = "local"
    S3 = "s3"
    MERGED = "merged"


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """One adapter to fetch, verify and parse."""

    source: Source
    id: str
    """A hub repository, a directory, `s3://bucket/prefix`, or a merged adapter's name."""
    revision: str = ""
    """A commit or a moving name; empty: the source's default."""
    token: str = field(default="", repr=False)
    """The caller's own hub token; empty: the environment's."""
    expect_digest: str = ""
    """The digest to arrive at; empty: any."""
    subfolder: str = ""
    """Of a hub repository; empty: its top level."""
    root: str = ""
    """The directory below which a local adapter's files must lie; empty: they may be links to anywhere."""
    merge: MergeRequest | None = None
    """What a merged adapter is made of."""

    def key(self) -> tuple[str, ...]:
        """Equal for requests that one fetch can answer. Holds no secret."""
        token_hash = hashlib.sha256(self.token.encode()).hexdigest() if self.token else ""
        merge = self.merge.key() if self.merge is not None else ""
        return (self.source, self.id, self.revision, token_hash, self.subfolder, self.root, merge)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An adapter's files on disk, as one fetch left them."""

    directory: Path
    revision: str = ""
    """The commit, or what stands for one; empty where the source has none."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A fetched adapter, as the contract's AdapterManifest describes it."""

    digest: str
    """SHA-256 over config and weights: the adapter's version."""
    revision: str
    """The commit that was fetched; empty where the source has none."""
    rank_bytes: tuple[int, ...]
    """Device bytes on each tensor-parallel rank."""
    max_rank: int
    modules: int
    """Base modules that the adapter changes."""
    traits: Traits
    own_tokenizer: bool
    own_chat_template: bool
