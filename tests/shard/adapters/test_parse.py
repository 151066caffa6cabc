from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_torch

from loraplex.shard.adapters.config import parse_config
from loraplex.shard.adapters.digest import weight_digest
from loraplex.shard.adapters.floats import all_finite, read_float32, store
from loraplex.shard.adapters.layout import AdapterLayout, BaseWeight
from loraplex.shard.adapters.parse import SiteArrays, parse_adapter
from loraplex.shard.errors import AdapterRejected

from .layouts import TOY, Q, V, config_bytes, mentions, toy_tensors, weights_bytes


def parse(
    tensors: dict[str, np.ndarray] | bytes, layout: AdapterLayout = TOY, **fields: Any
) -> list[SiteArrays]:
    file = tensors if isinstance(tensors, bytes) else weights_bytes(tensors)
    return list(parse_adapter(parse_config(config_bytes(**fields)), memoryview(file), layout).sites())


def refusal(tensors: dict[str, np.ndarray] | bytes, layout: AdapterLayout = TOY, **fields: Any) -> str:
    with pytest.raises(AdapterRejected) as refused:
        parse(tensors, layout, **fields)
    return str(refused.value)


def renamed(change: Any) -> dict[str, np.ndarray]:
    return {change(key): tensor for key, tensor in toy_tensors().items()}


def test_parts_of_a_site_share_a_and_carry_scaled_transposed_b() -> None:
    tensors = toy_tensors()
    [site] = parse(tensors, lora_alpha=3)
    assert site.site == 0
    np.testing.assert_array_equal(site.a[:2], tensors[f"{Q}.lora_A.weight"])
    np.testing.assert_array_equal(site.a[2:], tensors[f"{V}.lora_A.weight"])
    q, v = site.parts
    assert (q.rank_offset, q.out_offset, v.rank_offset, v.out_offset) == (0, 0, 2, 12)
    np.testing.assert_array_equal(q.b, (tensors[f"{Q}.lora_B.weight"] * np.float32(1.5)).T)
    np.testing.assert_array_equal(v.b, (tensors[f"{V}.lora_B.weight"] * np.float32(1.5)).T)
    assert all(array.flags.c_contiguous for array in (site.a, q.b, v.b))


def test_figures() -> None:
    file = memoryview(weights_bytes(toy_tensors()))
    parsed = parse_adapter(parse_config(config_bytes()), file, TOY)
    assert (parsed.modules, parsed.max_rank) == (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A.", "lora_A.my-adapter.").replace("lora_B.", "lora_B.my-adapter."),
        lambda key: key.removeprefix("base_model.model."),
    ],
    ids=["default", "other name", "no prefix"],
)
def test_other_forms_of_keys_mean_the_same(change: Any) -> None:
    [plain], [other] = parse(toy_tensors()), parse(renamed(change))
    np.testing.assert_array_equal(plain.a, other.a)
    for one, two in zip(plain.parts, other.parts, strict=True):
        np.testing.assert_array_equal(one.b, two.b)


def test_two_adapters_in_one_file_are_refused() -> None:
    both = renamed(lambda key: key.replace("lora_A.", "lora_A.x.").replace("lora_B.", "lora_B.x."))
    assert mentions(refusal(toy_tensors() | both), "more than one adapter", "'x'")


