from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.shard.adapters.families.lora_config import LoraSpec, parse_config
from loraplex.shard.errors import AdapterRejected

from .layouts import mentions

MODULE = "model.layers.0.self_attn.q_proj"
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.3.w1")
] + ["lm_head", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]

PATTERN_KEYS = [
    "q_proj",
    "_proj",
    "proj",
    "self_attn.q_proj",
    "layers.1.*",
    "^model.layers.0.*",
    "model.layers.0.self_attn.q_proj",
    "base_model.model.model.layers.0.self_attn.q_proj",
    "q_proj|up_proj",
    r"layers\.(0|11)\.mlp\..*",
    ".*",
    "lm_head",
    "c_proj",
]


def spec_of(**fields: Any) -> LoraSpec:
    return parse_config({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields)


def refusal(**fields: Any) -> str:
    with pytest.raises(AdapterRejected) as refused:
        spec_of(**fields)
    return str(refused.value)


def test_plain_scale_is_alpha_over_rank() -> None:
    spec = spec_of(r=16, lora_alpha=8)
    assert (spec.rank_of(MODULE), spec.scale_of(MODULE)) == (16, 0.5)


def test_rslora_scale_is_alpha_over_root_of_rank() -> None:
    assert spec_of(r=16, lora_alpha=8, use_rslora=True).scale_of(MODULE) == 2.0
    assert spec_of(r=16, lora_alpha=8, use_rslora=True, rank_pattern={"q_proj": 7}).scale_of(
        MODULE
    ) == pytest.approx(8 / math.sqrt(7))


@pytest.mark.parametrize("alpha", [0, -3, 2.5])
def test_alpha_may_be_any_finite_number(alpha: float) -> None:
    assert spec_of(r=2, lora_alpha=alpha).scale_of(MODULE) == alpha / 2


def test_absent_and_null_fields_take_the_defaults_of_peft() -> None:
    default = LoraConfig()
    spec = parse_config({"peft_type": "LORA"})
    assert (spec.rank, spec.alpha, spec.rslora) == (default.r, default.lora_alpha, default.use_rslora)
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"peft_type"}
    spec = parse_config({"peft_type": "LORA"} | dict.fromkeys(fields))
    assert (spec.rank, spec.scale_of(MODULE)) == (8, 1.0)
    assert spec == parse_config({"peft_type": "LORA"})


@given(
    st.lists(st.tuples(st.sampled_from(PATTERN_KEYS), st.integers(1, 64)), max_size=4),
    st.lists(st.tuples(st.sampled_from(PATTERN_KEYS), st.integers(1, 64)), max_size=4),
    st.booleans(),
)
def test_patterns_decide_as_in_peft(
    ranks: list[tuple[str, int]], alphas: list[tuple[str, int]], rslora: bool
) -> None:
    rank_pattern, alpha_pattern = dict(ranks), dict(alphas)
    spec = spec_of(
        r=5, lora_alpha=3, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, use_rslora=rslora
    )
    for module in MODULES:
        rank = rank_pattern.get(get_pattern_key(rank_pattern.keys(), module), 5)
        alpha = alpha_pattern.get(get_pattern_key(alpha_pattern.keys(), module), 3)
        assert spec.rank_of(module) == rank
        assert spec.scale_of(module) == alpha / (math.sqrt(rank) if rslora else rank)


def test_the_first_matching_pattern_wins() -> None:
    wide_first = spec_of(rank_pattern={"layers.0.*": 3, "q_proj": 4})
    narrow_first = spec_of(rank_pattern={"q_proj": 4, "layers.0.*": 3})
    assert (wide_first.rank_of(MODULE), narrow_first.rank_of(MODULE)) == (3, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "q_proj"},
        {"target_modules": r".*\.(q|o)_proj"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]},
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": r"\w"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "o_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    ],
)
def test_modules_are_selected_as_in_peft(fields: dict[str, Any]) -> None:
    config = LoraConfig(**fields)
    spec = spec_of(**fields)
    selected = [module for module in MODULES if spec.selection.selects(module)]
    # PEFT marks an excluded module with an object that is neither True nor a match.
    expected = [m for m in MODULES if check_target_module_exists(config, m) and not _excluded(config, m)]
    assert selected == expected


def _excluded(config: LoraConfig, module: str) -> bool:
    return type(check_target_module_exists(config, module)).__name__ == "_ExcludedModule"


@pytest.mark.parametrize("targets", [None, "all-linear", "ALL-LINEAR"])
def test_unnamed_targets_are_what_the_tensors_say(targets: str | None) -> None:
    assert spec_of(target_modules=targets).selection.selects(MODULE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("arrow_config", {"top_k": 3}),
        ("enable_lora", [True, False]),
        ("bias", "some"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "something_new"),
        ("use_something_new", True),
        ("future_config", {"a": 1}),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", {"embed_tokens": [-1]}),
        ("alora_invocation_tokens", [-1]),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert field in message
    assert ";" in message, "the remedy follows the reason"


@pytest.mark.parametrize("init", ["corda", "loftq"])
def test_initialisations_that_cannot_be_repeated_name_the_conversion(init: str) -> None:
    assert mentions(refusal(init_lora_weights=init), init, "path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica", "lora_ga"])
