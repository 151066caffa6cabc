from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from loraplex.proto import shard_pb2
from loraplex.router.auth import Caller
from loraplex.router.call import Chat, GenerateCall, Sampling, Stopping, check_call, seed_of
from loraplex.router.client import Manifest
from loraplex.router.errors import AdapterNotFound, InvalidRequest, NumericalError, Overloaded
from loraplex.router.frontend import Frontend
from loraplex.router.merges import MergeRecipe
from loraplex.router.output import Choice, StopStrings
from loraplex.router.request import AdapterChoice, FinishReason, TokenEvent
from loraplex.router.tokenizer import Tokenizer
from loraplex.router.tokenizers import Tokenizers

from ..fakes.engine import logprobs_of, play
from .conftest import byte_level_library_tokenizer

LIBRARY = byte_level_library_tokenizer()
TOKENIZER = Tokenizer(tokenizer_json=LIBRARY.to_str().encode())
LETTERS = {letter: LIBRARY.token_to_id(letter) for letter in "abcdefgh"}


def call(prompt="hello world", **fields) -> GenerateCall:
    fields.setdefault("stopping", Stopping(max_tokens=4))
    return GenerateCall(id="c", caller=Caller("acme"), prompts=[prompt], **fields)


async def collect(frontend, generate_call):
    """Events by choice, and the usage."""
    async with frontend.generate(generate_call) as generation:
        events = [[] for _ in range(len(generate_call.prompts) * generate_call.n)]
        async for batch in generation:
            assert batch
            for event in batch:
                events[event.index].append(event)
        return events, generation.usage


def text_of(events) -> str:
    return "".join(event.text for event in events)


def spell(text: str) -> list[int]:
    """Tokens of one byte each."""
    return [LIBRARY.encode(letter).ids[0] for letter in text]


# Stop strings.


def run_choice(tokens, strings, *, split=1, min_tokens=0, finish=FinishReason.LENGTH):
    choice = Choice(
        0,
        TOKENIZER.detokenizer(),
        stops=StopStrings(strings),
        stop_ids=frozenset({0}),
        min_tokens=min_tokens,
    )
    out = []
    for start in range(0, len(tokens), split):
        part = tokens[start : start + split]
        last = start + split >= len(tokens)
        logprobs = tuple(logprobs_of(token, 0) for token in part)
        out += choice.feed(TokenEvent(part, logprobs, None, finish if last else None))
        if choice.done:
            break
    return choice, out


@pytest.mark.parametrize("split", [1, 2, 3, 100])
@given(
    text=st.text("abc", min_size=1, max_size=30),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_before_the_first_stop_string(split, text, strings):
    choice, out = run_choice(spell(text), strings, split=split)
    shown = text_of(out)
    first = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in strings)]
    if not first:
        assert shown == text
        assert out[-1].finish is FinishReason.LENGTH
        assert choice.tokens == len(text)
    else:
        stopped = text[: first[0]]
        cut = min(stopped.find(string) for string in strings if string in stopped)
        assert shown == text[:cut]
        assert out[-1].finish is FinishReason.STOP
        assert out[-1].stop in strings
        assert choice.tokens == cut
    assert choice.done
    assert [event.finish is not None for event in out] == [False] * (len(out) - 1) + [True]


