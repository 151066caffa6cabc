"""Which tokenizer a call reads and writes with: the base's, or what its adapters ship."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final
from weakref import WeakValueDictionary

from ..proto import shard_pb2
from .client import PreparedAdapter
from .errors import AdapterRejected, InvalidRequest
from .template_process import OwnTemplate, TemplateProcess
from .tokenizer import Tokenizer
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)

MAX_KEPT: Final = 64
"""Adapters whose tokenizers are kept, the most recently used ones."""


class Tokenizers:
    """Tokenizers by the digest of the adapter that ships them, fetched once each.

    Args:
        fetch: asks a shard for what the adapter of this digest ships; an empty tokenizer or template: the
            base's.
        own: False: adapters' tokenizers and templates are not used at all.
    """

    def __init__(
        self,
        base: Tokenizer,
        fetch: Callable[[str], Awaitable[shard_pb2.TokenizerReply]],
        *,
        own: bool = True,
        most: int = MAX_KEPT,
    ) -> None:
        self.base = base
        self._fetch = fetch
        self._own = own
        self._most = most
        self._kept: OrderedDict[str, Tokenizer | AdapterRejected] = OrderedDict()
        self._loading: dict[str, asyncio.Task[Tokenizer]] = {}
        self._vocabularies: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()
        self._vocabularies[base.vocabulary.digest] = base.vocabulary
        self._templates = TemplateProcess()

    async def of(self, adapters: Sequence[PreparedAdapter], *, chat: bool, param: str) -> Tokenizer:
        """The one tokenizer of these adapters' sum. A shard is asked only where it is not known yet.

        Raises InvalidRequest where adapters bring different tokenizers or, for a `chat`, different chat
        templates; AdapterRejected for a tokenizer that cannot be read.
        """
        own = [adapter for adapter in adapters if adapter.manifest.ships_text] if self._own else []
        if not own:
            return self.base
        found = [(adapter.name, await self._get(adapter)) for adapter in own]
        words = [(name, t) for name, t in found if t.vocabulary.digest != self.base.vocabulary.digest]
        templates = [(name, t) for name, t in found if t.chat_template != self.base.chat_template]
        _check_one("tokenizers", [(name, t.vocabulary.digest) for name, t in words], param)
        if chat:
            _check_one("chat templates", [(name, t.chat_template) for name, t in templates], param)
        if len(found) == 1:
            return found[0][1]
        template = (templates or words or found)[0][1]
        return (words or found)[0][1].joined(template, [t.stop_ids for _, t in found])

    async def aclose(self) -> None:
        """End what runs for them."""
        for task in self._loading.values():
            task.cancel()
        await self._templates.aclose()

    async def _get(self, adapter: PreparedAdapter) -> Tokenizer:
        digest = adapter.manifest.digest
        kept = self._kept.get(digest)
        if kept is None:
            return await self._load_once(adapter.name, digest)
        self._kept.move_to_end(digest)
        if isinstance(kept, AdapterRejected):
            raise AdapterRejected(kept.message, param=kept.param)
        return kept

    async def _load_once(self, name: str, digest: str) -> Tokenizer:
        """One load at a time for each digest; a caller that goes away does not end it for the others."""
        task = self._loading.get(digest)
        if task is None:
            task = asyncio.create_task(self._load(name, digest))
            self._loading[digest] = task
            task.add_done_callback(lambda done: self._loaded(digest, done))
        return await asyncio.shield(task)

    def _loaded(self, digest: str, task: asyncio.Task[Tokenizer]) -> None:
        del self._loading[digest]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, AdapterRejected):
            self._keep(digest, error)
        elif error is not None:
            log.warning("the tokenizer of adapter %s was not to be had: %s", digest, error)

    async def _load(self, name: str, digest: str) -> Tokenizer:
        reply = await self._fetch(digest)
        try:
            tokenizer = await asyncio.to_thread(self.base.with_own, reply, self._vocabulary, self._template)
        except ValueError as error:
            raise AdapterRejected(
                f"Adapter {name}: the tokenizer it ships cannot be used: {error}", param="model"
            ) from error
        self._keep(digest, tokenizer)
        return tokenizer

    def _keep(self, digest: str, found: Tokenizer | AdapterRejected) -> None:
        self._kept[digest] = found
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _vocabulary(self, tokenizer_json: bytes) -> Vocabulary:
        """Equal tokenizers share one: many adapters ship their base's."""
        digest = hashlib.sha256(tokenizer_json).hexdigest()
        vocabulary = self._vocabularies.get(digest)
        if vocabulary is None:
            vocabulary = self._vocabularies[digest] = Vocabulary(tokenizer_json)
        return vocabulary

    def _template(self, source: str, special_tokens: Mapping[str, str]) -> OwnTemplate:
        return OwnTemplate(self._templates, source, special_tokens)


def _check_one(what: str, brought: list[tuple[str, str]], param: str) -> None:
    """Raises InvalidRequest if two of these (name, content) differ."""
    first = brought[0] if brought else ("", "")
    for name, content in brought:
        if content != first[1]:
            raise InvalidRequest(
                f"{first[0]} and {name} bring different {what}: a sum can be read with one only", param=param
            )
