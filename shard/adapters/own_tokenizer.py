"""The tokenizer and chat template that an adapter ships, read from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from ..errors import AdapterRejected
from .files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, FileLimits, is_regular, read_regular


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of a tokenizer.json that says which id a special token has."""

    added_tokens: list[_AddedToken] = []


class _TokenizerConfig(msgspec.Struct):
    """The part of a tokenizer_config.json that is used; a token is a text or an object with `content`."""

    chat_template: Any = None
    bos_token: Any = None
    eos_token: Any = None
    unk_token: Any = None
    pad_token: Any = None


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """What an adapter brings along. The empty parts are the base's."""

    tokenizer_json: bytes = b""
    chat_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None


def read_own_tokenizer(directory: Path, limits: FileLimits) -> OwnTokenizer:
    """Read the companions of an adapter. Raises AdapterRejected where one cannot be read as what it is."""
    config = _decode(_read(directory, TOKENIZER_CONFIG, limits) or b"{}", _TokenizerConfig, TOKENIZER_CONFIG)
    template = _read(directory, CHAT_TEMPLATE, limits).decode("utf-8", "replace")
    tokenizer = _read(directory, TOKENIZER, limits)
    special = _special_tokens(config)
    added = _decode(tokenizer or b"{}", _TokenizerFile, TOKENIZER).added_tokens
    ids = {token.content: token.id for token in added}
    eos = ids.get(special.get("eos_token", ""))
    return OwnTokenizer(
        tokenizer_json=tokenizer,
        chat_template=template or _template(config.chat_template),
        special_tokens=special,
        stop_ids=() if eos is None else (eos,),
        bos_id=ids.get(special.get("bos_token", "")),
    )


class BaseText(msgspec.Struct, frozen=True):
    """The base's own tokenizer and chat template, which most adapters merely repeat."""

    tokenizer_json: bytes = b""
    chat_template: str = ""


class TextComparison:
    """Tells what an adapter ships that differs from the base's."""

    def __init__(self, base: BaseText, limits: FileLimits) -> None:
        self._base = base
        self._limits = limits

    def differs(self, directory: Path) -> tuple[bool, bool]:
        """Whether an adapter's tokenizer, and its chat template, is there and is not the base's.

        Raises AdapterRejected where one cannot be read as what it is.
        """
        own = read_own_tokenizer(directory, self._limits)
        tokenizer = bool(own.tokenizer_json) and _content(own.tokenizer_json) != self._base_content
        return tokenizer, bool(own.chat_template) and own.chat_template != self._base.chat_template

    @cached_property
    def _base_content(self) -> Any:
        return _content(self._base.tokenizer_json or b"{}")


def _content(tokenizer_json: bytes) -> Any:
    """What of a tokenizer.json decides which ids a text has. Padding and truncation are each caller's own."""
    content = _decode(tokenizer_json, dict[str, Any], TOKENIZER)
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def _read(directory: Path, name: str, limits: FileLimits) -> bytes:
    path = directory / name
    return bytes(read_regular(path, limits.of(name))) if is_regular(path) else b""


def _decode(data: bytes, kind: Any, name: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterRejected(f"its {name} cannot be read: {error}; correct or remove it") from error


def _special_tokens(config: _TokenizerConfig) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = getattr(config, name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _template(value: Any) -> str:
    """A chat template, or the default one of several named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
