from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import PreTrainedTokenizerFast

from loraplex.proto import shard_pb2
from loraplex.router.detokenizer import PieceDetokenizer, WindowDetokenizer
from loraplex.router.errors import InvalidRequest
from loraplex.router.tokenizer import Tokenizer

from .conftest import byte_level_library_tokenizer

WORDS = ["▁", "▁Hello", "▁world", "a", "b", "ing", "▁▁", "▁the", "é", "日", "\n"]


def sentencepiece_like(*, strip: bool) -> LibraryTokenizer:
    """As transformers converts Llama's (with strip) and Gemma's (without): metaspace and byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + WORDS:
        vocab[token] = len(vocab)
    tokenizer = LibraryTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def metaspace() -> LibraryTokenizer:
    tokenizer = sentencepiece_like(strip=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wrap(library: LibraryTokenizer) -> Tokenizer:
    return Tokenizer(tokenizer_json=library.to_str().encode())


LIBRARY = {
    "byte-level": byte_level_library_tokenizer(),
    "llama-like": sentencepiece_like(strip=True),
    "gemma-like": sentencepiece_like(strip=False),
    "metaspace": metaspace(),
}
WRAPPED = {name: wrap(library) for name, library in LIBRARY.items()}


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.step(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("byte-level", PieceDetokenizer),
        ("llama-like", PieceDetokenizer),
        ("gemma-like", PieceDetokenizer),
        ("metaspace", WindowDetokenizer),
    ],
)
def test_known_decoders_go_by_table_and_others_by_window(name, kind):
    assert isinstance(WRAPPED[name].detokenizer(), kind)


@pytest.mark.parametrize("name", ["byte-level", "metaspace"])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
def test_deltas_of_any_tokens_join_to_the_full_decode(name, skip, data):
    library = LIBRARY[name]
    ids = data.draw(st.lists(st.integers(0, library.get_vocab_size() - 1), max_size=20))
    joined = "".join(stream(WRAPPED[name], ids, skip_special_tokens=skip))
    assert joined == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["llama-like", "gemma-like"])
@pytest.mark.parametrize("skip", [True, False])
@given(text=st.text(max_size=30), specials=st.lists(st.integers(0, 30), max_size=3))
def test_deltas_of_byte_fallback_text_join_to_the_full_decode(name, skip, text, specials):
    library = LIBRARY[name]
    ids = library.encode(text, add_special_tokens=False).ids
    text_alone = stream(WRAPPED[name], ids, skip_special_tokens=skip)
    assert "".join(text_alone) == library.decode(ids, skip_special_tokens=skip)
    for position in specials:
        ids.insert(min(position, len(ids)), 2)
    if skip:
        assert "".join(stream(WRAPPED[name], ids)) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("name", "text"), [("llama-like", "Hello  the"), ("gemma-like", " Hello  the")])
def test_one_space_at_the_very_start_goes_where_the_decoder_strips_it(name, text):
    ids = [LIBRARY[name].token_to_id(token) for token in ("</s>", "▁Hello", "▁", "▁the")]
    assert "".join(stream(WRAPPED[name], ids)) == text == LIBRARY[name].decode(ids)


@given(ids=st.lists(st.integers(0, 2 + 256 + len(WORDS)), max_size=20))
def test_byte_fallback_never_raises_and_keeps_whole_characters(ids):
    pieces = b"".join(WRAPPED["gemma-like"].token_bytes(token) if token > 2 else b"" for token in ids)
    assert "".join(stream(WRAPPED["gemma-like"], ids)) == pieces.decode("utf-8", "replace")


def test_a_character_in_pieces_is_shown_once_it_is_whole():
    tokenizer = WRAPPED["llama-like"]
    ids = [LIBRARY["llama-like"].token_to_id(f"<0x{byte:02X}>") for byte in "🎉".encode()]
    assert stream(tokenizer, ids) == ["", "", "", "🎉", ""]
    assert stream(tokenizer, ids[:2]) == ["", "", "\ufffd"]


@pytest.mark.parametrize("name", LIBRARY)
def test_no_delta_of_valid_text_holds_a_broken_character(name):
    text = "日本語 🎉 Grüße and the rest"
    if name == "metaspace":
        text = " Hello the world"
    ids = LIBRARY[name].encode(text, add_special_tokens=False).ids
    deltas = stream(WRAPPED[name], ids)
    assert not any("\ufffd" in delta for delta in deltas)
    assert sum(bool(delta) for delta in deltas) > 3


def test_special_tokens_are_left_out_or_kept():
    tokenizer, library = WRAPPED["byte-level"], LIBRARY["byte-level"]
    ids = [0, *library.encode("hello").ids, 1]
    assert "".join(stream(tokenizer, ids)) == "hello"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "<|end|>hello<|begin|>"


def test_ids_without_a_token_add_nothing():
    assert stream(WRAPPED["byte-level"], [10**6]) == ["", ""]


def test_token_texts_tell_broken_bytes_apart():
    tokenizer, library = WRAPPED["byte-level"], LIBRARY["byte-level"]
    broken = [library.token_to_id(letter) for letter in "âã"]  # stand for the bytes 0xE2 and 0xE3
    assert [tokenizer.token_text(token) for token in broken] == ["bytes:\\xe2", "bytes:\\xe3"]
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.token_bytes(0) == b"<|end|>"


@pytest.mark.parametrize("name", LIBRARY)
def test_a_token_costs_less_than_eight_microseconds(name):
    ids = [random.Random(1).randrange(3, LIBRARY[name].get_vocab_size()) for _ in range(300)]
    stream(WRAPPED[name], ids)
    best = min(_seconds(name, ids) for _ in range(5))
    assert best / len(ids) < 8e-6


def _seconds(name: str, ids: list[int]) -> float:
    started = time.process_time()
    stream(WRAPPED[name], ids)
    return time.process_time() - started


async def test_long_and_short_texts_encode_alike():
    tokenizer, library = WRAPPED["byte-level"], LIBRARY["byte-level"]
    for text in ("hello", "hello world " * 1000):
        assert await tokenizer.encode(text) == library.encode(text).ids


def test_truncation_and_padding_of_the_file_are_off():
    library = byte_level_library_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=50)
    assert len(wrap(library).vocabulary.encode("hello world", add_special_tokens=True)) > 2
    assert len(wrap(library).vocabulary.encode("hello", add_special_tokens=True)) < 50


def test_fewest_tokens_is_a_lower_bound():
    text = "hello world " * 50
    assert 0 < WRAPPED["byte-level"].fewest_tokens(text) <= len(LIBRARY["byte-level"].encode(text).ids)


def test_from_reply_takes_every_field():
    reply = shard_pb2.TokenizerReply(
        tokenizer_json=LIBRARY["byte-level"].to_str().encode(),
        chat_template="{{ bos_token }}",
        special_tokens={"bos_token": "<|begin|>"},
        stop_ids=[0, 7],
        bos_id=1,
        generation_defaults_json='{"temperature": 0.6, "top_k": 20, "do_sample": true}',
    )
    tokenizer = Tokenizer.from_reply(reply)
    assert tokenizer.stop_ids == {0, 7}
    assert tokenizer.bos_id == 1
    assert tokenizer.generation_defaults.temperature == 0.6
    assert tokenizer.generation_defaults.top_k == 20
    assert tokenizer.generation_defaults.top_p is None
    assert Tokenizer.from_reply(shard_pb2.TokenizerReply(tokenizer_json=reply.tokenizer_json)).bos_id is None


# Chat templates in the manner of well-known families.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if system_message is defined and loop.last %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no System role') }}
{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
FEATURES = """{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}{{ message | tojson }}{% endgeneration %}
    {{ {'b': 1, 'a': 'ü<'} | tojson(indent=2, sort_keys=True) }}
    {{ dict(x=message.content) }} {{ dict.fromkeys(['k'], 1) }} {{ message.content[:2] | upper }}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}{{ unk_token }}{{ undefined_thing }}{{ tools is none }}{{ documents is none }}"""
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "mistral": MISTRAL, "gemma": GEMMA, "features": FEATURES}

ALTERNATING = [
    {"role": "user", "content": "  What's 1 < 2 & 3? "},
    {"role": "assistant", "content": "Yes — “indeed”.\n"},
    {"role": "user", "content": "日本語\n\n\twith tabs"},
]
WITH_SYSTEM = [{"role": "system", "content": " Be brief. "}, *ALTERNATING]
SPECIAL_TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": "<|begin|>"}


@pytest.mark.parametrize("messages", [ALTERNATING, WITH_SYSTEM], ids=["alternating", "with system"])
@pytest.mark.parametrize("name", TEMPLATES)
async def test_chat_renders_as_transformers_does(name, messages):
    if name == "gemma" and messages is WITH_SYSTEM:
        pytest.skip("this template refuses system messages")
    library = LIBRARY["byte-level"]
    oracle = PreTrainedTokenizerFast(
        tokenizer_object=library, chat_template=TEMPLATES[name], **SPECIAL_TOKENS
    )
    expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = Tokenizer(
        tokenizer_json=library.to_str().encode(), chat_template=TEMPLATES[name], special_tokens=SPECIAL_TOKENS
    )
    assert await tokenizer.render_chat(messages) == expected
    assert (
        await tokenizer.encode_chat(messages)
        == oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


def with_template(template: str) -> Tokenizer:
    return Tokenizer(tokenizer_json=LIBRARY["byte-level"].to_str().encode(), chat_template=template)


async def test_a_template_may_refuse_messages():
    with pytest.raises(InvalidRequest, match="no System role"):
        await with_template(GEMMA).render_chat(WITH_SYSTEM)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace(a=1) %}{% set ns._x = 2 %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content % () }}{{ 1 // 0 }}",
        "{{ messages[7].content }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
async def test_a_hostile_or_broken_template_is_an_invalid_request(template):
    with pytest.raises(InvalidRequest) as caught:
        await with_template(template).render_chat(ALTERNATING)
    assert "loraplex" not in caught.value.message
    assert "Error" not in caught.value.message


async def test_without_a_template_chat_is_refused():
    with pytest.raises(InvalidRequest, match="no chat template"):
        await WRAPPED["byte-level"].encode_chat(ALTERNATING)


def test_a_template_that_does_not_compile_is_told_at_start():
    with pytest.raises(ValueError, match="does not compile"):
        with_template("{% for %}")


async def test_a_text_on_which_an_expression_runs_away_is_refused() -> None:
    library = LibraryTokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    tokenizer = Tokenizer(tokenizer_json=library.to_str().encode())
    with pytest.raises(InvalidRequest, match="runs away"):
        await tokenizer.encode("a" * 40)
    assert await tokenizer.encode("ab") == [0, 1]
