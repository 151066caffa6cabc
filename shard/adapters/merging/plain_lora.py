"""PEFT LoRA adapters that are nothing but A and B of each module: what can be merged with others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import AdapterRejected
from ..digest import adapter_digest
from ..families.lora_config import LoraSpec, parse_config
from ..files import CONFIG, FileLimits, find_weights, read_regular
from ..floats import Float32
from ..parse import decode_config
from ..safetensors_header import TensorInfo
from ..tensors import Tensors

PREFIX = "base_model.model."

_SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING_SIDE = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?")
_BASE_COPY = re.compile(r".+\.base_layer\.weight")
_KEYS_NAMED = 5

_MORE_THAN_LORA: Mapping[str, str] = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of LoRA's own",
    "modules_to_save": "whole modules in place of the base's",
    "target_parameters": "LoRA on parameters of experts",
    "trainable_token_indices": "trained rows of embeddings",
    "ensure_weight_tying": "LoRA tied between embedding and head",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "routing between adapters",
    "enable_lora": "grouped LoRA",
}
"""Fields that, when set, give an adapter what a merge of A and B would lose."""

_EDITS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values with which `init_lora_weights` begins where A and B are relative to an edited base."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A and B of one module: A [rank, in], B [out, rank], or of an embedding A [rank, vocabulary]."""

    name: str
    """Without `base_model.model.`."""
    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scale: float
    """What the product B A is multiplied with."""
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.a_shape[0]

    @property
    def ends(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b_shape[0], self.a_shape[1]


@dataclass(frozen=True, slots=True)
class PlainLora:
    """An adapter on disk, read into memory as it lies there."""

    config: Mapping[str, Any]
    modules: Mapping[str, LoraModule]
    """By name."""
    base_copies: tuple[str, ...]
    """Keys of base weights that PEFT saved beside LoRA on embeddings and heads."""
    _tensors: Tensors

    def read(self, key: str) -> Float32:
        """One tensor's values. Raises AdapterRejected unless they are finite."""
        return self._tensors.read(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape


def read_plain_lora(directory: Path, limits: FileLimits, expect_digest: str = "") -> PlainLora:
    """Read an adapter's directory.

    Raises AdapterRejected: it holds more than plain LoRA, is damaged, or has another digest than expected.
    """
    config = bytes(read_regular(directory / CONFIG, limits.config))
    weights = read_regular(find_weights(directory), limits.weights)
    if expect_digest and adapter_digest(config, weights) != expect_digest:
        raise AdapterRejected(f"its files have changed: they had digest {expect_digest}; load it anew")
    raw = decode_config(config)
    _refuse_variants(raw)
    spec = parse_config(raw)
    tensors = Tensors(weights)
    sides, base_copies = _split(tensors)
    modules = {name: _module(name, sides, spec) for name in sorted({name for name, _ in sides})}
    if not modules:
        raise AdapterRejected("its weights file holds no LoRA tensors")
    return PlainLora(raw, modules, base_copies, tensors)


def _refuse_variants(raw: Mapping[str, Any]) -> None:
    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str) or peft_type.upper() != "LORA":
        raise AdapterRejected(f"peft_type is {str(peft_type)[:40]!r}; only LORA adapters can be merged")
    for name, what in _MORE_THAN_LORA.items():
        if raw.get(name):
            raise AdapterRejected(f"{name} is set: {what} cannot be merged, only plain LoRA can")
    if raw.get("bias") not in (None, "none"):
        raise AdapterRejected(
            f"bias is {str(raw['bias'])[:40]!r}: biases cannot be merged, only plain LoRA can"
        )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_EDITS_BASE):
        raise AdapterRejected(
            f"init_lora_weights is {init[:40]!r}: it is relative to an edited base; save it converted "
            "(path_initial_model_for_weight_conversion) before it is merged"
        )


_Sides = Mapping[tuple[str, str], tuple[TensorInfo, bool]]
"""(module, "A" or "B") to its tensor and whether it is of an embedding."""


def _split(tensors: Tensors) -> tuple[_Sides, tuple[str, ...]]:
    sides: dict[tuple[str, str], tuple[TensorInfo, bool]] = {}
    base_copies, others = [], []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _SIDE.fullmatch(name) or _EMBEDDING_SIDE.fullmatch(name)
        if match is not None:
            place = (match["module"], match["side"])
            if place in sides:
                raise AdapterRejected(f"{key} and {sides[place][0].key} mean the same tensor; keep one")
            sides[place] = (tensor, match.re is _EMBEDDING_SIDE)
        elif _BASE_COPY.fullmatch(name):
            base_copies.append(key)
        else:
            others.append(key[:200])
    if others:
        more = f" and {len(others) - _KEYS_NAMED} more" if len(others) > _KEYS_NAMED else ""
        raise AdapterRejected(
            f"{len(others)} of its {len(tensors)} tensors are not A or B of LoRA and cannot be merged: "
            f"{', '.join(others[:_KEYS_NAMED])}{more}"
        )
    return sides, tuple(base_copies)


def _module(name: str, sides: _Sides, spec: LoraSpec) -> LoraModule:
    """A and B of one module, their shapes checked against each other and the config."""
    if not spec.selection.selects(name):
        raise AdapterRejected(f"its config does not select {name} (target_modules, layers, exclusions)")
    for side, other in (("A", "B"), ("B", "A")):
        if (name, side) not in sides:
            raise AdapterRejected(f"{sides[name, other][0].key} has no lora_{side} beside it; save it again")
    (a, is_embedding), (b, _) = sides[name, "A"], sides[name, "B"]
    for tensor in (a, b):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdapterRejected(f"{tensor.key} has shape {list(tensor.shape)}; a matrix is needed")
    rank = spec.rank_of(name)
    if not a.shape[0] == b.shape[1] == rank:
        raise AdapterRejected(
            f"{a.key} has rank {a.shape[0]}, {b.key} {b.shape[1]}, its config (r, rank_pattern) says {rank}"
        )
    return LoraModule(name, a.key, b.key, a.shape, b.shape, spec.scale_of(name), is_embedding)