def test_two_keys_for_one_tensor_are_refused() -> None:
    both = toy_tensors() | renamed(lambda key: key.removeprefix("base_model.model."))
    assert "mean the same tensor" in refusal(both)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", "no such linear"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        ("base_model.model.model.norm.lora_A.weight", "this kind of module"),
        (f"{Q}.lora_magnitude_vector", "DoRA"),
        (f"{Q}.lora_magnitude_vector.default.weight", "DoRA"),
        (f"{Q}.lora_B.bias", "biases of LoRA's own"),
        (f"{Q}.base_layer.bias", "biases"),
        ("base_model.model.lm_head.modules_to_save.weight", "whole modules"),
        ("base_model.model.lm_head.weight", "whole weights"),
        ("base_model.model.lm_head.base_layer.weight", "whole weights"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "token embeddings"),
        (f"{Q}.lora_E", "AdaLoRA"),
        (f"{Q}.hada_w1_a", "only LoRA"),
        ("model.layers.0.self_attn.q_proj.lora_a", "MLX"),
        ("lora_unet_down.lora_down.weight", "diffusion"),
        ("something", "not a LoRA tensor"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(key: str, reason: str) -> None:
    message = refusal(toy_tensors() | {key: np.ones((2, 8), np.float32)})
    assert mentions(message, key, reason, "1 of its 5 tensors")


def test_five_keys_are_listed() -> None:
    message = refusal(toy_tensors() | {f"odd.{index}": np.ones(1, np.float32) for index in range(7)})
    assert mentions(message, "7 of its 11", "odd.0", "odd.4", "and 2 more")
    assert "odd.5" not in message


def test_a_tensor_that_the_config_does_not_select_is_refused() -> None:
    assert mentions(refusal(toy_tensors(), target_modules=["q_proj"]), V, "does not select")
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
        ("A", (3, 8), ("rank 3", "has 2")),
        ("A", (8,), ("lora_A", "[8]", "ZeRO-3")),
        ("A", (0, 8), ("lora_A", "[0, 8]", "ZeRO-3")),
        ("B", (8, 2, 1), ("lora_B", "[8, 2, 1]")),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    side: str, shape: tuple[int, ...], words: tuple[str, ...]
) -> None:
    message = refusal(toy_tensors() | {f"{Q}.lora_{side}.weight": np.ones(shape, np.float32)})
    assert mentions(message, *words)


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


def test_overflow_of_the_served_dtype_is_refused() -> None:
    tensors = toy_tensors()
    tensors[f"{Q}.lora_A.weight"][0, 0] = 1e5
    assert parse(tensors, replace(TOY, dtype="bfloat16"))
    assert mentions(refusal(tensors, replace(TOY, dtype="float16")), f"{Q}.lora_A.weight", "float16")
    scaled = toy_tensors()
    scaled[f"{Q}.lora_B.weight"][0, 0] = 1e4
    assert mentions(refusal(scaled, replace(TOY, dtype="float16"), lora_alpha=20), "lora_B", "float16")


@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("filed", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_applied_in_fp32_before_the_cast(served: str, filed: torch.dtype) -> None:
    tensors = {key: torch.from_numpy(value).to(filed) for key, value in toy_tensors().items()}
    [site] = parse(save_torch(tensors), replace(TOY, dtype=served), lora_alpha=7)
    target = getattr(torch, served)
    expected_b = (tensors[f"{Q}.lora_B.weight"].float() * 3.5).t().contiguous().to(target)
    expected_a = torch.cat([tensors[f"{Q}.lora_A.weight"], tensors[f"{V}.lora_A.weight"]]).float().to(target)
    assert torch.equal(torch.from_numpy(site.parts[0].b).view(target), expected_b)
    assert torch.equal(torch.from_numpy(site.a).view(target), expected_a)


def test_a_copy_of_a_base_weight_is_dropped_and_anything_else_refused() -> None:
    head = np.random.default_rng(1).standard_normal((5, 8), np.float32)
    layout = replace(TOY, base_weights=(BaseWeight("lm_head", weight_digest(head.tobytes())),))
    for key in ("base_model.model.lm_head.base_layer.weight", "base_model.model.lm_head.weight"):
        assert parse(toy_tensors() | {key: head}, layout)
        assert "whole weights" in refusal(toy_tensors() | {key: head + 1e-3}, layout)
        assert "whole weights" in refusal(toy_tensors() | {key: np.vstack([head, head[:1]])}, layout)
    assert "no LoRA tensors" in refusal({"lm_head.weight": head}, layout)


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
