"""What a LORA adapter's files may hold, and how everything else is refused."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save as save_torch

from loraplex.shard.adapters.changes import LinearChange, ParsedAdapter
from loraplex.shard.adapters.floats import all_finite, read_float32, store
from loraplex.shard.adapters.layout import AdapterLayout, EmbeddingTarget, ModuleTarget, Target
from loraplex.shard.adapters.parse import parse_adapter
from loraplex.shard.errors import AdapterRejected

from .layouts import TOY, Q, V, changes_of, config_bytes, held, mentions, toy_tensors, weights_bytes

Arrays = Mapping[str, np.ndarray]

MODEL = replace(
    TOY,
    linears=(*TOY.linears, Target("lm_head", 2, 8, 5, 0, is_head=True, tied_to="model.embed_tokens")),
    embeddings=(EmbeddingTarget("model.embed_tokens", 3, 5, 8),),
    modules=(ModuleTarget("model.norm", 4, (("weight", (8,)),)),),
    other_modules=("model.rotary_table",),
)
"""TOY with an embedding, a head that is tied to it, and a norm."""

TABLE = np.random.default_rng(1).standard_normal((5, 8), np.float32)
BASE = held(
    {
        "model.embed_tokens.weight": torch.from_numpy(TABLE),
        "lm_head.weight": torch.from_numpy(TABLE),
        "model.norm.weight": torch.ones(8),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        "model.layers.0.self_attn.v_proj.weight": torch.ones(4, 8),
    }
)

EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"


def parse(tensors: Arrays | bytes, layout: AdapterLayout = MODEL, **fields: Any) -> ParsedAdapter:
    file = tensors if isinstance(tensors, bytes) else weights_bytes(tensors)
    return parse_adapter(config_bytes(**fields), memoryview(file), layout, BASE)


def linear(parsed: ParsedAdapter, name: str) -> LinearChange:
    change = changes_of(parsed)[f"model.layers.0.self_attn.{name}"]
    assert isinstance(change, LinearChange)
    return change


def refusal(tensors: Arrays | bytes, layout: AdapterLayout = MODEL, **fields: Any) -> str:
    """Of the whole adapter, values included."""
    with pytest.raises(AdapterRejected) as refused:
        changes_of(parse(tensors, layout, **fields))
    return str(refused.value)


def renamed(change: Callable[[str], str]) -> dict[str, np.ndarray]:
    return {change(key): tensor for key, tensor in toy_tensors().items()}


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_b_carries_the_scale() -> None:
    tensors = toy_tensors()
    parsed = parse(tensors, lora_alpha=3)
    assert (parsed.modules, parsed.max_rank, parsed.traits.kind) == (2, 2, "LoRA")
    change = linear(parsed, "v_proj")
    np.testing.assert_array_equal(change.a, tensors[f"{V}.lora_A.weight"])
    np.testing.assert_array_equal(change.b, tensors[f"{V}.lora_B.weight"] * np.float32(1.5))
    assert (change.scale, change.shift, change.rows) == (None, None, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A.", "lora_A.my-adapter.").replace("lora_B.", "lora_B.my-adapter."),
        lambda key: key.replace("lora_A.", "lora_A.x."),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("model.model.model.", "model.model.language_model.model."),
        lambda key: key.replace("model.model.model.", "model.model.model.text_model."),
    ],
    ids=["default", "other name", "name on A alone", "no prefix", "language model", "text model"],
)
def test_other_forms_of_keys_mean_the_same(change: Callable[[str], str]) -> None:
    plain, other = changes_of(parse(toy_tensors())), changes_of(parse(renamed(change)))
    assert plain.keys() == other.keys()
    for name, one in plain.items():
        two = other[name]
        assert isinstance(one, LinearChange)
        assert isinstance(two, LinearChange)
        np.testing.assert_array_equal(one.a, two.a)
        np.testing.assert_array_equal(one.b, two.b)


def test_patterns_know_a_module_by_the_path_that_the_file_gives_it() -> None:
    tensors = renamed(lambda key: key.replace("model.model.model.", "model.model.language_model.model."))
    for path in ("language_model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        parsed = parse(tensors, target_modules=[path, "v_proj"])
        assert parsed.modules == 2
    pattern = {"^language_model.model.layers.0.self_attn.v_proj": 8}
    change = linear(parse(tensors, alpha_pattern=pattern), "v_proj")
    np.testing.assert_array_equal(change.b, toy_tensors()[f"{V}.lora_B.weight"] * 4)


def test_two_adapters_in_one_file_are_refused() -> None:
    both = {
        key.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}."): tensor
        for name in ("x", "y")
        for key, tensor in toy_tensors().items()
    }
    assert mentions(refusal(both), "more than one adapter", "'x'", "'y'", "directory of its own")


@pytest.mark.parametrize(
    "change",
    [lambda key: key.removeprefix("base_model.model."), lambda key: key.replace("lora_A.", "lora_A.x.")],
)
def test_two_keys_for_one_tensor_are_refused(change: Callable[[str], str]) -> None:
    both = toy_tensors() | renamed(change)
    assert "mean the same tensor" in refusal(both)


def test_two_copies_of_a_saved_module_must_be_equal() -> None:
    tensors = toy_tensors() | {f"{HEAD}.weight": TABLE + 1, f"{HEAD}.modules_to_save.weight": TABLE + 1}
    assert parse(tensors, modules_to_save=["lm_head"]).traits.owns == ("lm_head",)
    tensors[f"{HEAD}.weight"][0] += 1
    message = refusal(tensors, modules_to_save=["lm_head"])
    assert mentions(message, "lm_head.weight", "lm_head.modules_to_save.weight", "mean the same tensor")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "no such module"),
        ("base_model.model.model.norm.lora_A.weight", "lora_A on this kind of module"),
        ("base_model.model.model.rotary_table.weight", "this kind of module"),
        (f"{Q}.lora_magnitude_vector", "use_dora is not set"),
        (f"{Q}.lora_magnitude_vector.default.weight", "use_dora is not set"),
        (f"{Q}.lora_B.bias", "lora_bias is not set"),
        (f"{Q}.lora_diag", "kasa_config is not set"),
        (f"{Q}.base_layer.bias", "no bias there"),
        (f"{Q}.weight", "[2, 8]"),
        (f"{EMBED}.bias", "bias on this kind of module"),
        (f"{EMBED}.lora_A.weight", "lora_A on this kind of module"),
        ("base_model.model.model.norm.weight", "base has [8]"),
        ("base_model.model.model.norm.bias", "bias on this kind of module"),
        (f"{EMBED}.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
        (f"{Q}.lora_E", "AdaLoRA"),
        (f"{Q}.hada_w1_a", "peft_type says LORA"),
        ("base_model.model.score.weight", "classification head"),
        ("v_head.summary.weight", "value head"),
        ("internal_xlora_classifier.inner.0.weight", "X-LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
        ("lora_unet_down.lora_down.weight", "diffusion"),
        ("blk.0.attn_q.weight.lora_a", "llama.cpp"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "Megatron"),
        ("something", "not a LoRA tensor"),
        (f"{Q}.something", "not a LoRA tensor"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(key: str, reason: str) -> None:
    message = refusal(toy_tensors() | {key: ones(2, 8)})
    assert mentions(message, key, reason, "1 of its 5 tensors")


def test_five_keys_are_listed() -> None:
    message = refusal(toy_tensors() | {f"odd.{index}": ones(1) for index in range(7)})
    assert mentions(message, "7 of its 11", "odd.0", "odd.4", "and 2 more")
    assert "odd.5" not in message


def test_a_tensor_that_the_config_does_not_select_is_refused() -> None:
    assert mentions(refusal(toy_tensors(), target_modules=["q_proj"]), V, "does not select")
    assert mentions(refusal(toy_tensors(), exclude_modules=["v_proj"]), V, "does not select")
    assert parse(toy_tensors(), target_modules=["q_proj", "v_proj", "k_proj"])


def test_no_tensors_are_refused() -> None:
    assert "no tensors" in refusal({})


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_side_alone_is_refused(side: str) -> None:
    tensors = toy_tensors()
    del tensors[f"{V}.lora_{side}.weight"]
    other = "B" if side == "A" else "A"
    assert mentions(refusal(tensors), f"{V}.lora_{other}.weight", f"no lora_{side}")


@pytest.mark.parametrize(
    ("side", "shape", "words"),
    [
        ("A", (2, 6), ("lora_A", "built for in=6, base has 8")),
        ("B", (6, 2), ("lora_B", "built for out=6, base has 8")),
        ("A", (3, 8), ("rank 3", "says 2")),
        ("B", (8, 3), ("rank 3", "has 2")),
        ("A", (8,), ("lora_A", "[8]", "ZeRO-3")),
        ("A", (0, 8), ("lora_A", "[0, 8]", "ZeRO-3")),
        ("B", (8, 2, 1), ("lora_B", "[8, 2, 1]")),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    side: str, shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    message = refusal(toy_tensors() | {f"{Q}.lora_{side}.weight": ones(*shape)})
    assert mentions(message, *words)


@pytest.mark.parametrize(("side", "shape"), [("A", (3, 4)), ("B", (7, 1))])
def test_blocks_that_do_not_divide_are_refused(side: str, shape: tuple[int, ...]) -> None:
    tensors = toy_tensors() | {f"{Q}.lora_{side}.weight": ones(*shape)}
    assert mentions(
        refusal(tensors, use_bdlora={"nblocks": 2}, rank_pattern={"q_proj": shape[0] if side == "A" else 2}),
        f"{Q}.lora_{side}.weight",
        "base has 8",
    )
    halved = toy_tensors() | {f"{Q}.lora_A.weight": ones(2, 4)}
    assert parse(halved, use_bdlora={"nblocks": 2}).max_rank == 2


def test_every_module_that_does_not_fit_is_named() -> None:
    message = refusal({key: ones(*tensor.shape[:1], 3) for key, tensor in toy_tensors().items()})
    assert mentions(message, f"{Q}.lora_A.weight (built for in=3", f"{V}.lora_A.weight (built for in=3")


def test_a_rank_other_than_the_config_says_is_refused() -> None:
    assert mentions(refusal(toy_tensors(rank=3)), "rank 3", "says 2")
    assert mentions(refusal(toy_tensors(), rank_pattern={"v_proj": 4}), V, "rank 2", "says 4")
    assert parse(toy_tensors(), r=7, rank_pattern={"(q|v)_proj": 2})


def test_a_rank_above_the_maximum_is_refused() -> None:
    assert mentions(refusal(toy_tensors(rank=5), r=5), "rank 5", "--max-rank 4")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_values_that_are_not_finite_are_refused(side: str, value: float) -> None:
    tensors = toy_tensors()
    tensors[f"{V}.lora_{side}.weight"][1, 1] = value
    assert mentions(refusal(tensors), f"{V}.lora_{side}.weight", "NaN or infinity")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.bool_])
def test_integers_are_refused(dtype: type) -> None:
    tensors = toy_tensors() | {f"{Q}.lora_A.weight": np.ones((2, 8), dtype)}
    assert mentions(refusal(tensors), f"{Q}.lora_A.weight", "dtype")


def test_float8_is_refused() -> None:
    tensors = {key: torch.from_numpy(value).to(torch.float8_e4m3fn) for key, value in toy_tensors().items()}
    assert "F8_E4M3" in refusal(save_torch(tensors))


@pytest.mark.parametrize(
    ("fields", "added", "missing"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", V),
        ({"lora_bias": True}, "lora_B.bias", V),
        ({"kasa_config": {"beta": 1}}, "lora_diag", V),
    ],
)
def test_a_variant_needs_its_tensors_in_every_module(
    fields: dict[str, Any], added: str, missing: str
) -> None:
    message = refusal(toy_tensors() | {f"{Q}.{added}": ones(2 if added == "lora_diag" else 8)}, **fields)
    assert mentions(message, f"{missing}.lora_A.weight", f"no {added} beside it", *fields, "1 of its 5")
    wrong = refusal(toy_tensors() | {f"{module}.{added}": ones(3) for module in (Q, V)}, **fields)
    assert mentions(wrong, f"{Q}.{added}", "has shape [3]")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save names 'lm_head'",)),
        ({"modules_to_save": ["norm"]}, ("modules_to_save names 'norm'",)),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices is set",)),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ("target_parameters is set",)),
    ],
)
def test_what_the_config_names_but_the_file_lacks_is_refused(
    fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert mentions(
        refusal(toy_tensors(), **fields), *words, "nothing of it" if "is set" in words[0] else "nothing"
    )


def test_a_saved_module_that_no_causal_model_has_is_passed_over() -> None:
    assert parse(toy_tensors(), modules_to_save=["classifier", "score"]).traits.warnings == ()


TOKENS = f"{EMBED}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("fields", "shape", "words"),
    [
        ({"trainable_token_indices": [1, 2]}, (3, 8), ("[3, 8]", "[2, 8]")),
        ({"trainable_token_indices": [1, 2]}, (2, 6), ("[2, 6]", "[2, 8]")),
        (
            {"trainable_token_indices": [1, 7]},
            (2, 8),
            ("trains token 7", "base has 5", "save_embedding_layers"),
        ),
        ({"trainable_token_indices": {"lm_head": [1]}}, (1, 8), ("names none here",)),
    ],
)
def test_trained_tokens_that_do_not_fit_are_refused(
    fields: dict[str, Any], shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    assert mentions(refusal(toy_tensors() | {TOKENS: ones(*shape)}, **fields), TOKENS, *words)


def test_new_tokens_need_no_copy_of_the_embedding() -> None:
    parsed = parse(toy_tensors() | {TOKENS: ones(2, 8)}, trainable_token_indices=[6, 5])
    assert (parsed.traits.owns, parsed.traits.vocab_size) == (("model.embed_tokens", "lm_head"), 7)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"{HEAD}.weight", (4, 8), ("lm_head has 4 rows, the base's 5", "save_embedding_layers")),
        (f"{HEAD}.weight", (5, 6), ("[5, 6]", "[5, 8]")),
        (f"{HEAD}.weight", (40,), ("[40]",)),
        (f"{EMBED}.weight", (4, 8), ("embed_tokens has 4 rows, the base's 5", "save_embedding_layers")),
        (f"{Q}.weight", (9, 8), ("[9, 8]", "[8, 8]")),
        (f"{HEAD}.weight", (6, 8), ("lm_head has 6 rows, the base's 5", "save_embedding_layers")),
    ],
)
def test_saved_weights_that_do_not_fit_are_refused(
    key: str, shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    assert mentions(refusal(toy_tensors() | {key: ones(*shape)}), *words)


def test_a_file_of_copies_alone_changes_nothing_and_is_refused() -> None:
    assert "none of its tensors changes the base" in refusal({f"{HEAD}.weight": TABLE})
    assert parse(toy_tensors() | {f"{HEAD}.weight": TABLE}).traits.owns == ()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 6), (8, 2)), ("vocabulary of 6, base has 5", "save_embedding_layers")),
        (((2, 5), (6, 2)), ("[6, 2]", "[8, 2]")),
        (((3, 5), (8, 3)), ("rank 3", "says 2")),
        (((10,), (8, 2)), ("[10]", "ZeRO-3")),
    ],
)
def test_embedding_factors_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], words: tuple[str, ...]
) -> None:
    a, b = shapes
    factors = {f"{EMBED}.lora_embedding_A": ones(*a), f"{EMBED}.lora_embedding_B": ones(*b)}
    assert mentions(refusal(toy_tensors() | factors), *words)
    assert mentions(
        refusal({f"{EMBED}.lora_embedding_A": ones(2, 5)}), "lora_embedding_A", "no lora_embedding_B"
    )


def test_a_row_without_length_has_no_direction_to_scale() -> None:
    tensors = toy_tensors() | {f"{Q}.lora_magnitude_vector": ones(8), f"{V}.lora_magnitude_vector": ones(4)}
    tensors[f"{Q}.lora_B.weight"][:] = 0
    base = held(
        {
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8),
            "model.layers.0.self_attn.v_proj.weight": torch.ones(4, 8),
        }
    )
    file = memoryview(weights_bytes(tensors))
    parsed = parse_adapter(config_bytes(use_dora=True), file, MODEL, base)
    with pytest.raises(
        AdapterRejected, match=r"q_proj\.lora_magnitude_vector: a row of W \+ BA has no length"
    ):
        changes_of(parsed)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", ("not JSON",)),
        (b"\xff\xff", ("not JSON",)),
        (b"[" * 100_000, ("not JSON",)),
        (b"[]", ("not a JSON object",)),
        (b"{}", ("no peft_type", "LORA")),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', ("out of range",)),
        (config_bytes(peft_type="XLORA"), ("XLORA", "name those adapters")),
        (config_bytes(peft_type="OFT"), ("OFT", "merge")),
        (config_bytes(peft_type="BONE"), ("BONE", "MISS")),
        (config_bytes(peft_type="NEW"), ("'NEW' is not known",)),
        (config_bytes(peft_type=7), ("'7' is not known",)),
    ],
)
def test_configs_without_a_reader_are_refused(config: bytes, words: tuple[str, ...]) -> None:
    with pytest.raises(AdapterRejected) as refused:
        parse_adapter(config, memoryview(weights_bytes(toy_tensors())), MODEL, BASE)
    assert mentions(str(refused.value), *words)


def test_the_type_may_be_lower_case() -> None:
    assert parse(toy_tensors(), peft_type="lora").traits.kind == "LoRA"


def test_unknown_fields_are_warned_of() -> None:
    [warning] = parse(toy_tensors(), novelty=3).traits.warnings
    assert "'novelty'" in warning


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=50))
def test_bfloat16_rounds_like_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    finite = array[np.isfinite(array)]
    expected = torch.from_numpy(finite).to(torch.bfloat16)
    stored = store(finite, "bfloat16")
    assert torch.equal(torch.from_numpy(stored).view(torch.bfloat16), expected)
    assert all_finite(stored) == bool(expected.isfinite().all())
    read = read_float32(stored.data.cast("B"), "BF16")
    assert torch.equal(torch.from_numpy(read), expected.float())


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "pissa", "olora", "all", "lora_only", "q_proj", "lm_head", ".*", "(", "\\d"]),
    st.lists(st.sampled_from([0, 1, 6, -1, "norm", "q_proj", "lm_head"]), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", ".*", "nblocks", "lm_head"]), st.integers(-1, 9), max_size=2),
)
CONFIGS = st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(LoraConfig)]), JUNK)
KEYS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "base_model.model.", "base_model.model.language_model.", "visual."]),
    st.sampled_from(["model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head", "model.norm", ""]),
    st.sampled_from(
        [
            ".lora_A.weight", ".lora_B.weight", ".lora_A.x.weight", ".lora_B.bias", ".lora_embedding_A",
            ".lora_embedding_B", ".lora_magnitude_vector", ".lora_diag", ".weight", ".bias",
            ".base_layer.weight", ".modules_to_save.weight", ".modules_to_save.x.weight",
            ".original_module.weight", ".token_adapter.trainable_tokens_delta",
            ".token_adapter.base_layer.weight", ".", "",
        ]
    ),
)  # fmt: skip
SHAPES = st.one_of(
    st.sampled_from([(2, 8), (8, 2), (5, 8), (6, 8), (2, 5), (4, 8), (5,), (8,), (2,), (0, 8), ()]),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
)


@settings(deadline=None)
@given(CONFIGS, st.dictionaries(KEYS, SHAPES, max_size=6), st.booleans())
def test_whatever_is_in_the_files_is_read_or_refused(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], whole: bool
) -> None:
    tensors = {key: np.full(shape, 0.5, np.float32) for key, shape in shapes.items()}
    with contextlib.suppress(AdapterRejected):
        changes_of(parse((toy_tensors() if whole else {}) | tensors, **({"peft_type": "LORA"} | fields)))