@given(
    text=st.text("abc", min_size=1, max_size=30),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_only_what_may_begin_a_stop_string_is_held_back(text, strings):
    choice = Choice(0, TOKENIZER.detokenizer(), stops=StopStrings(strings), stop_ids=frozenset())
    shown = ""
    for end, token in enumerate(spell(text), start=1):
        shown += text_of(choice.feed(TokenEvent((token,))))
        if choice.done:
            return
        held = text[len(shown) : end]
        assert text[:end] == shown + held
        assert held == "" or any(string.startswith(held) and string != held for string in strings)
        longer = [text[at:end] for at in range(len(shown))]
        assert not any(string.startswith(suffix) for string in strings for suffix in longer if suffix)


def test_tokens_come_with_their_text_and_offsets():
    _, out = run_choice(spell("abcSTO?"), ["STOP"])
    assert [(event.text, event.offset) for event in out] == [
        ("a", 0), ("b", 1), ("c", 2), ("S", 3), ("T", 4), ("O", 5), ("?", 6),
    ]  # fmt: skip
    assert all(event.logprobs is not None for event in out)


def test_a_token_that_reaches_into_a_stop_string_is_shown_in_part():
    token = LIBRARY.encode("hello").ids
    choice, out = run_choice([*token, *spell("xy")], ["ox"])
    assert text_of(out) == "hell"
    assert out[-1].finish is FinishReason.STOP
    assert choice.tokens == len([event for event in out if event.token is not None and not event.hidden])


def test_text_of_a_token_that_was_held_in_part_comes_late():
    two = LIBRARY.encode("ab").ids
    ids = two if len(two) == 1 else spell("ab")
    _, out = run_choice([*ids, *spell("c")], ["bd"])
    assert text_of(out) == "abc"
    assert [event.token for event in out if event.token is not None] == [*ids, *spell("c")]


def test_stop_strings_do_not_count_before_min_tokens():
    _, out = run_choice(spell("abab"), ["b"], min_tokens=3)
    assert text_of(out) == "aba"


def test_a_stop_id_is_neither_shown_nor_billed():
    choice, out = run_choice([*spell("ab"), 0], [], finish=FinishReason.STOP)
    assert text_of(out) == "ab"
    assert out[-1].hidden
    assert (out[-1].token, out[-1].stop, out[-1].finish) == (0, 0, FinishReason.STOP)
    assert choice.tokens == 2


def test_a_stop_id_releases_what_was_held():
    _, out = run_choice([*spell("abS"), 0], ["STOP"], finish=FinishReason.STOP)
    assert text_of(out) == "abS"
    assert out[-1].stop == 0


def test_a_finish_without_a_token_ends_the_choice():
    choice = Choice(0, TOKENIZER.detokenizer(), stops=StopStrings(()), stop_ids=frozenset())
    choice.feed(TokenEvent(spell("a")))
    (last,) = choice.feed(TokenEvent(finish=FinishReason.STOP))
    assert (last.token, last.finish) == (None, FinishReason.STOP)


def test_a_character_that_is_never_finished_is_flushed_at_the_end():
    half = LIBRARY.token_to_id("â")  # the byte 0xE2
    _, out = run_choice([*spell("a"), half], [])
    assert text_of(out) == "a\ufffd"
    assert out[-1].finish is FinishReason.LENGTH


# Whole calls.


async def test_events_carry_the_text_of_the_tokens(frontend, engine):
    events, usage = await collect(frontend, call())
    assert text_of(events[0]) == TOKENIZER.decode(LIBRARY.encode("hello world").ids[:4])
    assert events[0][-1].finish is FinishReason.LENGTH
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(LIBRARY.encode("hello world").ids), 4)
    assert engine.cancelled == []


async def test_a_stop_string_cancels_the_request_at_once(frontend, engine):
    engine.script = play(spell("abcdefgh"))
    stopping = Stopping(max_tokens=100, strings=["de"])
    async with frontend.generate(call(stopping=stopping)) as generation:
        batches = [batch async for batch in generation]
        assert engine.cancelled == ["c-0"]
    assert text_of(event for batch in batches for event in batch) == "abc"
    assert generation.usage.completion_tokens == 3
    await asyncio.sleep(0.01)
    assert engine.cancelled == ["c-0"]
    assert engine.running == 0


async def test_several_prompts_and_choices(frontend, engine):
    generate_call = replace(call(n=2), prompts=["hello", spell("abc")], sampling=Sampling(seed=2**64 - 1))
    async with frontend.generate(generate_call) as generation:
        seen = [event async for batch in generation for event in batch]
        seeds = generation.seeds
    assert {event.index for event in seen} == {0, 1, 2, 3}
    assert text_of(event for event in seen if event.index == 3) == "abca"
    assert seeds == [2**64 - 1, 0, 2**64 - 1, 0]
    assert [request.id for request in engine.requests] == ["c-0", "c-1", "c-2", "c-3"]
    assert generation.usage.prompt_tokens == len(LIBRARY.encode("hello").ids) + 3


