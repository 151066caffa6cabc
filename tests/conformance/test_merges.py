"""Row 63: what merging drops at random is drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraplex.shard.adapters.merging.merge import MergeInput, merge_adapters
from loraplex.shard.adapters.merging.recipe import merge_recipe

from .bases import Base
from .bench import WEIGHTS, Bench, lora
from .serving import Served


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_a_dare_merge_is_the_same_for_the_same_seed_and_another_for_another(
    method: str, bases: Callable[[str], Base], serve: Callable[[str], Served], tmp_path: Path
) -> None:
    parts = [
        lora(target_modules=["q_proj"])(Bench(bases("llama"), tmp_path / str(index), bases, seed=index))
        for index in range(2)
    ]
    inputs = [MergeInput(part.directory, 0.8) for part in parts]
    digests = []
    for index, seed in enumerate((7, 7, 8)):
        target = tmp_path / f"merged{index}"
        target.mkdir()
        merge_adapters(inputs, merge_recipe(method, density=0.5, seed=seed), target)
        digests.append(serve("llama").pack(target).digest)
        assert all(tensor.any() for tensor in load_file(target / WEIGHTS).values())
    assert digests[0] == digests[1] != digests[2]
