"""Rows of the base's weights that a LORA adapter has its own of: saved modules, new vocabularies, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import AdapterRejected
from ..changes import Int64, Rows
from ..floats import Float32, store
from ..layout import EmbeddingTarget, Target
from ..safetensors_header import TensorInfo
from ..tensors import Tensors
from .files import AdapterFiles
from .lora_config import LoraSpec
from .lora_keys import BIAS, TOKENS, WEIGHT
from .lora_modules import LoraModule, Misfit

_ROWS_AT_ONCE = 4096
"""Compared with the base's; bounds the memory that a comparison takes."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """A whole weight in the file."""

    weight: str
    """Key."""
    bias: str | None
    ids: Int64
    """Ascending: the rows that differ from the base's; every row of a head with fewer of them."""
    height: int
    is_transposed: bool

    def read(self, tensors: Tensors) -> Float32:
        values = tensors.read(self.weight)
        return values.T if self.is_transposed else values


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Trained rows in the file, in ascending order of their token ids."""

    key: str
    ids: Int64
    order: Int64
    """Where the row of each id is in the file."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """The rows of one base weight that an adapter has its own of."""

    height: int
    """Rows of the weight once they are in place: fewer than the base's only at a head."""
    ids: Int64
    """Ascending."""
    tensors: Tensors
    saved: _Saved | None
    tokens: _Tokens | None

    def rows(self) -> Rows:
        """The rows, read from the file."""
        everything = len(self.ids) == self.height
        weight, bias = self._read()
        return Rows(None if everything else self.ids, weight, bias)

    def put_into(self, base: Float32) -> Float32:
        """The whole weight [height, in] with these rows, given the base's."""
        weight = np.zeros((self.height, base.shape[1]), np.float32)
        weight[: len(base)] = base[: self.height]
        weight[self.ids] = self._read()[0]
        return weight

    def _read(self) -> tuple[Float32, Float32 | None]:
        if self.saved is None:
            assert self.tokens is not None
            return self.tensors.read(self.tokens.key)[self.tokens.order], None
        weight = self.saved.read(self.tensors)
        own_bias = None if self.saved.bias is None else self.tensors.read(self.saved.bias)
        if self.tokens is None:
            everything = len(self.ids) == len(weight)
            return (
                weight if everything else weight[self.ids],
                None if own_bias is None else own_bias[self.ids],
            )
        # Trained rows count even where they lie beyond the saved weight.
        own = self.ids < len(weight)
        rows = np.empty((len(self.ids), weight.shape[1]), np.float32)
        rows[own] = weight[self.ids[own]]
        rows[np.isin(self.ids, self.tokens.ids)] = self.tensors.read(self.tokens.key)[self.tokens.order]
        if own_bias is None:
            return rows, None
        bias = np.zeros(len(self.ids), np.float32)
        bias[own] = own_bias[self.ids[own]]
        return rows, bias


def find_replacements(
    modules: Mapping[str, LoraModule], spec: LoraSpec, files: AdapterFiles
) -> dict[str, Replacement]:
    """What is replaced in linears and embeddings, by the target's name. Reads whole weights to compare them.

    A head that shares the embedding's weight follows its trained tokens and its new size, but no copy of it
    that was trained. Raises Misfit, and AdapterRejected where sizes of vocabularies contradict each other.
    """
    finder = _Finder(modules, spec, files)
    found = {}
    layout = files.layout
    targets: tuple[Target | EmbeddingTarget, ...] = (*layout.embeddings, *layout.linears, *layout.aliases)
    for target in targets:
        if (replacement := finder.find(target)) is not None:
            found[target.name] = replacement
    _check_vocabulary(found, modules, files)
    return found


