"""Whose tokenizer and chat template a call is read with."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tokenizers import AddedToken

from loraplex.proto import shard_pb2
from loraplex.router.client import Manifest, PreparedAdapter
from loraplex.router.errors import AdapterRejected, InvalidRequest, ShardLost
from loraplex.router.tokenizer import Tokenizer
from loraplex.router.tokenizers import Tokenizers

from .conftest import CHAT_TEMPLATE, byte_level_library_tokenizer

Make = Callable[..., Tokenizers]
BASE_JSON = byte_level_library_tokenizer().to_str().encode()
OWN_ID = byte_level_library_tokenizer().get_vocab_size()
"""Of the one token that an own tokenizer has more."""
OWN_TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def own_json(token: str = "<tool>") -> bytes:
    """The base's tokenizer with one more token."""
    library = byte_level_library_tokenizer()
    library.add_tokens([AddedToken(token)])
    return library.to_str().encode()


class Shard:
    """Answers what adapters ship, and counts how often it is asked."""

    def __init__(self, **replies: shard_pb2.TokenizerReply) -> None:
        self.replies = replies
        self.asked: list[str] = []
        self.error: ShardLost | None = None

    async def __call__(self, digest: str) -> shard_pb2.TokenizerReply:
        self.asked.append(digest)
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        return self.replies[digest]


def reply(**fields: object) -> shard_pb2.TokenizerReply:
    return shard_pb2.TokenizerReply(**fields)  # type: ignore[arg-type]


def adapter(name: str, *, tokenizer: bool = True, template: bool = False) -> PreparedAdapter:
    manifest = Manifest(digest=name, own_tokenizer=tokenizer, own_chat_template=template)
    return PreparedAdapter(name, f"{name}#1", 1.0, manifest)


@pytest.fixture
def base() -> Tokenizer:
    return Tokenizer(
        tokenizer_json=BASE_JSON,
        chat_template=CHAT_TEMPLATE,
        special_tokens={"eos_token": "<|end|>"},
        stop_ids=[0],
        bos_id=1,
        generation_defaults_json='{"temperature": 0.5}',
    )


@pytest.fixture
async def made(base: Tokenizer) -> AsyncIterator[Make]:
    """Makes `Tokenizers` on the base, and closes them."""
    async with AsyncExitStack() as stack:

        def make(shard: Shard, base: Tokenizer = base, **options: Any) -> Tokenizers:
            tokenizers = Tokenizers(base, shard, **options)
            stack.push_async_callback(tokenizers.aclose)
            return tokenizers

        yield make


async def of(tokenizers: Tokenizers, *adapters: PreparedAdapter, chat: bool = False) -> Tokenizer:
    return await tokenizers.of(adapters, chat=chat, param="adapters")


async def test_plain_adapters_are_read_with_the_base(base: Tokenizer, made: Make) -> None:
    shard = Shard()
    tokenizers = made(shard)
    assert await of(tokenizers) is base
    assert await of(tokenizers, adapter("a", tokenizer=False), adapter("b", tokenizer=False)) is base
    assert shard.asked == []


async def test_switched_off_the_base_serves_always(base: Tokenizer, made: Make) -> None:
    shard = Shard(a=reply(tokenizer_json=own_json()))
    assert await of(made(shard, own=False), adapter("a", template=True)) is base
    assert shard.asked == []


async def test_an_own_tokenizer_is_fetched_once_and_used(base: Tokenizer, made: Make) -> None:
    shard = Shard(
        a=reply(tokenizer_json=own_json(), stop_ids=[OWN_ID], generation_defaults_json='{"top_k": 3}')
    )
    tokenizers = made(shard)
    first, second = await asyncio.gather(of(tokenizers, adapter("a")), of(tokenizers, adapter("a")))
    assert first is second is await of(tokenizers, adapter("a"), adapter("b", tokenizer=False))
    assert shard.asked == ["a"]
    assert await first.encode("<tool>") == [OWN_ID]
    assert len(await base.encode("<tool>")) > 1
    assert first.decode([OWN_ID]) == "<tool>"
    assert first.stop_ids == {0, OWN_ID}
    assert base.stop_ids == {0}
    assert first.generation_defaults == base.generation_defaults
    assert first.bos_id == 1
    assert await first.render_chat([{"role": "user", "content": "x"}]) == "<|user|>x\n<|assistant|>"


async def test_an_empty_part_of_the_reply_means_the_bases(base: Tokenizer, made: Make) -> None:
    tokenizers = made(Shard(a=reply(chat_template=OWN_TEMPLATE)))
    own = await of(tokenizers, adapter("a", tokenizer=False, template=True))
    assert own.vocabulary is base.vocabulary
    assert await own.render_chat([{"role": "user", "content": "x"}]) == "[x]"
    assert own.stop_ids == base.stop_ids


