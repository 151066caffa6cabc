"""What is asked for, and what comes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum


class Source(StrEnum):
    """Where an adapter comes from."""

    HUB = "hub"
    LOCAL = "local"
    S3 = "s3"


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """One adapter to fetch, verify and parse."""

    source: Source
    id: str
    """A hub repository or a directory."""
    revision: str = ""
    """A commit or a moving name; empty: the source's default."""
    token: str = field(default="", repr=False)
    """The caller's own hub token; empty: the environment's."""
    expect_digest: str = ""
    """The digest to arrive at; empty: any."""

    def key(self) -> tuple[str, ...]:
        """Equal for requests that one fetch can answer. Holds no secret."""
        token_hash = hashlib.sha256(self.token.encode()).hexdigest() if self.token else ""
        return (self.source, self.id, self.revision, token_hash)


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
    """Base linears that the adapter changes."""
    warnings: tuple[str, ...]
    own_tokenizer: bool
    own_chat_template: bool
