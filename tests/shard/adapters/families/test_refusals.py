"""What a family's reader says no to, and how."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeftConfig,
    PeftType,
    VeraConfig,
)

from loraplex.shard.adapters.families.refused import refusal
from loraplex.shard.adapters.parse import READERS
from loraplex.shard.errors import AdapterRejected

from .oracle import Directory, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Unsupported layer type:UserWarning",
)

_BASE = "base_model.model.model.layers"
_TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "VeRA": VeraConfig(r=8, target_modules=_TARGETS),
    "LoHa": LoHaConfig(r=4, target_modules=_TARGETS),
    "LoKr": LoKrConfig(r=2, target_modules=_TARGETS),
    "MiSS": MissConfig(r=4, target_modules=_TARGETS),
    "IA3": IA3Config(target_modules=_TARGETS, feedforward_modules=["down_proj"]),
    "LN tuning": LNTuningConfig(target_modules=["input_layernorm"]),
}
PARTS = {
    "VeRA": "0.mlp.down_proj.vera_lambda_b",
    "LoHa": "0.mlp.down_proj.hada_w2_b",
    "LoKr": "0.mlp.down_proj.lokr_w2_a",
    "MiSS": "0.mlp.down_proj.miss_block",
    "IA3": "0.mlp.down_proj.ia3_l",
    "LN tuning": "0.input_layernorm.ln_tuning_layers.weight",
}

Adapter = Callable[[str], Directory]


@pytest.fixture(scope="module")
def sound(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter of each family, made once."""
    root = tmp_path_factory.mktemp("sound")
    return cache(lambda family: make(tiny_model("llama"), root / family, CONFIGS[family]))


@pytest.fixture
def adapter(sound: Adapter, tmp_path: Path) -> Adapter:
    """A copy of one, to be spoilt."""

    def copy(family: str) -> Directory:
        original = sound(family)
        shutil.copytree(original.path, tmp_path, dirs_exist_ok=True)
        return Directory(original.base, tmp_path)

    return copy


def refused(directory: Directory, *words: str, max_rank: int = 64) -> None:
    """Parsing names each of these words."""
    with pytest.raises(AdapterRejected) as error:
        directory.parse(max_rank=max_rank)
    for word in words:
        assert re.search(re.escape(word), str(error.value)), (word, str(error.value))


@pytest.mark.parametrize("family", CONFIGS)
def test_tensors_left_over(family: str, adapter: Adapter) -> None:
    directory = adapter(family)
    extra = {f"{_BASE}.{layer}.mlp.down_proj.other": torch.ones(2) for layer in range(7)}
    directory.rewrite(directory.tensors | extra)
    refused(directory, "7 of its", f"{_BASE}.4.mlp.down_proj.other (not a {family} tensor)", "and 2 more")


@pytest.mark.parametrize("family", CONFIGS)
def test_wrong_shape(family: str, adapter: Adapter) -> None:
    directory = adapter(family)
    tensors, key = directory.tensors, f"{_BASE}.{PARTS[family]}"
    shape = list(tensors[key].shape)
    tensors[key] = tensors[key].repeat(*(2 for _ in shape))
    doubled = str([2 * length for length in shape])
    if family == "LoKr":
        refused(directory.rewrite(tensors), f"{key} has shape {doubled}", str([2 * shape[0], shape[1]]))
    else:
        refused(directory.rewrite(tensors), f"{key} has shape {doubled}", f"need {shape}")


@pytest.mark.parametrize("family", CONFIGS)
def test_not_finite(family: str, adapter: Adapter) -> None:
    directory = adapter(family)
    tensors, key = directory.tensors, f"{_BASE}.{PARTS[family]}"
    tensors[key].view(-1)[0] = float("nan")
    placed = directory.rewrite(tensors).parse().placed
    spoilt = next(one for one in placed if f".{one.target.name}." in key)
    with pytest.raises(AdapterRejected, match=f"{re.escape(key)} holds NaN or infinity"):
        spoilt.build()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_module_that_the_base_lacks(family: str, adapter: Adapter) -> None:
    directory = adapter(family)
    tensors, key = directory.tensors, f"{_BASE}.{PARTS[family]}"
    wrong = key.replace("layers.0", "layers.9")
    tensors[wrong] = tensors.pop(key)
    refused(directory.rewrite(tensors), wrong, "the base has no such module")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_module_that_its_config_does_not_select(family: str, adapter: Adapter) -> None:
    directory = adapter(family).rewrite(target_modules=["k_proj"])
    refused(directory, PARTS[family], "its config does not select this module")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save is set", "without it")),
        ({"bias": "all"}, ("bias is 'all'", "without them")),
        ({"use_magic": True}, ("use_magic is set and not known",)),
        ({"magic_config": {"a": 1}}, ("magic_config is set and not known",)),
        ({"target_modules": 7}, ("target_modules",)),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
    ],
)
def test_config(family: str, fields: dict[str, Any], words: tuple[str, ...], adapter: Adapter) -> None:
    refused(adapter(family).rewrite(**fields), *words)


@pytest.mark.parametrize("family", CONFIGS)
def test_unknown_fields_are_named_in_a_warning(family: str, adapter: Adapter) -> None:
    warnings = adapter(family).rewrite(later_field=3, empty=None).parse().traits.warnings
    assert warnings == ("unknown fields of adapter_config.json were ignored: 'later_field'",)


