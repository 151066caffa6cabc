"""Text to token ids and back, by the tokenizer that the shard serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import tokenizers

from ..proto import shard_pb2
from .chat_template import ChatTemplate
from .detokenizer import (
    IncrementalDetokenizer,
    PieceDecoder,
    PieceDetokenizer,
    PieceTable,
    WindowDetokenizer,
)
from .errors import InvalidRequest

_INLINE_CHARACTERS: Final = 2048
"""Up to this length a text is encoded where it stands: handing it to a thread would take longer."""
_CHAT_SECONDS: Final = 10.0


class _TokenizerFile(msgspec.Struct):
    """The part of a tokenizer.json that says how tokens become text."""

    decoder: dict[str, Any] | None = None


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What the model's generation config says of sampling; None where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Tokenizer:
    """The base model's tokenizer, chat template, stop ids and generation defaults. Immutable."""

    def __init__(
        self,
        *,
        tokenizer_json: bytes,
        chat_template: str = "",
        special_tokens: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        bos_id: int | None = None,
        generation_defaults_json: str = "",
    ) -> None:
        """Raises ValueError if the chat template or the generation defaults cannot be read."""
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = ChatTemplate(chat_template, special_tokens or {}) if chat_template else None
        self.stop_ids = frozenset(stop_ids)
        self.bos_id = bos_id
        self.generation_defaults = msgspec.json.decode(
            generation_defaults_json or "{}", type=GenerationDefaults
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        decoder = PieceDecoder.from_config(msgspec.json.decode(tokenizer_json, type=_TokenizerFile).decoder)
        self._strip = decoder.strip if decoder else ("", 0)
        self._shown_pieces = PieceTable(self._tokenizer, decoder, self._special_ids) if decoder else None
        self._all_pieces = PieceTable(self._tokenizer, decoder, frozenset()) if decoder else None
        self._longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)

    @classmethod
    def from_reply(cls, reply: shard_pb2.TokenizerReply) -> Tokenizer:
        return cls(
            tokenizer_json=reply.tokenizer_json,
            chat_template=reply.chat_template,
            special_tokens=reply.special_tokens,
            stop_ids=reply.stop_ids,
            bos_id=reply.bos_id if reply.HasField("bos_id") else None,
            generation_defaults_json=reply.generation_defaults_json,
        )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens in a text, without encoding it."""
        return len(text) // self._longest_token

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long texts are encoded in a thread."""
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to the assistant's next answer.

        Raises InvalidRequest if the model has no template, or it refuses the messages or takes too long.
        """
        text = await self.render_chat(messages)
        return await self.encode(text, add_special_tokens=False)

    async def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, special tokens included. Raises as `encode_chat`."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template: send a prompt to /v1/completions instead")
        try:
            async with asyncio.timeout(_CHAT_SECONDS):
                return await asyncio.to_thread(self._template.render, messages)
        except TimeoutError as error:
            raise InvalidRequest("the chat template takes too long over these messages") from error

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

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
