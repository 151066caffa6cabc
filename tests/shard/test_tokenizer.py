"""What a shard tells the router of a model's text side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig, LlamaConfig

from loraplex.shard.errors import ModelRefused
from loraplex.shard.tokenizer import stop_ids, tokenizer_reply

from .. import tiny


def model(config_eos: object, generation_eos: object, **generation: object) -> SimpleNamespace:
    return SimpleNamespace(
        config=LlamaConfig(eos_token_id=config_eos),
        generation_config=GenerationConfig(eos_token_id=generation_eos, **generation),
    )


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "tokenizer_eos", "expected"),
    [
        (2, None, None, [2]),
        (2, [2, 7], None, [2, 7]),
        ([5, 3], 9, 1, [3, 5, 9]),
        (None, 4, 1, [4]),
        (None, None, 1, [1]),
        (None, None, None, []),
    ],
)
def test_stop_ids_come_from_both_configs_and_else_from_the_tokenizer(
    config_eos: object, generation_eos: object, tokenizer_eos: int | None, expected: list[int]
) -> None:
    assert stop_ids(model(config_eos, generation_eos), tokenizer_eos) == expected


def test_the_reply_has_what_the_authors_set(tiny_model: Callable[[str], Path]) -> None:
    reply = tokenizer_reply(str(tiny_model("llama")), model(299, [299, 296], temperature=0.6, top_k=20))
    assert list(reply.stop_ids) == [296, 299]
    assert json.loads(reply.generation_defaults_json) == {"temperature": 0.6, "top_k": 20}
    assert reply.chat_template == tiny.CHAT_TEMPLATE
    assert json.loads(reply.tokenizer_json)["model"]["type"] == "BPE"
    assert not reply.HasField("bos_id")


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"tool_use": "tools", "default": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_reply(str(tmp_path), model(1, None)).chat_template == "{{ messages }}"


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="tokenizer"):
        tokenizer_reply(str(tmp_path), model(1, None))
