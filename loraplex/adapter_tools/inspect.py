"""`loraplex adapters inspect`: what is in an adapter, without its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..shard.adapters.digest import adapter_digest
from ..shard.adapters.files import CONFIG, FileLimits, find_weights, read_regular
from ..shard.adapters.parse import decode_config
from ..shard.adapters.tensors import Tensors
from .errors import reported
from .modules import Group, Module, grouped, modules_of
from .oddities import oddities
from .scales import MlxScales, Scales
from .sources import bring
from .text import facts, printable, size, table

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter's files as they were read."""

    config: Mapping[str, Any]
    weights: Path
    nbytes: int
    """Of the weights file."""
    tensors: Tensors
    digest: str

    @property
    def peft_type(self) -> str:
        if self.config.get("peft_type"):
            return str(self.config["peft_type"]).upper()
        return "MLX" if self.config.keys() & {"fine_tune_type", "lora_parameters"} else "no peft_type"

    @property
    def base(self) -> str:
        return str(self.config.get("base_model_name_or_path") or self.config.get("model") or "")

    @property
    def dtypes(self) -> list[str]:
        return sorted({_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in self.tensors.values()})


def inspect(source: str) -> None:
    """Print what `source` holds. Raises ToolFailed where it cannot be read."""
    snapshot = bring(source)
    with reported(source):
        adapter = _read(snapshot.directory)
    commit = f"@{snapshot.revision}" if snapshot.revision and "@" not in source else ""
    file = f"{adapter.weights.name}, {size(adapter.nbytes)}, {len(adapter.tensors)} tensors"
    print(
        facts(
            [
                ("source", f"{source}{commit}"),
                ("type", adapter.peft_type),
                ("base", adapter.base),
                ("file", ", ".join([file, *adapter.dtypes])),
                ("digest", adapter.digest),
            ]
        )
    )
    _print_modules(adapter)


def _read(directory: Path) -> _Adapter:
    path = find_weights(directory)
    config = bytes(read_regular(directory / CONFIG, FileLimits().config))
    weights = read_regular(path, FileLimits().weights)
    digest = adapter_digest(config, weights)
    return _Adapter(decode_config(config), path, len(weights), Tensors(weights), digest)


def _print_modules(adapter: _Adapter) -> None:
    """The table of modules, and below it what is unusual."""
    config, kind = adapter.config, adapter.peft_type
    scales = MlxScales(config) if kind == "MLX" else Scales(config, kind)
    modules = modules_of(adapter.tensors)
    if config.get("target_parameters"):
        modules = tuple(_per_expert(module, scales.rank_of(module.name)) for module in modules)
    groups = grouped((module, scales.scale_of(module.name) if module.rank else None) for module in modules)
    if groups:
        print(f"\n{_groups_table(groups)}")
    notes = oddities(config, modules, adapter.weights.parent, scales.rank_of)
    if notes:
        print("\nunusual:")
        print("\n".join(f"- {printable(note)}" for note in notes))


def _per_expert(module: Module, rank: int | None) -> Module:
    """The rank of each expert, where A holds all of them one below the other."""
    if rank and module.rank > rank and module.rank % rank == 0:
        return replace(module, rank=rank)
    return module


def _groups_table(groups: Sequence[Group]) -> str:
    rows = [
        (
            group.name,
            group.layer_ranges,
            ", ".join(group.parts),
            str(group.rank or ""),
            "" if group.scale is None else f"{group.scale:g}",
            size(group.nbytes),
        )
        for group in groups
    ]
    return table(("module", "layers", "holds", "rank", "scale", "bytes"), rows)
