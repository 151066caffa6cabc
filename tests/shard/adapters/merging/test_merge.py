"""Merging on disk against PEFT's `add_weighted_adapter`, which merges in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from loraplex.shard.adapters.digest import adapter_digest
from loraplex.shard.adapters.host_cache import HostCache
from loraplex.shard.adapters.manifest import AdapterManifest, AdapterRequest, Source
from loraplex.shard.adapters.merging.merge import MergeInput, merge_adapters
from loraplex.shard.adapters.merging.merge_math import keep_largest, merge_tensors
from loraplex.shard.adapters.merging.recipe import METHODS, MergePart, MergeRecipe, MergeRequest, merge_recipe
from loraplex.shard.adapters.store import AdapterStore
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.errors import AdapterNotFound, AdapterRejected

from ..layouts import Q, config_bytes, toy_files, toy_tensors, weights_bytes
from ..test_worker import write_adapter

PREFIX = "base_model.model."

in_the_modules_loop = pytest.mark.asyncio(loop_scope="module")


class Block(torch.nn.Module):
    """Something for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.q_proj = torch.nn.Linear(6, 8)
        self.v_proj = torch.nn.Linear(6, 7)
        self.down = torch.nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return torch.cat([self.down(self.q_proj(x)), self.v_proj(x)], dim=-1)


def make_parts(directory: Path, configs: Sequence[Mapping[str, Any]]) -> tuple[PeftModel, list[Path]]:
    """A PEFT model with randomised adapters p0, p1, …, and the directories that it saved them to."""
    torch.manual_seed(3)
    model: PeftModel | None = None
    for index, fields in enumerate(configs):
        config = LoraConfig(**fields)
        if model is None:
            model = get_peft_model(Block().eval(), config, adapter_name=f"p{index}")
        else:
            model.add_adapter(f"p{index}", config)
    assert model is not None
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return model, [directory / f"p{index}" for index in range(len(configs))]


def merged_tensors(
    directories: Sequence[Path], weights: Sequence[float], recipe: MergeRecipe, target: Path
) -> dict[str, np.ndarray]:
    target.mkdir()
    inputs = [MergeInput(directory, weight) for directory, weight in zip(directories, weights, strict=True)]
    merge_adapters(inputs, recipe, target)
    return load_file(target / "adapter_model.safetensors")


def peft_tensors(
    model: PeftModel, weights: Sequence[float], method: str, **options: Any
) -> dict[str, np.ndarray]:
    names = [f"p{index}" for index in range(len(weights))]
    model.base_model.add_weighted_adapter(names, list(weights), "merged", combination_type=method, **options)
    marks = (
        ".lora_A.merged.weight",
        ".lora_B.merged.weight",
        ".lora_embedding_A.merged",
        ".lora_embedding_B.merged",
    )
    return {
        name.replace(".merged", ""): parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if name.endswith(marks)
    }


def products(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """B A of each module."""
    return {
        key.split(".lora_")[0]: tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        @ a
        for key, a in tensors.items()
        if "_A" in key
    }


ALIKE = (
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "embed"]},
    {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "down", "embed"], "use_rslora": True},
    {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 11}},
)
UNLIKE = (
    {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "down"]},
)
WEIGHTS = (0.7, -0.4, 1.3)
PRUNING = ("ties", "magnitude_prune")


