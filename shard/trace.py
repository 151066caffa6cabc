"""One observed forward pass: which modules a model calls, with which inputs, and what attention stores."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .attention import NAME, Options, register
from .errors import ModelRefused
from .kv import LayerShape

TOKENS = 11
"""No usual number of heads: the axis of this size is the axis of tokens."""
LOGITS = 2


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A module with parameters of its own, called once, with a tensor as its first argument."""

    name: str
    input_id: int
    """Equal for modules that were given the very same tensor."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    """Empty where the output is no tensor."""
    is_plain: bool
    """That tensor was the only argument."""

    @property
    def input_rows(self) -> int:
        """Vectors in the input."""
        return math.prod(self.input_shape[:-1])


@dataclass(slots=True)
class Trace:
    """What `trace` saw."""

    calls: list[ModuleCall] = field(default_factory=list)
    """In the order in which they ended."""
    layers: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    """Sliding window of each attention layer, as passed to the attention function."""


class _Observer:
    """Hooks that fill a Trace. Inputs are kept alive so that their identities stay distinct."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._inputs: list[torch.Tensor] = []
        self._counts: Counter[str] = Counter()

    def hook(self, name: str) -> Any:
        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self._counts[name] += 1
            if not args or not isinstance(args[0], torch.Tensor):
                return
            x = args[0]
            self._inputs.append(x)
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
            is_plain = len(args) == 1 and not kwargs
            self.trace.calls.append(ModuleCall(name, id(x), tuple(x.shape), shape, is_plain))

        return after_forward

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
        """Drop modules that ran more than once: their rows are not the batch's rows."""
        self.trace.calls = [call for call in self.trace.calls if self._counts[call.name] == 1]
        if not self.trace.layers:
            raise ModelRefused("this model's attention does not go through transformers' AttentionInterface")
        return self.trace


@torch.inference_mode()
def trace(model: nn.Module) -> Trace:
    """Run `model` once on TOKENS tokens, LOGITS of them with logits, and report what it called.

    Leaves the model with its attention set to NAME; `specialise` or the caller sets it from there.
    """
    observer = _Observer()
    hooks = [
        module.register_forward_hook(observer.hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
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