class _Finder:
    def __init__(self, modules: Mapping[str, LoraModule], spec: LoraSpec, files: AdapterFiles) -> None:
        self._modules = modules
        self._spec = spec
        self._files = files
        self._found: dict[tuple[str, str], Replacement | None] = {("", ""): None}
        """By the modules that hold the weight and the trained tokens."""

    def find(self, target: Target | EmbeddingTarget) -> Replacement | None:
        saved_in, tokens_in = self._sources(target)
        sources = (saved_in.target.name if saved_in else "", tokens_in.target.name if tokens_in else "")
        if sources not in self._found:
            self._found[sources] = self._replacement(target, saved_in, tokens_in)
        return self._found[sources]

    def _replacement(
        self, target: Target | EmbeddingTarget, saved_in: LoraModule | None, tokens_in: LoraModule | None
    ) -> Replacement | None:
        saved = self._saved(target, saved_in) if saved_in is not None else None
        tokens = self._tokens(target, tokens_in) if tokens_in is not None else None
        ids = saved.ids if saved is not None else np.empty(0, np.int64)
        if tokens is not None:
            ids = np.union1d(ids, tokens.ids)
        if not len(ids):
            return None
        height = _height(target)
        if saved is not None and _is_head(target):
            height = min(height, saved.height)
        added = ids[ids >= height]
        if tokens_in is not None and len(added) and added[-1] != height + len(added) - 1:
            raise Misfit(
                tokens_in.parts[TOKENS].key,
                f"trains token {added[-1]}, but the base has {height} and the file has no rows for those "
                "between; save the adapter with save_embedding_layers=True",
            )
        return Replacement(height + len(added), ids, self._files.tensors, saved, tokens)

    def _sources(self, target: Target | EmbeddingTarget) -> tuple[LoraModule | None, LoraModule | None]:
        """The modules that hold this target's weight and its trained tokens."""
        module = self._modules.get(target.name)
        saved = module if module is not None and WEIGHT in module.parts else None
        tokens = module if module is not None and TOKENS in module.parts else None
        if isinstance(target, Target) and (source := self._modules.get(target.tied_to)) is not None:
            if tokens is None and TOKENS in source.parts:
                tokens = source
            if saved is None and WEIGHT in source.parts and not self._spec.saves(source.path):
                saved = source
        return saved, tokens

    def _saved(self, target: Target | EmbeddingTarget, module: LoraModule) -> _Saved:
        tensor, bias = module.parts[WEIGHT], module.parts.get(BIAS)
        transposed = isinstance(target, Target) and target.fan_in_fan_out
        _check_weight(target, tensor, transposed)
        base = self._files.base
        weight = self._files.tensors.read(tensor.key)
        differs = self._differing(weight.T if transposed else weight, base.read(f"{target.name}.weight"))
        if bias is not None:
            _check_bias(target, bias, len(differs))
            own = self._files.tensors.read(bias.key)[:, None]
            differs |= self._differing(own, base.read(f"{target.name}.bias")[:, None])
        if _is_head(target) and len(differs) < _height(target):
            differs[:] = True  # what it lacks cannot be said by the rows that it has
        bias_key = None if bias is None else bias.key
        return _Saved(tensor.key, bias_key, np.flatnonzero(differs), len(differs), transposed)

    def _differing(self, own: Float32, base: Float32) -> NDArray[np.bool_]:
        """Which rows of `own` differ from the base's once they are served, bool."""
        dtype = self._files.layout.dtype
        differs = np.ones(len(own), np.bool_)
        for chunk in _chunks(min(len(own), len(base))):
            differs[chunk] = (store(own[chunk], dtype) != store(base[chunk], dtype)).any(axis=1)
        return differs

    def _tokens(self, target: Target | EmbeddingTarget, module: LoraModule) -> _Tokens:
        tensor = module.parts[TOKENS]
        indices = self._indices(module)
        width = _width(target)
        if indices is None:
            raise Misfit(
                tensor.key, "trained tokens, of which the config's trainable_token_indices names none here"
            )
        if tensor.shape != (len(indices), width):
            raise Misfit(
                tensor.key,
                f"has shape {list(tensor.shape)}; the config's trainable_token_indices and the base need "
                f"{[len(indices), width]}",
            )
        ids = np.array(indices, np.int64)
        order = np.argsort(ids)
        return _Tokens(tensor.key, ids[order], order)

    def _indices(self, module: LoraModule) -> tuple[int, ...] | None:
        for name, indices in self._spec.tokens.items():
            if name and module.path.endswith(name):
                return indices
        # A list is for the embedding, and for a head that is tied to it.
        target = module.target
        takes_list = isinstance(target, EmbeddingTarget) or (isinstance(target, Target) and target.tied_to)
        return self._spec.tokens.get("") if takes_list else None


def _chunks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, rows))


def _height(target: Target | EmbeddingTarget) -> int:
    return target.vocab_size if isinstance(target, EmbeddingTarget) else target.out_features


def _is_head(target: Target | EmbeddingTarget) -> bool:
    return isinstance(target, Target) and target.is_head


def _width(target: Target | EmbeddingTarget) -> int:
    return target.hidden_size if isinstance(target, EmbeddingTarget) else target.in_features


def _check_weight(target: Target | EmbeddingTarget, tensor: TensorInfo, transposed: bool) -> None:
    """Raises Misfit unless a whole weight is as large as the base's; a vocabulary may have another height."""
    base = (_height(target), _width(target))
    shape = tensor.shape[::-1] if transposed else tensor.shape
    resizable = isinstance(target, EmbeddingTarget) or target.is_head
    if len(shape) != 2 or shape[1] != base[1] or (shape[0] != base[0] and not resizable):
        raise Misfit(
            tensor.key,
            f"has shape {list(tensor.shape)}, the base's weight {list(base[::-1] if transposed else base)}; "
            "only a vocabulary can change size; it was made for another base",
        )


def _check_bias(target: Target | EmbeddingTarget, tensor: TensorInfo, height: int) -> None:
    if not isinstance(target, Target) or not target.has_bias:
        raise Misfit(tensor.key, "the base has no bias there: it was made for another base")
    if tensor.shape != (height,):
        raise Misfit(tensor.key, f"has shape {list(tensor.shape)}, the weight beside it has {height} rows")


def _check_vocabulary(
    found: Mapping[str, Replacement], modules: Mapping[str, LoraModule], files: AdapterFiles
) -> None:
    """A head with more or fewer rows than the base's goes with an embedding that has as many."""
    embeddings, heads = files.layout.embeddings, [t for t in files.layout.linears if t.is_head]
    saved = {
        e.name: modules[e.name].parts[WEIGHT].shape[0]
        for e in embeddings
        if e.name in modules and WEIGHT in modules[e.name].parts
    }
    known = [*saved.values(), *(found[e.name].height for e in embeddings if e.name in found)]
    heights = [found[t.name].height if t.name in found else t.out_features for t in heads]
    for target, height in zip(heads, heights, strict=True):
        if height != target.out_features and height not in known:
            raise _lonely_vocabulary(target.name, height, target.out_features, "embedding")
    for e in embeddings:
        if saved.get(e.name, e.vocab_size) < e.vocab_size and saved[e.name] not in heights:
            raise _lonely_vocabulary(e.name, saved[e.name], e.vocab_size, "head")


def _lonely_vocabulary(name: str, height: int, base: int, other: str) -> AdapterRejected:
    return AdapterRejected(
        f"{name} has {height} rows, the base's {base}, and no {other} of that size is beside it; "
        "save both, with save_embedding_layers=True"
    )
