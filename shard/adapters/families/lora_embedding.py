"""What a LORA adapter does to the token embedding."""

from __future__ import annotations

import numpy as np

from ..changes import EmbeddingChange, Norm, Placed
from ..floats import Float32
from ..layout import EmbeddingTarget
from .files import AdapterFiles
from .lora_config import LoraSpec
from .lora_dora import read_scale, row_squares
from .lora_keys import EMBEDDING_A, EMBEDDING_B, MAGNITUDE
from .lora_linear import check_pair, check_rank, check_variant
from .lora_modules import LoraModule, Misfit
from .lora_rows import Replacement


def place_embedding(
    target: EmbeddingTarget,
    module: LoraModule,
    replacement: Replacement | None,
    spec: LoraSpec,
    files: AdapterFiles,
) -> Placed | None:
    """The change to an embedding, None where there is none. Raises Misfit."""
    if not module.has_lora:
        if replacement is None:
            return None
        return Placed(target, 0, lambda: EmbeddingChange(rows=replacement.rows()))
    a, b = check_pair(module, EMBEDDING_A, EMBEDDING_B)
    rank = a.shape[0]
    check_rank(a, rank, rank, module.path, spec, files.layout.max_rank)
    vocabulary = target.vocab_size if replacement is None else replacement.height
    if a.shape[1] != vocabulary:
        raise Misfit(
            a.key,
            f"built for a vocabulary of {a.shape[1]}, base has {vocabulary}; an adapter for a resized one "
            "brings the embedding along (save_embedding_layers=True)",
        )
    if b.shape != (target.hidden_size, rank):
        raise Misfit(
            b.key, f"has shape {list(b.shape)}, {a.key} and the base need {[target.hidden_size, rank]}"
        )
    check_variant(module, MAGNITUDE, spec.dora, "use_dora", target.hidden_size)
    scale = np.float32(spec.scale_of(module.path))
    tensors, weight_name = files.tensors, f"{target.name}.weight"

    def build() -> EmbeddingChange:
        rows = None if replacement is None else replacement.rows()
        with np.errstate(over="ignore"):
            factors = tensors.read(a.key), tensors.read(b.key) * scale
            if not spec.dora:
                return EmbeddingChange(factors[0].T, factors[1], rows=rows)
            key = module.parts[MAGNITUDE].key
            if replacement is None and target.share is not None and target.share.outputs is not None:
                tokens = target.share.outputs.positions(vocabulary)
                squares = row_squares(files.base.read_held(weight_name).T, factors[0][:, tokens], factors[1])
                return EmbeddingChange(factors[0].T, factors[1], norm=Norm(tensors.read(key), squares))
            norm_scale = read_scale(tensors.read(key), key, weight().T, *factors)
            return EmbeddingChange(factors[0].T, norm_scale[:, None] * factors[1], norm_scale, rows)

    def weight() -> Float32:
        base = files.base.read(weight_name)
        return base if replacement is None else replacement.put_into(base)

    return Placed(target, rank, build)
