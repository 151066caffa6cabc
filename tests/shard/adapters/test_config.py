from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.shard.adapters.config import LoraSpec, parse_config
from loraplex.shard.errors import AdapterRejected

from .layouts import config_bytes

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


def refusal(config: bytes) -> str:
    with pytest.raises(AdapterRejected) as refused:
        parse_config(config)
    return str(refused.value)


def spec_of(**fields: Any) -> LoraSpec:
    return parse_config(config_bytes(**fields))


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
    spec = parse_config(b'{"peft_type": "LORA"}')
    assert (spec.rank, spec.alpha, spec.rslora) == (default.r, default.lora_alpha, default.use_rslora)
    nulls = ("rank_pattern", "alpha_pattern", "target_modules", "bias", "fan_in_fan_out", "use_rslora", "r")
    spec = parse_config(json.dumps({"peft_type": "LORA"} | dict.fromkeys(nulls)).encode())
    assert (spec.rank, spec.scale_of(MODULE)) == (8, 1.0)


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
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("ensure_weight_tying", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 3}),
        ("enable_lora", [True, False]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("use_something_new", True),
        ("future_config", {"a": 1}),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    message = refusal(config_bytes(**{field: value}))
    assert field in message
    assert ";" in message, "the remedy follows the reason"


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_plain_initialisations_are_served(init: bool | str) -> None:
    assert spec_of(init_lora_weights=init).rank == 2


@pytest.mark.parametrize(
    "variant", ["use_dora", "modules_to_save", "layer_replication", "kasa_config", "use_new"]
)
@pytest.mark.parametrize("unset", [None, False, [], {}])
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
    data = json.dumps(config, default=str).encode()
    assert parse_config(data).warnings == ()


@pytest.mark.parametrize(
    "kind", ["ADALORA", "VERA", "IA3", "LOHA", "OFT", "BONE", "PROMPT_TUNING", "XLORA", 7]
)
def test_other_peft_types_are_refused(kind: Any) -> None:
    assert str(kind) in refusal(config_bytes(peft_type=kind))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", ("not JSON",)),
        (b"\xff\xff", ("not JSON",)),
        (b"[" * 100_000, ("not JSON",)),
        (b"[]", ("not a JSON object",)),
        (b"{}", ("peft_type",)),
        (b'{"fine_tune_type": "lora"}', ("MLX",)),
        (config_bytes(r="8"), ("r", "str")),
        (config_bytes(r=0), ("r is 0",)),
        (config_bytes(r=-1), ("r is -1",)),
        (config_bytes(rank_pattern={"q_proj": 0}), ("rank_pattern['q_proj'] is 0",)),
        (config_bytes(rank_pattern={"q_proj": "8"}), ("rank_pattern",)),
        (config_bytes(rank_pattern=[1]), ("rank_pattern",)),
        (config_bytes(rank_pattern={"(": 8}), ("rank_pattern", "regular expression")),
        (config_bytes(alpha_pattern={"*": 8}), ("alpha_pattern", "regular expression")),
        (config_bytes(target_modules="("), ("target_modules", "regular expression")),
        (config_bytes(target_modules=3), ("target_modules",)),
        (config_bytes(layers_to_transform=[1], layers_pattern="("), ("layers_pattern",)),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', ("out of range",)),
    ],
)
def test_bad_configs_are_refused(config: bytes, words: tuple[str, ...]) -> None:
    message = refusal(config)
    assert all(word in message for word in words), message
