"""From a directory to a packed file: digests, true ranks, and values rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_torch
from transformers import AutoModelForCausalLM

from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.adapters.weights import LinearWeights, PackedAdapter, read_packed
from loraplex.shard.errors import AdapterNotFound, AdapterRejected

from ...tiny import AdapterRecipe, build_adapter
from .layouts import NO_WEIGHTS, TOY, Q, V, config_bytes, layout_of, mentions, toy_tensors, weights_bytes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write(directory: Path, tensors: dict[str, np.ndarray] | bytes, **fields: Any) -> Path:
    directory.mkdir()
    file = tensors if isinstance(tensors, bytes) else weights_bytes(tensors)
    (directory / "adapter_config.json").write_bytes(config_bytes(**fields))
    (directory / "adapter_model.safetensors").write_bytes(file)
    return directory


def pack(directory: Path, layout: AdapterLayout = TOY) -> PackedAdapter:
    target = directory.with_suffix(".packed")
    packed = Packer(layout, FileLimits()).pack(directory, target, NO_WEIGHTS)
    return read_packed(target, packed.file.index, pin=False)


def linears(adapter: PackedAdapter) -> dict[int, LinearWeights]:
    weights = adapter.site_weights()
    assert all(isinstance(site, LinearWeights) and site.lora is not None for site in weights.values())
    return weights


def test_parts_of_a_site_share_a_and_carry_scaled_transposed_b(tmp_path: Path) -> None:
    tensors = toy_tensors()
    [site] = linears(pack(write(tmp_path / "a", tensors, lora_alpha=3))).values()
    np.testing.assert_array_equal(site.lora.a[:2], tensors[f"{Q}.lora_A.weight"])
    np.testing.assert_array_equal(site.lora.a[2:], tensors[f"{V}.lora_A.weight"])
    q, v = site.lora.parts
    assert (q.rank_offset, q.out_offset, v.rank_offset, v.out_offset) == (0, 0, 2, 12)
    np.testing.assert_array_equal(q.b, (tensors[f"{Q}.lora_B.weight"] * np.float32(1.5)).T)
    np.testing.assert_array_equal(v.b, (tensors[f"{V}.lora_B.weight"] * np.float32(1.5)).T)


def test_sites_at_true_rank(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_model("llama")
    recipe = AdapterRecipe(4, 8, ("q_proj", "v_proj"), {"rank_pattern": {"v_proj": 2}})
    directory = build_adapter(base, tmp_path / "adapter", recipe, seed=1)
    adapter = pack(directory, layout_of(AutoModelForCausalLM.from_pretrained(base)))
    weights = linears(adapter)
    assert len(weights) == 3
    assert adapter.modules == 6
    for site in weights.values():
        lora = site.lora
        assert lora.a.shape == (6, 64)
        assert [tuple(part.b.shape) for part in lora.parts] == [(4, 64), (2, 32)]
        assert all(tensor.is_contiguous() for tensor in (lora.a, *(part.b for part in lora.parts)))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in (lora.a, *(part.b for part in lora.parts)))
    assert adapter.nbytes < 3 * 4 * (6 * 64 + 4 * 64 + 2 * 32) + 9 * 128


@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("filed", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_applied_in_fp32_before_the_cast(
    served: str, filed: torch.dtype, tmp_path: Path
) -> None:
    tensors = {key: torch.from_numpy(value).to(filed) for key, value in toy_tensors().items()}
    directory = write(tmp_path / "a", save_torch(tensors), lora_alpha=7)
    [site] = linears(pack(directory, replace(TOY, dtype=served))).values()
    target = getattr(torch, served)
    expected_b = (tensors[f"{Q}.lora_B.weight"].float() * 3.5).t().to(target)
    expected_a = torch.cat([tensors[f"{Q}.lora_A.weight"], tensors[f"{V}.lora_A.weight"]]).float().to(target)
    assert torch.equal(site.lora.parts[0].b, expected_b)
    assert torch.equal(site.lora.a, expected_a)


def test_overflow_of_the_served_dtype_is_refused(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors[f"{Q}.lora_A.weight"][0, 0] = 1e5
    directory = write(tmp_path / "a", tensors)
    assert pack(directory, replace(TOY, dtype="bfloat16"))
    scaled = toy_tensors()
    scaled[f"{Q}.lora_B.weight"][0, 0] = 1e4
    for damaged in (write(tmp_path / "b", tensors), write(tmp_path / "c", scaled, lora_alpha=20)):
        with pytest.raises(AdapterRejected) as refused:
            pack(damaged, replace(TOY, dtype="float16"))
        assert mentions(str(refused.value), "q_proj", "float16", "--dtype")
        assert not damaged.with_suffix(".packed").exists()


def test_the_digest_that_was_expected_must_be_arrived_at(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", toy_tensors())
    packer = Packer(TOY, FileLimits())
    digest = packer.pack(directory, tmp_path / "one", NO_WEIGHTS).digest
    assert packer.pack(directory, tmp_path / "two", NO_WEIGHTS, digest).digest == digest
    (directory / "adapter_config.json").write_bytes(config_bytes(lora_alpha=5))
    with pytest.raises(AdapterRejected, match=f"they had digest {digest}, now "):
        packer.pack(directory, tmp_path / "three", NO_WEIGHTS, digest)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="there is no directory"):
        pack(tmp_path / "none")
