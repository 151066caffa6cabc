"""Adapters by name over REST: weighted sums, load, list, pin, unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..tiny import AdapterRecipe, build_adapter, tokenizer
from .server import Refused, Server

PROMPT = [70, 80, 90, 100, 110]


def prompt_logprobs(server: Server, **fields: Any) -> torch.Tensor:
    choice = server.complete("base", PROMPT, echo=True, logprobs=0, max_tokens=0, **fields)["choices"][0]
    return torch.tensor(choice["logprobs"]["token_logprobs"][1:], dtype=torch.float64)


@torch.inference_mode()
def peft_sum(base: Path, adapters: dict[str, Path], weights: dict[str, float]) -> torch.Tensor:
    """PEFT's exact weighted sum: adapters side by side in one of their summed rank."""
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, name)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
    model.set_adapter("sum")
    logprobs = torch.log_softmax(model.eval()(torch.tensor([PROMPT])).logits[0, :-1].double(), -1)
    return logprobs.gather(1, torch.tensor(PROMPT)[1:, None])[:, 0]


def test_a_weighted_sum_equals_pefts(
    server: Server, two_adapters: dict[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    weights = {"alpha": 0.7, "beta": -0.4}
    chosen = [{"id": name, "weight": weight} for name, weight in weights.items()]
    got = prompt_logprobs(server, adapters=chosen)
    expected = peft_sum(tiny_model("llama"), two_adapters, weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (got - prompt_logprobs(server)).abs().max() > 0.1


def test_an_adapter_is_loaded_listed_pinned_and_unloaded(
    server: Server, two_adapters: dict[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    root = two_adapters["alpha"].parent
    path = build_adapter(tiny_model("llama"), root / "gamma", AdapterRecipe(2), seed=9)
    server.post("/v1/load_lora_adapter", {"lora_name": "gamma", "lora_path": str(path)})
    listed = server.get("/v1/adapters/gamma")
    assert (listed["state"], listed["max_rank"], listed["pinned"]) == ("resident", 2, False)
    assert len(listed["digest"]) == 64
    assert server.post("/v1/adapters/gamma/pin", {"pinned": True})["pinned"] is True
    assert server.complete("gamma", PROMPT) != server.complete("base", PROMPT)
    server.post("/v1/unload_lora_adapter", {"lora_name": "gamma"})
    with pytest.raises(Refused) as refused:
        server.complete("gamma", PROMPT)
    assert refused.value.status == 404


@torch.inference_mode()
def peft_alone(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    logprobs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, :-1].double(), -1)
    return logprobs.gather(1, torch.tensor(PROMPT)[1:, None])[:, 0]


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": PROMPT[:2]},
    "one-layer": {"layers_to_transform": [1], "use_rslora": True},
}


def test_variants_are_served_as_peft_computes_them(
    server: Server, two_adapters: dict[str, Path], tiny_model: Callable[[str], Path]
) -> None:
    base, kinds = tiny_model("llama"), []
    for name, extra in VARIANTS.items():
        targets = tuple(extra.pop("target_modules", ("q_proj", "down_proj")))
        path = two_adapters["alpha"].parent / name
        build_adapter(base, path, AdapterRecipe(4, targets=targets, extra=extra), seed=3)
        server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        got = prompt_logprobs(server, adapters=[{"id": name}])
        torch.testing.assert_close(got, peft_alone(base, path), rtol=0, atol=1e-4)
        kinds.append(server.get(f"/v1/adapters/{name}")["kind"])
    assert kinds[0] == "DoRA"
    with pytest.raises(Refused) as refused:
        prompt_logprobs(server, adapters=[{"id": "dora"}, {"id": "alpha"}])
    assert refused.value.status == 400
    assert "DoRA" in refused.value.body["error"]["message"]


def test_a_merged_adapter_equals_the_sum(server: Server) -> None:
    parts = [{"id": "alpha", "weight": 0.7}, {"id": "beta", "weight": -0.4}]
    server.post("/v1/adapters/merge", {"name": "merged", "adapters": parts, "method": "cat"})
    expected = prompt_logprobs(server, adapters=parts)
    merged = prompt_logprobs(server, adapters=[{"id": "merged"}])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert server.get("/v1/adapters/merged")["max_rank"] == 12


def lorax(server: Server, ids: list[str], weights: list[float]) -> str:
    merged = {"ids": ids, "weights": weights, "merge_strategy": "linear"}
    parameters = {"merged_adapters": merged, "max_new_tokens": 8, "do_sample": False}
    return str(server.post("/generate", {"inputs": "hello", "parameters": parameters})["generated_text"])


def test_lorax_merges_are_made_for_a_request(server: Server, two_adapters: dict[str, Path]) -> None:
    twin = shutil.copytree(two_adapters["alpha"], two_adapters["alpha"].parent / "twin")
    server.post("/v1/load_lora_adapter", {"lora_name": "twin", "lora_path": str(twin)})
    # A and B are summed apart, each with the root of its weight: twins of half weight make twice the delta.
    doubled = server.complete("base", "hello", adapters=[{"id": "alpha", "weight": 2.0}])["choices"][0][
        "text"
    ]
    assert lorax(server, ["alpha", "twin"], [0.5, 0.5]) == doubled
    assert lorax(server, ["alpha", "twin"], [0.5, 0.5]) == doubled
    with pytest.raises(Refused, match="rank"):
        lorax(server, ["alpha", "beta"], [0.7, -0.4])


def test_an_adapters_own_tokenizer_and_template_are_used(
    server: Server, two_adapters: dict[str, Path]
) -> None:
    path = shutil.copytree(two_adapters["alpha"], two_adapters["alpha"].parent / "talker")
    own = tokenizer()
    own.add_tokens(["<tool>"], special_tokens=True)
    own.chat_template = "{% for message in messages %}<tool>{{ message.content }}{% endfor %}"
    own.save_pretrained(path)
    server.post("/v1/load_lora_adapter", {"lora_name": "talker", "lora_path": str(path)})
    ids = server.post("/tokenize", {"model": "talker", "prompt": "<tool>hi"})["tokens"]
    assert len(ids) == 3
    assert len(server.post("/tokenize", {"model": "alpha", "prompt": "<tool>hi"})["tokens"]) == 8
    messages = [{"role": "user", "content": "hi"}]
    chat = server.post(
        "/v1/chat/completions", {"model": "talker", "messages": messages, "temperature": 0, "max_tokens": 8}
    )
    assert chat["usage"]["prompt_tokens"] == 3
    by_ids = server.complete("talker", ids)["choices"][0]["text"]
    assert chat["choices"][0]["message"]["content"] == by_ids
    assert server.complete("talker", "<tool>hi")["choices"][0]["text"] == by_ids


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": 5}, "rank"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    server: Server,
    two_adapters: dict[str, Path],
    change: dict[str, Any],
    named: str,
) -> None:
    name = f"refused-{next(iter(change))}"
    path = shutil.copytree(two_adapters["alpha"], two_adapters["alpha"].parent / name)
    config = json.loads((path / "adapter_config.json").read_text()) | change
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Refused) as refused:
        server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    assert refused.value.status == 422
    assert refused.value.body["error"]["code"] == "adapter_rejected"
    assert named in refused.value.body["error"]["message"]
    assert server.complete("base", PROMPT)["choices"]
