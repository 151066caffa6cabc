"""Adapters by name over REST: weighted sums, load, list, pin, unload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..tiny import AdapterRecipe, build_adapter
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


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    server: Server,
    two_adapters: dict[str, Path],
    tiny_model: Callable[[str], Path],
    extra: dict[str, Any],
    named: str,
) -> None:
    name = next(iter(extra))
    targets = tuple(extra.get("target_modules", ("q_proj",)))
    extra = {key: value for key, value in extra.items() if key != "target_modules"}
    path = two_adapters["alpha"].parent / name
    build_adapter(tiny_model("llama"), path, AdapterRecipe(2, targets=targets, extra=extra), seed=3)
    with pytest.raises(Refused) as refused:
        server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
    assert refused.value.status == 422
    assert refused.value.body["error"]["code"] == "adapter_rejected"
    assert named in refused.value.body["error"]["message"]
    assert server.complete("base", PROMPT)["choices"]
