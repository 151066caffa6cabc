"""Token ids to text, one at a time, without ever showing half a character.

Most tokenizers decode each token to bytes on its own and join them: byte-level BPE, and SentencePiece with
byte fallback. For those a table from id to bytes and an incremental UTF-8 decoder are exact and cheap, and
cost the same whatever a model emits. Any other decoder is run over a short window of tokens.
"""

from __future__ import annotations

import codecs
import re
from typing import Any, Final, Protocol

import tokenizers

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WINDOW_PATIENCE: Final = 8
"""Tokens after which a window that ends in U+FFFD is shown as it is: no character needs more."""


class IncrementalDetokenizer(Protocol):
    """Turns the tokens of one sequence into text."""

    def step(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        ...

    def flush(self) -> str:
        """The rest: U+FFFD for a character that will never be finished, else nothing."""
        ...


class PieceTable(dict[int, bytes]):
    """Token id to the bytes it adds to a text, filled on first use. Ids without a token add nothing."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, decoder: PieceDecoder, hidden: frozenset[int]
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._hidden = hidden

    def __missing__(self, token: int) -> bytes:
        text = None if token in self._hidden else self._tokenizer.id_to_token(token)
        piece = b"" if text is None else self._decoder.piece(text)
        self[token] = piece
        return piece


class PieceDecoder:
    """A tokenizer's decoder that works token by token.

    Args:
        byte_level: tokens spell bytes in GPT-2's alphabet.
        replacements: applied to each token, in order.
        byte_fallback: tokens such as `<0x0A>` stand for one byte.
        strip: the character, and how many of it at most, taken from the start of the whole text.
    """

    def __init__(
        self,
        *,
        byte_level: bool = False,
        replacements: tuple[tuple[str, str], ...] = (),
        byte_fallback: bool = False,
        strip: tuple[str, int] = ("", 0),
    ) -> None:
        self._alphabet = _byte_alphabet() if byte_level else None
        self._replacements = replacements
        self._byte_fallback = byte_fallback
        self.strip = strip

    @classmethod
    def from_config(cls, config: dict[str, Any] | None) -> PieceDecoder | None:
        """From the `decoder` of a tokenizer.json; None if that decoder looks beyond single tokens."""
        if config is None:
            return None
        steps = config["decoders"] if config["type"] == "Sequence" else [config]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(byte_level=True)
        replacements: list[tuple[str, str]] = []
        byte_fallback = fused = False
        strip = ("", 0)
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                    replacements.append((old, new))
                case {"type": "ByteFallback"} if not fused:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": content, "start": start, "stop": 0} if (
                    fused and not strip[1]
                ):
                    strip = (content, start)
                case _:
                    return None
        if not fused:
            return None
        return cls(replacements=tuple(replacements), byte_fallback=byte_fallback, strip=strip)

    def piece(self, token: str) -> bytes:
        """The bytes that a token adds to a text."""
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[character] for character in token])
            except KeyError:
                return token.encode()
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


class PieceDetokenizer:
    """By table.

    Equal to the tokenizer's own decoding, but in one case where that cannot be streamed: of a run of
    byte-fallback tokens that is not UTF-8 throughout, the library drops the valid characters too.
    """

    __slots__ = ("_decode", "_pieces", "_strip", "_strip_left")

    def __init__(self, pieces: PieceTable, strip: tuple[str, int]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip, self._strip_left = strip

    def step(self, token: int) -> str:
        text = self._decode(self._pieces[token])
        return self._lead(text) if self._strip_left else text

    def flush(self) -> str:
        return self._decode(b"", True)

    def _lead(self, text: str) -> str:
        while text and self._strip_left:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class WindowDetokenizer:
    """By decoding the tokens since the last full character, with the ones before them for context."""

    __slots__ = ("_context", "_shown", "_skip_special", "_tokenizer", "_window")

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._window: list[int] = []
        self._context = 0
        self._shown = ""

    def step(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        if text.endswith("\ufffd") and len(self._window) - self._context < _WINDOW_PATIENCE:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special)

    def _advance(self, text: str) -> str:
        """Make the newest tokens the context of the next ones, and return what they added."""
        added = text[len(self._shown) :]
        if added:
            del self._window[: self._context]
            self._context = len(self._window)
            self._shown = self._decode()
        return added


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + position): byte for position, byte in enumerate(others)})
    return alphabet
