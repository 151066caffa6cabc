"""API keys: who is calling, and which adapters they may name."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from .errors import Unauthenticated
from .sources import adapter_not_found


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request. No globs: every adapter may be named."""

    tenant: str = ""
    adapters: tuple[str, ...] = ()

    def may_name(self, adapter: str) -> bool:
        return not self.adapters or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def require(self, adapter: str) -> None:
        """Raises AdapterNotFound for an adapter that this caller may not name, as if there were none."""
        if not self.may_name(adapter):
            raise adapter_not_found(adapter)


_ANYONE: Final = Caller()


class ApiKeys:
    """The keys of an --api-key-file, kept as hashes. Without keys everybody is let in as tenant ""."""

    def __init__(self, callers: dict[bytes, Caller] | None = None) -> None:
        """`callers`: by the SHA-256 of their key; None: no key is needed."""
        self._callers = callers

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """Read lines `key tenant [adapter globs]`; blank lines and lines that begin with # are skipped.

        Raises ValueError naming the line, never the key, if one is malformed or repeated, or there is none.
        """
        callers: dict[bytes, Caller] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, *rest = line.split()
            if not rest:
                raise ValueError(f"{path}, line {number}: expected `key tenant [adapter globs]`")
            digest = _digest(key)
            if digest in callers:
                raise ValueError(f"{path}, line {number}: this key was given before")
            callers[digest] = Caller(rest[0], tuple(rest[1:]))
        if not callers:
            raise ValueError(f"{path}: no key in it, so nobody could call; leave the file out to need no key")
        return cls(callers)

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises Unauthenticated, which does not tell why."""
        if self._callers is None:
            return _ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        found = None
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None or scheme.lower() != "bearer":
            raise Unauthenticated("A valid API key is needed: send the header `Authorization: Bearer KEY`.")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
