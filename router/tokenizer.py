"""Text and conversations to token ids and back, by what the shard serves of a model or an adapter."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from ..proto import shard_pb2
from .chat_template import ChatTemplate
from .detokenizer import IncrementalDetokenizer
from .errors import InvalidRequest
from .vocabulary import Vocabulary

_INLINE_CHARACTERS: Final = 2048
"""Up to this length a text is encoded where it stands: handing it to a thread would take longer."""
_CHAT_SECONDS: Final = 10.0


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What the model's generation config says of sampling; None where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Template(Protocol):
    """Messages to prompt text. Raises InvalidRequest if it refuses them or takes too long."""

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> str: ...


class _BaseTemplate:
    """The base's own template, which the operator chose with it: rendered in a thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ValueError if it does not compile."""
        self._template = ChatTemplate(source, special_tokens)

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            async with asyncio.timeout(_CHAT_SECONDS):
                return await asyncio.to_thread(self._template.render, messages)
        except TimeoutError as error:
            raise InvalidRequest("the chat template takes too long over these messages") from error


class Tokenizer:
    """A vocabulary, a chat template, stop ids and generation defaults. Immutable."""

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
        """Raises ValueError if any of it cannot be read."""
        self.vocabulary = Vocabulary(tokenizer_json)
        self.chat_template = chat_template
        self.stop_ids = frozenset(stop_ids)
        self.bos_id = bos_id
        self.generation_defaults = msgspec.json.decode(
            generation_defaults_json or "{}", type=GenerationDefaults
        )
        self._special_tokens = dict(special_tokens or {})
        self._template: Template | None = None
        if chat_template:
            self._template = _BaseTemplate(chat_template, self._special_tokens)

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

    def with_own(
        self,
        reply: shard_pb2.TokenizerReply,
        vocabulary: Callable[[bytes], Vocabulary],
        template: Callable[[str, Mapping[str, str]], Template],
    ) -> Tokenizer:
        """This one, the base's, with what an adapter ships in its place; stop ids are those of both.

        Args:
            vocabulary: makes one of a tokenizer.json; raises ValueError, as this does, for what is none.
            template: makes one of a source and special tokens.
        """
        own = copy.copy(self)
        own.stop_ids = self.stop_ids | frozenset(reply.stop_ids)
        if reply.tokenizer_json:
            own.vocabulary = vocabulary(reply.tokenizer_json)
            own.bos_id = reply.bos_id if reply.HasField("bos_id") else self.bos_id
            own._special_tokens = self._special_tokens | dict(reply.special_tokens)
        if reply.chat_template not in ("", self.chat_template):
            own.chat_template = reply.chat_template
            own._template = template(own.chat_template, own._special_tokens)
        elif self.chat_template:
            own._template = _BaseTemplate(self.chat_template, own._special_tokens)
        return own

    def joined(self, template: Tokenizer, stop_ids: Iterable[Iterable[int]]) -> Tokenizer:
        """This one's vocabulary, another one's chat template, and all of these stop ids."""
        joined = copy.copy(self)
        joined.stop_ids = self.stop_ids.union(*stop_ids)
        joined.chat_template, joined._template = template.chat_template, template._template
        return joined

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens in a text, without encoding it."""
        return self.vocabulary.fewest_tokens(text)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; long texts are encoded in a thread."""
        encode = self.vocabulary.encode
        if len(text) <= _INLINE_CHARACTERS:
            return encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

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
        return await self._template.render(messages)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self.vocabulary.decode(tokens, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh detokenizer for one sequence."""
        return self.vocabulary.detokenizer(skip_special_tokens=skip_special_tokens)

    def is_special(self, token: int) -> bool:
        return self.vocabulary.is_special(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; special tokens stand for their own name."""
        return self.vocabulary.token_bytes(token)

    def token_text(self, token: int) -> str:
        """A token as text; bytes that are no text as `bytes:\\xe2\\x82`, so that none look the same."""
        return self.vocabulary.token_text(token)
