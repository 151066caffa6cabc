"""Making adapters: by PEFT, by PEFT and then altered, by hand; each with the model that computes it."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file, save_file
from torch import nn

from .bases import Base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROMPT = (5, 71, 204, 33, 71, 9, 150, 12, 88, 240, 3, 17, 64, 129)

Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Reference:
    """A model that says what a row must compute. Built when it is first asked."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = cache(build)

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """Of prompt and output together, fp32 [len(prompt) + len(output), vocabulary]."""
        with quiet():
            model = self._build().eval()
            ids = torch.tensor([[*prompt, *output]])
            extra = _activation(model, ids[:, : len(prompt)], len(output))
            return model(input_ids=ids, **extra).logits[0].float()


def _activation(model: nn.Module, prompt: torch.Tensor, output_length: int) -> dict[str, Any]:
    """An activated LoRA counts from the end of the sequence; only the prompt can invoke it."""
    configs = getattr(model, "peft_config", {})
    invoked = [name for name, config in configs.items() if getattr(config, "alora_invocation_tokens", None)]
    if not invoked:
        return {}
    [offset] = calculate_alora_offsets(configs, invoked[0], prompt)
    return {"alora_offsets": [None if offset is None else offset + output_length]}


@dataclass(frozen=True)
class Made:
    """One row of a batch: the adapters it names, and what PEFT says about it."""

    adapters: tuple[tuple[Path, float], ...]
    """(directory, weight)."""
    reference: Reference
    prompt: tuple[int, ...] = PROMPT

    @property
    def directory(self) -> Path:
        return self.adapters[0][0]


@dataclass(frozen=True)
class Bench:
    """Where one adapter is made: for a base, in a directory that is not there yet."""

    base: Base
    directory: Path
    bases: Callable[[str], Base]
    """Every base by name, for what is made on another."""
    seed: int = 0

    def part(self, name: str) -> Bench:
        """A bench for one of several adapters that make up a row."""
        return replace(self, directory=self.directory / name, seed=self.seed + 1 + sum(name.encode()))

    def reload(self) -> nn.Module:
        """PEFT's model of what lies in the directory, on a fresh base."""
        return PeftModel.from_pretrained(self.base.fresh(), self.directory)


Maker = Callable[[Bench], Made]


@dataclass(frozen=True)
class Saved:
    """How PEFT is to save an adapter, and on what base it is made."""

    resize: int | None = None
    """Rows of the resized embeddings."""
    randomise: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of `save_pretrained`."""


def peft(config: PeftConfig, saved: Saved | None = None) -> Maker:
    """An adapter made by PEFT with exactly this config, its values random. Its reference is that model."""
    how = saved or Saved()

    def make(bench: Bench) -> Made:
        with quiet():
            model = build(bench, config, how)
            model.save_pretrained(bench.directory, **how.arguments)
        return Made(((bench.directory, 1.0),), Reference(lambda: model))

    return make


def build(bench: Bench, config: PeftConfig, how: Saved) -> PeftModel:
    """The PEFT model of a config on a fresh base."""
    base = bench.base.fresh()
    torch.manual_seed(bench.seed)
    if how.resize is not None:
        base.resize_token_embeddings(how.resize, mean_resizing=False)  # type: ignore[operator]
    model = get_peft_model(base, copy.deepcopy(config))
    if how.randomise:
        randomise(model, bench.seed)
    return model


def lora(saved: Saved | None = None, **fields: Any) -> Maker:
    """A LORA adapter of rank 4 and alpha 8 on all linears, unless `fields` say otherwise."""
    return peft(lora_config(**fields), saved)


def lora_config(**fields: Any) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with quiet():
        return LoraConfig(**(defaults | fields))


def randomise(model: nn.Module, seed: int) -> None:
    """Give every trainable parameter values that show: nothing is zero, one or the base's any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.copy_(_random_values(name, parameter.data, generator))


def _random_values(name: str, old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(old.shape, generator=generator).to(old.dtype)
    if "magnitude" in name:
        return old * (1 + 0.2 * noise)
    if "lora_embedding_" in name or ("lora_" in name and old.dim() >= 2):
        return noise * (0.5 / old.shape[-1] ** 0.5)
    if "lora_E" in name or "lora_diag" in name:
        return noise
    if old.dim() >= 2 and any(part in name for part in ("hada_", "lokr_", "miss_")):
        return noise * 0.3
    return old + 0.2 * noise


def reconfigured(maker: Maker, **changes: Any) -> Maker:
    """`maker`, then its adapter_config.json changed (... drops a field). Its reference is PEFT's reload."""

    def make(bench: Bench) -> Made:
        made = maker(bench)
        change_config(bench.directory, **changes)
        return replace(made, reference=Reference(bench.reload))

    return make


def relabelled(maker: Maker, **changes: Any) -> Maker:
    """`maker`, then its adapter_config.json changed to say the same: the reference stays."""

    def make(bench: Bench) -> Made:
        made = maker(bench)
        change_config(bench.directory, **changes)
        return made

    return make


def altered(maker: Maker, alter: Callable[[Tensors], Tensors], *, reload: bool = False) -> Maker:
    """`maker`, then its tensors altered. The reference stays, or is PEFT's reload."""

    def make(bench: Bench) -> Made:
        made = maker(bench)
        save_file(_separate(alter(load_file(bench.directory / WEIGHTS))), bench.directory / WEIGHTS)
        return replace(made, reference=Reference(bench.reload)) if reload else made

    return make


def rekeyed(maker: Maker, rename: Callable[[str], str]) -> Maker:
    """`maker`, then its tensors renamed; they mean what they meant."""
    return altered(maker, lambda tensors: {rename(key): value for key, value in tensors.items()})


def change_config(directory: Path, **changes: Any) -> None:
    """Rewrite fields of adapter_config.json in the order given; ... drops one."""
    config = json.loads((directory / CONFIG).read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (directory / CONFIG).write_text(json.dumps(kept))


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """An adapter by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config))
    save_file(_separate(tensors), directory / WEIGHTS)


def _separate(tensors: Tensors) -> Tensors:
    """Each tensor in memory of its own, as safetensors wants it."""
    return {key: value.clone().contiguous() for key, value in tensors.items()}
