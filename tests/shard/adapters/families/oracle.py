"""Adapters made by PEFT, and what a model becomes under the changes that are read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.changes import (
    Change,
    EmbeddingChange,
    LinearChange,
    ModuleChange,
    ParsedAdapter,
)
from loraplex.shard.adapters.files import find_weights
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.adapters.parse import parse_adapter

from ..layouts import base_of, layout_of

TOKENS = torch.tensor([[3, 141, 59, 265, 35, 89, 79, 32], [38, 46, 264, 33, 83, 27, 95, 2]])


@cache
def _base(directory: Path) -> tuple[AdapterLayout, BaseTensors]:
    """What a reader is told of a model, and its weights."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    return layout_of(model), base_of(model)


@dataclass(frozen=True)
class Directory:
    """An adapter on disk, for the model at `base`."""

    base: Path
    path: Path

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "adapter_config.json").read_text())
        return config

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(find_weights(self.path))

    def rewrite(self, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Directory:
        """Write other tensors, and other fields into the config."""
        (self.path / "adapter_config.json").write_text(json.dumps(self.config | config))
        if tensors is not None:
            save_file(tensors, find_weights(self.path))
        return self

    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base)

    def parse(self, *, max_rank: int = 64) -> ParsedAdapter:
        layout, base = _base(self.base)
        config = (self.path / "adapter_config.json").read_bytes()
        weights = memoryview(find_weights(self.path).read_bytes())
        return parse_adapter(config, weights, replace(layout, max_rank=max_rank), base)

    def peft_logits(self) -> torch.Tensor:
        """PEFT's answer, from the files."""
        return logits(PeftModel.from_pretrained(self.model(), self.path))

    def our_logits(self, *, max_rank: int = 64) -> torch.Tensor:
        """The base's answer with our changes applied to its weights."""
        return logits(self.applied_to(self.model(), max_rank=max_rank))

    @torch.no_grad()
    def applied_to(self, model: PreTrainedModel, *, max_rank: int = 64) -> PreTrainedModel:
        """The model, with its weights what the adapter's changes make of them."""
        for placed in self.parse(max_rank=max_rank).placed:
            _apply(model.get_submodule(placed.target.name), placed.build())
        return model


Draw = Callable[[torch.nn.Parameter, torch.Generator], torch.Tensor]


def draw_small(parameter: torch.nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Values that change a tiny model's answers clearly, without drowning them."""
    return torch.randn(parameter.shape, generator=generator) * 0.4


def draw_near_one(parameter: torch.nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    return 1 + torch.randn(parameter.shape, generator=generator) * 0.2


def make(base: Path, path: Path, config: PeftConfig, *, draw: Draw = draw_small, seed: int = 1) -> Directory:
    """An adapter with random values for all that it trains."""
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(wrapped.named_parameters()):
        if parameter.requires_grad:
            parameter.data = draw(parameter, generator)
    wrapped.save_pretrained(path)
    return Directory(base, path)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    output: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return output


def _apply(module: torch.nn.Module, change: Change) -> None:
    match change:
        case LinearChange():
            _apply_linear(module, change)
        case ModuleChange():
            for name, value in change.parameters.items():
                module.get_parameter(name).copy_(torch.tensor(value))
        case EmbeddingChange():
            assert change.a is not None
            assert change.b is not None
            module.weight += torch.tensor(change.a @ change.b.T)
        case _:
            raise AssertionError("changes to experts are compared one by one")


def _apply_linear(module: torch.nn.Module, change: LinearChange) -> None:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    if change.input_scale is not None:
        weight *= torch.tensor(change.input_scale)
    if change.scale is not None:
        weight *= torch.tensor(change.scale)[:, None]
        if module.bias is not None:
            module.bias *= torch.tensor(change.scale)
    if change.shift is not None:
        module.bias += torch.tensor(change.shift)
    if change.a is not None:
        assert change.b is not None
        weight += torch.tensor(change.b @ change.a)
