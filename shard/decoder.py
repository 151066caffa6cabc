"""The forward pass of the usual decoder in fused pieces, in place of transformers' many small operators.

Norm, q/k/v, rotary positions, attention, o, norm, gate/up, down: what Llama, Mistral, Qwen2, Qwen3 and Phi-3
have in common. The products go through the model's own sites, with everything that adapters change there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from ..kernels.cuda import CudaDelta
from ..kernels.decoder_ops import DecoderOps
from .attention import NAME, Options, PagedAttention, register
from .batch import Batch
from .kv import KvCache
from .linear import LinearSite, SiteLinear
from .saved_modules import ModuleSite, SiteModule
from .trace import TOKENS, Trace

NEAR = (0, 1, 5)
"""Positions at which a model's rotation is compared with ours, beside its last."""
ROTATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative L2 distance of what attention is given: a few roundings of the same projections."""


class NotFused(Exception):
    """A model is not of the common pattern. The message says where it differs."""


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm, which adapters may bring for their rows."""

    site: ModuleSite
    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each head's query and key, before their positions."""

    query: Norm
    key: Norm
    heads: int
    """Of queries."""
    weight: torch.Tensor
    """[heads + kv_heads, dim]: each head's."""
    ones: torch.Tensor
    """[dim]."""

    @property
    def is_idle(self) -> bool:
        """Whether no adapter of this step brings parameters."""
        return self.query.site.is_idle and self.key.site.is_idle

    def output(self, heads: torch.Tensor) -> torch.Tensor:
        """What the modules make of queries and keys [T, heads + kv_heads, dim]."""
        queries, keys = heads[None, :, : self.heads], heads[None, :, self.heads :]
        return torch.cat([self.query.site.output(queries)[0], self.key.site.output(keys)[0]], dim=1)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's pieces."""

    index: int
    input_norm: Norm
    qkv: LinearSite
    head_norms: HeadNorms | None
    o: LinearSite
    post_norm: Norm
    gate_up: LinearSite
    down: LinearSite
    options: Options


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's pieces."""

    embedding: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    layers: Sequence[Layer]
    norm: Norm
    head: LinearSite
    heads: int
    dim: int