def test_plain_initialisations_are_served(init: bool | str | None) -> None:
    spec = spec_of(init_lora_weights=init)
    assert spec.residual == ""
    assert len(spec.warnings) == (init == "lora_ga")


@pytest.mark.parametrize(
    ("fields", "residual", "kind"),
    [
        ({"init_lora_weights": "pissa"}, "pissa", "PiSSA as LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa", "PiSSA as LoRA"),
        ({"init_lora_weights": "olora"}, "olora", "OLoRA as LoRA"),
        ({"kasa_config": {"beta": 1}}, "kasa", "KaSA as LoRA"),
    ],
)
def test_initialisations_that_change_the_base(fields: dict[str, Any], residual: str, kind: str) -> None:
    spec = spec_of(**fields)
    assert (spec.residual, spec.kind) == (residual, kind)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "LoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True, "use_rslora": True}, "DoRA"),
        ({"alora_invocation_tokens": [5]}, "aLoRA"),
        ({"use_qalora": True}, "QA-LoRA as LoRA"),
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": None}}, "BD-LoRA as LoRA"),
        ({"monteclora_config": {"num_samples": 8}, "velora_config": {"scale": 1}}, "LoRA"),
    ],
)
def test_kinds(fields: dict[str, Any], kind: str) -> None:
    spec = spec_of(**fields)
    assert (spec.kind, spec.warnings) == (kind, ())


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True, "lora_bias": True},
        {"use_dora": True, "use_bdlora": {"nblocks": 2}},
        {"use_qalora": True, "alora_invocation_tokens": [5]},
        {"kasa_config": {"beta": 1}, "use_dora": True},
    ],
)
def test_variants_that_peft_does_not_combine_are_refused(fields: dict[str, Any]) -> None:
    assert mentions(refusal(**fields), *fields, "at once")


@pytest.mark.parametrize(
    ("module", "saved"),
    [
        ("lm_head", True),
        ("model.layers.0.input_layernorm", True),
        ("model.norm", True),
        ("model.embed", False),
    ],
)
def test_saved_modules_are_found_by_their_ends(module: str, saved: bool) -> None:
    assert spec_of(modules_to_save=["norm", "lm_head"]).saves(module) == saved
    assert not spec_of().saves(module)


def test_variants_that_are_off() -> None:
    off = {"use_dora": False, "use_bdlora": False, "kasa_config": {}, "trainable_token_indices": []}
    assert spec_of(**off) == spec_of()


@pytest.mark.parametrize(
    "variant", ["modules_to_save", "layer_replication", "arrow_config", "enable_lora", "use_new"]
)
@pytest.mark.parametrize("unset", [None, []])
def test_an_unset_variant_is_no_reason_to_refuse(variant: str, unset: Any) -> None:
    assert spec_of(**{variant: unset}).warnings == ()


def test_an_unknown_field_is_a_warning() -> None:
    assert "novelty" in spec_of(novelty=3).warnings[0]
    assert spec_of(novelty=None).warnings == ()
    [warning] = spec_of(**{f"novelty_{index}": 1 for index in range(1000)}).warnings
    assert warning.endswith("'novelty_4' and 995 more")


def test_every_field_of_an_ordinary_config_is_known() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    config["target_modules"] = list(config["target_modules"])
    assert parse_config(json.loads(json.dumps(config, default=str))).warnings == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": "8"}, ("r", "str")),
        ({"r": 0}, ("r is 0",)),
        ({"r": -1}, ("r is -1",)),
        ({"r": 10**30}, ("r is 1000",)),
        ({"lora_alpha": -1e308}, ("lora_alpha is -1e+308",)),
        ({"alpha_pattern": {"q_proj": 1e38}}, ("alpha_pattern['q_proj'] is 1e+38",)),
        ({"trainable_token_indices": [2**70]}, ("trainable_token_indices",)),
        ({"alora_invocation_tokens": [2**32]}, ("alora_invocation_tokens",)),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj'] is 0",)),
        ({"rank_pattern": {"q_proj": "8"}}, ("rank_pattern",)),
        ({"rank_pattern": [1]}, ("rank_pattern",)),
        ({"rank_pattern": {"(": 8}}, ("rank_pattern", "regular expression")),
        ({"alpha_pattern": {"*": 8}}, ("alpha_pattern", "regular expression")),
        ({"target_modules": "("}, ("target_modules", "regular expression")),
        ({"target_modules": 3}, ("target_modules",)),
        ({"layers_to_transform": [1], "layers_pattern": "("}, ("layers_pattern",)),
        ({"modules_to_save": "lm_head"}, ("modules_to_save",)),
        ({"trainable_token_indices": ["a"]}, ("trainable_token_indices",)),
        ({"use_bdlora": {"nblocks": 0}}, ("use_bdlora.nblocks is 0",)),
        ({"use_bdlora": True}, ("use_bdlora",)),
        ({"use_qalora": True, "qalora_group_size": 0}, ("qalora_group_size is 0",)),
        ({"use_dora": "yes"}, ("use_dora", "str")),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    assert mentions(refusal(**fields), *words)