@pytest.mark.parametrize("family", CONFIGS)
def test_other_names_for_the_same_tensors(family: str, adapter: Adapter) -> None:
    directory = adapter(family)
    expected = {placed.target.name for placed in directory.parse().placed}
    renamed = {}
    for key, tensor in directory.tensors.items():
        is_shared = key.startswith("base_model.vera_")
        head, _, part = key.rpartition(".")
        long = f"{head}.default.{part}" if family == "LN tuning" else f"{key}.default"
        renamed[key if is_shared else long.removeprefix("base_model.model.")] = tensor
    assert {placed.target.name for placed in directory.rewrite(renamed).parse().placed} == expected


@pytest.mark.parametrize("family", ["VeRA", "LoHa", "LoKr", "LN tuning"])
def test_missing_part(
    family: str, adapter: Adapter, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = adapter(family)
    if family == "LN tuning":
        directory = make(tiny_model("gpt2"), tmp_path / "other", LNTuningConfig(target_modules=["ln_1"]))
    tensors = directory.tensors
    key = next(
        key for key in sorted(tensors) if key.endswith(("_b", ".bias")) and "base_model.vera" not in key
    )
    del tensors[key]
    refused(directory.rewrite(tensors), f"has no {key.rpartition('.')[2]} beside it")


@pytest.mark.parametrize(("family", "rank"), [("VeRA", 8), ("MiSS", 4)])
def test_rank_above_the_limit(family: str, rank: int, adapter: Adapter) -> None:
    refused(adapter(family), f"has rank {rank}; the server was started with --max-rank 3", max_rank=3)


def test_two_adapters_in_one_file(adapter: Adapter) -> None:
    directory = adapter("MiSS")
    tensors = directory.tensors
    key = f"{_BASE}.{PARTS['MiSS']}"
    tensors[f"{key}.other"] = tensors[key].clone()
    refused(directory.rewrite(tensors), f"{key}.other and {key}", "mean the same tensor")
    del tensors[key]
    refused(directory.rewrite(tensors), "more than one adapter", f"{key}.other")


def test_vera_with_one_projection(adapter: Adapter) -> None:
    directory = adapter("VeRA")
    tensors = directory.tensors
    del tensors["base_model.vera_A"]
    refused(directory.rewrite(tensors), "lacks base_model.vera_A", "save the adapter again")


def test_vera_of_projections_alone(adapter: Adapter) -> None:
    directory = adapter("VeRA")
    shared = {key: tensor for key, tensor in directory.tensors.items() if key.startswith("base_model.vera_")}
    assert len(shared) == 2
    refused(directory.rewrite(shared), "VeRA tensors for no module of the base")


def test_miss_of_full_rank(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = MissConfig(r=4, target_modules=_TARGETS, init_weights="bat")
    refused(make(tiny_model("llama"), tmp_path, config), "init_weights is 'bat'", "convert_to_lora")


def test_miss_that_does_not_divide(adapter: Adapter) -> None:
    directory = adapter("MiSS").rewrite(init_weights="mini", mini_r=7)
    refused(directory, "mini_r is 7, which does not divide the 64 outputs")


@pytest.mark.parametrize("named", [["q_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_ia3_on_a_shared_input(named: list[str], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = IA3Config(target_modules=[*named, "o_proj"], feedforward_modules=named)
    directory = make(tiny_model("llama"), tmp_path, config)
    refused(directory, "self_attn.q_proj.ia3_l", "share one input", "feedforward_modules")


def test_ia3_with_one_vector_for_a_shared_input(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    named = ["q_proj", "k_proj", "v_proj"]
    directory = make(
        tiny_model("llama"), tmp_path, IA3Config(target_modules=named, feedforward_modules=named)
    )
    tensors = directory.tensors
    for key in tensors:
        tensors[key] = torch.linspace(0.5, 2, 64)[None]
    directory.rewrite(tensors)
    torch.testing.assert_close(directory.our_logits(), directory.peft_logits(), rtol=0, atol=1e-4)


def test_lokr_whole_and_in_parts(adapter: Adapter) -> None:
    directory = adapter("LoKr")
    tensors = directory.tensors
    key = f"{_BASE}.0.mlp.down_proj.lokr_w2"
    tensors[key] = torch.ones(8, 12)
    refused(directory.rewrite(tensors), f"{key} is there whole and in parts")


def test_lokr_of_another_base(adapter: Adapter) -> None:
    directory = adapter("LoKr")
    tensors = directory.tensors
    tensors[f"{_BASE}.0.mlp.down_proj.lokr_w1"] = torch.ones(4, 8)
    refused(directory.rewrite(tensors), "delta of shape [32, 96], the base has [64, 96]")


@pytest.mark.parametrize("family", ["LoHa", "LoKr"])
def test_rank_of_zero(family: str, adapter: Adapter) -> None:
    refused(adapter(family).rewrite(r=0), "is 0; a rank is at least 1")


def test_every_type_of_peft_is_served_or_refused_by_name() -> None:
    for peft_type in PeftType:
        if peft_type.value not in READERS:
            message = refusal(peft_type.value, READERS)
            assert f"peft_type {peft_type.value} is not served: " in message
            assert "; " in message, "it says what to do"
    assert "by MISS" in refusal("bone", READERS)
    assert "'NOVEL' is not known here (served: ADALORA, IA3," in refusal("novel", READERS)
