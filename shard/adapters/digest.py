"""Content digests: the version of an adapter."""

from __future__ import annotations

import hashlib

_DOMAIN = b"loraplex adapter 1\0"


def adapter_digest(config: bytes, weights: memoryview) -> str:
    """SHA-256 over the bytes of the config and of the weights file, as 64 hex digits."""
    parts = hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()
    return hashlib.sha256(_DOMAIN + parts).hexdigest()
