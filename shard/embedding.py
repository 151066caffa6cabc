"""The token embedding with what adapters change in it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.ops import LoraOps, Routing
from .adapters.layout import EmbeddingTarget
from .adapters.weights import EmbeddingWeights, ReplacedRows, SiteWeights
from .parallel.forward import embed, own_forward
from .parallel.vocabulary import VocabularyShare
from .sites import ModelSites, RoutingCell, SiteContext, replace_module
from .trace import TOKENS, Trace


class EmbeddingSite:
    """The lookup of input tokens: the base's row, or an adapter's own, plus low-rank deltas; then the base's
    scaling of embeddings, which applies to all of it."""

    def __init__(
        self,
        base: nn.Embedding,
        scale: torch.Tensor | None,
        ops: LoraOps,
        cell: RoutingCell,
        vocabulary: VocabularyShare,
    ) -> None:
        """`scale`: what `base` multiplies its rows by, in the weight's dtype; None: nothing."""
        self._base = base
        self._vocabulary = vocabulary
        self._scale = scale
        self._ops = ops
        self._cell = cell
        self._lora = ops.embedding_table()
        self._rows: dict[int, ReplacedRows] = {}

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's EmbeddingWeights."""
        assert isinstance(weights, EmbeddingWeights)
        if weights.lora is not None:
            self._lora[slot] = weights.lora
        if weights.rows is not None and len(weights.rows.weight):
            self._rows[slot] = weights.rows

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        self._lora.pop(slot, None)
        self._rows.pop(slot, None)

    def output(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [..., T] int64 -> [..., T, hidden]."""
        placed = self._cell.placed
        if placed is None:
            output: torch.Tensor = self._base(token_ids)
            return output
        tokens = token_ids.reshape(-1)
        weight = self._base.weight
        e = embed(lambda ids: F.embedding(ids, weight), tokens, len(weight), self._vocabulary)
        local = self._vocabulary.local(tokens)
        self._replace_rows(e, local, self._cell.routing)
        self._ops.add_embedding(e, local, placed, self._lora)
        e = self._vocabulary.sum(e)
        if self._scale is not None:
            e = e * self._scale
        return e.view(*token_ids.shape, -1)

    def _replace_rows(self, e: torch.Tensor, tokens: torch.Tensor, routing: Routing) -> None:
        """Look tokens up in their adapter's own rows, where it has any for them; in place."""
        for group in routing.groups:
            for slot, _ in group.entries:
                if (own := self._rows.get(slot)) is not None:
                    found, index = _find(tokens[group.rows], own)
                    e[group.rows] = torch.where(found[:, None], own.weight[index], e[group.rows])


def _find(tokens: torch.Tensor, own: ReplacedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens have rows of the adapter's own, and where; anywhere for the others."""
    last = len(own.weight) - 1
    if own.ids is None:
        return tokens <= last, tokens.clamp(max=last)
    index = torch.searchsorted(own.ids, tokens).clamp(max=last)
    return own.ids[index] == tokens, index


class SiteEmbedding(nn.Module):
    """Stands where the base's embedding stood."""

    def __init__(self, site: EmbeddingSite, weight: nn.Parameter) -> None:
        """`weight` stays visible: a tied head shares it."""
        super().__init__()
        self._site = site
        self.weight = weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._site.output(token_ids)


def add_embedding_site(model: nn.Module, trace: Trace, context: SiteContext, sites: ModelSites) -> None:
    """The SiteBuilder of the token embedding. Leaves an embedding alone that computes more than rows times a
    scale."""
    base = model.get_input_embeddings()  # type: ignore[operator]
    name = next(path for path, module in model.named_modules() if module is base)
    calls = [call for call in trace.calls if call.name == name]
    if not calls or not calls[0].is_plain or calls[0].input_shape != (1, TOKENS):
        return
    scale = _scale_of(base)
    if not _is_scaled_lookup(base, scale):
        return
    held, hidden_size = base.weight.shape
    vocabulary = VocabularyShare.of(context.split, held)
    site = EmbeddingSite(base, scale, context.ops, context.tokens, vocabulary)
    share = context.split.share(f"{name}.weight")
    sites.embeddings.append(EmbeddingTarget(name, sites.add(site), vocabulary.size, hidden_size, share))
    sites.keep(f"{name}.weight", base.weight, context)
    sites.held[f"{name}.weight"] = lambda: base.weight
    replace_module(model, name, SiteEmbedding(site, base.weight))


def _scale_of(base: nn.Module) -> torch.Tensor | None:
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return None
    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    return torch.as_tensor(scale, device=weight.device).to(weight.dtype)


@torch.inference_mode()
def _is_scaled_lookup(base: nn.Module, scale: torch.Tensor | None) -> bool:
    """Whether an embedding's output is its rows times `scale`, bit for bit."""
    if not isinstance(base, nn.Embedding):
        return False
    tokens = torch.arange(min(TOKENS, len(base.weight)), device=base.weight.device)
    rows = F.embedding(tokens, base.weight)
    return torch.equal(own_forward(base)(tokens), rows if scale is None else rows * scale)
