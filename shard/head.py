"""The output head, which an adapter may give more or fewer logits than the base has."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..kernels.ops import LoraOps, Routing, RowGroup
from .adapters.weights import LinearWeights, SiteWeights
from .linear import BaseWeight, LinearSite
from .parallel.vocabulary import VocabularyShare
from .sites import RoutingCell


class HeadSite(LinearSite):
    """The linear whose outputs are the logits."""

    def __init__(
        self, weight: BaseWeight, ops: LoraOps, cell: RoutingCell, vocabulary: VocabularyShare
    ) -> None:
        super().__init__(weight, [weight.out_features], ops, cell)
        self._vocabulary = vocabulary
        self._width = vocabulary.size
        self._widths: dict[int, int] = {}
        """How many logits a slot's adapter has, where that is not the base's number."""
        self._whole: set[int] = set()
        """Slots whose adapters bring every row of the head."""

    def put(self, slot: int, weights: SiteWeights) -> None:
        """Keep one adapter's LinearWeights."""
        super().put(slot, weights)
        assert isinstance(weights, LinearWeights)
        for own in weights.rows:
            if own.height != self._width:
                self._widths[slot] = own.height
            if own.ids is None:
                self._whole.add(slot)

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known."""
        super().drop(slot)
        self._widths.pop(slot, None)
        self._whole.discard(slot)

    def mask(self, logits: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Minus infinity wherever a row's adapter, or the base for a row without one, has no such logit.

        A row can then never draw a token that is not its own, and its logprobs are those of its own
        vocabulary alone.

        Args:
            logits: [rows, at least the widest of these rows' vocabularies], as the model made them of this
                site's output; overwritten.
            routing: groups of these rows.
        """
        if not self._widths or not routing.groups:
            return logits
        widths = [self._group_width(group) for group in routing.groups]
        rows = sum(group.count for group in routing.groups)
        narrowest = min(widths) if rows == len(logits) else min(*widths, self._width)
        beyond = logits[:, narrowest:]
        if beyond.shape[1]:
            own = torch.full((len(logits), 1), self._width, device=logits.device)
            for group, width in zip(routing.groups, widths, strict=True):
                own[group.rows] = width
            ids = torch.arange(narrowest, logits.shape[1], device=logits.device)
            beyond.masked_fill_(ids >= own, -torch.inf)
        return logits

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., logits], those of every rank."""
        own = super().compute(x)
        if self._vocabulary.is_whole:
            return own
        joined = self._vocabulary.join(own.reshape(-1, own.shape[-1]), self._widest(self._cell.routing))
        return joined.view(*own.shape[:-1], joined.shape[-1])

    def _base_output(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        width = self._vocabulary.width(self._widest(routing))
        if self._whole and self._is_base_unused(len(x), routing):
            return x.new_empty(len(x), width)
        y = super()._base_output(x, routing)
        return F.pad(y, (0, width - y.shape[1])) if width > y.shape[1] else y

    def _widest(self, routing: Routing) -> int:
        """Logits that the step has room for: the most of any row, at least the base's."""
        return max(self._width, *map(self._group_width, routing.groups)) if self._widths else self._width

    def _is_base_unused(self, rows: int, routing: Routing) -> bool:
        """Whether every row has a whole head of its own, so that the base's need not be read."""
        own = (
            group.count for group in routing.groups if any(slot in self._whole for slot, _ in group.entries)
        )
        return sum(own) == rows

    def _group_width(self, group: RowGroup) -> int:
        """Logits of a group's rows: those of the one adapter among its entries that brings its own number."""
        return next((self._widths[slot] for slot, _ in group.entries if slot in self._widths), self._width)