class LayerStack(Protocol):
    """All layers of a decoder at once, for a backend that has such."""

    def run(
        self, residual: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor | None:
        """Run the layers on the embeddings `residual` [T, hidden], which they change; the attention has begun
        the batch.

        Args:
            rotation: cosines and sines [T, dim].

        Returns:
            What the last layer adds to the residual; None, and nothing done, where this step holds what it
            does not know.
        """
        ...


@dataclass(frozen=True, slots=True)
class FusedParts:
    """What a decoder's steps are made with."""

    kv: KvCache
    attention: PagedAttention
    ops: DecoderOps


class FusedDecoder:
    """Runs a Decoder's steps. Keeps nothing between them."""

    def __init__(self, decoder: Decoder, parts: FusedParts, stack: LayerStack | None = None) -> None:
        self._decoder = decoder
        self._stack = stack
        self._kv = parts.kv
        self._attention = parts.attention
        self._ops = parts.ops

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [L, vocab] of a batch on the device; the sites' cells and the attention have begun it."""
        decoder = self._decoder
        residual = decoder.embedding(batch.token_ids[None])[0]
        cos, sin = decoder.rotary(residual[None], batch.positions[None])
        rotation = cos[0].to(residual.dtype), sin[0].to(residual.dtype)
        added = None if self._stack is None else self._stack.run(residual, rotation, batch)
        if added is None:
            added = self._run_layers(residual, rotation, batch)
        return decoder.head.compute(self._last(residual, added, batch.logit_rows))

    def _run_layers(
        self, residual: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """One piece after another; as `LayerStack.run`."""
        added: torch.Tensor | None = None
        for layer in self._decoder.layers:
            normed = self._norm(layer.input_norm, residual, added)
            attended = self._attend(layer, layer.qkv.compute(normed), rotation, batch.kv_slots)
            normed = self._norm(layer.post_norm, residual, layer.o.compute(attended))
            added = layer.down.compute(self._gate(layer.gate_up, normed))
        assert added is not None
        return added

    def _last(self, residual: torch.Tensor, added: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[L, hidden]: the last norm, of the rows whose logits are wanted."""
        norm = self._decoder.norm
        if norm.site.is_idle:
            return self._norm(norm, residual.index_select(0, rows), added.index_select(0, rows))
        # Which rows have a norm of their own is known among all tokens only.
        return self._norm(norm, residual, added).index_select(0, rows)

    def _norm(self, norm: Norm, residual: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """residual [T, hidden] += added, in place; its norm."""
        out = torch.empty_like(residual)
        if added is None:
            self._ops.rms_norm(out, residual, norm.weight, norm.eps)
        else:
            self._ops.add_rms_norm(out, residual, added, norm.weight, norm.eps)
        return out if norm.site.is_idle else norm.site.output(residual[None])[0]

    def _attend(
        self,
        layer: Layer,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        kv_slots: torch.Tensor,
    ) -> torch.Tensor:
        """[T, heads * dim] of the fused projection [T, (heads + 2 kv_heads) * dim]."""
        if layer.head_norms is not None:
            self._norm_heads(layer.head_norms, qkv)
        q = qkv.new_empty(len(qkv), self._decoder.heads, self._decoder.dim)
        self._ops.rope_kv(q, *self._kv.layer(layer.index), qkv, rotation, kv_slots)
        return self._attention.attend(layer.index, q, layer.options).view(len(qkv), -1)

    def _norm_heads(self, norms: HeadNorms, qkv: torch.Tensor) -> None:
        """Norm the queries and keys of the fused projection, in place."""
        heads = qkv.view(len(qkv), -1, self._decoder.dim)
        normed = heads[:, : len(norms.weight)]
        if not norms.is_idle:
            normed.copy_(norms.output(normed))
            return
        # One launch over values too, which are thrown away, instead of one over queries and one over keys.
        plain = torch.empty_like(heads)
        rows = (plain.view(-1, plain.shape[-1]), heads.view(-1, plain.shape[-1]))
        self._ops.rms_norm(*rows, norms.ones, norms.query.eps)
        torch.mul(plain[:, : len(norms.weight)], norms.weight, out=normed)

    def _gate(self, site: LinearSite, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of x [T, hidden]."""
        gate_up, delta = site.begin(x)
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        if isinstance(delta, CudaDelta) and delta.is_gated:
            delta.gate_into(out, gate_up)
            return out
        if delta is not None:
            delta.add_to(gate_up)
        self._ops.silu_mul(out, gate_up)
        return out


def find_decoder(model: Any, trace: Trace) -> Decoder:
    """The pieces of a specialised model. Raises NotFused where it is not of the common pattern."""
    config, body = model.config, getattr(model, "model", None)
    _require(getattr(config, "hidden_act", None) == "silu", "its activation is not SiLU")
    _require(getattr(config, "final_logit_softcapping", None) is None, "its logits are capped")
    for name in ("embed_tokens", "rotary_emb", "layers", "norm"):
        _require(hasattr(body, name), f"it has no model.{name}")
    assert body is not None
    dim = next(iter(trace.layers.values())).key_dim
    layers = [_layer(index, layer, trace, dim) for index, layer in enumerate(body.layers)]
    head = model.get_output_embeddings()
    _require(isinstance(head, SiteLinear), "its output head is not a linear")
    decoder = Decoder(
        embedding=body.embed_tokens,
        rotary=body.rotary_emb,
        layers=layers,
        norm=_norm(body.norm),
        head=head.site,
        heads=config.num_attention_heads,
        dim=dim,
    )
    _check_rotation(model, decoder, trace)
    return decoder


@torch.inference_mode()
def _check_rotation(model: Any, decoder: Decoder, trace: Trace) -> None:
    """See that attention is given, near and far, what `rope_kv` makes of the same projections.

    Logits of a short run hardly tell a layer that turns its heads another way or not at all, and not one that
    scales its queries far from the beginning.
    """
    last = int(getattr(model.config, "max_position_embeddings", None) or 8192) - 1
    positions = torch.tensor([[*NEAR, last]], device=decoder.norm.weight.device)
    inputs, given = _attention_inputs(model, positions)
    cos, sin = decoder.rotary(inputs[0][None], positions)
    _require(cos.shape[-1] == decoder.dim, "only a part of each head is turned by its position")
    for layer, x, want in zip(decoder.layers, inputs, given, strict=True):
        qkv, kv_heads = layer.qkv.compute(x), trace.layers[layer.index].kv_heads
        turned = decoder.heads + kv_heads
        fits = want.shape[1] == turned and qkv.shape[1] == (turned + kv_heads) * decoder.dim
        _require(fits, f"layer {layer.index} has another number of heads")
        heads = qkv.view(len(x), -1, decoder.dim)[:, :turned]
        if layer.head_norms is not None:
            heads = layer.head_norms.output(heads)
        low, high = heads.chunk(2, dim=-1)
        got = heads * cos[0, :, None] + torch.cat([-high, low], dim=-1) * sin[0, :, None]
        distance = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9))
        is_equal = distance <= ROTATION_TOLERANCE[x.dtype]
        _require(is_equal, f"layer {layer.index} makes other queries and keys of its projections")


def _attention_inputs(model: Any, positions: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What each layer's projections are given [T, hidden] by the model's own forward pass, and what attention
    is: queries and keys [T, heads + kv_heads, dim]."""
    inputs: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0][0])

    def attention(
        module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        given.append(torch.cat([q, k], dim=1)[0].transpose(0, 1))
        # Each token sees itself alone, so that hidden states stay of their usual size.
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2), None

    hooks = [_qkv(layer.self_attn)[0].register_forward_pre_hook(see) for layer in model.model.layers]
    before = AttentionInterface()[NAME]  # type: ignore[no-untyped-call]
    register(attention)
    try:
        tokens = torch.arange(positions.shape[1], device=positions.device)[None]
        model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        register(before)
        for hook in hooks:
            hook.remove()
    return inputs, given


_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_MLP = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def _layer(index: int, layer: Any, trace: Trace, dim: int) -> Layer:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    _require(_weighted(layer) == _LAYER, f"layer {index} has other parts than attention, MLP and two norms")
    has_head_norms = _weighted(attention) >= _HEAD_NORMS
    projections = _weighted(attention) - (_HEAD_NORMS if has_head_norms else set())
    _require(projections in _ATTENTION, f"layer {index} has other projections than q, k, v and o")
    _require(_weighted(mlp) in _MLP, f"layer {index} has another MLP than gate, up and down")
    shape = trace.layers[index]
    _require(shape.key_dim == shape.value_dim == dim, "keys and values differ in size")
    assert attention is not None
    assert mlp is not None
    is_fused = hasattr(mlp, "gate_up_proj")
    return Layer(
        index=index,
        input_norm=_norm(layer.input_layernorm),
        qkv=_site(*_qkv(attention)),
        head_norms=_head_norms(index, attention, trace) if has_head_norms else None,
        o=_site(attention.o_proj),
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up=_site(mlp.gate_up_proj) if is_fused else _site(mlp.gate_proj, mlp.up_proj),
        down=_site(mlp.down_proj),
        options=Options(float(attention.scaling), trace.windows[index], None),
    )


def _qkv(attention: Any) -> tuple[nn.Module, ...]:
    """The linears that make queries, keys and values, in this order."""
    if hasattr(attention, "qkv_proj"):
        return (attention.qkv_proj,)
    return attention.q_proj, attention.k_proj, attention.v_proj


def _head_norms(index: int, attention: Any, trace: Trace) -> HeadNorms:
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    calls = {call.name: call for call in trace.calls}
    shapes = [calls[f"model.layers.{index}.self_attn.{name}"].input_shape for name in ("q_norm", "k_norm")]
    dims = {(len(shape), shape[1], shape[-1]) for shape in shapes}
    is_known = dims == {(4, TOKENS, len(query.weight))} and query.eps == key.eps
    _require(is_known, f"layer {index} norms queries and keys in another way than head by head")
    heads, kv_heads = shapes[0][2], shapes[1][2]
    weight = torch.cat([query.weight.expand(heads, -1), key.weight.expand(kv_heads, -1)])
    return HeadNorms(query, key, heads, weight, torch.ones_like(query.weight))


def _weighted(module: nn.Module | None) -> set[str]:
    """Names of the children that hold parameters or stand where such a one stood; "" for parameters beside
    them."""
    if module is None:
        return set()
    own = {""} if next(module.parameters(recurse=False), None) is not None else set()
    return own | {
        name
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None
        or any(isinstance(each, SiteLinear) for each in child.modules())
    }


def _norm(module: nn.Module) -> Norm:
    _require(isinstance(module, SiteModule), "a norm is not a plain vector of weights")
    assert isinstance(module, SiteModule)
    eps = getattr(module.site.module, "variance_epsilon", None)
    _require(isinstance(eps, float), "a norm is not an RMS norm")
    assert isinstance(eps, float)
    assert isinstance(module.weight, torch.Tensor)
    return Norm(module.site, module.weight.data, eps)


def _site(*linears: nn.Module) -> LinearSite:
    """The one site of linears that share an input, in their order."""
    sites, end = [], 0
    for linear in linears:
        _require(isinstance(linear, SiteLinear), "a projection is not a linear")
        assert isinstance(linear, SiteLinear)
        start = 0 if linear.columns is None else linear.columns.start
        _require(start == end, "projections that share an input lie in another order")
        end = 0 if linear.columns is None else linear.columns.stop
        sites.append(linear.site)
    _require(all(site is sites[0] for site in sites), "projections do not share their input")
    return sites[0]


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotFused(reason)
