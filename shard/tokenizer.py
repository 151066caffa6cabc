"""What the router needs to know of a model's text side, converted by transformers."""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..proto import shard_pb2 as pb
from .errors import ModelRefused

GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def tokenizer_reply(path: str, model: Any) -> pb.TokenizerReply:
    """The base's tokenizer, chat template, stop ids and generation defaults.

    Raises ModelRefused where the model has no tokenizer that converts to `tokenizer.json`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelRefused(f"no tokenizer can be loaded from {path}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelRefused(f"the tokenizer of {path} does not convert to tokenizer.json")
    reply = pb.TokenizerReply(
        tokenizer_json=tokenizer.backend_tokenizer.to_str().encode(),
        chat_template=_default_template(tokenizer.chat_template),
        special_tokens={
            name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        },
        stop_ids=stop_ids(model, tokenizer.eos_token_id),
        generation_defaults_json=json.dumps(_generation_defaults(model)),
    )
    if tokenizer.bos_token_id is not None:
        reply.bos_id = tokenizer.bos_token_id
    return reply


def stop_ids(model: Any, tokenizer_eos: int | None) -> list[int]:
    """End-of-sequence ids from the config and the generation config, single or lists; failing both,
    the tokenizer's."""
    found: set[int] = set()
    for source in (model.config, getattr(model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids] if ids is not None else [])
    if not found and tokenizer_eos is not None:
        found.add(tokenizer_eos)
    return sorted(found)


def _default_template(template: str | dict[str, str] | None) -> str:
    if isinstance(template, dict):
        return template.get("default", "")
    return template or ""


def _generation_defaults(model: Any) -> dict[str, float]:
    """Sampling fields that the checkpoint's authors set."""
    config = getattr(model, "generation_config", None)
    written = config.to_diff_dict() if config is not None else {}
    return {name: written[name] for name in GENERATION_DEFAULTS if written.get(name) is not None}
