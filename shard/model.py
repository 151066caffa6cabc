"""A transformers causal LM, loaded once and specialised for flat batches, paged KV and adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..kernels.ops import LoraOps, Placed
from .adapters.base_tensors import ReadTensor
from .adapters.layout import AdapterLayout
from .adapters.pool import Site
from .attention import NAME, PagedAttention, register
from .batch import Batch
from .embedding import add_embedding_site
from .experts import add_expert_sites
from .head import HeadSite
from .linear_sites import add_linear_sites
from .parallel.split import WHOLE, Split
from .routers import add_router_sites
from .saved_modules import add_module_sites
from .sites import ModelSites, RoutingCell, SiteBuilder, SiteContext
from .trace import Trace

SITE_BUILDERS: tuple[SiteBuilder, ...] = (
    add_linear_sites,
    add_embedding_site,
    add_module_sites,
    add_expert_sites,
    add_router_sites,
)
"""Every kind of place that adapters change."""


class StepModel(Protocol):
    """What the engine runs a step on."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [L, vocab] of the batch's logit rows; writes the batch's keys and values to the cache.

        `vocab` is the largest of these rows' vocabularies; beyond its own, a row's logits are minus infinity.
        """
        ...


Forward = Callable[[Batch], torch.Tensor]
"""From a batch on the device, which attention and sites have begun, to its logits [L, vocab]."""


class CausalModel:
    """The base with sites in the places that adapters change, and its attention replaced by the paged one.

    Owns the model; the pool changes what its sites hold between steps.
    """

    def __init__(
        self, model: nn.Module, attention: PagedAttention, context: SiteContext, head: HeadSite | None
    ) -> None:
        """`head`: the site of the model's output head, where it has one."""
        self._model = model
        self._attention = attention
        self._context = context
        self._head = head
        self._device = next(model.parameters()).device
        self._run: Forward = self._run_generic

    def use(self, run: Forward) -> Forward:
        """Run steps by `run` from now on, at first by transformers' forward; answers what ran them."""
        before, self._run = self._run, run
        return before

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        self._context.tokens.begin(batch.token_routing)
        self._context.logits.begin(batch.logit_routing)
        logits = self._forward(batch.to(self._device))
        # Only now: some models cap their logits softly, which would turn minus infinity into a number.
        return logits if self._head is None else self._head.mask(logits, batch.logit_routing)

    @torch.inference_mode()
    def forward_placed(self, batch: Batch, placed: Placed | None) -> torch.Tensor:
        """As `forward`, of decode rows alone whose batch is on the device and whose adapters are placed: with
        no work on the host that differs from step to step."""
        for cell in (self._context.tokens, self._context.logits):
            cell.begin_placed(placed)
        return self._forward(batch)

    def _forward(self, batch: Batch) -> torch.Tensor:
        self._attention.begin(batch)
        return self._run(batch)

    def _run_generic(self, batch: Batch) -> torch.Tensor:
        output = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.logit_rows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits


@dataclass(frozen=True, slots=True)
class Specialised:
    """The result of `specialise`: a model that runs steps, and what adapters may change in it."""

    model: CausalModel
    layout: AdapterLayout
    sites: Sequence[Site]
    """In the order of the layout's numbers, all empty."""
    parameters: Mapping[str, ReadTensor]
    """The base's weights in these places by path, as `BaseWeights.read` describes them."""
    held: Mapping[str, ReadTensor]
    """Of linears' and the embedding's weights, what this rank holds."""


def specialise(
    model: nn.Module,
    trace: Trace,
    *,
    attention: PagedAttention,
    ops: LoraOps,
    max_rank: int,
    split: Split = WHOLE,
    read_whole: Callable[[str], torch.Tensor] | None = None,
) -> Specialised:
    """Put a site into every place that adapters can change, and the paged attention into its place.

    `split` and `read_whole` as of a SiteContext. Changes `model` in place.
    """
    context = SiteContext(ops, RoutingCell(ops), RoutingCell(ops), split, read_whole)
    found = ModelSites()
    for build in SITE_BUILDERS:
        build(model, trace, context, found)
    register(attention.forward)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    layout = AdapterLayout(
        linears=tuple(found.linears),
        aliases=tuple(found.aliases),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        max_rank=max_rank,
        embeddings=tuple(found.embeddings),
        modules=tuple(found.modules),
        experts=tuple(found.experts),
        other_modules=_other_modules(model, found.names),
    )
    head = next((site for site in found.sites if isinstance(site, HeadSite)), None)
    causal = CausalModel(model, attention, context, head)
    return Specialised(causal, layout, found.sites, found.parameters, found.held)


def _other_modules(model: nn.Module, served: set[str]) -> tuple[str, ...]:
    """Modules that hold weights of their own and that no adapter can change."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name not in served and next(module.parameters(recurse=False), None) is not None
    )