@pytest.mark.parametrize("sign_method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("method", ["linear", *PRUNING])
@pytest.mark.filterwarnings("ignore:The density")
def test_equal_ranks_give_pefts_tensors(
    method: str, density: float, sign_method: Any, tmp_path: Path
) -> None:
    model, directories = make_parts(tmp_path / "parts", ALIKE)
    options = {} if method == "linear" else {"density": density, "majority_sign_method": sign_method}
    recipe = merge_recipe(method, **options)
    ours = merged_tensors(directories, WEIGHTS, recipe, tmp_path / "ours")
    expected = peft_tensors(model, WEIGHTS, method, **options)
    assert ours.keys() == expected.keys()
    assert len(ours) == 8
    for key, tensor in ours.items():
        np.testing.assert_allclose(tensor, expected[key], atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("configs", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_cat_gives_pefts_tensors_without_its_padding(configs: Sequence[Any], tmp_path: Path) -> None:
    model, directories = make_parts(tmp_path / "parts", configs)
    weights = WEIGHTS[: len(configs)]
    ours = merged_tensors(directories, weights, merge_recipe("cat"), tmp_path / "ours")
    expected = peft_tensors(model, weights, "cat")
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        padded = np.zeros_like(expected[key])
        padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
        np.testing.assert_allclose(padded, expected[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("method", ["svd", *(f"{method}_svd" for method in PRUNING)])
@pytest.mark.parametrize("configs", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_svd_methods_give_pefts_products(configs: Any, method: str, rank: int, tmp_path: Path) -> None:
    model, directories = make_parts(tmp_path / "parts", configs)
    weights = WEIGHTS[: len(configs)]
    options = {} if method == "svd" else {"density": 0.4}
    ours = merged_tensors(directories, weights, merge_recipe(method, rank=rank, **options), tmp_path / "ours")
    expected = peft_tensors(model, weights, method, svd_rank=rank or None, **options)
    assert ours.keys() == expected.keys()
    most = rank or max(config["r"] for config in configs)
    assert max(tensor.shape[0] for key, tensor in ours.items() if "_A" in key) == most
    for module, product in products(expected).items():
        np.testing.assert_allclose(products(ours)[module], product, atol=1e-5, rtol=1e-5, err_msg=module)


def test_one_adapter_is_merged_linearly(tmp_path: Path) -> None:
    model, directories = make_parts(tmp_path / "parts", ALIKE[:1])
    ours = merged_tensors(directories, [-0.5], merge_recipe("ties", density=0.1), tmp_path / "ours")
    for key, tensor in peft_tensors(model, [-0.5], "ties").items():
        np.testing.assert_allclose(ours[key], tensor, atol=1e-6)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_what_is_written_loads_in_peft_with_scale_1(method: str, tmp_path: Path) -> None:
    """Where PEFT's own result of rsLoRA parts is off: it keeps the flag."""
    configs = [dict(config, r=3, rank_pattern={}, use_rslora=True) for config in UNLIKE]
    _, directories = make_parts(tmp_path / "parts", configs)
    recipe = merge_recipe(method, rank=6) if method == "svd" else merge_recipe(method)
    ours = merged_tensors(directories, WEIGHTS[:2], recipe, tmp_path / "ours")
    torch.manual_seed(3)
    base = Block().eval()
    ids = torch.arange(11)
    before = base(ids)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    delta = {name: torch.from_numpy(value) for name, value in products(ours).items()}
    x = base.embed(ids)
    q = base.q_proj.base_layer(x) + x @ delta[f"{PREFIX}q_proj"].T
    expected = torch.cat(
        [
            base.down.base_layer(q) + q @ delta[f"{PREFIX}down"].T,
            base.v_proj.base_layer(x) + x @ delta[f"{PREFIX}v_proj"].T,
        ],
        dim=-1,
    )
    torch.testing.assert_close(loaded(ids), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.1
    if method == "linear":
        return
    summed = sum(
        weight
        * config["lora_alpha"]
        / np.sqrt(3)
        * products(load_file(path / "adapter_model.safetensors"))[f"{PREFIX}q_proj"]
        for weight, config, path in zip(WEIGHTS, configs, directories, strict=False)
    )
    np.testing.assert_allclose(delta[f"{PREFIX}q_proj"], summed, atol=1e-5)


def random_tensors(count: int = 2, shape: tuple[int, int] = (100, 200)) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.standard_normal(shape, np.float32) for _ in range(count)]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_keeps_its_share_and_rescales(density: float) -> None:
    tensors = random_tensors(1)
    recipe = merge_recipe("dare_linear", density=density)
    merged = merge_tensors(tensors, [2.0], recipe, generator())
    kept = merged != 0
    assert kept.mean() == pytest.approx(density, abs=0.02)
    np.testing.assert_allclose(merged[kept], 2 * tensors[0][kept] / density, rtol=1e-5)


def test_dare_draws_anew_for_each_part() -> None:
    ones = np.ones((100, 100), np.float32)
    merged = merge_tensors([ones, ones], [1.0, 1.0], merge_recipe("dare_linear", density=0.5), generator())
    assert set(np.unique(merged)) == {0, 2, 4}
    assert (merged == 4).mean() == pytest.approx(0.25, abs=0.03)


def test_dare_ties_elects_among_what_is_left() -> None:
    recipe = merge_recipe("dare_ties", density=0.6)
    tensors = random_tensors(3)
    draws = generator()
    kept = [
        np.where(draws.random(tensor.shape, dtype=np.float32) < 0.6, tensor / np.float32(0.6), 0)
        for tensor in tensors
    ]
    expected = merge_tensors(kept, list(WEIGHTS), merge_recipe("ties", density=1.0), generator())
    np.testing.assert_array_equal(merge_tensors(tensors, list(WEIGHTS), recipe, generator()), expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_equal_recipes_give_equal_bytes_and_another_seed_others(method: str, tmp_path: Path) -> None:
    _, directories = make_parts(tmp_path / "parts", ALIKE)
    density = None if method in ("linear", "cat", "svd") else 0.5

    def files(name: str, seed: int) -> dict[str, bytes]:
        merged_tensors(
            directories, WEIGHTS, merge_recipe(method, density=density, seed=seed), tmp_path / name
        )
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = files("first", 7)
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    assert files("again", 7) == first
    assert (files("other", 8) == first) == (not method.startswith("dare"))


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    tensor = np.array([[1, -2, 2], [2, 0, -2]], np.float32)
    np.testing.assert_array_equal(keep_largest(tensor, 0.5), [[0, -2, 2], [2, 0, 0]])
    assert not keep_largest(tensor, 0.1).any()


def test_patterns_name_the_modules_of_other_rank_only(tmp_path: Path) -> None:
    _, directories = make_parts(tmp_path / "parts", UNLIKE)
    merged_tensors(directories, (1, 1), merge_recipe("cat"), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"v_proj": 2, "down": 4}
    assert config["target_modules"] == ["down", "q_proj", "v_proj"]
    assert config["use_rslora"] is False


def toy(directory: Path, tensors: Mapping[str, np.ndarray] | None = None, **fields: Any) -> Path:
    files = {
        "adapter_config.json": config_bytes(**fields),
        "adapter_model.safetensors": weights_bytes(toy_tensors() if tensors is None else tensors),
    }
    return write_adapter(directory, files)


def refusal(bad: Path, tmp_path: Path, method: str = "linear") -> str:
    """What a merge of a good adapter and `bad` is refused with."""
    target = tmp_path / "merged"
    target.mkdir()
    good = write_adapter(tmp_path / "good")
    with pytest.raises(AdapterRejected) as refused:
        merge_adapters(
            [MergeInput(good, 1.0, "good"), MergeInput(bad, 1.0, "bad")], merge_recipe(method), target
        )
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA's magnitudes cannot be merged"),
        ({"lora_bias": True}, "biases of LoRA's own"),
        ({"bias": "lora_only"}, "bias is 'lora_only': biases cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"target_parameters": ["x"]}, "target_parameters is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "relative to an edited base"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA adapters can be merged"),
        ({"peft_type": None}, "peft_type is 'None'"),
        ({"use_something_new": True}, "use_something_new"),
        ({"r": 5}, "rank 2, .* its config .* says 5"),
        ({"target_modules": ["q_proj"]}, "does not select .*v_proj"),
    ],
)
def test_a_part_that_is_more_than_lora_is_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    message = refusal(toy(tmp_path / "bad", **fields), tmp_path)
    assert message.startswith("its part 'bad': ")
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{Q}.lora_magnitude_vector", (8,)),
        (f"{Q}.lora_B.bias", (8,)),
        (f"{PREFIX}lm_head.weight", (8, 8)),
        ("nonsense", (1,)),
    ],
)
def test_a_tensor_that_is_neither_a_nor_b_is_named(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = toy_tensors() | {key: np.ones(shape, np.float32)}
    assert f"1 of its 5 tensors are not A or B of LoRA and cannot be merged: {key}" in refusal(
        toy(tmp_path / "bad", tensors), tmp_path
    )


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors[f"{Q}.lora_A.weight"][0, 0] = np.nan
    bad = toy(tmp_path / "nan", tensors)
    assert f"{Q}.lora_A.weight holds NaN" in refusal(bad, tmp_path)


def test_a_without_b_is_named(tmp_path: Path) -> None:
    tensors = toy_tensors()
    del tensors[f"{Q}.lora_B.weight"]
    assert f"{Q}.lora_A.weight has no lora_B" in refusal(toy(tmp_path / "bad", tensors), tmp_path)


def test_unequal_ranks_are_refused_where_a_and_b_are_merged_apart(tmp_path: Path) -> None:
    bad = toy(tmp_path / "bad", toy_tensors(rank=3), r=3)
    message = refusal(bad, tmp_path)
    assert "q_proj has rank 2 in its part 'good' and 3 in 'bad'" in message
    assert "cat" in message


def test_parts_of_other_shapes_are_refused(tmp_path: Path) -> None:
    tensors = toy_tensors() | {f"{Q}.lora_A.weight": np.ones((2, 16), np.float32)}
    message = refusal(toy(tmp_path / "bad", tensors), tmp_path, "cat")
    assert "[8, 8] in its part 'good' and [8, 16] in 'bad'" in message


def test_copies_of_the_base_go_along_if_they_are_the_same(tmp_path: Path) -> None:
    key = f"{PREFIX}lm_head.base_layer.weight"
    copied = np.arange(6, dtype=np.float32).reshape(2, 3)
    one = toy(tmp_path / "one", toy_tensors() | {key: copied})
    two = toy(tmp_path / "two", toy_tensors(seed=1) | {key: copied})
    ours = merged_tensors([one, two], (1, 1), merge_recipe("linear"), tmp_path / "ours")
    np.testing.assert_array_equal(ours[key], copied)
    other = toy(tmp_path / "other", toy_tensors() | {key: copied + 1})
    (tmp_path / "none").mkdir()
    with pytest.raises(AdapterRejected, match=r"lm_head\.base_layer\.weight differs between its parts"):
        merge_adapters([MergeInput(one, 1), MergeInput(other, 1)], merge_recipe("linear"), tmp_path / "none")


def test_half_precision_parts_are_merged_in_float32(tmp_path: Path) -> None:
    halves = {key: value.astype(np.float16) for key, value in toy_tensors().items()}
    part = write_adapter(tmp_path / "part", {"adapter_config.json": config_bytes()})
    save_file(halves, part / "adapter_model.safetensors")
    ours = merged_tensors([part], [0.25], merge_recipe("linear"), tmp_path / "ours")
    key = f"{Q}.lora_A.weight"
    assert ours[key].dtype == np.float32
    np.testing.assert_allclose(ours[key], np.sqrt(0.5) * halves[key].astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight: float, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="it must be finite"):
        merge_adapters([MergeInput(write_adapter(tmp_path / "a"), weight)], MergeRecipe(), tmp_path)


def test_nothing_to_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="nothing to merge"):
        merge_adapters([], MergeRecipe(), tmp_path)


def test_a_part_that_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="its values are infinite"):
        merge_adapters([MergeInput(write_adapter(tmp_path / "a"), 1e308)], MergeRecipe(), tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("average", {}, "no merge method 'average'"),
        ("ties", {}, "density is missing"),
        ("dare_linear", {"density": 0.0}, "density is 0.0"),
        ("magnitude_prune", {"density": 1.5}, "density is 1.5"),
        ("ties", {"density": float("nan")}, "density is nan"),
        ("linear", {"density": 0.5}, "leave density out"),
        ("cat", {"rank": 4}, "leave rank out"),
        ("svd", {"rank": -1}, "rank is -1"),
        ("ties", {"density": 0.5, "majority_sign_method": "loudest"}, "take total or frequency"),
    ],
)
def test_recipes_are_checked(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterRejected, match=said):
        merge_recipe(method, **options)


def test_the_files_are_those_of_the_digest(tmp_path: Path) -> None:
    part = write_adapter(tmp_path / "a", toy_files())
    (tmp_path / "b").mkdir()
    with pytest.raises(AdapterRejected, match="its part 'a': its files have changed"):
        merge_adapters([MergeInput(part, 1.0, "a", "0" * 64)], MergeRecipe(), tmp_path / "b")


def merge_of(*parts: tuple[str, float], method: str = "linear", **options: Any) -> MergeRequest:
    return MergeRequest(tuple(MergePart(*part) for part in parts), merge_recipe(method, **options))


async def download(store: AdapterStore, request: AdapterRequest) -> AdapterManifest:
    return await store.download(request, lambda done, total: None)


@in_the_modules_loop
async def test_a_store_merges_what_it_has(worker: AdapterWorker, hub_home: Path, tmp_path: Path) -> None:
    store = AdapterStore(worker, HostCache(1_000_000))
    directories = [write_adapter(tmp_path / f"{seed}", toy_files(seed)) for seed in (1, 2)]
    one, two = [await download(store, AdapterRequest(Source.LOCAL, str(path))) for path in directories]
    progress: list[tuple[int, int]] = []
    merge = merge_of((one.digest, 0.5), (two.digest, -2.0), method="cat")
    request = AdapterRequest(Source.MERGED, "mix", merge=merge)
    mixed = await store.download(request, lambda *step: progress.append(step))
    assert (mixed.modules, mixed.max_rank, mixed.revision) == (2, 4, "")
    assert progress[-1][0] == progress[-1][1] > 0
    expected = tmp_path / "expected"
    merged_tensors(directories, (0.5, -2.0), merge.recipe, expected)
    files = [(expected / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    assert mixed.digest == adapter_digest(files[0], memoryview(files[1]))
    assert (await store.host_weights(mixed.digest)).modules == 2
    kept = list((hub_home / "loraplex" / "merged").iterdir())
    assert [path.name for path in kept] == [merge.key()]
    (kept[0] / "adapter_model.safetensors").write_bytes(b"damaged")
    assert await download(store, request) == mixed, "made anew"


@in_the_modules_loop
async def test_a_merge_of_merges(worker: AdapterWorker, tmp_path: Path) -> None:
    store = AdapterStore(worker, HostCache(0))
    part = await download(store, AdapterRequest(Source.LOCAL, str(write_adapter(tmp_path / "a"))))
    half = AdapterRequest(Source.MERGED, "half", merge=merge_of((part.digest, 0.5)))
    inner = await download(store, half)
    outer = AdapterRequest(Source.MERGED, "whole", merge=merge_of((inner.digest, 1.0), (part.digest, 0.5)))
    assert (await download(store, outer)).modules == 2


@in_the_modules_loop
async def test_a_part_that_is_not_on_this_host_is_named(worker: AdapterWorker) -> None:
    store = AdapterStore(worker, HostCache(0))
    request = AdapterRequest(Source.MERGED, "mix", merge=merge_of(("f" * 64, 1.0)))
    with pytest.raises(AdapterNotFound, match=f"adapter 'mix' is made of others: .*'{'f' * 64}' was"):
        await download(store, request)


@in_the_modules_loop
async def test_what_cannot_be_merged_is_named_with_its_part(worker: AdapterWorker, tmp_path: Path) -> None:
    store = AdapterStore(worker, HostCache(0))
    part = await download(store, AdapterRequest(Source.LOCAL, str(write_adapter(tmp_path / "a"))))
    write_adapter(tmp_path / "a", toy_files(seed=1))
    request = AdapterRequest(Source.MERGED, "mix", merge=merge_of((part.digest, 1.0)))
    with pytest.raises(
        AdapterRejected, match=f"adapter 'mix': its part '{tmp_path}/a': its files have changed"
    ):
        await download(store, request)


def test_other_merges_have_other_keys() -> None:
    one = merge_of(("a" * 64, 1.0), ("b" * 64, 1.0))
    others = [
        merge_of(("b" * 64, 1.0), ("a" * 64, 1.0)),
        merge_of(("a" * 64, 1.0), ("b" * 64, 1.5)),
        merge_of(("a" * 64, 1.0), ("b" * 64, 1.0), method="cat"),
        merge_of(("a" * 64, 1.0), ("b" * 64, 1.0), method="svd", rank=4),
        merge_of(("a" * 64, 1.0), ("b" * 64, 1.0), method="dare_linear", density=0.5, seed=1),
        merge_of(("a" * 64, 1.0), ("b" * 64, 1.0), method="dare_linear", density=0.5, seed=2),
    ]
    assert len({one.key(), *(other.key() for other in others)}) == 7
    assert one.key() == merge_of(("a" * 64, 1.0), ("b" * 64, 1.0)).key()
