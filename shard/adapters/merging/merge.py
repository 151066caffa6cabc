"""Adapters merged into a new one on disk, as PEFT's `add_weighted_adapter` merges them in memory.

The tensors are PEFT's, with two differences. Where not all parts adapt a module, PEFT pads it with zeros to
the rank of the others; here it keeps the rank it needs, which `rank_pattern` names. And the written config
has scale 1 everywhere: PEFT copies `use_rslora` of the first part, which multiplies the result by a root.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from ...errors import AdapterRejected
from ..files import CONFIG, WEIGHTS, FileLimits
from ..floats import Float32, all_finite
from .merge_math import Pair, Term, merge_pairs
from .plain_lora import PREFIX, LoraModule, PlainLora, read_plain_lora
from .recipe import MergeRecipe
from .safetensors_writer import write_safetensors

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class MergeInput:
    """An adapter's directory and its weight in the sum."""

    directory: Path
    weight: float
    name: str = ""
    """What to call it in errors; empty: its directory."""
    digest: str = ""
    """What its files must have; empty: any."""

    def __str__(self) -> str:
        return repr(self.name or str(self.directory))


@dataclass(frozen=True, slots=True)
class _Part:
    label: str
    weight: float
    lora: PlainLora


@dataclass(frozen=True, slots=True)
class _MergedModule:
    """One module of the result, and whose tensors make it."""

    name: str
    sources: tuple[tuple[_Part, LoraModule], ...]
    rank: int

    @property
    def keys(self) -> tuple[str, str]:
        side = "lora_embedding_{}" if self.sources[0][1].is_embedding else "lora_{}.weight"
        return f"{PREFIX}{self.name}.{side.format('A')}", f"{PREFIX}{self.name}.{side.format('B')}"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, columns = self.sources[0][1].ends
        return (self.rank, columns), (rows, self.rank)


