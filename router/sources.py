"""Where an adapter may come from, and what a request may name."""

from __future__ import annotations

import enum
import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import AdapterNotFound, InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9._:/@+~-]{1,512}")
_HUB_ID = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,128}))?", re.ASCII
)


class SourceKind(enum.Enum):
    HUB = "hub"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Source:
    """A hub repository at a revision (empty: its main one), or a directory as an absolute path."""

    kind: SourceKind
    id: str
    revision: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.kind.value}:{self.id}{revision}"


def adapter_not_found(name: str) -> AdapterNotFound:
    """The one answer for unknown and for forbidden."""
    shown = name if _NAME.fullmatch(name) else ascii(name[:64])
    return AdapterNotFound(f"The model or adapter {shown} does not exist.", param="model")


def check_name(name: str) -> None:
    """InvalidRequest unless `name` can be an adapter's registered name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            "An adapter's name may hold letters, digits and . _ : / @ + ~ - only, without '..'.",
            param="lora_name",
        )


def trusted_source(text: str) -> Source:
    """A source from the command line, where a directory may lie anywhere. ValueError if it is neither."""
    kind, text = _split(text)
    if kind in ("", "local") and Path(text).expanduser().is_dir():
        return Source(SourceKind.LOCAL, str(Path(text).expanduser().resolve()))
    hub = _HUB_ID.fullmatch(text)
    if kind in ("", "hub") and hub and ".." not in text:
        return Source(SourceKind.HUB, hub["id"], hub["revision"] or "")
    raise ValueError(f"adapter source {text!r} is neither a directory nor a hub id such as org/name")


class SourcePolicy:
    """What requests may name: hub repositories that match a pattern, directories below a root.

    Args:
        roots: directories; a request's directory must resolve to one strictly below.
        patterns: such as `hub:my-org/*`. A `local:` pattern narrows the roots further.
    """

    def __init__(self, roots: tuple[str, ...], patterns: tuple[str, ...]) -> None:
        self._roots = tuple(Path(root).expanduser().resolve() for root in roots)
        self._patterns = patterns

    def requested(self, text: str, kind: str = "") -> Source:
        """The source that a request names, as `text` says or `kind` insists.

        Raises:
            InvalidRequest: `kind` is no kind of source.
            AdapterNotFound: unknown, malformed and forbidden alike.
        """
        if not _NAME.fullmatch(text) or ".." in text:
            raise adapter_not_found(text)
        said, rest = _split(text)
        kind = kind or said
        if kind == "s3":
            raise AdapterNotFound(
                "Adapters from S3 are not served yet; use a hub id or a directory.", param="model"
            )
        if kind not in ("", "hub", "local"):
            raise InvalidRequest("An adapter's source must be hub or local.", param="adapter_source")
        if kind == "local" or (not kind and rest.startswith("/")):
            return self._directory(text, rest)
        return self._hub(text, rest)

    def _hub(self, text: str, rest: str) -> Source:
        hub = _HUB_ID.fullmatch(rest)
        if not hub or not any(fnmatch.fnmatchcase(f"hub:{hub['id']}", pattern) for pattern in self._patterns):
            raise adapter_not_found(text)
        return Source(SourceKind.HUB, hub["id"], hub["revision"] or "")

    def _directory(self, text: str, rest: str) -> Source:
        for root in self._roots:
            path = Path(os.path.realpath(root / rest))
            if path != root and path.is_relative_to(root) and path.is_dir() and self._local_allowed(path):
                return Source(SourceKind.LOCAL, str(path))
        raise adapter_not_found(text)

    def _local_allowed(self, path: Path) -> bool:
        patterns = [pattern for pattern in self._patterns if pattern.startswith("local:")]
        return not patterns or any(fnmatch.fnmatchcase(f"local:{path}", pattern) for pattern in patterns)


def _split(text: str) -> tuple[str, str]:
    """("hub", "org/name") of "hub:org/name"; ("s3", …) of "s3://…"; ("", text) otherwise."""
    if text.startswith("s3://"):
        return "s3", text
    for kind in SourceKind:
        if text.startswith(f"{kind.value}:"):
            return kind.value, text[len(kind.value) + 1 :]
    return "", text