async def test_seeds_are_random_unless_given(frontend):
    async with frontend.generate(call(n=8)) as generation:
        assert len(set(generation.seeds)) == 8


async def test_leaving_the_block_cancels_what_runs(frontend, engine):
    engine.delay = None
    async with frontend.generate(call(n=3)):
        await asyncio.sleep(0)
    assert sorted(engine.cancelled) == ["c-0", "c-1", "c-2"]
    await asyncio.sleep(0.01)
    assert engine.running == 0


async def test_cancelling_the_consumer_cancels_what_runs(frontend, engine):
    engine.delay = None
    consumer = asyncio.ensure_future(collect(frontend, call(n=2)))
    await asyncio.sleep(0.05)
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert sorted(engine.cancelled) == ["c-0", "c-1"]


async def test_a_refusal_midway_cancels_the_sequences_before_it(frontend, engine):
    accept = engine.submit

    def submit(request):
        if request.id == "c-2":
            raise Overloaded("full")
        accept(request)

    engine.submit = submit
    engine.delay = None
    with pytest.raises(Overloaded):
        async with frontend.generate(call(n=3)):
            pytest.fail("must not start")
    assert sorted(engine.cancelled) == ["c-0", "c-1"]


async def test_an_error_ends_the_call_after_what_came_before_it(frontend, engine):
    def script(request):
        yield TokenEvent(spell("a"))
        yield NumericalError("not finite")

    engine.script = script
    seen = []

    async def read() -> None:
        async with frontend.generate(call(n=2)) as generation:
            async for batch in generation:
                seen.extend(batch)

    with pytest.raises(NumericalError):
        await read()
    assert text_of(seen) == "aa"


async def test_waiting_events_come_in_one_batch(frontend, engine):
    async with frontend.generate(call(stopping=Stopping(max_tokens=50))) as generation:
        await asyncio.sleep(0.1)
        batches = [batch async for batch in generation]
    assert [len(batch) for batch in batches] == [50]


async def test_scoring_shows_prompt_logprobs_and_no_token(frontend, engine):
    generate_call = call(
        echo=True, stopping=Stopping(max_tokens=0), sampling=Sampling(logprobs=1, prompt_logprobs=1)
    )
    (events,), usage = await collect(frontend, generate_call)
    assert engine.requests[0].params.max_tokens == 1
    assert text_of(events) == ""
    assert events[0].prompt_logprobs[0] is None
    assert len(events[0].prompt_logprobs) == usage.prompt_tokens
    assert usage.completion_tokens == 0
    assert events[-1].finish is FinishReason.LENGTH


async def test_adapters_are_resolved_and_weighted(frontend, engine):
    adapters = [AdapterChoice("upper", 0.5), AdapterChoice("reverse")]
    await collect(frontend, call(model="base", adapters=adapters, adapter_source="hub", hub_token="secret"))
    assert [(use.key, use.weight) for use in engine.requests[0].adapters] == [
        ("key of upper", 0.5),
        ("key of reverse", 1.0),
    ]
    query = engine.queries[0]
    assert (list(query.choices), query.tenant) == (adapters, "acme")
    assert (query.source, query.token) == ("hub", "secret")
    assert engine.leased == 0
    await collect(frontend, call(model="upper"))
    assert [use.key for use in engine.requests[1].adapters] == ["key of upper"]
    assert "secret" not in repr(call(hub_token="secret"))


async def test_unknown_and_forbidden_adapters_look_the_same(frontend, engine):
    with pytest.raises(AdapterNotFound) as unknown:
        await collect(frontend, call(model="nobody"))
    forbidden_call = replace(call(model="upper"), caller=Caller("acme", ("reverse", "org/*")))
    with pytest.raises(AdapterNotFound) as forbidden:
        await collect(frontend, forbidden_call)
    assert forbidden.value.message.replace("upper", "nobody") == unknown.value.message
    assert engine.requests == []
    await collect(frontend, replace(forbidden_call, model="org/nested"))
    assert len(engine.requests) == 1