async def test_special_tokens_of_an_own_tokenizer_reach_the_bases_template(
    base: Tokenizer, made: Make
) -> None:
    with_eos = Tokenizer(
        tokenizer_json=BASE_JSON, chat_template="x{{ eos_token }}", special_tokens={"eos_token": "<|end|>"}
    )
    own = reply(tokenizer_json=own_json(), special_tokens={"eos_token": "<tool>"}, bos_id=OWN_ID)
    tokenizer = await of(made(Shard(a=own), with_eos), adapter("a"))
    assert await tokenizer.render_chat([{"role": "user", "content": ""}]) == "x<tool>"
    assert await with_eos.render_chat([{"role": "user", "content": ""}]) == "x<|end|>"
    assert tokenizer.bos_id == OWN_ID


async def test_an_own_template_is_sandboxed(base: Tokenizer, made: Make) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = await of(made(Shard(a=reply(chat_template=template))), adapter("a", template=True))
    with pytest.raises(InvalidRequest):
        await tokenizer.render_chat([{"role": "user", "content": "x"}])


async def test_of_a_sum_the_one_that_ships_a_tokenizer_decides(base: Tokenizer, made: Make) -> None:
    shard = Shard(
        words=reply(tokenizer_json=own_json(), stop_ids=[OWN_ID]),
        template=reply(chat_template=OWN_TEMPLATE, stop_ids=[5]),
        same=reply(tokenizer_json=BASE_JSON, chat_template=CHAT_TEMPLATE, stop_ids=[6]),
    )
    tokenizers = made(shard)
    joined = await of(
        tokenizers, adapter("same"), adapter("template", template=True), adapter("words"), chat=True
    )
    assert await joined.encode("<tool>") == [OWN_ID]
    assert await joined.render_chat([{"role": "user", "content": "x"}]) == "[x]"
    assert joined.stop_ids == {0, 5, 6, OWN_ID}
    same = await of(tokenizers, adapter("same"), adapter("template", template=True))
    assert same.vocabulary is base.vocabulary, "equal ones are one"


async def test_different_tokenizers_in_one_sum_are_refused_by_name(base: Tokenizer, made: Make) -> None:
    shard = Shard(
        a=reply(tokenizer_json=own_json("<a>"), chat_template="a"),
        b=reply(tokenizer_json=own_json("<b>")),
        c=reply(tokenizer_json=own_json("<a>"), chat_template="c"),
    )
    tokenizers = made(shard)
    with pytest.raises(InvalidRequest, match="a and b bring different tokenizers") as caught:
        await of(tokenizers, adapter("a"), adapter("b"))
    assert caught.value.param == "adapters"
    assert await (await of(tokenizers, adapter("a"), adapter("c"))).encode("<a>") == [OWN_ID]
    with pytest.raises(InvalidRequest, match="a and c bring different chat templates"):
        await of(tokenizers, adapter("a"), adapter("c"), chat=True)


@pytest.mark.parametrize("broken", [b"{}", b"\xff", b"[1]"])
async def test_a_tokenizer_that_cannot_be_read_is_refused_by_name_and_not_read_again(
    made: Make, broken: bytes
) -> None:
    shard = Shard(a=reply(tokenizer_json=broken))
    tokenizers = made(shard)
    for _ in range(2):
        with pytest.raises(AdapterRejected, match="Adapter a: the tokenizer it ships"):
            await of(tokenizers, adapter("a"))
    assert shard.asked == ["a"]


async def test_a_lost_shard_is_asked_again(base: Tokenizer, made: Make) -> None:
    shard = Shard(a=reply(tokenizer_json=own_json()))
    shard.error = ShardLost("gone")
    tokenizers = made(shard)
    with pytest.raises(ShardLost):
        await of(tokenizers, adapter("a"))
    shard.error = None
    assert await (await of(tokenizers, adapter("a"))).encode("<tool>") == [OWN_ID]


async def test_a_caller_that_goes_does_not_end_the_fetch_for_others(base: Tokenizer, made: Make) -> None:
    shard = Shard(a=reply(tokenizer_json=own_json()))
    tokenizers = made(shard)
    gone, stays = (asyncio.create_task(of(tokenizers, adapter("a"))) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    assert await (await stays).encode("<tool>") == [OWN_ID]
    assert shard.asked == ["a"]


async def test_only_the_most_recently_used_are_kept(base: Tokenizer, made: Make) -> None:
    shard = Shard(**{name: reply(tokenizer_json=own_json(f"<{name}>")) for name in "abc"})
    tokenizers = made(shard, most=2)
    for name in "abacab":
        await of(tokenizers, adapter(name))
    assert shard.asked == ["a", "b", "c", "b"]
    gc.collect()
    assert len(tokenizers._vocabularies) == 3, "the base's and two more"
