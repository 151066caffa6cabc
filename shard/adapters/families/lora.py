"""PEFT's LORA: A and B of linears, embeddings and experts, and everything that is saved beside them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from ...errors import AdapterRejected
from ..changes import ModuleChange, ParsedAdapter, Placed, Traits
from ..layout import EmbeddingTarget, ModuleTarget, Target
from .experts import read_experts
from .files import AdapterFiles
from .lora_config import LoraSpec, parse_config
from .lora_embedding import place_embedding
from .lora_keys import BIAS, WEIGHT
from .lora_linear import place_linear
from .lora_modules import LoraModule, Misfit, SortedTensors, sort_tensors
from .lora_rows import Replacement, find_replacements
from .modules import describe_unusable
from .names import BaseNames


def read_lora(files: AdapterFiles) -> ParsedAdapter:
    """Read a LORA adapter.

    Raises AdapterRejected: a tensor that is for nothing in the base or that the config does not select,
    A without B, a shape that does not fit the base, a rank other than the config's or above the layout's
    maximum, a variant whose tensors are missing, and what is not served.
    """
    spec = parse_config(files.config)
    names = BaseNames(files.layout)
    tensors = sort_tensors(files, names, spec)
    reader = _Reader(tensors, spec, files)
    placed = [*reader.place(), *read_experts(tensors.experts, names.find, spec, files)]
    if not placed:
        raise AdapterRejected("none of its tensors changes the base; save the adapter again")
    _check_overlaps(placed)
    traits = reader.traits()
    _check_activated(spec, traits, placed)
    return ParsedAdapter(tuple(placed), traits)


class _Reader:
    """Places what is not on experts."""

    def __init__(self, tensors: SortedTensors, spec: LoraSpec, files: AdapterFiles) -> None:
        self._tensors = tensors
        self._spec = spec
        self._files = files
        self._replaced: dict[str, Replacement] = {}

    def place(self) -> list[Placed]:
        """Every change. Raises AdapterRejected naming the tensors that cannot be applied."""
        try:
            self._replaced = find_replacements(self._tensors.modules, self._spec, self._files)
        except Misfit as misfit:
            raise self._rejected({misfit.key: misfit.reason}) from misfit
        placed, unusable = [], {}
        for module in self._modules():
            try:
                change = self._place(module)
            except Misfit as misfit:
                unusable[misfit.key] = misfit.reason
                continue
            if change is not None:
                placed.append(change)
        if unusable:
            raise self._rejected(unusable)
        return placed

    def traits(self) -> Traits:
        """What the router must know. Valid once everything is placed."""
        own = [
            name for name, module in self._tensors.modules.items() if isinstance(module.target, ModuleTarget)
        ]
        return Traits(
            kind=self._spec.kind,
            alone=self._alone(),
            owns=(*self._replaced, *own),
            invocation_tokens=self._spec.invocation_tokens,
            vocab_size=self._vocab_size(),
            warnings=self._spec.warnings + self._tensors.warnings,
        )

    def _rejected(self, unusable: dict[str, str]) -> AdapterRejected:
        return AdapterRejected(describe_unusable(unusable, len(self._files.tensors)))

    def _modules(self) -> Iterator[LoraModule]:
        yield from self._tensors.modules.values()
        for target in self._files.layout.linears:
            if target.name in self._replaced and target.name not in self._tensors.modules:
                yield LoraModule(target, target.name)  # a head that follows the embedding

    def _place(self, module: LoraModule) -> Placed | None:
        target = module.target
        if isinstance(target, ModuleTarget):
            return _place_module(target, module, self._files)
        replacement = self._replaced.get(target.name)
        if isinstance(target, EmbeddingTarget):
            return place_embedding(target, module, replacement, self._spec, self._files)
        return place_linear(target, module, replacement, self._spec, self._files)

    def _alone(self) -> str:
        if self._spec.dora:
            return "DoRA"
        modules = self._tensors.modules.values()
        if any(BIAS in module.parts and WEIGHT not in module.parts for module in modules):
            return "biases of its own"
        return ""

    def _vocab_size(self) -> int:
        """Of an embedding that has grown, else 0."""
        return max(
            (
                self._replaced[target.name].height
                for target in self._files.layout.embeddings
                if target.name in self._replaced and self._replaced[target.name].height > target.vocab_size
            ),
            default=0,
        )


def _place_module(target: ModuleTarget, module: LoraModule, files: AdapterFiles) -> Placed:
    """A module that is replaced as a whole; parameters that the file lacks are the base's. Raises Misfit."""
    for name, shape in target.parameters:
        tensor = module.parts.get(name)
        if tensor is not None and tensor.shape != shape:
            raise Misfit(tensor.key, f"has shape {list(tensor.shape)}, base has {list(shape)}")

    def build() -> ModuleChange:
        return ModuleChange(
            {
                name: files.tensors.read(module.parts[name].key)
                if name in module.parts
                else files.base.read(f"{target.name}.{name}")
                for name, _ in target.parameters
            }
        )

    return Placed(target, 0, build)


def _check_overlaps(placed: list[Placed]) -> None:
    """No two changes to the same columns: a fused linear and a part of it."""
    linears = [change.target for change in placed if isinstance(change.target, Target)]
    linears.sort(key=lambda target: (target.site, target.out_offset, target.out_features))
    for one, other in pairwise(linears):
        if one.site == other.site and other.out_offset < one.out_offset + one.out_features:
            raise AdapterRejected(
                f"{one.name} and {other.name} are the same linear, fused and apart; keep one of them"
            )


def _check_activated(spec: LoraSpec, traits: Traits, placed: list[Placed]) -> None:
    """What an aLoRA changes must begin at its invocation, which PEFT has for LoRA on linears alone."""
    if spec.invocation_tokens and (
        traits.owns or traits.alone or any(not isinstance(change.target, Target) for change in placed)
    ):
        raise AdapterRejected(
            "alora_invocation_tokens is set, and it changes more than linears by LoRA; "
            "train it without modules_to_save, trainable tokens, biases and embeddings"
        )