async def test_defaults_are_the_models_then_openais(frontend, engine, library_tokenizer):
    await collect(frontend, call())
    params = engine.requests[0].params
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (1.0, 0, 1.0, 1.0)
    assert params.stop_ids == (0,)
    own = Tokenizer(
        tokenizer_json=library_tokenizer.to_str().encode(),
        generation_defaults_json='{"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}',
    )
    await collect(
        Frontend(engine, Tokenizers(own, engine.tokenizer)),
        call(sampling=Sampling(top_k=-1, temperature=1e-9)),
    )
    params = engine.requests[1].params
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.0, 0, 0.9, 1.1)


async def test_max_tokens_defaults_to_the_rest_of_the_context(frontend, engine):
    prompt = spell("abc")
    await collect(frontend, call(prompt, stopping=Stopping()))
    await collect(frontend, call(prompt, stopping=Stopping(), default_max_tokens=16))
    await collect(frontend, call(spell("a" * 510), stopping=Stopping(), default_max_tokens=16))
    assert [request.params.max_tokens for request in engine.requests] == [509, 16, 2]


async def test_ignore_eos_keeps_other_stop_ids(frontend, engine):
    stopping = Stopping(max_tokens=3, ignore_eos=True, token_ids=[5])
    await collect(frontend, call(stopping=stopping))
    assert engine.requests[0].params.stop_ids == (5,)


async def test_truncate_keeps_the_last_tokens(frontend, engine):
    await collect(frontend, call(spell("abcdef"), truncate=2))
    assert list(engine.requests[0].prompt) == spell("ef")


NAN, INF = math.nan, math.inf
BAD = [
    ("n", {"n": 0}), ("n", {"n": 129}), ("n", {"n": -1}), ("n", {"n": 10**400}),
    ("prompt", {"prompt": ""}), ("prompt", {"prompt": []}), ("prompt", {"prompt": Chat(())}),
    ("prompt", {"prompt": [-1]}), ("prompt", {"prompt": [400]}), ("prompt", {"prompt": [10**400]}),
    ("prompt", {"prompt": [5] * 512}), ("prompt", {"prompt": "x" * 100_000}),
    ("truncate", {"truncate": 0}),
    *[("temperature", {"sampling": Sampling(temperature=value)}) for value in (-0.1, 2.1, NAN, INF)],
    *[("top_p", {"sampling": Sampling(top_p=value)}) for value in (0, -1, 1.1, NAN)],
    *[("min_p", {"sampling": Sampling(min_p=value)}) for value in (-0.1, 1.1, NAN)],
    *[("top_k", {"sampling": Sampling(top_k=value)}) for value in (-2, 2**31, 10**400)],
    *[("presence_penalty", {"sampling": Sampling(presence_penalty=value)}) for value in (-2.1, 2.1, NAN)],
    *[("frequency_penalty", {"sampling": Sampling(frequency_penalty=value)}) for value in (-2.1, -INF)],
    *[("repetition_penalty", {"sampling": Sampling(repetition_penalty=value)}) for value in (0, NAN, INF)],
    *[("seed", {"sampling": Sampling(seed=value)}) for value in (-(2**63) - 1, 2**64, 10**400)],
    *[("logprobs", {"sampling": Sampling(logprobs=value)}) for value in (-1, 21, 10**400)],
    *[("prompt_logprobs", {"sampling": Sampling(prompt_logprobs=value)}) for value in (-1, 21)],
    *[("logit_bias", {"sampling": Sampling(logit_bias=value)})
      for value in ({-1: 0.0}, {400: 0.0}, {10**400: 0.0}, {1: 101.0}, {1: NAN},
                    dict.fromkeys(range(1025), 0.0))],
    *[("max_tokens", {"stopping": Stopping(max_tokens=value)}) for value in (0, -1, 10**400, 512)],
    *[("min_tokens", {"stopping": Stopping(max_tokens=4, min_tokens=value)}) for value in (-1, 5, 10**400)],
    *[("stop", {"stopping": Stopping(strings=value)}) for value in ([""], ["x" * 257], ["x"] * 17)],
    *[("stop_token_ids", {"stopping": Stopping(token_ids=value)}) for value in ([-1], [400], [1] * 257)],
    *[("adapters", {"adapters": value})
      for value in ([AdapterChoice("")], [AdapterChoice("upper", NAN)], [AdapterChoice("upper", 1e9)],
                    [AdapterChoice("upper")] * 2, [AdapterChoice("base")],
                    [AdapterChoice(f"a{i}") for i in range(9)])],
    ("adapters", {"model": "upper", "adapters": [AdapterChoice("reverse")]}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "fields"), BAD)