def merge_adapters(
    inputs: Sequence[MergeInput],
    recipe: MergeRecipe,
    target: Path,
    limits: FileLimits | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` of the merge into the directory `target`.

    Holds the parts' files in memory, and one module's values. `on_written`: told (bytes of this tensor, bytes
    in total) after each. As in PEFT, a single adapter is merged by `linear`, whatever the method.

    Raises AdapterRejected naming the part, and what in it cannot be merged.
    """
    if not inputs:
        raise AdapterRejected("there is nothing to merge; name at least one adapter")
    recipe = MergeRecipe() if len(inputs) == 1 else recipe
    parts = [_read(item, limits or FileLimits()) for item in inputs]
    modules = _plan(parts, recipe)
    base_copies = _base_copies(parts)
    shapes = {
        key: shape for module in modules for key, shape in zip(module.keys, module.shapes, strict=True)
    } | {key: part.lora.shape(key) for key, part in base_copies.items()}
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())

    def values() -> Iterator[Float32]:
        for tensor in _values(modules, base_copies, recipe):
            yield tensor
            on_written(tensor.nbytes, total)

    with (target / WEIGHTS).open("xb") as file:
        write_safetensors(file, shapes, values())
    (target / CONFIG).write_bytes(_config(modules, parts))


def _read(item: MergeInput, limits: FileLimits) -> _Part:
    if not np.isfinite(item.weight):
        raise AdapterRejected(f"its part {item} has weight {item.weight}; it must be finite")
    try:
        lora = read_plain_lora(item.directory, limits, item.digest)
    except AdapterRejected as error:
        raise AdapterRejected(f"its part {item}: {error}") from error
    return _Part(str(item), item.weight, lora)


def _plan(parts: Sequence[_Part], recipe: MergeRecipe) -> list[_MergedModule]:
    """Every module that a part adapts, by name. Raises AdapterRejected where parts do not fit together."""
    largest = max(module.rank for part in parts for module in part.lora.modules.values())
    modules = []
    for name in sorted({name for part in parts for name in part.lora.modules}):
        sources = tuple((part, part.lora.modules[name]) for part in parts if name in part.lora.modules)
        _check_same(sources, "is [out, in] =", lambda module: list(module.ends))
        _check_same(sources, "is an embedding:", lambda module: module.is_embedding)
        modules.append(_MergedModule(name, sources, _rank(sources, recipe, recipe.rank or largest)))
    return modules


_Sources = Sequence[tuple[_Part, LoraModule]]


def _rank(sources: _Sources, recipe: MergeRecipe, wanted: int) -> int:
    total = sum(module.rank for _, module in sources)
    match recipe.method:
        case "cat":
            return total
        case "svd":
            return min(wanted, total, *sources[0][1].ends)
        case method if method.endswith("_svd"):
            return min(wanted, *sources[0][1].ends)
    _check_same(
        sources, "has rank", lambda module: module.rank, f"; {recipe.method} needs one (cat does not)"
    )
    return sources[0][1].rank


def _check_same(
    sources: _Sources, what: str, value: Callable[[LoraModule], object], remedy: str = ""
) -> None:
    first_part, first = sources[0]
    for part, module in sources[1:]:
        if value(module) != value(first):
            raise AdapterRejected(
                f"{first.name} {what} {value(first)} in its part {first_part.label} and {value(module)} in "
                f"{part.label}{remedy}"
            )


def _base_copies(parts: Sequence[_Part]) -> dict[str, _Part]:
    """Keys of base weights that go along unchanged, and a part that has each."""
    owners: dict[str, _Part] = {}
    for part in parts:
        for key in part.lora.base_copies:
            owner = owners.setdefault(key, part)
            if owner is not part and not np.array_equal(owner.lora.read(key), part.lora.read(key)):
                raise AdapterRejected(
                    f"{key} differs between its parts {owner.label} and {part.label}: they were trained on "
                    "different bases and cannot be merged"
                )
    return dict(sorted(owners.items()))


def _values(
    modules: Sequence[_MergedModule], base_copies: Mapping[str, _Part], recipe: MergeRecipe
) -> Iterator[Float32]:
    """The tensors of the result, in the order of their keys: A and B of each module, then the copies."""
    random = np.random.Generator(np.random.PCG64(recipe.seed))
    for module in modules:
        yield from _merge_module(module, recipe, random)
    for key, part in base_copies.items():
        yield part.lora.read(key)


def _merge_module(module: _MergedModule, recipe: MergeRecipe, random: np.random.Generator) -> Pair:
    terms = [
        Term(part.lora.read(lora.a_key), part.lora.read(lora.b_key), lora.scale, part.weight)
        for part, lora in module.sources
    ]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            pair = merge_pairs(terms, recipe, module.rank, random)
    except np.linalg.LinAlgError as error:
        raise AdapterRejected(f"{module.name}: its decomposition does not converge ({error})") from error
    if not all(all_finite(tensor) for tensor in pair):
        raise AdapterRejected(f"{module.name}: merged, its values are infinite; take smaller weights")
    return pair


def _config(modules: Sequence[_MergedModule], parts: Sequence[_Part]) -> bytes:
    """A LoRA config under which every module has its rank and scale 1."""
    rank = max(module.rank for module in modules)
    patterns = _rank_pattern({module.name: module.rank for module in modules}, rank)
    first = parts[0].lora.config
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": [module.name for module in modules],
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return msgspec.json.format(msgspec.json.encode(fields), indent=2)


def _rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Patterns for the modules whose rank is not `default`: one for all of a kind where they agree."""
    by_kind: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_kind.setdefault(name.rpartition(".")[2], set()).add(rank)
    patterns = {}
    for name, rank in ranks.items():
        kind = name.rpartition(".")[2]
        if rank != default:
            patterns[re.escape(kind if len(by_kind[kind]) == 1 else name)] = rank
    return patterns
