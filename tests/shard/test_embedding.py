"""The token embedding with adapters, plain and scaled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import EmbeddingLora, Routing, route
from loraplex.shard.adapters.weights import EmbeddingWeights, ReplacedRows
from loraplex.shard.embedding import EmbeddingSite, SiteEmbedding, add_embedding_site
from loraplex.shard.parallel.ranks import Alone
from loraplex.shard.parallel.vocabulary import VocabularyShare
from loraplex.shard.sites import ModelSites, RoutingCell, SiteContext
from loraplex.shard.trace import TOKENS, ModuleCall, Trace

VOCAB, HIDDEN = 12, 6
NOTHING = Routing((), ())


class Scaled(nn.Embedding):
    """As in Gemma."""

    def __init__(self) -> None:
        super().__init__(VOCAB, HIDDEN)
        self.embed_scale = 2.5

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    """Computes something else than rows times a scale."""

    def __init__(self) -> None:
        super().__init__(VOCAB, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


class Model(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


def built(embedding: nn.Embedding, routing: Routing) -> tuple[Model, ModelSites]:
    """The model with its embedding's site in place, as far as there is one."""
    model, sites = Model(embedding), ModelSites()
    call = ModuleCall("embed_tokens", 1, (1, TOKENS), (1, TOKENS, HIDDEN), True)
    cell = RoutingCell(CpuLoraOps(), routing)
    add_embedding_site(model, Trace([call]), SiteContext(CpuLoraOps(), cell, cell), sites)
    return model, sites


@pytest.mark.parametrize("kind", [Scaled, lambda: nn.Embedding(VOCAB, HIDDEN)], ids=["scaled", "plain"])
def test_rows_low_rank_and_scale_before_the_models_own_scaling(kind: type[nn.Embedding]) -> None:
    entries = [((0, 0.5),), (), ((0, 0.5),), ((1, 1.0),), ((0, 0.5),), ((2, 1.0),), ((3, 1.0),)]
    base = kind()
    model, sites = built(base, route(entries))
    (site,) = sites.sites
    a, b, scale = torch.randn(14, 2), torch.randn(2, HIDDEN), torch.rand(HIDDEN) + 1
    own = ReplacedRows(0, torch.tensor([3, 13]), torch.randn(2, HIDDEN), None, 14)
    whole = ReplacedRows(0, None, torch.randn(VOCAB + 1, HIDDEN), None, VOCAB + 1)
    site.put(0, EmbeddingWeights(EmbeddingLora(a, b, scale), own))
    site.put(1, EmbeddingWeights(None, whole))
    site.put(
        3, EmbeddingWeights(None, ReplacedRows(0, torch.tensor([2]), torch.randn(1, HIDDEN), None, VOCAB))
    )
    ids = torch.tensor([[3, 7, 13, 12, 7, 7, 7]])
    with torch.no_grad():
        got = model.embed_tokens(ids)[0]
        factor = getattr(base, "embed_scale", 1.0)
        rows = F.embedding(torch.tensor([0, 7, 0, 0, 7, 7, 7]), base.weight)
        rows[0], rows[2], rows[3] = own.weight[0], own.weight[1], whole.weight[12]
        for row in (0, 2, 4):
            rows[row] = scale * rows[row] + 0.5 * (a[ids[0, row]] @ b)
    torch.testing.assert_close(got, rows * factor)
    assert torch.equal(got[[1, 5, 6]], base(ids[0, [1, 5, 6]]))


def test_the_layout_and_the_weight_stay_visible() -> None:
    base = nn.Embedding(VOCAB, HIDDEN)
    model, sites = built(base, NOTHING)
    assert isinstance(model.embed_tokens, SiteEmbedding)
    assert model.embed_tokens.weight is base.weight
    assert [(e.name, e.site, e.vocab_size, e.hidden_size) for e in sites.embeddings] == [
        ("embed_tokens", 0, VOCAB, HIDDEN)
    ]
    assert sites.parameters["embed_tokens.weight"]() is base.weight


def test_an_embedding_that_computes_something_else_is_left_alone() -> None:
    model, sites = built(Shifted(), NOTHING)
    assert isinstance(model.embed_tokens, Shifted)
    assert (sites.sites, sites.embeddings, sites.parameters) == ([], [], {})


def test_without_adapters_the_base_alone_is_asked() -> None:
    class Asked(nn.Embedding):
        asked = 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.asked += 1
            return super().forward(ids)

    base, cell = Asked(VOCAB, HIDDEN), RoutingCell(CpuLoraOps(), route([((0, 1.0),)]))
    site = EmbeddingSite(base, None, CpuLoraOps(), cell, VocabularyShare(VOCAB, Alone()))
    ids = torch.tensor([[1]])
    assert torch.equal(site.output(ids), base(ids))
    site.put(0, EmbeddingWeights(EmbeddingLora(torch.randn(VOCAB, 1), torch.randn(1, HIDDEN)), None))
    assert not torch.equal(site.output(ids), base(ids))
    site.drop(0)
    cell.begin(NOTHING)
    assert torch.equal(site.output(ids), base(ids))
    assert base.asked == 4