async def test_bad_fields_are_named_and_nothing_runs(frontend, engine, field, fields):
    with pytest.raises(InvalidRequest) as caught:
        await collect(frontend, call(**fields))
    assert caught.value.param == field
    assert field in caught.value.message
    assert engine.requests == []


async def test_errors_speak_the_dialects_names(frontend):
    with pytest.raises(InvalidRequest, match="max_new_tokens") as caught:
        await collect(
            frontend, call(stopping=Stopping(max_tokens=-1), field_names={"max_tokens": "max_new_tokens"})
        )
    assert caught.value.param == "max_new_tokens"


async def test_too_many_sequences_are_refused(frontend):
    with pytest.raises(InvalidRequest, match="1024"):
        await collect(frontend, replace(call(n=128), prompts=["a"] * 9))


@given(seed=st.integers(-(2**63), 2**64 - 1))
def test_any_64_bit_seed_is_taken(seed):
    generate_call = call(sampling=Sampling(seed=seed))
    check_call(generate_call)
    assert 0 <= seed_of(generate_call, 127) < 2**64


# Adapters that are more than a delta.


def own_tokenizer(**fields) -> shard_pb2.TokenizerReply:
    """The base's tokenizer with one more token."""
    library = byte_level_library_tokenizer()
    library.add_tokens([AddedToken("<tool>")])
    return shard_pb2.TokenizerReply(tokenizer_json=library.to_str().encode(), **fields)


TOOL = LIBRARY.get_vocab_size()


@pytest.fixture
def resized(engine):
    """`upper` knows one token more than the base, and brings the tokenizer and template for it."""
    engine.manifests["upper"] = Manifest(
        digest="resized", vocab_size=TOOL + 1, own_tokenizer=True, own_chat_template=True
    )
    template = "{% for m in messages %}<tool>{{ m.content }}{% endfor %}"
    engine.tokenizers["resized"] = own_tokenizer(chat_template=template, stop_ids=[TOOL])


async def test_an_adapters_own_tokenizer_reads_and_writes(frontend, engine, resized):
    (events,), _ = await collect(frontend, call("<tool>ab", model="upper"))
    assert list(engine.requests[0].prompt) == [TOOL, *LIBRARY.encode("ab").ids]
    assert engine.requests[0].params.stop_ids == (0, TOOL)
    assert text_of(events) == ""
    assert events[-1].stop == TOOL
    stopping = Stopping(max_tokens=4, ignore_eos=True)
    (events,), _ = await collect(frontend, call([*spell("ab"), TOOL, 5], model="upper", stopping=stopping))
    assert text_of(events) == "ab<tool>" + LIBRARY.decode([5])
    chat = Chat(({"role": "user", "content": "ab"},))
    await collect(frontend, call(chat, model="upper"))
    assert list(engine.requests[2].prompt) == [TOOL, *LIBRARY.encode("ab").ids]
    assert engine.tokenizers_asked == ["resized"]
    await collect(frontend, call("<tool>", model="reverse"))
    assert TOOL not in engine.requests[3].prompt


