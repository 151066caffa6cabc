"""Adapters made by PEFT change the base as PEFT does: compared on the logits of whole models."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loraplex.shard.adapters.changes import LinearChange, ParsedAdapter
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.parse import parse_adapter
from loraplex.shard.errors import AdapterRejected

from ..dense import merged_logits
from .layouts import base_of, changes_of, held, layout_of

TOKENS = (5, 71, 204, 33, 71, 9, 150, 1, 12, 88, 240, 3, 17)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Case:
    """An adapter made by PEFT, and what is known of it beside its logits."""

    model: str
    config: Mapping[str, Any]
    kind: str = "LoRA"
    alone: str = ""
    owns: tuple[str, ...] = ()
    vocab_size: int = 0
    resize: int = 0
    """Rows of the vocabulary that the adapter is trained on; 0: the base's."""
    untouched: bool = False
    """Save it as PEFT initialises it, so that only what is resized changes anything."""
    save: Mapping[str, Any] = field(default_factory=dict)


ATTENTION = ["q_proj", "v_proj"]
SOME = ["q_proj", "down_proj"]
NORMS = tuple(
    f"model.layers.{layer}.{norm}"
    for layer in range(3)
    for norm in ("input_layernorm", "post_attention_layernorm")
)
EMBED, HEAD = "model.embed_tokens", "lm_head"

