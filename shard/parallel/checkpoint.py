"""Reads a rank's slices of a checkpoint, and nothing else of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..adapters.share import Axis
from ..errors import ModelRefused
from .split import HeldParameter, Narrowed


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a checkpoint."""

    key: str
    file: Path
    shape: tuple[int, ...]
    pattern: str | None
    """Of the conversion that makes it a part of a parameter; None where it is one itself."""


class Checkpoint:
    """The safetensors files of one model, by the parameters that transformers makes of them."""

    def __init__(self, directory: Path, whole: Any) -> None:
        """`whole`: the model, without storage."""
        self._whole = whole
        conversions = get_model_conversion_mapping(whole)
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._sources: dict[str, list[Source]] = {}
        self.bytes_read = 0
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        known = whole.state_dict()
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    name, pattern = rename_source_key(
                        key, renamings, self._converters, whole.base_model_prefix, known
                    )
                    shape = tuple(file.get_slice(key).get_shape())
                    self._sources.setdefault(name, []).append(Source(key, path, shape, pattern))

    def slices(self, parameters: Mapping[str, HeldParameter]) -> dict[str, torch.Tensor]:
        """Of every tensor, by its key, what this rank has. Raises ModelRefused where it cannot be divided."""
        found = {}
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, sources in self._sources.items():
                for source in sources:
                    if source.file not in files:
                        files[source.file] = stack.enter_context(safe_open(source.file, framework="pt"))
                    tensor = _read(files[source.file], source, self._axis(name, source, parameters.get(name)))
                    self.bytes_read += tensor.nbytes
                    found[source.key] = tensor
        return found

    def _axis(self, name: str, source: Source, held: HeldParameter | None) -> tuple[int, Axis] | None:
        """Along which axis of one of its tensors a parameter is divided, and how."""
        if held is None:
            return None
        # Tensors that are stacked to a parameter have one axis less.
        axis = held.axis - (self._whole.get_parameter(name).dim() - len(source.shape))
        size = source.shape[axis]
        if size == held.whole.size:
            return axis, held.whole
        if part := next((part for part in held.parts if part.size == size), None):
            return axis, part
        raise ModelRefused(f"{source.key}: its shape {list(source.shape)} cannot be divided as {name} is")

    def whole(self, name: str) -> torch.Tensor:
        """One parameter as the model would have it, whatever the checkpoint makes of it."""
        sources = self._sources[name]
        tensors: list[torch.Tensor] = []
        for source in sources:
            with safe_open(source.file, framework="pt") as file:
                tensors.append(file.get_tensor(source.key))
        if sources[0].pattern is None:
            return tensors[0]
        converter = next(each for each in self._converters if sources[0].pattern in each.source_patterns)
        converter = copy.deepcopy(converter)
        for source, tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(name, source.key, str(source.pattern), tensor)  # type: ignore[arg-type]
        made: Any = converter.convert(name, model=self._whole, config=self._whole.config)[name]
        value: torch.Tensor = made[0] if isinstance(made, list) else made
        return value


def _read(file: Any, source: Source, divided: tuple[int, Axis] | None) -> torch.Tensor:
    if divided is None:
        return file.get_tensor(source.key)  # type: ignore[no-any-return]
    axis, held = divided
    view, before = file.get_slice(source.key), (slice(None),) * axis
    pieces = [view[(*before, slice(first, last))] for first, last in held.ranges]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def read_part(directory: Path, checkpoint: Checkpoint, narrowed: Narrowed, dtype: str | torch.dtype) -> Any:
    """A rank's model with its weights, on the CPU."""
    model = type(narrowed.whole).from_pretrained(
        None,
        config=narrowed.config,
        state_dict=checkpoint.slices(narrowed.split.parameters),
        dtype=dtype,
        attn_implementation="eager",
    )
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model
