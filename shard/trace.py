"""One observed forward pass: which linears a model calls, with which inputs, and what attention stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention import NAME, Options, register
from .errors import ModelRefused
from .kv import LayerShape

TOKENS = 3
LOGITS = 2


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One linear, called once on all tokens (or, `on_logits`, on the tokens whose logits are wanted)."""

    name: str
    input_id: int
    """Equal for linears that were given the very same tensor."""
    on_logits: bool


@dataclass(slots=True)
class Trace:
    """What `trace` saw."""

    linears: list[LinearCall] = field(default_factory=list)
    layers: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    """Sliding window of each attention layer, as passed to the attention function."""


class _Observer:
    """Hooks that fill a Trace. Inputs are kept alive so that their identities stay distinct."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._inputs: list[torch.Tensor] = []
        self._calls: dict[str, int] = {}

    def linear_hook(self, name: str) -> Any:
        def before_forward(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            x = args[0]
            rows = x.numel() // x.shape[-1]
            if rows in (TOKENS, LOGITS):
                self._inputs.append(x)
                self.trace.linears.append(LinearCall(name, id(x), rows == LOGITS))

        return before_forward

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        options = Options.parse(query.shape[-1], kwargs)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.trace.layers[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        self.trace.windows[layer] = options.window
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def finish(self) -> Trace:
        """Drop linears that ran more than once: their rows are not the batch's rows."""
        self.trace.linears = [call for call in self.trace.linears if self._calls[call.name] == 1]
        if not self.trace.layers:
            raise ModelRefused("this model's attention does not go through transformers' AttentionInterface")
        return self.trace


@torch.inference_mode()
def trace(model: nn.Module) -> Trace:
    """Run `model` once on three tokens, two of them with logits, and report what it called.

    Leaves the model with its attention set to NAME; `specialise` or the caller sets it from there.
    """
    observer = _Observer()
    hooks = [
        module.register_forward_pre_hook(observer.linear_hook(name))
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    ]
    register(observer.attention)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    device = next(model.parameters()).device
    tokens = torch.arange(TOKENS, device=device)[None]
    try:
        model(
            input_ids=tokens,
            position_ids=tokens,
            use_cache=False,
            logits_to_keep=torch.tensor([0, TOKENS - 1]),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return observer.finish()
