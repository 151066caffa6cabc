"""How a model's linears become sites, and what is left of the originals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.shard.config import ShardConfig
from loraplex.shard.linear import LinearSite, SiteLinear
from loraplex.shard.linear_sites import group_sites, linear_calls
from loraplex.shard.load import LoadedModel, load_model
from loraplex.shard.trace import ModuleCall, trace


def loaded(directory: Path, **changes: object) -> LoadedModel:
    return load_model(
        ShardConfig(model=str(directory), device="cpu", kv_memory=1 << 20, **changes)  # type: ignore[arg-type]
    )


def sites_of(directory: Path) -> list[list[str]]:
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return [[call.name for call in site] for site in group_sites(linear_calls(model, trace(model)))]


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
    calls = [ModuleCall(name, 1, (1, 11, 4), (1, 11, 4), True) for name in ("a.q", "b.up", "a.k")]
    assert [[call.name for call in site] for site in group_sites(calls)] == [["a.q", "a.k"], ["b.up"]]


def test_what_sees_only_the_wanted_tokens_stays_alone() -> None:
    """Two heads: each may become as wide as an adapter's vocabulary."""
    calls = [ModuleCall(name, 1, (1, 2, 4), (1, 2, 4), True) for name in ("lm_head", "second_head")]
    assert [[call.name for call in site] for site in group_sites(calls)] == [["lm_head"], ["second_head"]]


def test_the_layout_says_what_adapters_may_change(tiny_model: Callable[[str], Path]) -> None:
    layout = loaded(tiny_model("qwen2")).layout
    linears = {target.name: target for target in layout.linears}
    k = linears["model.layers.1.self_attn.k_proj"]
    assert (k.in_features, k.out_features, k.out_offset, k.has_bias) == (64, 32, 64, True)
    assert k.site == linears["model.layers.1.self_attn.v_proj"].site
    assert not linears["model.layers.1.mlp.down_proj"].has_bias
    assert [target.name for target in layout.linears if target.is_head] == ["lm_head"]
    assert [(e.name, e.vocab_size, e.hidden_size) for e in layout.embeddings] == [
        ("model.embed_tokens", 300, 64)
    ]
    modules = {target.name: target.parameters for target in layout.modules}
    assert modules["model.norm"] == modules["model.layers.2.input_layernorm"] == (("weight", (64,)),)
    assert layout.other_modules == ()
    every = (*layout.linears, *layout.embeddings, *layout.modules)
    assert {target.site for target in every} == set(range(len(loaded(tiny_model("qwen2")).sites)))


def test_a_transposed_base_and_its_position_embedding(tiny_model: Callable[[str], Path]) -> None:
    layout = loaded(tiny_model("gpt2")).layout
    conv = layout.linears[0]
    assert (conv.in_features, conv.out_features, conv.fan_in_fan_out) == (64, 192, True)
    assert [target.name for target in layout.embeddings] == ["transformer.wte"]
    assert layout.other_modules == ("transformer.wpe",)
    norm = next(target for target in layout.modules if target.name == "transformer.ln_f")
    assert norm.parameters == (("weight", (64,)), ("bias", (64,)))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_norms_of_heads_are_found_whichever_way_they_lie(
    kind: str, tiny_model: Callable[[str], Path]
) -> None:
    modules = {target.name: target.parameters for target in loaded(tiny_model(kind)).layout.modules}
    assert modules["model.layers.1.self_attn.k_norm"] == (("weight", (16,)),)


@pytest.mark.parametrize(
    ("kind", "name"), [("llama_tied", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("llama", "")]
)
def test_a_tied_head_names_its_embedding(kind: str, name: str, tiny_model: Callable[[str], Path]) -> None:
    layout = loaded(tiny_model(kind)).layout
    head = layout.linears[-1]
    assert (head.is_head, head.tied_to) == (True, name)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "gpt2", "phi3", "opt"])
def test_the_base_weights_are_those_of_the_checkpoint(kind: str, tiny_model: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind))
    served = loaded(tiny_model(kind))
    layout = served.layout
    for target in layout.linears:
        module = model.get_submodule(target.name)
        weight = module.weight.detach()
        expected = (weight.t() if target.fan_in_fan_out else weight).numpy()
        assert np.array_equal(served.base.read(f"{target.name}.weight"), expected)
        assert (module.bias is not None) == target.has_bias
        if target.has_bias:
            assert np.array_equal(served.base.read(f"{target.name}.bias"), module.bias.detach().numpy())
    for other in (*layout.embeddings, *layout.modules):
        for name, value in model.get_submodule(other.name).named_parameters():
            own = served.base.read(f"{other.name}.{name}")
            assert np.array_equal(own, value.detach().numpy()), (other.name, name)


def test_fused_weights_are_held_once(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of a site keep no weight of their own beside the fused one."""
    kept: list[torch.Tensor | None] = []
    init = SiteLinear.__init__

    def note(self: SiteLinear, site: LinearSite, columns: slice | None, weight: torch.Tensor | None) -> None:
        kept.append(weight)
        init(self, site, columns, weight)

    monkeypatch.setattr(SiteLinear, "__init__", note)
    loaded(tiny_model("llama_tied"))
    per_layer = [None, None, None, "o", None, None, "down"]
    assert [weight is None for weight in kept] == [name is None for name in per_layer * 3] + [False]


def test_a_tied_head_is_held_once(tiny_model: Callable[[str], Path]) -> None:
    tied, untied = loaded(tiny_model("llama_tied")), loaded(tiny_model("llama"))
    assert untied.weight_bytes - tied.weight_bytes == 300 * 64 * 4


def test_the_digest_tells_checkpoints_apart(tiny_model: Callable[[str], Path]) -> None:
    digests = {loaded(tiny_model(kind)).digest for kind in ("llama", "llama_tied", "qwen2")}
    assert len(digests) == 3
    assert loaded(tiny_model("llama")).digest in digests