CASES: Mapping[str, Case] = {
    "q and v": Case("llama", {"target_modules": ATTENTION}),
    "all linear": Case("llama", {"target_modules": "all-linear", "r": 7}),
    "rslora": Case("llama", {"target_modules": ATTENTION, "r": 7, "use_rslora": True}, kind="rsLoRA"),
    "transposed": Case("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "fused": Case("phi3", {"target_modules": "all-linear"}),
    "layers": Case("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "regular expression": Case("llama", {"target_modules": r".*\.1\..*(q|up)_proj"}),
    "excluded": Case("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "patterns": Case(
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"gate_proj|up_proj": 1, "layers.0.*": 3, "q_proj": 5},
            "alpha_pattern": {"^model.layers.1.*": 9, "q_proj": -4, "v_proj": 2.5},
        },
    ),
    "dora": Case("llama", {"target_modules": "all-linear", "use_dora": True}, "DoRA", "DoRA"),
    "dora with biases": Case(
        "qwen2", {"target_modules": [*SOME, "k_proj"], "use_dora": True}, "DoRA", "DoRA"
    ),
    "dora transposed": Case(
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, "DoRA", "DoRA"
    ),
    "dora with patterns": Case(
        "llama",
        {
            "target_modules": SOME,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"down_proj": 5},
        },
        "DoRA",
        "DoRA",
    ),
    "dora on embedding and head": Case(
        "llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}, "DoRA", "DoRA"
    ),
    "dora on a scaled embedding": Case(
        "gemma3", {"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA", "DoRA"
    ),
    "dora with trained biases": Case(
        "qwen2", {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"}, "DoRA", "DoRA"
    ),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding that is scaled": Case("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding that is tied": Case("llama_tied", {"target_modules": ["embed_tokens"]}),
    "embedding of gpt2": Case("gpt2", {"target_modules": ["wte"]}),
    "head": Case("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "head that is tied": Case("llama_tied", {"target_modules": ["lm_head"]}),
    "tied together": Case("llama_tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied together by the head": Case(
        "llama_tied", {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    ),
    "saved head": Case("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, owns=(HEAD,)),
    "saved head and embedding": Case(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
        owns=(EMBED, HEAD),
    ),
    "saved embedding, tied": Case(
        "llama_tied", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, owns=(EMBED,)
    ),
    "saved embedding, tied together": Case(
        "llama_tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        owns=(EMBED, HEAD),
    ),
    "saved norms": Case(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
        owns=(*NORMS, "model.norm"),
    ),
    "saved linear": Case(
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
        owns=tuple(f"model.layers.{layer}.self_attn.k_proj" for layer in range(3)),
    ),
    "saved transposed linear": Case(
        "gpt2",
        {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"], "fan_in_fan_out": True},
        owns=tuple(f"transformer.h.{layer}.attn.c_attn" for layer in range(3)),
    ),
    "saved block": Case(
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
        owns=tuple(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    "tokens": Case("llama", {"target_modules": ATTENTION, "trainable_token_indices": [71, 1]}, owns=(EMBED,)),
    "tokens, tied": Case(
        "llama_tied", {"target_modules": ATTENTION, "trainable_token_indices": [71, 1]}, owns=(EMBED, HEAD)
    ),
    "tokens of both": Case(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [7]}},
        owns=(EMBED, HEAD),
    ),
    "tokens of both, tied": Case(
        "llama_tied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [7]}},
        owns=(EMBED, HEAD),
    ),
    "tokens of both, tied, the same": Case(
        "llama_tied",
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
        owns=(EMBED, HEAD),
    ),
    "tokens of the tied head": Case(
        "llama_tied", {"target_modules": ATTENTION, "trainable_token_indices": {"lm_head": [7]}}, owns=(HEAD,)
    ),
    "tokens of gpt2": Case(
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": [5, 9], "fan_in_fan_out": True},
        owns=("transformer.wte", HEAD),
    ),
    "tokens and head, resized": Case(
        "llama",
        {
            "target_modules": ATTENTION,
            "trainable_token_indices": [301, 300, 5],
            "modules_to_save": ["lm_head"],
        },
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "tokens, resized": Case(
        "llama",
        {"target_modules": ATTENTION, "trainable_token_indices": [300]},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "tokens, resized, tied": Case(
        "llama_tied",
        {"target_modules": ATTENTION, "trainable_token_indices": [300]},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "resized": Case("llama", {"target_modules": ATTENTION}, owns=(EMBED, HEAD), vocab_size=304, resize=304),
    "resized, tied": Case(
        "llama_tied", {"target_modules": ATTENTION}, owns=(EMBED, HEAD), vocab_size=304, resize=304
    ),
    "resized, saved": Case(
        "llama",
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "resized, saved embedding, tied": Case(
        "llama_tied",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "resized, LoRA on both": Case(
        "llama",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "resized, DoRA on both": Case(
        "llama",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
        "DoRA",
        "DoRA",
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
    ),
    "biases of LoRA's modules": Case(
        "qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, alone="biases of its own"
    ),
    "all biases": Case("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, alone="biases of its own"),
    "all biases, also of norms": Case(
        "opt",
        {"target_modules": ["q_proj"], "bias": "all"},
        alone="biases of its own",
        owns=(
            *(
                f"model.decoder.layers.{layer}.{norm}"
                for layer in range(3)
                for norm in ("self_attn_layer_norm", "final_layer_norm")
            ),
            "model.decoder.final_layer_norm",
        ),
    ),
    "biases of LoRA's own": Case("qwen2", {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "pissa": Case("llama", {"target_modules": SOME, "init_lora_weights": "pissa"}, "PiSSA as LoRA"),
    "pissa with rslora": Case(
        "llama",
        {"target_modules": SOME, "init_lora_weights": "pissa", "use_rslora": True},
        "PiSSA as LoRA",
    ),
    "pissa, transposed": Case(
        "gpt2",
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
        "PiSSA as LoRA",
    ),
    "olora": Case("llama", {"target_modules": SOME, "init_lora_weights": "olora"}, "OLoRA as LoRA"),
    "kasa": Case("llama", {"target_modules": SOME, "kasa_config": KasaConfig()}, "KaSA as LoRA"),
    "kasa with biases": Case(
        "qwen2", {"target_modules": SOME, "kasa_config": KasaConfig(), "lora_bias": True}, "KaSA as LoRA"
    ),
    "pissa with dora": Case(
        "llama",
        {"target_modules": SOME, "init_lora_weights": "pissa", "use_dora": True},
        "DoRA",
        "DoRA",
    ),
    "block-diagonal": Case(
        "llama",
        {
            "target_modules": SOME,
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2
            ),
        },
        "BD-LoRA as LoRA",
    ),
    "block-diagonal, some": Case(
        "llama",
        {
            "target_modules": SOME,
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], nblocks=4, match_strict=False),
        },
        "BD-LoRA as LoRA",
    ),
    "monteclora": Case("llama", {"target_modules": SOME, "monteclora_config": MontecloraConfig()}),
    "velora": Case("llama", {"target_modules": SOME, "velora_config": VeloraConfig()}),
    "mica": Case("llama", {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
    "orthogonal": Case("llama", {"target_modules": SOME, "init_lora_weights": "orthogonal"}),
    "gaussian": Case("llama", {"target_modules": SOME, "init_lora_weights": "gaussian"}),
    "no initialisation": Case("llama", {"target_modules": SOME, "init_lora_weights": False}),
    "fresh": Case("llama", {"target_modules": SOME}, untouched=True),
    "fresh, resized": Case(
        "llama",
        {"target_modules": SOME},
        owns=(EMBED, HEAD),
        vocab_size=304,
        resize=304,
        untouched=True,
    ),
}


@pytest.fixture(scope="module")
def base(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[nn.Module, Any, Any]]:
    """A tiny model by kind, with its layout and its weights as readers ask for them."""

    @cache
    def load(kind: str) -> tuple[nn.Module, Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(kind)).eval()
        with quiet():
            return model, layout_of(model), base_of(model)

    return load


def train(model: nn.Module, seed: int) -> None:
    """Move everything that PEFT would train, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            size = 0.1 if "lora_" not in name or "magnitude" in name else 0.5 / parameter.shape[-1] ** 0.5
            parameter.data += noise * size


def make(model: nn.Module, case: Case, directory: Path) -> nn.Module:
    """Save the adapter of a case, made on a copy of `model`; answers the model that PEFT has then."""
    own = copy.deepcopy(model)
    own.config._name_or_path = model.config._name_or_path
    with quiet():
        if case.resize:
            own.resize_token_embeddings(case.resize)
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | dict(case.config))
        wrapped = get_peft_model(own, config)
        if not case.untouched:
            train(wrapped, seed=1)
        wrapped.save_pretrained(directory, **case.save)
    return wrapped.eval()


def parse(directory: Path, layout: Any, weights: Any) -> ParsedAdapter:
    file = memoryview((directory / WEIGHTS).read_bytes())
    return parse_adapter((directory / CONFIG).read_bytes(), file, layout, weights)


def logits(model: nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """fp32 [len(tokens), vocabulary]."""
    with torch.inference_mode():
        output: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return output


def adapted_logits(
    model: nn.Module, layout: AdapterLayout, parsed: ParsedAdapter, tokens: Sequence[int] = TOKENS
) -> torch.Tensor:
    """Of the model with what was read merged into it, fp32."""
    return merged_logits(model, layout, [(changes_of(parsed), 1.0)], tokens).float()


def difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    assert expected.shape == actual.shape
    return (expected - actual).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_peft(name: str, base: Any, tmp_path: Path) -> None:
    case = CASES[name]
    model, layout, weights = base(case.model)
    reference = make(model, case, tmp_path)
    parsed = parse(tmp_path, layout, weights)
    tokens = (*TOKENS, 300, 303) if case.resize else TOKENS
    expected, actual = logits(reference, tokens), adapted_logits(model, layout, parsed, tokens)
    assert difference(expected, actual) < 1e-4
    if not case.untouched:
        known = [token for token in tokens if token < 300]
        unadapted = logits(model, known)
        assert difference(logits(reference, known)[:, : unadapted.shape[1]], unadapted) > 0.1
    traits = parsed.traits
    assert (traits.kind, traits.alone, traits.vocab_size) == (case.kind, case.alone, case.vocab_size)
    assert sorted(traits.owns) == sorted(case.owns)
    assert traits.warnings == ()


Alter = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def keys(change: Callable[[str], str]) -> Alter:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def _old_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As PEFT 0.2 wrote a saved head."""
    head = tensors.pop("base_model.model.lm_head.weight")
    return tensors | {
        "base_model.model.lm_head.modules_to_save.weight": head,
        "base_model.model.lm_head.original_module.weight": torch.zeros_like(head),
    }


def _old_named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    head = tensors.pop("base_model.model.lm_head.weight")
    return tensors | {"base_model.model.lm_head.modules_to_save.default.weight": head}


def _without_copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "base_layer" not in key}


ALTERED: Mapping[str, tuple[str, Alter]] = {
    "no prefix": ("all linear", keys(lambda key: key.removeprefix("base_model.model."))),
    "no model prefix": ("all linear", keys(lambda key: key.replace("model.model.model.", "model.model."))),
    "default": ("all linear", keys(lambda key: key.replace(".weight", ".default.weight"))),
    "vision-language, old": (
        "head",
        keys(lambda key: key.replace("base_model.model.", "base_model.model.language_model.")),
    ),
    "vision-language, new": (
        "all linear",
        keys(lambda key: key.replace("model.model.model.", "model.model.model.language_model.")),
    ),
    "magnitude as module": (
        "dora",
        keys(lambda key: key.replace("magnitude_vector", "magnitude_vector.weight")),
    ),
    "magnitude with name": (
        "dora",
        keys(lambda key: key.replace("magnitude_vector", "magnitude_vector.default.weight")),
    ),
    "magnitude with bare name": (
        "dora",
        keys(lambda key: key.replace("magnitude_vector", "magnitude_vector.default")),
    ),
    "embedding with name": (
        "embedding",
        keys(lambda key: key.replace("embedding_A", "embedding_A.x").replace("embedding_B", "embedding_B.x")
             .replace("lora_A.", "lora_A.x.").replace("lora_B.", "lora_B.x.")),
    ),
    "old saved head": ("saved head", _old_saved),
    "old saved head with name": ("saved head", _old_named),
    "old biases": ("biases of LoRA's modules", keys(lambda key: key.replace(".base_layer.bias", ".bias"))),
    "no copies of the base": ("head", _without_copies),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_other_names_mean_the_same(name: str, base: Any, tmp_path: Path) -> None:
    case, alter = CASES[ALTERED[name][0]], ALTERED[name][1]
    model, layout, weights = base(case.model)
    reference = make(model, case, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    altered = alter(dict(tensors))
    assert altered.keys() != tensors.keys()
    save_file(altered, tmp_path / WEIGHTS)
    parsed = parse(tmp_path, layout, weights)
    assert difference(logits(reference, TOKENS), adapted_logits(model, layout, parsed)) < 1e-4
    assert parsed.traits.owns == case.owns


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"fan_in_fan_out": True},
        {"fan_in_fan_out": None},
        {"enable_lora": None, "merge_weights": False},
        {"rank_pattern": None, "alpha_pattern": None, "target_modules": None},
        {"target_modules": "all-linear"},
        {"init_lora_weights": None, "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": None},
        {"modules_to_save": ["classifier", "score"]},
    ],
)
def test_fields_that_mean_nothing_here_are_passed_over(
    fields: Mapping[str, Any], base: Any, tmp_path: Path
) -> None:
    model, layout, weights = base("gpt2")
    case = replace(CASES["transposed"], config={"target_modules": ["c_attn"], "fan_in_fan_out": True})
    reference = make(model, case, tmp_path)
    edit_config(tmp_path, **fields)
    parsed = parse(tmp_path, layout, weights)
    assert difference(logits(reference, TOKENS), adapted_logits(model, layout, parsed)) < 1e-4
    assert parsed.traits.warnings == ()


@pytest.mark.parametrize("alpha", [0, -3, 2.5])
def test_alpha_may_be_any_number(alpha: float, base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    make(model, CASES["q and v"], tmp_path)
    edit_config(tmp_path, lora_alpha=alpha)
    with quiet():
        reference = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    actual = adapted_logits(model, layout, parse(tmp_path, layout, weights))
    assert difference(logits(reference, TOKENS), actual) < 1e-4


def test_pissa_saved_as_plain_lora_is_plain_lora(base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    with quiet():
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=SOME, init_lora_weights="pissa", task_type="CAUSAL_LM"
        )
        wrapped = get_peft_model(copy.deepcopy(model), config)
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(tmp_path / "initial")
        wrapped.peft_config["default"].init_lora_weights = "pissa"
        train(wrapped, seed=1)
        wrapped.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    parsed = parse(tmp_path / "converted", layout, weights)
    assert (parsed.traits.kind, parsed.max_rank) == ("LoRA", 8)
    assert difference(logits(wrapped.eval(), TOKENS), adapted_logits(model, layout, parsed)) < 1e-4


def test_residual_initialisations_double_the_rank(base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    make(model, CASES["pissa"], tmp_path)
    assert parse(tmp_path, layout, weights).max_rank == 8
    with pytest.raises(
        AdapterRejected, match="rank 4, served as 8; the server was started with --max-rank 7"
    ):
        parse(tmp_path, replace(layout, max_rank=7), weights)


@pytest.mark.parametrize(
    ("init", "word"), [("lora_ga", "LoRA-GA"), ("pissa_niter_4", "randomised SVD")], ids=str
)
def test_what_can_only_be_served_nearly_is_warned_of(init: str, word: str, base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    make(model, CASES["q and v"], tmp_path)
    edit_config(tmp_path, init_lora_weights=init)
    [warning] = parse(tmp_path, layout, weights).traits.warnings
    assert word in warning


def test_an_activated_adapter_is_plain_from_its_invocation_on(base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    make(model, CASES["q and v"], tmp_path)
    plain = adapted_logits(model, layout, parse(tmp_path, layout, weights))
    edit_config(tmp_path, alora_invocation_tokens=[33, 71])
    activated = parse(tmp_path, layout, weights)
    assert (activated.traits.kind, activated.traits.invocation_tokens) == ("aLoRA", (33, 71))
    assert torch.equal(plain, adapted_logits(model, layout, activated))


@pytest.mark.parametrize("case", ["saved norms", "tokens", "all biases", "embedding"])
def test_an_activated_adapter_changes_linears_alone(case: str, base: Any, tmp_path: Path) -> None:
    model, layout, weights = base(CASES[case].model)
    make(model, CASES[case], tmp_path)
    edit_config(tmp_path, alora_invocation_tokens=[33, 71])
    with pytest.raises(AdapterRejected, match="alora_invocation_tokens is set, and it changes more"):
        parse(tmp_path, layout, weights)


def test_group_wise_factors_are_spread(base: Any, tmp_path: Path) -> None:
    """Against the definition: A applies to the mean of every group of inputs, times the number of groups."""
    model, layout, weights = base("llama")
    make(model, CASES["q and v"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    grouped = {
        key: tensor[:, :8].contiguous() if "lora_A" in key else tensor for key, tensor in tensors.items()
    }
    save_file(grouped, tmp_path / WEIGHTS)
    edit_config(tmp_path, use_qalora=True, qalora_group_size=8)
    parsed = parse(tmp_path, layout, weights)
    assert parsed.traits.kind == "QA-LoRA as LoRA"
    change = changes_of(parsed)["model.layers.1.self_attn.q_proj"]
    assert isinstance(change, LinearChange)
    x = torch.randn(5, 64)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    pooled = x.view(5, 8, 8).mean(dim=2) * 8
    expected = (
        (pooled @ grouped[f"{prefix}.lora_A.weight"].t()) @ grouped[f"{prefix}.lora_B.weight"].t() * 1.5
    )
    actual = (x @ torch.from_numpy(change.a).t()) @ torch.from_numpy(change.b).t()
    torch.testing.assert_close(actual, expected)


def test_tensors_of_a_vision_tower_are_left_out_with_a_warning(base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    reference = make(model, CASES["q and v"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    text = {
        key.replace("model.model.model.", "model.model.model.language_model."): value
        for key, value in tensors.items()
    }
    vision = {f"{tower}.lora_A.weight": torch.ones(4, 32), f"{tower}.lora_B.weight": torch.ones(32, 4)}
    save_file(text | vision, tmp_path / WEIGHTS)
    edit_config(tmp_path, target_modules=r".*(language_model|vision_tower).*(q|v)_proj")
    parsed = parse(tmp_path, layout, weights)
    assert parsed.traits.warnings == (
        "2 tensors of a vision or audio model were left out: text alone is served",
    )
    assert difference(logits(reference, TOKENS), adapted_logits(model, layout, parsed)) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_of_the_base_in_another_dtype_is_no_replacement(dtype: str, base: Any, tmp_path: Path) -> None:
    """The served weights are rounded, the copy is not."""
    model, layout, _ = base("llama")
    make(model, CASES["head"], tmp_path)
    served = copy.deepcopy(model).to(getattr(torch, dtype))
    parsed = parse(tmp_path, replace(layout, dtype=dtype), held(dict(served.named_parameters())))
    assert parsed.traits.owns == ()


def test_only_rows_that_differ_are_kept(base: Any, tmp_path: Path) -> None:
    model, layout, weights = base("llama")
    make(model, CASES["head"], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"][[3, 250]] += 0.5
    save_file(tensors, tmp_path / WEIGHTS)
    parsed = parse(tmp_path, layout, weights)
    assert parsed.traits.owns == ("lm_head",)
    change = changes_of(parsed)["lm_head"]
    assert isinstance(change, LinearChange)
    assert change.rows.ids.tolist() == [3, 250]
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, tmp_path / WEIGHTS)
    change = changes_of(parse(tmp_path, layout, weights))["lm_head"]
    assert isinstance(change, LinearChange)
    assert change.rows.ids is None
    assert change.rows.weight.shape == (300, 64)


def test_an_adapter_of_another_model_is_refused(base: Any, tmp_path: Path) -> None:
    make(base("llama")[0], CASES["all linear"], tmp_path)
    _, layout, weights = base("gpt2")
    with pytest.raises(
        AdapterRejected, match=r"42 of its 42 tensors cannot be applied.*the base has no such"
    ):
        parse(tmp_path, layout, weights)


def test_a_classifier_is_refused(tiny_model: Callable[[str], Path], base: Any, tmp_path: Path) -> None:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model("llama"), num_labels=2)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=ATTENTION, task_type="SEQ_CLS"))
        wrapped.save_pretrained(tmp_path)
    _, layout, weights = base("llama")
    with pytest.raises(AdapterRejected, match=r"score\.weight \(a classification head"):
        parse(tmp_path, layout, weights)


def test_a_large_adapter_is_parsed_quickly(base: Any, tmp_path: Path) -> None:
    """Placing a hundred modules takes a small part of a second, so that loads stay cheap."""
    model, layout, weights = base("llama")
    make(model, CASES["all linear"], tmp_path)
    begin = time.process_time()
    for _ in range(4):
        changes_of(parse(tmp_path, layout, weights))
    assert time.process_time() - begin < 1.0
