"""A rank's model that answers for the whole one: the modules whose outputs other ranks have a part of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .split import Split
from .vocabulary import VocabularyShare


def join_outputs(model: Any, split: Split) -> None:
    """Have the modules of a rank's model sum or join what the ranks make, until something takes their places.

    Changes `model`. A bias that would be added on every rank is kept on the first one.
    """
    for name in split.partial:
        module = model.get_submodule(name)
        _divert(module, lambda own, *args, **kwargs: split.ranks.sum(own(*args, **kwargs)))
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor) and split.ranks.rank > 0:
            bias.data.zero_()
    if split.vocabulary is not None:
        vocabulary = VocabularyShare(split.vocabulary.size, split.ranks)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        _divert(
            embedding,
            lambda own, tokens: vocabulary.sum(embed(own, tokens, len(embedding.weight), vocabulary)),
        )
        _divert(head, lambda own, x: _logits(own(x), vocabulary))


def embed(
    lookup: Callable[[torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    rows: int,
    vocabulary: VocabularyShare,
) -> torch.Tensor:
    """This rank's part of the embeddings [..., hidden] of tokens [...]: zeros for those of other ranks.

    `lookup`: of the `rows` ids that this rank has.
    """
    if vocabulary.is_whole:
        return lookup(tokens.clamp(max=rows - 1))
    local = vocabulary.local(tokens)
    embeddings = lookup(local.clamp(max=rows - 1))
    return embeddings.masked_fill((local >= rows)[..., None], 0)


def own_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """What a module's class computes, without the other ranks."""
    return type(module).forward.__get__(module)  # type: ignore[no-any-return]


def _logits(own: torch.Tensor, vocabulary: VocabularyShare) -> torch.Tensor:
    joined = vocabulary.join(own.reshape(-1, own.shape[-1]), vocabulary.size)
    return joined.view(*own.shape[:-1], -1)


def _divert(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    """Have a module's calls answered by forward(its class's own, *arguments)."""
    own = own_forward(module)
    module.forward = lambda *args, **kwargs: forward(own, *args, **kwargs)
