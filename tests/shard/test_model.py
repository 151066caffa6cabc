"""How a model's linears become sites, and what is left of the originals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.shard.config import ShardConfig
from loraplex.shard.linear import SiteLinear
from loraplex.shard.load import load_model
from loraplex.shard.model import group_sites
from loraplex.shard.trace import LinearCall, trace


def loaded(directory: Path, **changes: object) -> object:
    return load_model(
        ShardConfig(model=str(directory), device="cpu", kv_memory=1 << 20, **changes)  # type: ignore[arg-type]
    )


def sites_of(directory: Path) -> list[list[str]]:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return [[call.name for call in site] for site in group_sites(trace(model).linears)]


def test_linears_with_one_input_form_a_site(tiny_model: Callable[[str], Path]) -> None:
    first = [
        [name.removeprefix("model.layers.0.") for name in site] for site in sites_of(tiny_model("llama"))[:4]
    ]
    assert first == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert sites_of(tiny_model("llama"))[-1] == ["lm_head"]
    assert sites_of(tiny_model("gpt2"))[0] == ["transformer.h.0.attn.c_attn"]


def test_the_same_tensor_under_another_parent_is_another_site() -> None:
    calls = [LinearCall("a.q", 1, False), LinearCall("b.up", 1, False), LinearCall("a.k", 1, False)]
    assert [[call.name for call in site] for site in group_sites(calls)] == [["a.q", "a.k"], ["b.up"]]


def test_the_layout_tells_targets_from_what_no_adapter_may_change(tiny_model: Callable[[str], Path]) -> None:
    layout = loaded(tiny_model("qwen2")).layout  # type: ignore[attr-defined]
    targets = {target.name: target for target in layout.targets}
    k = targets["model.layers.1.self_attn.k_proj"]
    assert (k.in_features, k.out_features, k.out_offset) == (64, 32, 64)
    assert k.site == targets["model.layers.1.self_attn.v_proj"].site
    assert "model.embed_tokens" in layout.other_modules
    assert "model.layers.1.self_attn.k_proj" not in layout.other_modules
    assert [weight.name for weight in layout.base_weights] == ["lm_head"]
    conv = loaded(tiny_model("gpt2")).layout.targets[0]  # type: ignore[attr-defined]
    assert (conv.in_features, conv.out_features, conv.fan_in_fan_out) == (64, 192, True)


def test_experts_are_no_targets(tiny_model: Callable[[str], Path]) -> None:
    layout = loaded(tiny_model("mixtral")).layout  # type: ignore[attr-defined]
    assert not [target.name for target in layout.targets if "experts" in target.name]
    assert any("experts" in name for name in layout.other_modules)


def test_fused_weights_are_held_once(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of a site keep no weight of their own beside the fused one."""
    kept: list[torch.Tensor | None] = []
    init = SiteLinear.__init__

    def note(self: SiteLinear, site: object, offset: int, out: int, weight: torch.Tensor | None) -> None:
        kept.append(weight)
        init(self, site, offset, out, weight)  # type: ignore[arg-type]

    monkeypatch.setattr(SiteLinear, "__init__", note)
    loaded(tiny_model("llama_tied"))
    per_layer = [None, None, None, "o", None, None, "down"]
    assert [weight is None for weight in kept] == [name is None for name in per_layer * 3] + [False]


def test_a_tied_head_is_held_once(tiny_model: Callable[[str], Path]) -> None:
    tied, untied = loaded(tiny_model("llama_tied")), loaded(tiny_model("llama"))
    assert untied.weight_bytes - tied.weight_bytes == 300 * 64 * 4  # type: ignore[attr-defined]


def test_the_digest_tells_checkpoints_apart(tiny_model: Callable[[str], Path]) -> None:
    digests = {loaded(tiny_model(kind)).digest for kind in ("llama", "llama_tied", "qwen2")}  # type: ignore[attr-defined]
    assert len(digests) == 3
    assert loaded(tiny_model("llama")).digest in digests  # type: ignore[attr-defined]
