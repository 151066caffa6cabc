"""A tokenizer.json at work: text to token ids, token ids to bytes and text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import tokenizers

from .detokenizer import (
    IncrementalDetokenizer,
    PieceDecoder,
    PieceDetokenizer,
    PieceTable,
    WindowDetokenizer,
)
from .errors import InvalidRequest

_PANIC = "PanicException"


class _TokenizerFile(msgspec.Struct):
    """The part of a tokenizer.json that says how tokens become text."""

    decoder: dict[str, Any] | None = None


class Vocabulary:
    """Immutable; may be shared by tokenizers that differ in other things."""

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises ValueError if it is no tokenizer."""
        self.digest = hashlib.sha256(tokenizer_json).hexdigest()
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        decoder = PieceDecoder.from_config(msgspec.json.decode(tokenizer_json, type=_TokenizerFile).decoder)
        self._strip = decoder.strip if decoder else ("", 0)
        self._shown_pieces = PieceTable(self._tokenizer, decoder, self._special_ids) if decoder else None
        self._all_pieces = PieceTable(self._tokenizer, decoder, frozenset()) if decoder else None
        self._longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens in a text, without encoding it."""
        return len(text) // self._longest_token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises InvalidRequest for a text on which an expression of the tokenizer runs away."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            # The library panics then, with an exception that is no Exception and has no importable type.
            if type(error).__name__ != _PANIC:
                raise
            raise InvalidRequest(
                "the tokenizer cannot split this text: one of its expressions runs away on it; "
                "send other text, or token ids"
            ) from error

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh detokenizer for one sequence."""
        pieces = self._shown_pieces if skip_special_tokens else self._all_pieces
        if pieces is None:
            return WindowDetokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens)
        return PieceDetokenizer(pieces, self._strip)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; special tokens stand for their own name."""
        if self._all_pieces is None or token in self._special_ids:
            return (self._tokenizer.id_to_token(token) or "").encode()
        return self._all_pieces[token]

    def token_text(self, token: int) -> str:
        """A token as text; bytes that are no text as `bytes:\\xe2\\x82`, so that none look the same."""
        piece = self.token_bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
