"""A decoder's layers on a CPU in one call of the extension, in steps that hold nothing it does not know."""

from __future__ import annotations

import torch

from ..kernels.decoder_ops import Scores
from ..kernels.native_lora import NativeRouting
from ..kernels.native_stack import NativeStack, StackInput, StackLayer, StackLinear, StackNorm
from .attention_native import NativeAttention
from .batch import Batch
from .decoder import Decoder, FusedParts, Layer, Norm
from .kv import KvCache
from .linear import LinearSite
from .packed_weight import PanelWeight


class NativeLayers:
    """`LayerStack` by the extension."""

    def __init__(self, decoder: Decoder, kv: KvCache, attention: NativeAttention) -> None:
        """Raises ValueError where the decoder holds what the extension does not know."""
        self._layers = decoder.layers
        self._attention = attention
        self._norms = [norm for layer in decoder.layers for norm in (layer.input_norm, layer.post_norm)]
        self._sites = [site for layer in decoder.layers for site in _sites(layer)]
        self._stack = NativeStack([_stack_layer(layer, kv) for layer in decoder.layers], decoder.heads)

    def run(
        self, residual: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor | None:
        """See `LayerStack.run`."""
        are_idle = all(norm.site.is_idle for norm in self._norms)
        if not (are_idle and all(site.is_plain for site in self._sites)):
            return None
        placed = self._sites[0].placed
        assert placed is None or isinstance(placed, NativeRouting)
        tables, lengths = self._attention.tables, self._attention.lengths
        return self._stack.run(StackInput(residual, rotation, batch.kv_slots, tables, lengths, placed))


def native_layers(decoder: Decoder, parts: FusedParts) -> NativeLayers | None:
    """The layers by the extension, where it knows all that they hold."""
    if not isinstance(parts.attention, NativeAttention):
        return None
    if not all(_is_known(layer) for layer in decoder.layers):
        return None
    return NativeLayers(decoder, parts.kv, parts.attention)


def _is_known(layer: Layer) -> bool:
    sites = _sites(layer)
    are_whole = not any(site.is_partial for site in sites)
    are_panels = all(isinstance(site.weight, PanelWeight) for site in sites)
    return are_whole and are_panels and layer.head_norms is None


def _sites(layer: Layer) -> tuple[LinearSite, ...]:
    return (layer.qkv, layer.o, layer.gate_up, layer.down)


def _stack_layer(layer: Layer, kv: KvCache) -> StackLayer:
    keys, values = kv.layer(layer.index)
    options = layer.options
    qkv, o, gate_up, down = map(_stack_linear, _sites(layer))
    return StackLayer(
        input_norm=_stack_norm(layer.input_norm),
        qkv=qkv,
        o=o,
        post_norm=_stack_norm(layer.post_norm),
        gate_up=gate_up,
        down=down,
        keys=keys,
        values=values,
        scores=Scores(options.scale, options.window, options.softcap),
    )


def _stack_norm(norm: Norm) -> StackNorm:
    return StackNorm(norm.weight, norm.eps)


def _stack_linear(site: LinearSite) -> StackLinear:
    weight = site.weight
    assert isinstance(weight, PanelWeight)
    return StackLinear(weight.panels, weight.bias, weight.in_features, weight.out_features, site.table)
