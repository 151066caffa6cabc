"""Where an adapter may come from, and what a request may name."""

from __future__ import annotations

import enum
import fnmatch
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import AdapterNotFound, InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9._:/@+~-]{1,512}")
_SEGMENT = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(
    rf"(?P<id>{_SEGMENT}/{_SEGMENT})(/(?P<subfolder>{_SEGMENT}(/{_SEGMENT}){{0,7}}))?"
    r"(@(?P<revision>[\w./-]{1,128}))?",
    re.ASCII,
)
_S3_ID = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[A-Za-z0-9._:@+~-]+)+)")
_S3_SCHEME = "s3://"


class SourceKind(enum.Enum):
    HUB = "hub"
    LOCAL = "local"
    S3 = "s3"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter's files lie."""

    kind: SourceKind
    id: str
    """A hub repository, a directory as an absolute path, or `s3://bucket/prefix`."""
    revision: str = ""
    """Of a hub repository; empty: its main one."""
    subfolder: str = ""
    """Of a hub repository, such as `checkpoint-100`; empty: its top level."""
    root: str = field(default="", compare=False)
    """The directory below which a local adapter's files must lie; empty: anywhere, as the operator said."""

    def __str__(self) -> str:
        if self.kind is SourceKind.S3:
            return self.id
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.kind.value}:{self.id}{subfolder}{revision}"


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
    """A source from the command line, where a directory may lie anywhere. ValueError if it is none."""
    kind, rest = _split(text)
    if kind in ("", "local") and Path(rest).expanduser().is_dir():
        return Source(SourceKind.LOCAL, str(Path(rest).expanduser().resolve()))
    source = _remote(kind, rest)
    if source is None:
        raise ValueError(
            f"adapter source {text!r} is neither a directory, nor a hub id such as org/name, "
            "nor an S3 address such as s3://bucket/prefix"
        )
    return source


class SourcePolicy:
    """What requests may name: repositories and S3 prefixes that match a pattern, directories below a root.

    Args:
        roots: directories; a request's directory must resolve to one strictly below, and so must its files.
        patterns: such as `hub:my-org/*` or `s3:my-bucket/adapters/*`. A `local:` pattern narrows the roots
            further.
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
        if kind not in ("", "hub", "local", "s3"):
            raise InvalidRequest("An adapter's source must be hub, local or s3.", param="adapter_source")
        if kind == "local" or (not kind and rest.startswith("/")):
            return self._directory(text, rest)
        source = _remote(kind, rest)
        if source is None or not self._allows(_address(source)):
            raise adapter_not_found(text)
        return source

    def _allows(self, address: str) -> bool:
        return any(fnmatch.fnmatchcase(address, pattern) for pattern in self._patterns)

    def _directory(self, text: str, rest: str) -> Source:
        for root in self._roots:
            path = Path(os.path.realpath(root / rest))
            if path != root and path.is_relative_to(root) and path.is_dir() and self._local_allowed(path):
                return Source(SourceKind.LOCAL, str(path), root=str(root))
        raise adapter_not_found(text)

    def _local_allowed(self, path: Path) -> bool:
        narrowed = any(pattern.startswith("local:") for pattern in self._patterns)
        return not narrowed or self._allows(f"local:{path}")


def _split(text: str) -> tuple[str, str]:
    """("hub", "org/name") of "hub:org/name"; ("s3", "s3://…") of "s3://…"; ("", text) otherwise."""
    if text.startswith(_S3_SCHEME):
        return SourceKind.S3.value, text
    for kind in SourceKind:
        if text.startswith(f"{kind.value}:"):
            return kind.value, text[len(kind.value) + 1 :]
    return "", text


def _remote(kind: str, text: str) -> Source | None:
    """The hub repository or S3 prefix that `text` names, if it is one of this kind (empty: a repository)."""
    if ".." in text:
        return None
    if kind == SourceKind.S3.value:
        address = text if text.startswith(_S3_SCHEME) else _S3_SCHEME + text
        s3 = _S3_ID.fullmatch(address)
        return Source(SourceKind.S3, address) if s3 and "." not in s3["prefix"].split("/") else None
    if kind in ("", SourceKind.HUB.value) and (hub := _HUB_ID.fullmatch(text)):
        return Source(SourceKind.HUB, hub["id"], hub["revision"] or "", hub["subfolder"] or "")
    return None


def _address(source: Source) -> str:
    """What patterns are compared with: `hub:org/name` or `s3:bucket/prefix`."""
    return f"{source.kind.value}:{source.id.removeprefix(_S3_SCHEME)}"
