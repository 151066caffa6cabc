"""`loraplex adapters merge --into BASE`: a whole model of a base and the adapters in its weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

from ..shard.adapters.changes import AnyTarget, ParsedAdapter
from ..shard.adapters.files import COMPANIONS, CONFIG, FileLimits, find_weights, is_regular, read_regular
from ..shard.adapters.layout import AdapterLayout
from ..shard.adapters.parse import parse_adapter
from ..shard.load import MODEL_FILES
from .base_model import EditableBase, Weighted
from .check import load_base
from .errors import REFUSED, ToolFailed, reported
from .output import new_directory
from .parts import Part, parse_part
from .sources import bring
from .text import printable

_ANY_RANK = 1 << 20
_COPIED_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_WRITTEN_ANEW = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class _Adapter:
    part: Part
    directory: Path
    parsed: ParsedAdapter


def merge_into(base: str, target: Path, texts: Sequence[str]) -> None:
    """Write `base` with the adapters that `texts` name merged into its weights to the new directory `target`.

    Raises ToolFailed where the base or an adapter cannot be had, or cannot be merged for good.
    """
    parts = [parse_part(text) for text in texts]
    directories = [bring(part.source).directory for part in parts]
    layout = load_base(base, max_rank=_ANY_RANK).layout
    checkpoint = (
        Path(base) if Path(base).is_dir() else Path(snapshot_download(base, allow_patterns=MODEL_FILES))
    )
    model = EditableBase(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", use_safetensors=True), layout
    )
    adapters = [
        _Adapter(part, directory, _parse(part, directory, layout, model))
        for part, directory in zip(parts, directories, strict=True)
    ]
    _check_together(adapters)
    with new_directory(target) as draft:
        _apply(adapters, model)
        model.finish().save_pretrained(draft)
        _copy_text_side(checkpoint, adapters, draft)
    modules = len({placed.target.name for adapter in adapters for placed in adapter.parsed.placed})
    print(printable(f"{target}: {base} with {len(adapters)} merged into {modules} of its modules"))


def _parse(part: Part, directory: Path, layout: AdapterLayout, model: EditableBase) -> ParsedAdapter:
    limits = FileLimits()
    with reported(part.source):
        config = bytes(read_regular(directory / CONFIG, limits.config))
        weights = read_regular(find_weights(directory), limits.weights)
        return parse_adapter(config, weights, layout, model)


def _check_together(adapters: Sequence[_Adapter]) -> None:
    """Raises ToolFailed where weights cannot hold what an adapter does, or what several do together."""
    owners: dict[str, str] = {}
    for adapter in adapters:
        name, traits = adapter.part.source, adapter.parsed.traits
        if traits.invocation_tokens:
            _refuse(f"adapter {name} applies from its invocation tokens on (aLoRA); weights apply always")
        if traits.alone and (len(adapters) > 1 or adapter.part.weight != 1):
            _refuse(f"adapter {name} cannot be weighted or merged with others: {traits.alone}")
        for module in traits.owns:
            owner = owners.setdefault(module, name)
            if owner != name:
                _refuse(f"adapters {owner} and {name} both replace {module}")


def _refuse(message: str) -> None:
    raise ToolFailed(REFUSED, printable(message))


def _apply(adapters: Sequence[_Adapter], model: EditableBase) -> None:
    """Change the model, one module after another."""
    targets: dict[str, AnyTarget] = {}
    builders: dict[str, list[tuple[_Adapter, Any]]] = {}
    for adapter in adapters:
        for placed in adapter.parsed.placed:
            targets[placed.target.name] = placed.target
            builders.setdefault(placed.target.name, []).append((adapter, placed.build))
    model.grow(max(adapter.parsed.traits.vocab_size for adapter in adapters))
    for name in targets:
        model.check(name)
    for name, target in targets.items():
        changes = []
        for adapter, build in builders[name]:
            with reported(adapter.part.source):
                changes.append(Weighted(build(), adapter.part.weight))
        model.apply(target, changes)


def _copy_text_side(checkpoint: Path, adapters: Sequence[_Adapter], target: Path) -> None:
    """Tokenizer, chat template and the like: the base's, or those of the adapter whose token ids are used."""
    for path in checkpoint.iterdir():
        if (
            path.suffix in _COPIED_SUFFIXES
            and path.name not in _WRITTEN_ANEW
            and not path.name.endswith(".index.json")
            and is_regular(path)
        ):
            shutil.copyfile(path, target / path.name)
    for adapter in adapters:
        if len(adapters) == 1 or adapter.parsed.traits.vocab_size:
            for name in COMPANIONS:
                if is_regular(adapter.directory / name):
                    shutil.copyfile(adapter.directory / name, target / name)