async def test_a_server_may_read_with_the_base_only(engine, tokenizer, resized):
    frontend = Frontend(engine, Tokenizers(tokenizer, engine.tokenizer, own=False))
    await collect(frontend, call("<tool>", model="upper"))
    assert TOOL not in engine.requests[0].prompt
    assert engine.tokenizers_asked == []


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("prompt", {"prompt": [TOOL]}),
        ("logit_bias", {"sampling": Sampling(logit_bias={TOOL: 1.0})}),
        ("stop_token_ids", {"stopping": Stopping(max_tokens=2, token_ids=[TOOL])}),
    ],
)
async def test_token_ids_may_go_as_far_as_the_adapter_knows_them(frontend, engine, resized, field, fields):
    await collect(frontend, call(model="upper", **fields))
    for model in ("base", "reverse"):
        with pytest.raises(InvalidRequest, match=f"{field} holds a token id .* {TOOL - 1}$") as caught:
            await collect(frontend, call(model=model, **fields))
        assert caught.value.param == field
    both = [AdapterChoice("reverse"), AdapterChoice("upper")]
    await collect(frontend, call(adapters=both, **fields))
    assert len(engine.requests) == 2
    assert engine.leased == 0


async def test_each_prompt_invokes_an_adapter_on_its_own(frontend, engine):
    engine.manifests["upper"] = Manifest(digest="alora", invocation_tokens=tuple(spell("b")))
    generate_call = replace(call(model="upper"), prompts=[spell("abab"), spell("b"), spell("aa")])
    await collect(frontend, generate_call)
    assert [[use.start for use in request.adapters] for request in engine.requests] == [[3], [0], []]
    await collect(frontend, replace(generate_call, prompts=[spell("abab")], truncate=1))
    assert [use.start for use in engine.requests[3].adapters] == [0]


async def test_what_may_not_be_summed_is_refused_by_name(frontend, engine):
    engine.manifests["upper"] = Manifest(digest="d", alone="DoRA")
    both = [AdapterChoice("upper"), AdapterChoice("reverse")]
    with pytest.raises(InvalidRequest, match=r"upper \(DoRA\) cannot be summed with reverse") as caught:
        await collect(frontend, call(adapters=both))
    assert caught.value.param == "adapters"
    with pytest.raises(InvalidRequest, match="takes no weight but 1"):
        await collect(frontend, call(adapters=[AdapterChoice("upper", 0.5)]))
    await collect(frontend, call(model="upper"))
    assert len(engine.requests) == 1
    assert engine.leased == 0


async def test_a_merge_is_one_adapter(frontend, engine):
    recipe = MergeRecipe.checked("linear")
    both = [AdapterChoice("upper", 0.5), AdapterChoice("reverse", 2.0)]
    await collect(frontend, call(adapters=both, merge=recipe))
    assert engine.queries[0].merge is recipe
    assert [(use.key, use.weight) for use in engine.requests[0].adapters] == [("key of merged", 1.0)]


async def test_time_before_acceptance_counts(frontend, engine, resized, monkeypatch):
    fetched: list[float] = []

    async def slow(digest):
        await asyncio.sleep(0.01)
        fetched.append(asyncio.get_running_loop().time())
        return engine.tokenizers[digest]

    monkeypatch.setattr(frontend._tokenizers, "_fetch", slow)
    await collect(frontend, call(model="upper"))
    assert engine.requests[0].arrival < fetched[0]


async def test_the_tokenizer_of_a_model(frontend, engine, resized):
    caller = Caller("acme", ("up*",))
    assert await frontend.tokenizer_of(caller, "") == (await frontend.tokenizer_of(caller, "base"))
    tokenizer, vocab_size = await frontend.tokenizer_of(caller, "upper")
    assert (tokenizer.decode([TOOL]), vocab_size) == ("<tool>", TOOL + 1)
    for name in ("reverse", "nobody"):
        with pytest.raises(AdapterNotFound):
            await frontend.tokenizer_of(caller, name)
    assert engine.leased == 0
