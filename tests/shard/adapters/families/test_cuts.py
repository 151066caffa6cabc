"""Deltas whose rank is above the server's: cut where nearly nothing is lost, else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig

from loraplex.shard.adapters.families.low_rank import TOLERANCE, Cut, cut, thin_svd
from loraplex.shard.errors import AdapterRejected

from .oracle import Directory, make

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

_UP = "base_model.model.model.layers.1.mlp.up_proj"


def loha(base: Path, path: Path, rank: int) -> Directory:
    return make(base, path, LoHaConfig(r=rank, target_modules=["q_proj", "up_proj"]))


def lokr(base: Path, path: Path, rank: int, **fields: object) -> Directory:
    return make(base, path, LoKrConfig(r=rank, target_modules=["q_proj", "up_proj"], **fields))


def weaken(directory: Directory, part: str, factor: float, *, dim: int, keep: int) -> Directory:
    """Make all but the first `keep` rows or columns of a part small, in every module."""
    tensors = directory.tensors
    for key, tensor in tensors.items():
        if key.endswith(part):
            tensor.narrow(dim, keep, tensor.shape[dim] - keep).mul_(factor)
    return directory.rewrite(tensors)


@pytest.mark.parametrize("rank", [4, 9])
def test_loha_of_lower_rank_than_it_looks(
    rank: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    # Of one matrix a single component is left: the product has the other's rank.
    directory = weaken(loha(tiny_model("llama"), tmp_path, rank), "hada_w1_b", 0.0, dim=0, keep=1)
    adapter = directory.parse(max_rank=rank)
    assert (adapter.max_rank, adapter.traits.kind) == (rank, f"LoHa as LoRA, rank {rank}")
    assert adapter.traits.warnings == ()
    torch.testing.assert_close(
        directory.our_logits(max_rank=rank), directory.peft_logits(), rtol=0, atol=1e-4
    )


def test_loha_that_loses_a_little(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = weaken(loha(tiny_model("llama"), tmp_path, 4), "hada_w1_b", 1e-4, dim=0, keep=2)
    adapter = directory.parse(max_rank=8)
    assert adapter.max_rank == 8
    assert len(adapter.traits.warnings) == 1
    assert "cut to rank 8; the largest relative error is " in adapter.traits.warnings[0]
    whole = deltas(directory, 64)
    for name, delta in deltas(directory, 8).items():
        error = np.linalg.norm(delta - whole[name]) / np.linalg.norm(whole[name])
        assert 1e-6 < error < TOLERANCE


def test_lokr_of_lower_rank_than_it_looks(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = weaken(lokr(tiny_model("llama"), tmp_path, 3), "lokr_w1", 0.0, dim=0, keep=2)
    assert directory.parse().max_rank == 24
    assert directory.parse(max_rank=10).max_rank == 6
    torch.testing.assert_close(directory.our_logits(max_rank=10), directory.peft_logits(), rtol=0, atol=1e-4)


def test_lokr_that_loses_a_little(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    fields = {"decompose_factor": 4}
    directory = weaken(lokr(tiny_model("llama"), tmp_path, 32, **fields), "lokr_w2", 1e-4, dim=0, keep=5)
    adapter = directory.parse(max_rank=20)
    assert adapter.max_rank == 20
    assert "cut to rank 20" in adapter.traits.warnings[0]
    whole = deltas(directory, 64)
    for name, delta in deltas(directory, 20).items():
        assert np.linalg.norm(delta - whole[name]) < TOLERANCE * np.linalg.norm(whole[name])


@pytest.mark.parametrize("family", [loha, lokr])
def test_above_the_limit(
    family: Callable[[Path, Path, int], Directory], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = family(tiny_model("llama"), tmp_path, 4)
    with pytest.raises(
        AdapterRejected, match=r"effective rank of (16|32); .*--max-rank 6; .*convert_to_lora"
    ):
        directory.parse(max_rank=6)


def test_untrained_is_served(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = weaken(loha(tiny_model("llama"), tmp_path, 4), "hada_w2_b", 0.0, dim=0, keep=0)
    assert directory.parse(max_rank=6).max_rank == 1
    assert all(not delta.any() for delta in deltas(directory, 6).values())


def test_cut() -> None:
    singular = np.array([1.0, 0.5, 1e-4, 1e-5, 0.0])
    assert cut("m", singular, 4) == Cut(4, 0.0)
    assert cut("m", singular, 8) == Cut(4, 0.0)
    lossy = cut("m", singular, 3)
    assert (lossy.rank, lossy.is_exact) == (3, False)
    assert lossy.error == pytest.approx(1e-5 / np.linalg.norm(singular))
    assert cut("m", singular, 2).error == pytest.approx(np.hypot(1e-4, 1e-5) / np.linalg.norm(singular))
    with pytest.raises(AdapterRejected, match=r"m: its delta has an effective rank of 2; .*--max-rank 1;"):
        cut("m", singular, 1)


def test_thin_svd() -> None:
    random = np.random.default_rng(0)
    b, a = random.standard_normal((20, 6)), random.standard_normal((6, 30))
    u, s, v = thin_svd(b, a)
    np.testing.assert_allclose(u * s @ v, b @ a, atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(b @ a)[1][:6], atol=1e-12)


def deltas(directory: Directory, max_rank: int) -> dict[str, np.ndarray]:
    changes = {placed.target.name: placed.build() for placed in directory.parse(max_rank=max_rank).placed}
    return {name: change.b @ change.a for name, change in changes.items()}
